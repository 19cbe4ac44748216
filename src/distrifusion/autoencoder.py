"""Half an autoencoder on all ranks: each encodes or decodes one band of the picture, exactly, and the bands are joined.

The half is divided, not the autoencoder around it: what diffusers does there (tiles, slices of the batch, quantising
convolutions) goes on as it is, and each call of the half is one divided call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy.base import Site
from distrifusion.anatomy.vae import coder_anatomy_of
from distrifusion.division import Division
from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.transport import Transport
from distrifusion.layout.partition import Interval, Level, partition_shapes
from distrifusion.plan import Norms, Split
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.patch import PatchStep, PatchStrategy


class Calls(StrEnum):
    """How the ranks call a model, and who gets what it gives."""

    ALONE = "alone"  # each rank for itself: nothing is exchanged
    ALL = "all"  # all ranks alike, and all get the result
    FIRST = "first"  # all ranks alike, and rank 0 alone gets a picture; the others get zeros in its place, and latents


class ParallelCoder(Division):
    """The encoder or decoder of an AutoencoderKL whose calls are divided over all ranks into bands.

    Every call is synchronous and equals one device to rounding. Outside `calls` each rank runs the model by itself.

    Args:
        model: the encoder or decoder, unmodified; `detach` restores it bit for bit.
        split: direction of the bands.
        transport: the ranks; all of them take part.
        prefix: begins the names of this model's layers in messages and errors.

    Attributes:
        withheld: True when a call has given a picture to rank 0 alone.

    Raises:
        UnsupportedModel: if the model is of no known kind.
    """

    def __init__(self, model: nn.Module, split: Split, transport: Transport, prefix: str) -> None:
        super().__init__(model, transport, prefix)
        self.withheld = False
        self._split = split
        self._calls = Calls.ALONE
        self._anatomy = coder_anatomy_of(model)
        self._patch = PatchStrategy(self.exchange, Norms.CORRECTED)

    @contextmanager
    def calls(self, how: Calls) -> Iterator[None]:
        """Say how the ranks call the model within a block. Every rank enters it, except for `ALONE`."""
        before, self._calls = self._calls, how
        try:
            yield
        finally:
            self._calls = before

    def run(
        self, forward: Callable[..., torch.Tensor], sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """One call; `forward` is the model's own."""
        transport = self.exchange.transport
        team = (transport.rank,) if self._calls is Calls.ALONE else tuple(range(transport.world_size))
        index = team.index(transport.rank)
        shapes = self._anatomy.shapes(self.model, *sample.shape[2:])
        levels = partition_shapes(shapes, len(team), self._split)
        self._patch.begin(PatchStep(levels, index, sample))
        self.exchange.begin(CallPolicy(team, index))
        own = forward(self._patch.cut(sample), *args, **kwargs)
        result = self._join(own, levels[self._anatomy.exit(self.model)], team)
        self.exchange.end()
        return result

    def _find_sites(self) -> list[Site]:
        return self._anatomy.sites(self.model)

    def _put_on(self, sites: Sequence[Site], layers: Attachment) -> None:
        self._patch.attach(list(sites), layers)

    def _join(self, own: torch.Tensor, level: Level, team: tuple[int, ...]) -> torch.Tensor:
        """The whole result from every rank's band."""
        if level.bands is None or len(team) == 1:
            return own
        rank = self.exchange.transport.rank
        first_only = self._calls is Calls.FIRST and self._anatomy.gives_pictures
        self.withheld |= first_only
        full = own.new_zeros(*own.shape[:2], level.height, level.width)
        places = {r: _place(full, level, band) for r, band in zip(team, level.bands, strict=True)}
        own = own.contiguous()
        wanted = {r: place.shape for r, place in places.items() if r != rank and (not first_only or rank == 0)}
        takers = [r for r in team if r != rank and (not first_only or r == 0)]
        received = self.exchange.collect(f"{self.prefix}exit", own, wanted, takers).wait()
        if not first_only or rank == 0:
            for r, place in places.items():
                place.copy_(own if r == rank else received[r])
        return full


def _place(full: torch.Tensor, level: Level, band: Interval) -> torch.Tensor:
    """The place of a band in a tensor [B, C, H, W] of a level."""
    return full.narrow(2 if level.split is Split.ROWS else 3, band.start, len(band))
