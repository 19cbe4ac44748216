"""A stack of convolutions on an input that every rank has whole: each computes the rows that its own band needs.

The rows around a band are computed twice, by the ranks on both sides; nothing is exchanged and the result is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from distrifusion.anatomy.base import StackSite
from distrifusion.errors import ConfigError
from distrifusion.layout.partition import Interval
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.patch import PatchStrategy, input_rows
from distrifusion.strategies.strips import Rows, convolve

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Window:
    """Rows of a stage's input: those that are wanted, picture edges exceeded, and those of them that exist."""

    wanted: Interval
    inside: Interval


class ConvStackStrategy:
    """Cuts the input of a convolution stack to the rows that reach this rank's band."""

    def __init__(self, patch: PatchStrategy) -> None:
        self._patch = patch
        self._windows: list[_Window] = []

    def attach(self, sites: list[StackSite], attachment: Attachment) -> None:
        """Replace the forward of every stack and of its convolutions."""
        for site in sites:
            for i, convs in enumerate(site.stages):
                for conv in convs:
                    attachment.replace(conv, "forward", partial(partial, self._conv, conv, i))
            attachment.replace(site.module, "forward", partial(partial, self._run, site))

    def _run(self, site: StackSite, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        level, dim = self._patch.step.levels[site.level_out], self._patch.step.dim
        sizes = [x.shape[dim]]
        for convs in site.stages:
            sizes.append(_output_size(convs[0], dim, sizes[-1]))
        if sizes[-1] != level.size:
            raise ConfigError(
                f"a control image of {sizes[0]} pixels gives {sizes[-1]} latents and the picture has {level.size}; "
                "give a control image of the picture's own size"
            )
        self._windows = []
        if level.bands is None:
            return forward(x)
        rows = level.bands[self._patch.step.index]
        for convs, size in zip(reversed(site.stages), reversed(sizes[:-1]), strict=True):
            wanted = input_rows(convs[0], dim, rows)
            rows = wanted & Interval(0, size)
            self._windows.insert(0, _Window(wanted, rows))
        return forward(x.narrow(dim, rows.start, len(rows)))

    def _conv(self, conv: nn.Conv2d, stage: int, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        if not self._windows:
            return forward(x)
        wanted, inside = self._windows[stage].wanted, self._windows[stage].inside
        edges = (inside.start - wanted.start, wanted.stop - inside.stop)
        return convolve(conv, Rows(x, self._patch.step.dim, (edges[0], x, edges[1])))


def _output_size(conv: nn.Conv2d, dim: int, size: int) -> int:
    axis = dim - 2
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    return (size + 2 * int(conv.padding[axis]) - reach) // conv.stride[axis] + 1
