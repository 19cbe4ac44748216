"""A chain is cut into components that cover it, are even, and take from each other what they read."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from distrifusion.layout.depth import Layer, divide


@st.composite
def chains(draw: st.DrawFn) -> list[Layer]:
    """Layers that each read the one before, and some that read earlier ones too."""
    costs = draw(st.lists(st.integers(0, 50), min_size=1, max_size=14))
    layers = []
    for place, cost in enumerate(costs):
        skips = draw(st.frozensets(st.integers(0, max(0, place - 1)), max_size=2)) if place else frozenset()
        layers.append(Layer(cost, skips | ({place - 1} if place else frozenset())))
    return layers


cuts = chains().flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, len(layers)), st.integers(1, 2)))


@given(cuts, st.floats(0, 1))
def test_every_layer_has_one_owner_and_owners_follow_one_another(cut: object, repeated: float) -> None:
    layers, num_components, stride = cut
    depth = divide(layers, num_components, stride, repeated)
    assert list(depth.owner) == sorted(depth.owner)
    assert set(depth.owner) == set(range(num_components))
    for place, owner in enumerate(depth.owner):
        runners = {component for component, own in enumerate(depth.runs) if place in own}
        assert runners - {num_components - 1} <= {owner} <= runners


@given(cuts, st.floats(0, 1))
def test_a_component_takes_what_it_reads_and_does_not_run(cut: object, repeated: float) -> None:
    layers, num_components, stride = cut
    depth = divide(layers, num_components, stride, repeated)
    for own, taken in zip(depth.runs, depth.takes, strict=True):
        assert taken == {place for layer in own for place in layers[layer].reads} - own
    for place in range(len(layers)):
        assert all(place in depth.takes[component] for component in depth.takers(place))


@given(cuts, st.floats(0, 1))
def test_what_is_run_again_needs_nobody_and_stays_within_its_budget(cut: object, repeated: float) -> None:
    layers, num_components, stride = cut
    depth = divide(layers, num_components, stride, repeated)
    again = {place for place in depth.runs[-1] if depth.owner[place] != num_components - 1}
    assert all(layers[place].reads <= again for place in again)
    total = sum(layer.cost for layer in layers)
    assert sum(layers[place].cost for place in again) <= repeated * total or not again


@given(cuts)
def test_no_other_cut_is_more_even(cut: object) -> None:
    layers, num_components, stride = cut

    def longest(loads: list[int]) -> float:
        return max([load / stride for load in loads[:-1]] + loads[-1:])

    def loads(edges: tuple[int, ...]) -> list[int]:
        spans = zip((0, *edges), (*edges, len(layers)), strict=True)
        return [sum(layer.cost for layer in layers[a:b]) for a, b in spans]

    depth = divide(layers, num_components, stride, repeated=0)
    others = combinations(range(1, len(layers)), num_components - 1)
    free = {place for place in depth.runs[-1] if layers[place].cost == 0}
    assert all(depth.owner[place] == num_components - 1 or place in free for place in depth.runs[-1])
    assert longest(depth.loads(layers)) == min(longest(loads(edges)) for edges in others)


def test_the_last_component_runs_cheap_first_layers_again_for_its_skip_connections() -> None:
    skips = {3: 2, 4: 1, 5: 0}
    reads = [
        frozenset({place - 1} if place else ()) | ({skips[place]} if place in skips else set()) for place in range(6)
    ]
    layers = [Layer(cost, frozenset(read)) for cost, read in zip((1, 30, 30, 30, 30, 1), reads, strict=True)]
    depth = divide(layers, 2)
    assert depth.runs == (frozenset({0, 1, 2}), frozenset({0, 3, 4, 5}))
    assert depth.takes == (frozenset(), frozenset({1, 2}))
    assert divide(layers, 2, repeated=0).takes[1] == frozenset({0, 1, 2})
