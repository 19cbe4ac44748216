"""The anatomy of diffusers' HunyuanDiT2DModel (Hunyuan-DiT): a transformer with skip connections."""

from __future__ import annotations

from diffusers import HunyuanDiT2DModel

from distrifusion.anatomy.tokens import Cut, Join, TokenAnatomy


def anatomy(model: HunyuanDiT2DModel) -> TokenAnatomy:
    """Facts about a model: self-attention over the picture, whose rotary tables the pipeline gives as an argument."""
    return TokenAnatomy(
        cuts=(
            Cut("pos_embed", 0, dim=1),
            Cut("", "image_rotary_emb", dim=0),
            Cut("", "controlnet_block_samples", dim=1),
        ),
        joins=(Join("proj_out", dim=1),),
        attentions=("blocks.*.attn1",),
    )
