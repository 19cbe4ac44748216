"""Every position of every level has one owner, for every size and number of ranks."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import torch
from hypothesis import given
from hypothesis import strategies as st

from distrifusion.layout.mesh import AttentionAxes, RankGrid
from distrifusion.layout.partition import Interval, partition_levels, split_evenly, token_intervals
from distrifusion.plan import Plan, Split

sizes = st.integers(1, 200)
splits = st.sampled_from(Split)


def covers_in_order(intervals: tuple[Interval, ...], size: int) -> bool:
    """Whether the intervals, one after the other, are 0..size."""
    edges = [intervals[0].start, *(interval.stop for interval in intervals)]
    joined = all(left.stop == right.start for left, right in pairwise(intervals))
    return joined and edges[0] == 0 and edges[-1] == size and edges == sorted(edges)


@given(sizes, st.integers(1, 20))
def test_an_even_split_covers_and_differs_by_at_most_one(total: int, parts: int) -> None:
    intervals = split_evenly(total, parts)
    assert len(intervals) == parts
    assert covers_in_order(intervals, total)
    assert max(map(len, intervals)) - min(map(len, intervals)) <= 1


@given(sizes, sizes, st.integers(1, 5), st.integers(1, 12), splits)
def test_bands_cover_every_level_that_is_cut_with_a_row_for_everybody(
    height: int, width: int, num_levels: int, num_bands: int, split: Split
) -> None:
    levels = partition_levels(height, width, num_levels, num_bands, split)
    assert len(levels) == num_levels
    for level in levels:
        assert (level.bands is None) == (level.size < num_bands)
        if level.bands is not None:
            assert len(level.bands) == num_bands
            assert covers_in_order(level.bands, level.size)
            assert all(len(band) > 0 for band in level.bands)


@given(sizes, sizes, st.integers(2, 5), st.integers(1, 12), splits)
def test_a_band_halves_to_its_own_band_of_the_next_level(
    height: int, width: int, num_levels: int, num_bands: int, split: Split
) -> None:
    for fine, coarse in pairwise(partition_levels(height, width, num_levels, num_bands, split)):
        for mine, half in zip(fine.bands or (), coarse.bands or (), strict=False):
            assert half == Interval(mine.start // 2, ceil(mine.stop / 2))
            assert mine.start % 2 == 0


@given(sizes, st.integers(2, 5), splits)
def test_levels_have_the_sizes_that_strided_convolutions_give(size: int, num_levels: int, split: Split) -> None:
    x = torch.zeros(1, 1, size, 7)
    halve = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    for level in partition_levels(size, 7, num_levels, 2, split):
        assert (level.height, level.width) == tuple(x.shape[2:])
        x = halve(x)


@given(sizes, sizes, st.integers(1, 4), st.integers(1, 9), splits)
def test_band_shapes_tile_the_level(height: int, width: int, num_levels: int, num_bands: int, split: Split) -> None:
    for level in partition_levels(height, width, num_levels, num_bands, split):
        shapes = [level.band_shape(i) for i in range(num_bands)]
        if level.bands is None:
            assert set(shapes) == {(level.height, level.width)}
        else:
            assert sum(h * w for h, w in shapes) == level.height * level.width


grids = st.builds(Plan, dp=st.integers(1, 4), cfg=st.sampled_from((1, 2)), patch=st.integers(1, 6))


@given(grids, st.integers(1, 9))
def test_every_batch_row_of_every_band_has_exactly_one_rank(plan: Plan, num_rows: int) -> None:
    layouts = [RankGrid(plan, rank).layout(num_rows) for rank in range(plan.num_ranks)]
    assert all((layout.batch, layout.band) == (layouts[0].batch, layouts[0].band) for layout in layouts)
    num_bands = len(layouts[0].team)
    owners = [
        (row, layout.band[rank])
        for rank, layout in enumerate(layouts)
        for row in range(layout.batch[rank].start, layout.batch[rank].stop)
    ]
    assert sorted(owners) == [(row, band) for row in range(num_rows) for band in range(num_bands)]


@given(grids, st.integers(1, 9))
def test_a_team_is_the_ranks_with_the_same_batch_rows_in_band_order(plan: Plan, num_rows: int) -> None:
    for rank in range(plan.num_ranks):
        layout = RankGrid(plan, rank).layout(num_rows)
        assert layout.team[layout.index] == rank
        assert [layout.band[peer] for peer in layout.team] == list(range(len(layout.team)))
        assert {layout.batch[peer] for peer in layout.team} == {layout.batch[rank]}


@given(st.integers(1, 3), st.sampled_from((1, 2)), st.integers(2, 4), st.integers(1, 9))
def test_teams_of_weights_keep_their_size_and_those_left_over_repeat(dp: int, cfg: int, tp: int, num_rows: int) -> None:
    plan = Plan(dp=dp, cfg=cfg, tp=tp)
    for rank in range(plan.num_ranks):
        layout = RankGrid(plan, rank).layout(num_rows)
        assert len(layout.team) == tp
        assert layout.team[layout.index] == rank
        assert {layout.batch[peer] for peer in layout.team} == {layout.rows}
        parts = [layout.rows, *(layout.batch[other] for other in layout.others_with_my_band)]
        assert sorted(row for part in parts for row in range(part.start, part.stop)) == list(range(num_rows))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 2))
def test_a_team_is_a_grid_of_rings_and_groups_with_the_same_keys(ulysses: int, ring: int, branches: int) -> None:
    """With one branch to evaluate, the ranks of the other one join the groups, or the ring if there are none."""
    plan, size = Plan(cfg=branches, ulysses=ulysses, ring=ring), branches * ulysses * ring
    places = [AttentionAxes.of(plan, size, place) for place in range(size)]
    for place, axes in enumerate(places):
        head, block = axes.index
        assert axes.ulysses[head] == place == axes.ring[block]
        assert len(axes.ulysses) * len(axes.ring) == size
        assert set(axes.ulysses) & set(axes.ring) == {place}
        assert axes.ulysses == tuple(range(axes.ulysses[0], axes.ulysses[0] + len(axes.ulysses)))
        assert all(places[other].ring == axes.ring for other in axes.ring)
    if ring > 1 and ulysses > 1:
        assert len(places[0].ring) == ring
    elif ring > 1:
        assert len(places[0].ring) == size
    else:
        assert len(places[0].ulysses) == size


@given(st.integers(1, 4100), st.integers(1, 16))
def test_tokens_are_cut_in_order_and_as_evenly_as_can_be(num_tokens: int, num_owners: int) -> None:
    parts = token_intervals(num_tokens, num_owners)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, num_tokens)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
