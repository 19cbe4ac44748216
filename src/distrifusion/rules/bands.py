"""A U-Net's calls cut into bands of rows or columns: what is cut before the model's own forward, and joined after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from distrifusion.anatomy.base import AdaptiveNormSite, Anatomy, BoundCall, FilterSite, ResampleSite, Site, StackSite
from distrifusion.errors import ConfigError, PlanError
from distrifusion.layout.mesh import CallLayout
from distrifusion.layout.partition import Interval, Level, partition_levels
from distrifusion.memory.prediction import BandQuestion
from distrifusion.nested import map_tensors, take_rows
from distrifusion.plan import Norms, Split
from distrifusion.rules.rule import Rule, Subject
from distrifusion.strategies.adaptive_norm import AdaptiveNormStrategy
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.conv_stack import ConvStackStrategy
from distrifusion.strategies.patch import PatchStep, PatchStrategy
from distrifusion.strategies.resample import ResampleStrategy
from distrifusion.strategies.skip_filter import SkipFilterStrategy


class BandRule(Rule[Anatomy]):
    """How a denoiser with an `Anatomy` (rows, columns, resolutions) is divided within a team.

    Raises:
        PlanError: if the plan divides attention alone, which leaves convolutions whole.
    """

    def __init__(self, subject: Subject[Anatomy]) -> None:
        subject.plan.check_bands(type(subject.model).__name__)
        super().__init__(subject)
        self._levels: tuple[Level, ...] = ()
        self._patch = PatchStrategy(self._exchange, self._plan.norms)
        self._stack = ConvStackStrategy(self._patch)
        self._resample = ResampleStrategy(self._exchange, self._patch)
        self._adaptive_norms = AdaptiveNormStrategy(self._patch)
        self._skip_filter = SkipFilterStrategy(self._exchange, self._patch)

    def sites(self) -> list[Site]:
        """All sites in the model's own order; raises UnsupportedModel naming a layer that has no rule."""
        sites = self._anatomy.sites(self._model)
        if self._plan.naive and any(isinstance(site, StackSite) for site in sites):
            raise PlanError(f"plan '{self._plan}': naive bands have no part of a control image; use another policy")
        return sites

    def attach(self, sites: Sequence[Site], layers: Attachment) -> None:
        """Replace the forwards of the sites."""
        norms = self._adaptive_norms.attach([s for s in sites if isinstance(s, AdaptiveNormSite)], layers)
        own_rules = StackSite | FilterSite | AdaptiveNormSite | ResampleSite
        self._patch.attach([*(s for s in sites if not isinstance(s, own_rules)), *norms], layers)
        self._resample.attach([s for s in sites if isinstance(s, ResampleSite)], layers)
        self._stack.attach([s for s in sites if isinstance(s, StackSite)], layers)
        self._skip_filter.attach([s for s in sites if isinstance(s, FilterSite)], layers)

    def question(self, call: BoundCall) -> BandQuestion:
        """The call as one whose values are to be kept."""
        shape, dtype = call.sample.shape, call.sample.dtype
        return BandQuestion(self.sites(), self._anatomy.num_levels(self._model), shape, dtype)

    def compute(
        self, forward: Callable[..., Any], call: BoundCall, layout: CallLayout, num_before: int, past_warmup: bool
    ) -> Any:
        """Run the model's own forward on this rank's batch rows and band."""
        num_rows, _, height, width = call.sample.shape
        split = self._plan.split_of(num_before)
        num_levels = self._anatomy.num_levels(self._model)
        self._levels = partition_levels(height, width, num_levels, len(layout.team), split)
        take = partial(take_rows, layout.rows, num_rows)
        sample, batched = take(call.sample), map_tensors(call.batched, take)
        separate = past_warmup and self._plan.norms is Norms.SEPARATE
        self._patch.begin(PatchStep(self._levels, layout.index, sample, separate))
        spatial = map_tensors(call.spatial, partial(self._own_part, take, num_rows))
        own = self._patch.cut(sample)
        if past_warmup and self._plan.naive:
            if spatial and any(level.bands is None for level in self._levels):
                raise PlanError(
                    f"plan '{self._plan}': a picture this small has residuals that naive bands cannot share"
                )
            self._patch.begin(PatchStep(partition_levels(*own.shape[2:], num_levels, 1, split), 0, own))
        return forward(own, **batched, **spatial, **{**call.rest, "return_dict": False})

    def join(self, result: Any, call: BoundCall, layout: CallLayout) -> Any:
        """The model's own output from every rank's rows of the batch and band of the picture."""
        tensors = self._anatomy.tensors(result)
        if not self._anatomy.stays_cut(call):
            exits = zip(tensors, self._anatomy.exits(self._model), strict=True)
            num_rows = call.sample.shape[0]
            tensors = [self._whole(tensor, layout, self._levels[level], num_rows) for tensor, level in exits]
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

    def _whole(self, own: torch.Tensor, layout: CallLayout, level: Level, num_rows: int) -> torch.Tensor:
        """The whole prediction from every rank's rows of the batch and band of the picture."""
        rank = self._exchange.transport.rank
        if len(layout.batch) == 1:
            return own
        full = own.new_empty(num_rows, own.shape[1], level.height, level.width)
        blocks = {
            r: _block(full, rows, level, band)
            for r, (rows, band) in enumerate(zip(layout.batch, layout.band, strict=True))
        }
        shapes = {r: block.shape for r, block in blocks.items() if r != rank}
        received = self._exchange.collect(f"{self._prefix}exit", own, shapes).wait()
        for r, block in blocks.items():
            block.copy_(own if r == rank else received[r])
        return full


def _block(full: torch.Tensor, rows: Interval, level: Level, index: int) -> torch.Tensor:
    """The place of some batch rows and one band in a tensor [B, C, H, W] of a level."""
    band = level.bands[index] if level.bands else Interval(0, level.size)
    return full[rows.start : rows.stop].narrow(2 if level.split is Split.ROWS else 3, band.start, len(band))
