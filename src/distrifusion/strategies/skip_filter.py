"""A frequency filter on skip connections that several ranks hold: FreeU (arXiv 2309.11497), exact, one small exchange.

The filter scales the four lowest Fourier modes of each channel. Each band gives its part of them, so that nine sums per
channel are exchanged and not the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from distrifusion.anatomy.base import FilterSite
from distrifusion.exchange.verbs import Exchange
from distrifusion.layout.partition import Interval
from distrifusion.plan import Split
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.patch import PatchStrategy

_SKIPS = "res_hidden_states_tuple"
_NUM_SUMS = 9


class SkipFilterStrategy:
    """Filters the skip connections of a block by what all bands hold; always fresh.

    The block's own code runs on, with filtered skip connections and, meanwhile, the scale 1, which filters nothing.
    """

    def __init__(self, exchange: Exchange, patch: PatchStrategy) -> None:
        self._exchange = exchange
        self._patch = patch

    def attach(self, sites: list[FilterSite], attachment: Attachment) -> None:
        """Replace the forward of every site."""
        for site in sites:
            attachment.replace(site.module, "forward", partial(partial, self._run, site))

    def _run(self, site: FilterSite, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        block, level = site.module, self._patch.step.levels[site.level]
        skips: tuple[torch.Tensor, ...] = kwargs[_SKIPS]
        on = all(getattr(block, name, None) for name in site.switches)
        if not on or self._patch.is_whole(skips[0].shape[self._patch.step.dim], level):
            return forward(*args, **kwargs)
        scale = getattr(block, site.scale)
        setattr(block, site.scale, 1.0)
        try:
            return forward(*args, **{**kwargs, _SKIPS: self._filter(site, skips, scale)})
        finally:
            setattr(block, site.scale, scale)

    def _filter(self, site: FilterSite, skips: tuple[torch.Tensor, ...], scale: float) -> tuple[torch.Tensor, ...]:
        level = self._patch.step.levels[site.level]
        assert level.bands is not None
        band = level.bands[self._patch.step.index]
        rows, columns = (
            (band, Interval(0, level.width)) if level.split is Split.ROWS else (Interval(0, level.height), band)
        )
        u, v = _waves(rows, level.height, skips[0].device), _waves(columns, level.width, skips[0].device)
        states = [skip.float() for skip in skips]
        own = torch.cat([(u @ state @ v.T).flatten(2).transpose(1, 2) for state in states], dim=2)
        lengths = (_NUM_SUMS,) * len(level.bands)
        (sums,) = self._exchange.gather(site.name, None, (own,), lengths).wait()
        total = sums.unflatten(1, (len(level.bands), _NUM_SUMS)).sum(1).transpose(1, 2).unflatten(2, (3, 3))
        modes = _lowest(total) * ((scale - 1) / (level.height * level.width))
        parts = modes.split([state.shape[1] for state in states], dim=1)
        filtered = [state + u.T @ part @ v for state, part in zip(states, parts, strict=True)]
        return tuple(new.to(skip.dtype) for new, skip in zip(filtered, skips, strict=True))


def _waves(part: Interval, size: int, device: torch.device) -> torch.Tensor:
    """1, cos and sin of the lowest frequency at positions of an axis: [3, positions]; a single one has no waves."""
    angles = torch.arange(part.start, part.stop, device=device) * (2 * math.pi / size)
    waves = torch.stack([torch.ones_like(angles), angles.cos(), angles.sin()])
    return waves * torch.tensor([[1.0], [float(size > 1)], [float(size > 1)]], device=device)


def _lowest(sums: torch.Tensor) -> torch.Tensor:
    """Amplitudes, by wave along rows and columns, of the modes with frequencies 0 and -1 on both axes: [..., 3, 3].

    A mode (p, q) of the real part is the sum of x cos(p (a' - a) + q (b' - b)) over all positions (a', b'); expanded by
    the addition theorems it needs only the sums of x against products of waves, `sums` [..., 3, 3].
    """
    modes = sums.clone()
    modes[..., 1, 1] -= sums[..., 2, 2]
    modes[..., 1, 2] += sums[..., 2, 1]
    modes[..., 2, 1] += sums[..., 1, 2]
    modes[..., 2, 2] -= sums[..., 1, 1]
    return modes
