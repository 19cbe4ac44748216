"""Attention of some queries to some keys: what a method is asked, the plain answer, and one that can be merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from distrifusion.layout.mesh import AttentionAxes
from distrifusion.layout.partition import Interval, piece_intervals, token_intervals


@dataclass(frozen=True)
class Piece:
    """One of the pieces of the tokens that flow through the network one after the other.

    Attributes:
        index: 0 to num - 1, in the order in which they flow.
        num: pieces; one is the whole.
        picture: number of tokens of the picture's stream; 0 where it is cut anywhere, as other streams are.
        width: tokens of one line of the picture, between which it is cut.
    """

    index: int = 0
    num: int = 1
    picture: int = 0
    width: int = 1

    def of(self, num_tokens: int) -> Interval:
        """Its part of a stream of so many tokens."""
        return piece_intervals(num_tokens, self.num, self.width if num_tokens == self.picture else 1)[self.index]


@dataclass(frozen=True)
class TokenStep:
    """What a layer must know of the denoiser call it is in.

    Attributes:
        team: ranks that share the tokens, in the order of their parts.
        index: this rank's place in it.
        axes: the team as a grid of ways to attend.
        alone: attention sees the own tokens only.
        piece: of all tokens, that the team shares now; None where nothing flows in pieces.
    """

    team: tuple[int, ...]
    index: int
    axes: AttentionAxes
    alone: bool = False
    piece: Piece | None = None

    @property
    def num_parts(self) -> int:
        """Parts into which a stream of tokens is cut."""
        return len(self.team) * (self.piece.num if self.piece else 1)

    def own(self, num_tokens: int) -> Interval:
        """This rank's part, in this step, of a stream of so many tokens."""
        shared = self.piece.of(num_tokens) if self.piece else Interval(0, num_tokens)
        part = token_intervals(len(shared), len(self.team))[self.index]
        return Interval(shared.start + part.start, shared.start + part.stop)


@dataclass(frozen=True)
class AttentionCall:
    """Attention of this rank's queries to everybody's keys. B batch, N heads, L tokens, D channels of a head.

    Attributes:
        name: the asking layer.
        query: own queries [B, N, L_q, D], after norms and rotary embeddings.
        key, value: own keys and values [B, N, L_k, D], likewise.
        queries, keys: numbers of queries and of keys that every place of the team has.
        bias: added to the scores of all keys, in the order of places [B or 1, N or 1, 1, L]; None adds nothing.
        scale: of the scores; None is D^(-1/2).
    """

    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    bias: torch.Tensor | None
    scale: float | None


class Attend(Protocol):
    """A method of attention over all ranks of a team. Every rank of it calls it."""

    def __call__(self, step: TokenStep, call: AttentionCall) -> torch.Tensor:
        """The result for the own queries [B, N, L_q, D]."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Attention of queries [B, N, L_q, D] to keys [B, N, L_k, D]."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def attend_with_sum(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to a part of the keys, and the logarithm of its softmax's denominator [B, N, L_q] in fp32 or fp64.

    The kernels behind `scaled_dot_product_attention` know that sum; those that do not give it are not used.
    """
    aten = torch.ops.aten
    if query.device.type in ("cpu", "meta"):
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
    if query.device.type == "cuda" and bias is None:
        facts = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
        # Heads of other widths are padded by what calls the kernel in scaled_dot_product_attention.
        if query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(facts):
            return aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
        if torch.backends.cuda.can_use_efficient_attention(facts):
            out, lse = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)[:2]
            return out, lse[..., : query.shape[2]]  # the kernel rounds the number of queries up
    return attend_plainly(query, key, value, bias, scale)


def attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attend_with_sum` gives, by its definition, holding all scores [B, N, L_q, L_k]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ value.to(wide)).to(query.dtype), lse


def merge_(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add to attention over some keys, in place, that over others (online softmax, arXiv 1805.02867).

    Args:
        out, lse: [B, N, L, D] and [B, N, L] in fp32 or fp64.
        part, part_lse: the same of the other keys; `part` in any type.
    """
    out.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, part_lse, out=lse)


def starts_of(lengths: Sequence[int]) -> list[int]:
    """Where each of some parts begins, and where the last ends."""
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]
