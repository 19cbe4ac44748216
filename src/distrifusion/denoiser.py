"""One denoiser on all ranks: divides a call over the ranks, runs the model's own code, and joins the prediction."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.base import AdaptiveNormSite, FilterSite, ResampleSite, Site, StackSite
from distrifusion.division import Division
from distrifusion.errors import ConfigError, PlanError
from distrifusion.exchange.pool import CallState, Pool
from distrifusion.exchange.transport import Transport
from distrifusion.memory.check import Question, check_fits
from distrifusion.mesh import CallLayout, RankGrid
from distrifusion.pacing import Pacing
from distrifusion.partition import Interval, Level, partition_levels
from distrifusion.plan import Norms, Plan, Split
from distrifusion.strategies.adaptive_norm import AdaptiveNormStrategy
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.conv_stack import ConvStackStrategy
from distrifusion.strategies.patch import PatchStep, PatchStrategy
from distrifusion.strategies.resample import ResampleStrategy
from distrifusion.strategies.skip_filter import SkipFilterStrategy


@dataclass(frozen=True)
class OpenRequest:
    """A request that is under way, and the denoiser call within its scheduler step that comes next."""

    request: Hashable | None
    slot: Hashable


class ParallelDenoiser(Division):
    """A diffusers denoiser whose calls are divided over the ranks of a plan.

    Called like the model itself, on every rank with the same arguments; every rank gets the whole prediction. A
    ControlNet is divided alike; each rank keeps its own part of the residuals, which a U-Net takes as they are. Outside
    a request (see `open`), nothing is kept and every call is synchronous.

    Args:
        model: the denoiser, unmodified; `detach` restores it bit for bit.
        plan: how to divide.
        transport: the ranks; exactly `plan.num_ranks` of them.
        prefix: begins the names of this model's layers in messages and errors; models that share ranks differ in it.

    Attributes:
        needs_request: a call outside a request is refused, because nobody has made the ranks agree.

    Raises:
        UnsupportedModel: if a layer mixes positions and has no rule.
    """

    def __init__(self, model: nn.Module, plan: Plan, transport: Transport, prefix: str = "") -> None:
        super().__init__(model, transport, prefix)
        self._anatomy = anatomy_of(model)
        self.plan = plan
        self.pool = Pool()
        self.request: Hashable | None = None
        self.slot: Hashable = 0
        self._grid = RankGrid(plan, transport.rank)
        self._pacing = Pacing(plan, self.exchange)
        self._patch = PatchStrategy(self.exchange, plan.norms)
        self._stack = ConvStackStrategy(self._patch)
        self._resample = ResampleStrategy(self.exchange, self._patch)
        self._adaptive_norms = AdaptiveNormStrategy(self._patch)
        self._skip_filter = SkipFilterStrategy(self.exchange, self._patch)
        self.needs_request = False
        self._audited = False

    def _find_sites(self) -> list[Site]:
        sites = self._anatomy.sites(self.model)
        if self.plan.naive and any(isinstance(site, StackSite) for site in sites):
            raise PlanError(f"plan '{self.plan}': naive bands have no part of a control image; use another policy")
        return sites

    def _put_on(self, sites: Sequence[Site], layers: Attachment) -> None:
        norms = self._adaptive_norms.attach([s for s in sites if isinstance(s, AdaptiveNormSite)], layers)
        own_rules = StackSite | FilterSite | AdaptiveNormSite | ResampleSite
        self._patch.attach([*(s for s in sites if not isinstance(s, own_rules)), *norms], layers)
        self._resample.attach([s for s in sites if isinstance(s, ResampleSite)], layers)
        self._stack.attach([s for s in sites if isinstance(s, StackSite)], layers)
        self._skip_filter.attach([s for s in sites if isinstance(s, FilterSite)], layers)

    def open(self, request: Hashable) -> OpenRequest:
        """Start a request: one picture (or batch) from its first step to its last. Every rank calls it.

        Returns what was open before, which `close` takes to go on with it.
        """
        before = OpenRequest(self.request, self.slot)
        self.request, self.slot = request, 0
        self._audited = False
        return before

    def close(self, before: OpenRequest | None = None) -> None:
        """End the request and forget what it kept. Every rank calls it."""
        request = self.request
        self.request, self.slot = (before.request, before.slot) if before else (None, 0)
        self.pool.close(request)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One denoiser call; `forward` is the model's own."""
        if self.needs_request and self.request is None:
            raise ConfigError(
                f"{type(self.model).__name__} is divided by plan '{self.plan}' and was called outside a run of a "
                "parallelized pipeline; call parallelize(pipe, plan) on the pipeline that calls it, also on one that "
                "from_pipe made"
            )
        if not self._audited:
            # Some pipelines put attention processors of their own on the model at the start of a run.
            self._sites()
            self._audited = True
        call = self._anatomy.bind(forward, args, kwargs)
        num_rows, _, height, width = call.sample.shape
        layout = self._grid.layout(num_rows)
        state = self._state(call.sample)
        past_warmup = self._pacing.past_warmup(state)
        split = self.plan.split_of(state.calls if state else 0)
        num_levels = self._anatomy.num_levels(self.model)
        levels = partition_levels(height, width, num_levels, len(layout.team), split)
        take = partial(_take_rows, layout.batch[self.exchange.transport.rank], num_rows)
        sample, batched = take(call.sample), _map(call.batched, take)

        separate = past_warmup and self.plan.norms is Norms.SEPARATE
        self._patch.begin(PatchStep(levels, layout.index, sample, separate))
        timestep = batched.get("timestep", 0)
        self.exchange.begin(self._pacing.policy(layout.team, layout.index, state, timestep, sample.device))
        if state is not None and self.plan.kept and state.calls == 0:
            question = Question(self._anatomy.sites(self.model), num_levels, call.sample.shape, call.sample.dtype)
            check_fits(question, self.plan, self.exchange, call.sample.device)
        spatial = _map(call.spatial, partial(self._own_part, take, num_rows))
        own = self._patch.cut(sample)
        if past_warmup and self.plan.naive:
            if spatial and any(level.bands is None for level in levels):
                raise PlanError(f"plan '{self.plan}': a picture this small has residuals that naive bands cannot share")
            self._patch.begin(PatchStep(partition_levels(*own.shape[2:], num_levels, 1, split), 0, own))
        result = forward(own, **batched, **spatial, **{**call.rest, "return_dict": False})
        tensors = self._anatomy.tensors(result)
        decide = self._pacing.announce(state, self.prefix, sample)
        if not self._anatomy.stays_cut(call):
            exits = zip(tensors, self._anatomy.exits(self.model), strict=True)
            tensors = [self._join(tensor, layout, levels[level], num_rows) for tensor, level in exits]
        decide()
        self.exchange.end()
        return self._anatomy.output(tensors, call)

    def _own_part(self, take: Callable[[torch.Tensor], torch.Tensor], num_rows: int, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of x [B, C, h, w] at one of the resolutions, or [B, C, 1, 1]; x if it is that already."""
        step = self._patch.step
        whole = [(num_rows, level.height, level.width) for level in step.levels]
        own = [(step.entry.shape[0], *level.band_shape(step.index)) for level in step.levels]
        shape = (x.shape[0], *x.shape[2:])
        if shape in own and shape in whole and own.index(shape) != whole.index(shape):
            raise ConfigError(
                f"a residual of {shape[1]}x{shape[2]} can be a part of one resolution and the whole of another; "
                "pictures one latent across need a plan without bands"
            )
        if shape in own:
            return x
        return take(x) if shape[1:] == (1, 1) else self._patch.cut(take(x))

    def _state(self, sample: torch.Tensor) -> CallState | None:
        """What the request at hand keeps for this call of its scheduler step; None where nothing is kept."""
        if self.request is None or self.plan.exact:
            return None
        slot = (self.slot, tuple(sample.shape), sample.dtype)
        self.slot = self.slot + 1 if isinstance(self.slot, int) else self.slot
        return self.pool.state(self.request, slot)

    def _join(self, own: torch.Tensor, layout: CallLayout, level: Level, num_rows: int) -> torch.Tensor:
        """The whole prediction from every rank's rows of the batch and band of the picture."""
        rank = self.exchange.transport.rank
        if len(layout.batch) == 1:
            return own
        full = own.new_empty(num_rows, own.shape[1], level.height, level.width)
        blocks = {
            r: _block(full, rows, level, band)
            for r, (rows, band) in enumerate(zip(layout.batch, layout.band, strict=True))
        }
        shapes = {r: block.shape for r, block in blocks.items() if r != rank}
        received = self.exchange.collect(f"{self.prefix}exit", own, shapes).wait()
        for r, block in blocks.items():
            block.copy_(own if r == rank else received[r])
        return full


def _take_rows(rows: Interval, num_rows: int, value: torch.Tensor) -> torch.Tensor:
    """Some rows of the batch only; a tensor without that many rows is the same for all."""
    return value[rows.start : rows.stop] if value.dim() and value.shape[0] == num_rows else value


def _block(full: torch.Tensor, rows: Interval, level: Level, index: int) -> torch.Tensor:
    """The place of some batch rows and one band in a tensor [B, C, H, W] of a level."""
    band = level.bands[index] if level.bands else Interval(0, level.size)
    return full[rows.start : rows.stop].narrow(2 if level.split is Split.ROWS else 3, band.start, len(band))


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, change) for item in value)
    return value
