"""A transformer cut by tokens: streams are cut and joined from outside, and attention is asked for where it is called.

The model's own forward runs on a part of the tokens. What it does to a token beside attention does not look at others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.tokens import Cut, CutSite, JoinSite, TokenAttentionSite, TokenCall
from distrifusion.errors import UnsupportedModel
from distrifusion.exchange.handles import with_length
from distrifusion.exchange.verbs import Exchange
from distrifusion.nested import map_tensors
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.attention import Attend, AttentionCall, TokenStep

Forward = Callable[..., Any]


class TooFewTokens(Exception):
    """A stream has fewer tokens than the team has ranks. All of them find out at the same cut."""


class TokenStrategy:
    """Cuts and joins the streams of tokens of a transformer, and gives its attention to a method.

    Args:
        exchange: this rank's.
        attend: the method, which answers for all tokens.
    """

    def __init__(self, exchange: Exchange, attend: Attend) -> None:
        self._exchange = exchange
        self._attend = attend
        self._step: TokenStep | None = None
        # Numbers of tokens that were cut in this call. All ranks know them alike, so they say whether a site's parts
        # have been told already.
        self.wholes: dict[Cut, int] = {}
        self._told: dict[Any, tuple[tuple[int, ...], ...]] = {}

    def attach(self, sites: Sequence[Site], attachment: Attachment) -> None:
        """Replace the forward of every site."""
        for site in sites:
            match site:
                case CutSite(cut=Cut(tensor=str())):
                    signature = inspect.signature(site.module.forward)
                    attachment.replace(site.module, "forward", partial(partial, self._cut_argument, site, signature))
                case CutSite():
                    attachment.replace(site.module, "forward", partial(partial, self._cut_output, site))
                case JoinSite():
                    attachment.replace(site.module, "forward", partial(partial, self._join, site))
                case TokenAttentionSite():
                    attachment.replace(site.module, "forward", partial(partial, self._attention, site))
                case _:
                    raise UnsupportedModel(f"layer '{site.name}': a cut by tokens has no rule for {type(site)}")

    def run(self, step: TokenStep, forward: Forward, call: TokenCall, cuts: Sequence[Cut]) -> Any:
        """The model's own forward on a call, of which some arguments are cut before."""
        self._step = step
        self.wholes.clear()
        given = dict(call.bound.arguments)
        for cut in cuts:
            name = str(cut.tensor)
            if name in given:
                given[name] = self.cut(cut, given[name])
        bound = inspect.BoundArguments(call.bound.signature, given)
        return forward(*bound.args, **bound.kwargs)

    @property
    def fewest(self) -> int:
        """Tokens of the shortest stream that was cut in this call."""
        return min(self.wholes.values())

    @property
    def step(self) -> TokenStep:
        """The call that the layers are in."""
        assert self._step is not None, "a layer that was cut ran outside a denoiser call"
        return self._step

    def cut(self, cut: Cut, value: Any) -> Any:
        """This rank's part of every tensor in a value that has all tokens; raises TooFewTokens."""
        return map_tensors(value, partial(self._own_part, cut))

    def _own_part(self, cut: Cut, x: torch.Tensor) -> torch.Tensor:
        if cut.num_dims not in (None, x.dim()):
            return x
        num_tokens = x.shape[cut.dim]
        if num_tokens < self.step.num_parts:
            raise TooFewTokens
        self.wholes[cut] = num_tokens
        if self.step.num_parts == 1:
            return x
        own = self.step.own(num_tokens)
        # A copy: a view would keep the whole alive as long as the part.
        return x.narrow(cut.dim, own.start, len(own)).contiguous()

    def _cut_argument(
        self, site: CutSite, signature: inspect.Signature, forward: Forward, *args: Any, **kwargs: Any
    ) -> Any:
        bound = signature.bind(*args, **kwargs)
        if site.cut.tensor in bound.arguments:
            value = bound.arguments[str(site.cut.tensor)]
            bound.arguments[str(site.cut.tensor)] = self.cut(site.cut, value)
        return forward(*bound.args, **bound.kwargs)

    def _cut_output(self, site: CutSite, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return self.cut(site.cut, output)
        return type(output)(self.cut(site.cut, x) if i == site.cut.tensor else x for i, x in enumerate(output))

    def _join(self, site: JoinSite, forward: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.join(site, forward(*args, **kwargs))

    def join(self, site: JoinSite, own: torch.Tensor) -> torch.Tensor:
        """All tokens of the team, from each one's own."""
        if len(self.step.team) == 1:
            return own
        (lengths,) = self.lengths(site, own, own.shape[site.dim])
        return torch.cat(self._of_all(site.name, own, site.dim, lengths), site.dim)

    def _of_all(self, name: str, own: torch.Tensor, dim: int, lengths: tuple[int, ...]) -> list[torch.Tensor]:
        """Everybody's tensor, in the order of places, by its length in one dimension."""
        team, rank = self.step.team, self.step.team[self.step.index]
        shapes = {peer: with_length(own.shape, dim, n) for peer, n in zip(team, lengths, strict=True) if peer != rank}
        parts = {**self._exchange.collect(name, own, shapes).wait(), rank: own}
        return [parts[peer] for peer in team]

    def _attention(self, site: TokenAttentionSite, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        if (len(self.step.team) == 1 and self.step.piece is None) or self.step.alone:
            return forward(*args, **kwargs)
        with _AttentionCalls(partial(self.answer, site)) as calls:
            result = forward(*args, **kwargs)
        if calls.count != 1:
            raise UnsupportedModel(
                f"layer '{site.name}' called scaled_dot_product_attention {calls.count} times, where one has a rule; "
                "use the attention backend 'native' and the model's own attention processor"
            )
        return result

    def answer(
        self,
        site: TokenAttentionSite,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """What attention of the own queries to the keys of all ranks gives; all are [B, N, L, D]."""
        plain = not dropout_p and not is_causal and not enable_gqa and key.shape == value.shape
        if not plain or query.dim() != 4 or query.shape[1] != key.shape[1]:
            raise UnsupportedModel(
                f"layer '{site.name}': attention that is causal, grouped or drops out has no rule for parts of tokens"
            )
        queries, keys = self.lengths(site, query, query.shape[2], key.shape[2])
        bias = None if attn_mask is None else self._bias(site, attn_mask, query, keys)
        return self._attend(self.step, AttentionCall(site.name, query, key, value, queries, keys, bias, scale))

    def _bias(self, site: Site, mask: torch.Tensor, query: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """What is added to the scores of everybody's keys [B or 1, N or 1, 1, L]; never infinite."""
        own_keys = lengths[self.step.index]
        if mask.dim() != 4 or mask.shape[2] != 1 or mask.shape[3] != own_keys:
            raise UnsupportedModel(
                f"layer '{site.name}': an attention mask of shape {tuple(mask.shape)} is not one over keys alone"
            )
        lowest = torch.finfo(query.dtype).min
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
        own = mask.to(query.dtype).clamp_min(lowest)
        return torch.cat(self._of_all(f"{site.name}.mask", own, 3, lengths), 3)

    def lengths(self, site: Site, like: torch.Tensor, *own: int) -> tuple[tuple[int, ...], ...]:
        """For each of the own numbers of tokens, that of every place: told once for streams of the same lengths."""
        team, place = self.step.team, self.step.index
        key = (site.name, team, self.step.piece, tuple(self.wholes.items()))
        if key not in self._told:
            # On the meta device numbers have values where tokens have none.
            numbers = torch.tensor(own, device="cpu" if like.is_meta else like.device)
            others = {rank: numbers.shape for rank in team if rank != team[place]}
            received = self._exchange.collect(f"{site.name}.lengths", numbers, others).wait()
            by_place = [received.get(rank, numbers).tolist() for rank in team]
            self._told[key] = tuple(tuple(lengths) for lengths in zip(*by_place, strict=True))
        return self._told[key]


class _AttentionCalls(TorchFunctionMode):
    """Answers calls of `scaled_dot_product_attention` on this thread, whatever code they are in, and counts them."""

    def __init__(self, answer: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return self._answer(*args, **(kwargs or {}))
