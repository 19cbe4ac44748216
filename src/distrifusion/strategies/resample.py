"""Fixed filters that change the resolution and pad by reflection: each band is filtered with its neighbours' rows.

The layer's own code runs on the band and a margin; what its padding touches inside the picture is cut off again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from distrifusion.anatomy.base import ResampleSite
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.partition import Interval
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.patch import PatchStrategy


class ResampleStrategy:
    """Filters a band with `site.margin` rows of its neighbours."""

    def __init__(self, exchange: Exchange, patch: PatchStrategy) -> None:
        self._exchange = exchange
        self._patch = patch

    def attach(self, sites: list[ResampleSite], attachment: Attachment) -> None:
        """Replace the forward of every site."""
        for site in sites:
            attachment.replace(site.module, "forward", partial(partial, self._run, site))

    def _run(self, site: ResampleSite, forward: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        step = self._patch.step
        level, level_out = step.levels[site.level], step.levels[site.level_out]
        if self._patch.is_whole(x.shape[step.dim], level):
            return self._patch.cut(forward(x))
        if level_out.bands is None:
            return forward(self._patch.gather_rows(site, x, level))
        assert level.bands is not None
        whole = Interval(0, level.size)
        wants = [Interval(band.start - site.margin, band.stop + site.margin) & whole for band in level.bands]
        extended = self._exchange.halo(site.name, x, step.dim, level.bands, wants).extend(x)
        before = level.bands[step.index].start - wants[step.index].start
        skip = before * 2 if site.level_out < site.level else before // 2
        return forward(extended).narrow(step.dim, skip, len(level_out.bands[step.index]))
