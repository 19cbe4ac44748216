"""The anatomy of diffusers' SD3Transformer2DModel (Stable Diffusion 3, 3.5 medium and large)."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel

from distrifusion.anatomy.tokens import Cut, Join, TokenAnatomy


def anatomy(model: SD3Transformer2DModel) -> TokenAnatomy:
    """Facts about a model: joint attention over text and picture, in 3.5 medium also over the picture alone."""
    dual = any(block.attn2 is not None for block in model.transformer_blocks)
    return TokenAnatomy(
        cuts=(
            Cut("pos_embed", 0, dim=1),
            Cut("context_embedder", 0, dim=1),
            Cut("", "block_controlnet_hidden_states", dim=1),
        ),
        patchwise=True,
        joins=(Join("proj_out", dim=1),),
        attentions=("transformer_blocks.*.attn", *(["transformer_blocks.*.attn2"] if dual else [])),
    )
