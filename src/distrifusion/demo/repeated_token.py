"""Joint attention in which one text token stands for many equal ones.

Without T5, ``StableDiffusion3Pipeline`` ends its text with 256 tokens of zeros. SD3 gives text no positions, so they
stay equal to each other in every layer, and a softmax over n equal keys is one over a single key whose logit is larger
by log(n). Training carries one such token instead of 256, with the same result.

Legend: B samples, N picture tokens, L text tokens, C channels, S = N + L, h heads.
"""

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F


class RepeatedTokenAttention:
    """Attention processor of SD3's joint layers whose last text token counts ``repeats`` times (at least 1)."""

    def __init__(self) -> None:
        self.repeats = 1

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Picture (B, N, C) and text (B, L, C) after the layer."""
        x, c = hidden_states, encoder_hidden_states
        query = _joined(attn, x, c, (attn.to_q, attn.norm_q), (attn.add_q_proj, attn.norm_added_q))
        key = _joined(attn, x, c, (attn.to_k, attn.norm_k), (attn.add_k_proj, attn.norm_added_k))
        value = _joined(attn, x, c, (attn.to_v, None), (attn.add_v_proj, None))
        query, key = query.to(value.dtype), key.to(value.dtype)
        bias = torch.zeros(key.shape[2], dtype=value.dtype, device=value.device)
        bias[-1] = math.log(self.repeats)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(*query.shape[:3], -1))
        picture, text = mixed.transpose(1, 2).flatten(2).split((x.shape[1], c.shape[1]), dim=1)
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


_Projection = tuple[nn.Module, nn.Module | None]


def _joined(attn: Attention, x: Tensor, c: Tensor, of_picture: _Projection, of_text: _Projection) -> Tensor:
    """Heads (B, h, S, C/h) of both streams, the picture first."""
    heads = []
    for tokens, (project, norm) in ((x, of_picture), (c, of_text)):
        split = project(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        heads.append(split if norm is None else norm(split))
    return torch.cat(heads, dim=2)
