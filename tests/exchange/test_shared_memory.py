"""Messages through shared memory: whole, in order, of any size, and never waited for without end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrifusion import RankFailed, StepTimeout
from distrifusion.exchange.shared_memory import SharedMemoryTransport
from distrifusion.exchange.transport import Message

TINY_RING = 256  # bytes, with its counters: nearly every message wraps or goes in parts


def on_ranks(num_ranks: int, work: Callable[[SharedMemoryTransport], Any], **options: Any) -> list[Any]:
    """The results of `work(transport)` by rank, or its error; ranks are threads that share a small memory."""
    memory, limited = bytearray(num_ranks**2 * TINY_RING), {"limit": 20.0, **options}
    results: list[Any] = [None] * num_ranks

    def body(rank: int) -> None:
        try:
            results[rank] = work(SharedMemoryTransport(rank, num_ranks, memoryview(memory), **limited))
        except (RankFailed, StepTimeout) as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def content(source: int, target: int, number: int, length: int) -> torch.Tensor:
    """Bytes that say whose they are."""
    return torch.randint(
        256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number * 100 + source * 10 + target)
    )


lengths = st.lists(st.integers(0, 700), min_size=1, max_size=6)


@settings(max_examples=40)
@given(lengths=lengths, num_ranks=st.integers(2, 4), late=st.integers(0, 3), order=st.randoms(use_true_random=False))
def test_every_message_arrives_whole_whatever_its_size_and_the_order_of_the_waits(
    lengths: list[int], num_ranks: int, late: int, order: Any
) -> None:
    """One rank posts its receives only after all its sends: what comes before it is asked for is kept."""
    waits = list(range(len(lengths)))
    order.shuffle(waits)

    def work(transport: SharedMemoryTransport) -> list[bool]:
        own, peers = transport.rank, [p for p in range(num_ranks) if p != transport.rank]
        boxes = [{p: torch.zeros(n, dtype=torch.uint8) for p in peers} for n in lengths]
        sends = [[Message(p, content(own, p, i, n), i % 2) for p in peers] for i, n in enumerate(lengths)]
        receives = [[Message(p, box, i % 2) for p, box in boxes[i].items()] for i in range(len(lengths))]
        if own == late:
            left = [transport.post(each, []) for each in sends]
            pending = [transport.post([], each) for each in receives]
        else:
            left = []
            pending = [transport.post(*pair) for pair in zip(sends, receives, strict=True)]
        for post in (*(pending[i] for i in waits), *left):
            post.wait()
        return [torch.equal(box, content(p, own, i, n)) for i, n in enumerate(lengths) for p, box in boxes[i].items()]

    for result in on_ranks(num_ranks, work):
        assert not isinstance(result, Exception), result
        assert all(result)


def test_a_message_is_waited_for_until_it_has_left_so_that_its_tensor_may_be_written_again() -> None:
    large = 20 * TINY_RING

    def work(transport: SharedMemoryTransport) -> torch.Tensor:
        peer, box = 1 - transport.rank, torch.zeros(large, dtype=torch.uint8)
        sent = torch.full((large,), 7, dtype=torch.uint8)
        transport.post([Message(peer, sent, 1)], [Message(peer, box, 1)]).wait()
        sent.fill_(9)
        transport.post([Message(peer, sent[:16], 2)], [Message(peer, torch.zeros(16, dtype=torch.uint8), 2)]).wait()
        return box

    for box in on_ranks(2, work):
        assert torch.equal(box, torch.full((large,), 7, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_of_any_type_and_shape_arrives(dtype: torch.dtype) -> None:
    value = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)

    def work(transport: SharedMemoryTransport) -> torch.Tensor:
        peer, box = 1 - transport.rank, torch.zeros_like(value)
        transport.post([Message(peer, value, 1)], [Message(peer, box, 1)]).wait()
        return box

    assert all(torch.equal(box, value) for box in on_ranks(2, work))


def test_a_message_that_never_comes_is_a_timeout_that_names_both_ranks() -> None:
    def work(transport: SharedMemoryTransport) -> None:
        if transport.rank == 1:
            transport.post([], [Message(0, torch.zeros(4), 1)]).wait()

    _, error = on_ranks(2, work, limit=0.3)
    assert isinstance(error, StepTimeout) and error.rank == 1
    assert "no answer from rank 0" in str(error)


def test_a_message_to_a_rank_that_takes_nothing_is_a_timeout() -> None:
    def work(transport: SharedMemoryTransport) -> None:
        if transport.rank == 0:
            transport.post([Message(1, torch.zeros(TINY_RING), 1)], []).wait()

    error, _ = on_ranks(2, work, limit=0.3)
    assert isinstance(error, StepTimeout) and error.rank == 0


def test_a_lost_rank_is_named_long_before_the_limit() -> None:
    def work(transport: SharedMemoryTransport) -> None:
        if transport.rank != 1:
            transport.post([], [Message(1, torch.zeros(4), 1)]).wait()

    first, _, last = on_ranks(3, work, limit=1e6, lost=lambda peer: peer == 1)
    for error in (first, last):
        assert isinstance(error, RankFailed) and error.rank == 1
        assert "process has ended" in str(error)


def test_the_last_words_of_a_lost_rank_still_count() -> None:
    def work(transport: SharedMemoryTransport) -> float:
        box = torch.zeros(1)
        if transport.rank == 1:
            transport.post([Message(0, torch.ones(1), 1)], [])
        else:
            transport.post([], [Message(1, box, 1)]).wait()
        return box.item()

    assert on_ranks(2, work, lost=lambda peer: True)[0] == 1.0


@pytest.mark.parametrize("asked_first", [True, False])
def test_messages_of_another_length_are_an_error_in_words(asked_first: bool) -> None:
    def work(transport: SharedMemoryTransport) -> None:
        if transport.rank == 1:
            transport.post([Message(0, torch.zeros(3), 1)], [Message(0, torch.zeros(1), 2)]).wait()
        elif asked_first:
            receive = transport.post([], [Message(1, torch.zeros(2), 1)])
            transport.post([Message(1, torch.zeros(1), 2)], [])
            receive.wait()
        else:
            transport.post([Message(1, torch.zeros(1), 2)], [Message(1, torch.zeros(3), 3)]).wait()

    error, _ = on_ranks(2, work, limit=0.5)
    if asked_first:
        assert isinstance(error, RankFailed) and "12 bytes where rank 0 expects 8" in str(error)
    else:
        assert isinstance(error, StepTimeout), "a message of another tag is not taken for the one that is awaited"
