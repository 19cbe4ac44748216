"""The anatomy of diffusers' CogVideoXTransformer3DModel (CogVideoX 2B, 5B, 1.5)."""

from __future__ import annotations

from diffusers import CogVideoXTransformer3DModel

from distrifusion.anatomy.tokens import Cut, Join, TokenAnatomy


def anatomy(model: CogVideoXTransformer3DModel) -> TokenAnatomy:
    """Facts about a model: words and video are embedded together, and told apart before the first block."""
    return TokenAnatomy(
        cuts=(
            Cut("transformer_blocks.0", "hidden_states", dim=1),
            Cut("transformer_blocks.0", "encoder_hidden_states", dim=1),
            Cut("", "image_rotary_emb", dim=0),
        ),
        joins=(Join("proj_out", dim=1),),
        attentions=("transformer_blocks.*.attn1",),
    )
