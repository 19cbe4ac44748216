"""One denoiser on all ranks: divides a call over the ranks, runs the model's own code, and joins the prediction."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.base import BoundCall
from distrifusion.exchange.pool import Pool
from distrifusion.exchange.transport import Transport
from distrifusion.exchange.verbs import CallPolicy, Exchange
from distrifusion.mesh import CallLayout, RankGrid
from distrifusion.partition import Interval, Level, partition_levels
from distrifusion.plan import Plan, Split
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.patch import PatchStep, PatchStrategy


class ParallelDenoiser:
    """A diffusers denoiser whose calls are divided over the ranks of a plan.

    Called like the model itself, on every rank with the same arguments; every rank gets the whole prediction. Outside a
    request (see `open`), nothing is kept and every call is synchronous.

    Args:
        model: the denoiser, unmodified; `detach` restores it bit for bit.
        plan: how to divide.
        transport: the ranks; exactly `plan.num_ranks` of them.

    Raises:
        UnsupportedModel: if a layer mixes positions and has no rule.
    """

    def __init__(self, model: nn.Module, plan: Plan, transport: Transport) -> None:
        self.model = model
        self.plan = plan
        self.exchange = Exchange(transport)
        self.pool = Pool()
        self.request: Hashable | None = None
        self.slot: Hashable = 0
        self._anatomy = anatomy_of(model)
        self._grid = RankGrid(plan, transport.rank)
        self._patch = PatchStrategy(self.exchange, plan.split)
        self._attachment = Attachment()
        self._modules: tuple[nn.Module, ...] = ()

    def attach(self) -> None:
        """Put the strategies on the model's layers."""
        sites = self._anatomy.sites(self.model)
        self._modules = tuple(self.model.modules())
        self._patch.attach(sites, self._attachment)
        self._attachment.replace(self.model, "forward", partial(partial, self.run))

    def detach(self) -> None:
        """Restore the model as it was."""
        self._attachment.detach()
        self._modules = ()

    def refresh(self) -> None:
        """Look at the layers again: what has no rule is refused, what was added (an adapter) is attached."""
        if tuple(self.model.modules()) == self._modules:
            self._anatomy.sites(self.model)
        else:
            self.detach()
            self.attach()

    def open(self, request: Hashable) -> None:
        """Start a request: one picture (or batch) from its first step to its last. Every rank calls it."""
        self.request = request
        self.slot = 0

    def close(self) -> None:
        """End the request and forget what it kept. Every rank calls it."""
        request, self.request = self.request, None
        self.pool.close(request)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One denoiser call; `forward` is the model's own."""
        call = self._anatomy.bind(forward, args, kwargs)
        num_rows, _, height, width = call.sample.shape
        layout = self._grid.layout(num_rows)
        num_levels = self._anatomy.num_levels(self.model)
        levels = partition_levels(height, width, num_levels, len(layout.team), self.plan.split)
        rank = self.exchange.transport.rank
        branch = _take_rows(call, layout.batch[rank], num_rows)

        self._patch.begin(PatchStep(levels, layout.index, branch.sample))
        self.exchange.begin(self._policy(layout, call.sample))
        own = replace(branch, sample=self._patch.cut(branch.sample), spatial=_map(branch.spatial, self._patch.cut))
        (prediction,) = forward(own.sample, **own.batched, **own.spatial, **{**own.rest, "return_dict": False})
        whole = self._join(prediction, layout, levels[0], num_rows)
        self.exchange.end()
        return self._anatomy.output(whole, call)

    def _policy(self, layout: CallLayout, sample: torch.Tensor) -> CallPolicy:
        policy = CallPolicy(layout.team, layout.index)
        if self.request is None or not self.plan.stale:
            return policy
        slot = (self.slot, tuple(sample.shape), sample.dtype)
        self.slot = self.slot + 1 if isinstance(self.slot, int) else self.slot
        state = self.pool.state(self.request, slot)
        stale = self.plan.stale if state.calls > self.plan.warmup else frozenset()
        return replace(policy, keep=self.plan.stale, stale=stale, state=state)

    def _join(self, own: torch.Tensor, layout: CallLayout, level: Level, num_rows: int) -> torch.Tensor:
        """The whole prediction from every rank's rows of the batch and band of the picture."""
        rank = self.exchange.transport.rank
        if len(layout.batch) == 1:
            return own
        full = own.new_empty(num_rows, own.shape[1], level.height, level.width)
        blocks = {
            r: self._block(full, rows, level.bands[band] if level.bands else Interval(0, level.size))
            for r, (rows, band) in enumerate(zip(layout.batch, layout.band, strict=True))
        }
        shapes = {r: block.shape for r, block in blocks.items() if r != rank}
        received = self.exchange.collect("exit", own, shapes)
        for r, block in blocks.items():
            block.copy_(own if r == rank else received[r])
        return full

    def _block(self, full: torch.Tensor, rows: Interval, band: Interval) -> torch.Tensor:
        dim = 2 if self.plan.split is Split.ROWS else 3
        return full[rows.start : rows.stop].narrow(dim, band.start, len(band))


def _take_rows(call: BoundCall, rows: Interval, num_rows: int) -> BoundCall:
    """The arguments for some rows of the batch only; tensors without that many rows are the same for all."""

    def take(value: torch.Tensor) -> torch.Tensor:
        return value[rows.start : rows.stop] if value.dim() and value.shape[0] == num_rows else value

    return replace(call, sample=take(call.sample), batched=_map(call.batched, take), spatial=_map(call.spatial, take))


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, change) for item in value)
    return value
