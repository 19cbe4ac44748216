"""A sum over a team: the same bits on every rank, in the order of the team, whatever the type, layout and size."""

from __future__ import annotations

import pytest
import torch

from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.summing import SUM
from distrifusion.exchange.verbs import Exchange
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld


def sums_of(parts: list[torch.Tensor], team: tuple[int, ...] | None = None) -> list[tuple[torch.Tensor, int]]:
    """What every rank gets for its part, and the bytes that it sent."""

    def work(transport: VirtualTransport) -> tuple[torch.Tensor, int]:
        members = team or tuple(range(len(parts)))
        exchange = Exchange(transport)
        if transport.rank not in members:
            return parts[transport.rank], 0
        exchange.begin(CallPolicy(members, members.index(transport.rank)))
        own = parts[transport.rank].clone(memory_format=torch.preserve_format)
        first, second = exchange.sum("layer", own), exchange.sum("layer", own.clone())
        second.wait()
        return first.wait(), exchange.bytes_sent[SUM] // 2

    return VirtualWorld(len(parts)).run(work)


def parts_of(num_ranks: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_ranks)
    return [torch.randn(shape, generator=generator) for _ in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 3, 4, 5), (1, 1, 2), (1,)])
def test_a_sum_is_added_in_the_order_of_ranks_and_alike_everywhere(num_ranks: int, shape: tuple[int, ...]) -> None:
    parts = parts_of(num_ranks, *shape)
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    for total, _ in sums_of(parts):
        assert torch.equal(total, expected)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_half_precision_is_added_in_full_and_rounded_once(num_ranks: int) -> None:
    parts = [part.to(torch.bfloat16) for part in parts_of(num_ranks, 3, 50)]
    expected = torch.stack([part.float() for part in parts]).sum(0).to(torch.bfloat16)
    for total, _ in sums_of(parts):
        assert torch.equal(total, expected)


def test_a_layout_stays() -> None:
    parts = [part.to(memory_format=torch.channels_last) for part in parts_of(3, 2, 4, 3, 5)]
    for total, _ in sums_of(parts):
        assert total.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(total, parts[0] + parts[1] + parts[2])


def test_a_team_adds_up_by_itself() -> None:
    parts = parts_of(4, 2, 3)
    by_rank = sums_of(parts, team=(1, 3))
    assert all(torch.equal(by_rank[rank][0], parts[1] + parts[3]) for rank in (1, 3))


@pytest.mark.parametrize(("num_ranks", "numel", "values"), [(2, 7, [7, 7]), (3, 7, [10, 9, 9]), (4, 2, [4, 4, 2, 2])])
def test_every_value_goes_to_the_rank_that_adds_it_and_back_to_all(
    num_ranks: int, numel: int, values: list[int]
) -> None:
    assert [sent // 4 for _, sent in sums_of(parts_of(num_ranks, numel))] == values
