"""The world of virtual ranks keeps the transport's promises, and fails in words instead of hanging."""

from __future__ import annotations

import pytest
import torch

from distrifusion import StepTimeout
from distrifusion.exchange.transport import Message
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld

TAG = 5


def test_messages_of_one_tag_meet_in_the_order_of_their_posts_whatever_the_order_of_the_waits() -> None:
    def work(transport: VirtualTransport) -> list[float]:
        peer = 1 - transport.rank
        boxes = [torch.zeros(1) for _ in range(3)]
        pending = [
            transport.post([Message(peer, torch.tensor([10.0 * peer + i]), TAG)], [Message(peer, box, TAG)])
            for i, box in enumerate(boxes)
        ]
        for post in reversed(pending):
            post.wait()
        return [box.item() for box in boxes]

    assert VirtualWorld(2).run(work) == [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]


def test_a_message_is_a_copy_of_the_moment_it_was_posted() -> None:
    def work(transport: VirtualTransport) -> float:
        peer, own, box = 1 - transport.rank, torch.tensor([1.0]), torch.zeros(1)
        pending = transport.post([Message(peer, own, TAG)], [Message(peer, box, TAG)])
        own.fill_(-1.0)
        pending.wait()
        return box.item()

    assert VirtualWorld(2).run(work) == [1.0, 1.0]


def test_a_broadcast_gives_rank_zeros_value_to_all() -> None:
    def work(transport: VirtualTransport) -> list[str]:
        return [transport.broadcast(f"{word} of {transport.rank}") for word in ("first", "second")]

    assert VirtualWorld(3).run(work) == 3 * [["first of 0", "second of 0"]]


def test_a_message_that_never_comes_is_a_timeout() -> None:
    def work(transport: VirtualTransport) -> None:
        transport.post([], [Message(1 - transport.rank, torch.zeros(1), TAG)]).wait()

    with pytest.raises(StepTimeout, match="no message"):
        VirtualWorld(2, timeout=0.1).run(work)


def test_the_error_of_the_rank_that_failed_is_raised_not_that_of_those_who_waited() -> None:
    def work(transport: VirtualTransport) -> None:
        if transport.rank == 2:
            raise LookupError("rank 2 lost its way")
        transport.post([], [Message(2, torch.zeros(1), TAG)]).wait()

    with pytest.raises(LookupError, match="lost its way"):
        VirtualWorld(3).run(work)


def test_a_message_of_another_size_is_an_error() -> None:
    def work(transport: VirtualTransport) -> None:
        peer = 1 - transport.rank
        transport.post([Message(peer, torch.zeros(3), TAG)], [Message(peer, torch.zeros(2), TAG)]).wait()

    with pytest.raises(RuntimeError, match="expected"):
        VirtualWorld(2).run(work)
