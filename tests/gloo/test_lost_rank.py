"""A rank that stops answering makes the others raise within the group's limit instead of waiting for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from work import Die, Hang, draw_until_lost
from world import GlooWorld


@pytest.fixture
def short_lived() -> Iterator[GlooWorld]:
    """Three ranks that wait five seconds for each other."""
    world = GlooWorld(3, timeout=5.0)
    yield world
    world.stop()


@pytest.mark.parametrize("plan", ["patch3", "patch3.displaced.w0"])
def test_a_rank_that_dies_is_an_error_on_the_others(short_lived: GlooWorld, plan: str) -> None:
    first, dead, last = short_lived.ask(draw_until_lost, plan, Die())
    assert dead.died
    for answer in (first, last):
        assert answer.error is None, answer.error
        assert answer.value[0] in ("RankFailed", "StepTimeout"), answer.value


def test_a_rank_that_hangs_is_a_timeout_on_the_others(short_lived: GlooWorld) -> None:
    first, hung, last = short_lived.ask(draw_until_lost, "patch3", Hang())
    assert hung.error == "no answer in time"
    for answer in (first, last):
        assert answer.error is None, answer.error
        assert answer.value[0] in ("RankFailed", "StepTimeout"), answer.value
    assert "StepTimeout" in (first.value[0], last.value[0])
