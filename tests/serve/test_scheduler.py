"""The queue by its numbers alone: order, limits, and what cancelling leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrifusion.serve.scheduler import QueueFull, Scheduler

ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 10**7)),
        st.tuples(st.just("next"), st.just(0)),
        st.tuples(st.just("withdraw"), st.integers(0, 12)),
        st.tuples(st.just("end"), st.integers(0, 10**6)),
    ),
    max_size=60,
)


@given(ACTS, st.integers(0, 3), st.integers(1, 2))
def test_first_come_first_served_within_the_limits(acts: list[tuple[str, int]], max_waiting: int, slots: int) -> None:
    scheduler = Scheduler(max_waiting, slots)
    waiting: list[int] = []
    drawn: list[int] = []
    number = 0
    for act, value in acts:
        if act == "add":
            number += 1
            if len(waiting) < max_waiting + slots - len(drawn):
                scheduler.add(number, value)
                waiting.append(number)
            else:
                with pytest.raises(QueueFull):
                    scheduler.add(number, value)
        elif act == "next":
            expected = waiting.pop(0) if waiting and len(drawn) < slots else None
            assert scheduler.next() == expected
            drawn += [] if expected is None else [expected]
        elif act == "withdraw":
            assert scheduler.withdraw(value) == (value in waiting)
            waiting = [other for other in waiting if other != value]
        elif drawn:
            scheduler.ended(drawn.pop(0), value)
        assert (scheduler.num_waiting, scheduler.num_drawn) == (len(waiting), len(drawn))
        assert [scheduler.ahead(other) for other in waiting] == [len(drawn) + i for i in range(len(waiting))]
        assert all(scheduler.ahead(other) == 0 for other in drawn)
    assert scheduler.withdraw_all() == waiting and scheduler.num_waiting == 0


@given(st.lists(st.tuples(st.integers(1, 10**8), st.integers(0, 10**6)), max_size=20), st.integers(1, 10**8))
def test_waiting_is_estimated_from_the_last_work_seen(seen: list[tuple[int, int]], work: int) -> None:
    scheduler = Scheduler(0)
    for number, (done, milliseconds) in enumerate(seen):
        scheduler.add(number, done)
        assert scheduler.next() == number
        scheduler.ended(number, milliseconds)
    scheduler.add(-1, work)
    scheduler.next()
    with pytest.raises(QueueFull) as full:
        scheduler.add(-2, 1)
    last = seen[-8:]
    if not last:
        assert full.value.free_in is None
        return
    exact = sum(took for _, took in last) * work / sum(done for done, _ in last)
    assert full.value.free_in is not None and exact <= full.value.free_in < exact + 1 + 1e-9 * exact


def test_a_request_that_was_not_drawn_to_its_end_says_nothing_of_time() -> None:
    scheduler = Scheduler(0)
    scheduler.add(1, 10)
    scheduler.next()
    scheduler.ended(1, None)
    scheduler.add(2, 10)
    scheduler.next()
    with pytest.raises(QueueFull) as full:
        scheduler.add(3, 1)
    assert full.value.free_in is None
