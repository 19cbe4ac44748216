"""A rank that stops answering makes the others raise within the group's limit instead of waiting for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from work import Lose, draw_until_lost
from world import GlooWorld

LIMIT = 3.0  # seconds that the ranks wait for each other


@pytest.fixture(scope="module")
def losing() -> Iterator[GlooWorld]:
    """Three ranks that may be lost."""
    world = GlooWorld(3, timeout=60.0)
    yield world
    world.stop()


@pytest.mark.parametrize("plan", ["patch3", "patch3.displaced.all.w0"])
@pytest.mark.parametrize("kind", ["sockets", "shared memory"])
def test_a_rank_that_dies_is_a_typed_error_on_the_others(losing: GlooWorld, kind: str, plan: str) -> None:
    first, lost, last = losing.ask(draw_until_lost, kind, plan, LIMIT, Lose(silence=0.0))
    assert lost.died
    for answer in (first, last):
        assert answer.error is None, answer.error
        assert answer.value[0] in ("RankFailed", "StepTimeout"), answer.value


@pytest.mark.parametrize("kind", ["sockets", "shared memory"])
def test_a_rank_that_says_nothing_is_a_timeout_on_the_others(losing: GlooWorld, kind: str) -> None:
    first, lost, last = losing.ask(draw_until_lost, kind, "patch3", LIMIT, Lose(silence=2 * LIMIT))
    assert lost.died
    for answer in (first, last):
        assert answer.error is None, answer.error
        assert answer.value[0] in ("RankFailed", "StepTimeout"), answer.value
    assert "StepTimeout" in (first.value[0], last.value[0])
