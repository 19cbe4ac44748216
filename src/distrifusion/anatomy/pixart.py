"""The anatomy of diffusers' PixArtTransformer2DModel (PixArt-alpha, PixArt-Sigma)."""

from __future__ import annotations

from diffusers import PixArtTransformer2DModel

from distrifusion.anatomy.tokens import Cut, Join, TokenAnatomy


def anatomy(model: PixArtTransformer2DModel) -> TokenAnatomy:
    """Facts about a model: self-attention over the picture; attention to the text is each token's own."""
    return TokenAnatomy(
        cuts=(Cut("pos_embed", 0, dim=1),),
        patchwise=True,
        joins=(Join("proj_out", dim=1),),
        attentions=("transformer_blocks.*.attn1",),
        refused={"attention_mask": "over picture positions cannot be cut"},
    )
