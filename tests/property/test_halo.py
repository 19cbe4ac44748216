"""The halo verb against slicing a picture that is padded with zeros."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.verbs import Exchange
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.layout.partition import Interval


@st.composite
def bands_and_wants(draw: st.DrawFn) -> tuple[list[Interval], list[Interval]]:
    """Bands of one row at least, and for each an interval that reaches any way over its edges and the picture's."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    stops = torch.tensor(lengths).cumsum(0).tolist()
    bands = [Interval(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    reach = st.integers(-2, 6)
    wants = []
    for band in bands:
        start = min(band.start - draw(reach), band.stop - 1)
        wants.append(Interval(start, max(band.stop + draw(reach), start + 1, band.start + 1)))
    return bands, wants


@settings(max_examples=40)
@given(bands_and_wants(), st.sampled_from((2, 3)), st.integers(1, 2))
def test_a_halo_is_a_slice_of_the_padded_whole(
    bands_wants: tuple[list[Interval], list[Interval]], dim: int, batch: int
) -> None:
    bands, wants = bands_wants
    size, margin = bands[-1].stop, 10
    whole = torch.randn(batch, 3, size, 4, generator=torch.Generator().manual_seed(size))
    whole = whole if dim == 2 else whole.transpose(2, 3)
    edge = torch.zeros_like(whole.narrow(dim, 0, 1)).repeat_interleave(margin, dim)
    padded = torch.cat([edge, whole, edge], dim)

    def ask(transport: VirtualTransport) -> torch.Tensor:
        exchange = Exchange(transport)
        exchange.begin(CallPolicy(tuple(range(len(bands))), transport.rank))
        own = bands[transport.rank]
        rows = whole.narrow(dim, own.start, len(own))
        extended = exchange.halo("conv", rows, dim, bands, wants).extend(rows)
        exchange.end()
        return extended

    for want, got in zip(wants, VirtualWorld(len(bands)).run(ask), strict=True):
        assert torch.equal(got, padded.narrow(dim, want.start + margin, len(want)))
