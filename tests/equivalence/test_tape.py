"""A tape: what was done once is done again, with what its inputs hold now, and nothing is held longer than needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from distrifusion.exchange.transport import Message
from distrifusion.tape import Tape, TapeBackend, replaying

Work = Callable[[torch.Tensor], Any]
KEPT = torch.zeros(3)


def in_place(x: torch.Tensor) -> Any:
    y = x + 1
    y.mul_(2)
    y[1:].add_(x[:-1])
    return y


def lists(x: torch.Tensor) -> Any:
    first, second, third = torch.stack((x, 2 * x, x * x)).unbind()
    return torch.cat([third, first, *second.split(2)])


def by_keyword(x: torch.Tensor) -> Any:
    room = torch.empty(6)
    torch.mul(x, x, out=room[:3])
    torch.add(x, x, alpha=3, out=room[3:])
    return torch.clamp(room, max=x.max(), min=x.min())


def of_numbers(x: torch.Tensor) -> Any:
    """Numbers that the host writes, which are then changed."""
    sizes = torch.tensor([1.0, 2.0, 3.0])
    sizes += x
    return sizes


def several(x: torch.Tensor) -> Any:
    values, places = x.sort(descending=True)
    return {"values": values, "both": (places.float(), torch.zeros(2))}


def kept(x: torch.Tensor) -> Any:
    """A tensor that outlives the call, and views of it: this call's value, and half of what was there."""
    half = KEPT / 2
    KEPT.view(3, 1)[:, 0].copy_(x)
    return half, KEPT[1:]


def by_place(x: torch.Tensor) -> Any:
    return x[torch.tensor([2, 0])]


def leaves(value: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize("work", [in_place, lists, by_keyword, of_numbers, several, kept, by_place])
@torch.no_grad()
def test_it_does_again_what_was_done_with_other_values(work: Work) -> None:
    KEPT.zero_()
    inputs = [torch.tensor([float(i), -i * i, 3.5 * i]) for i in range(1, 5)]
    expected = [[y.clone() for y in leaves(work(x.clone()))] for x in inputs]
    KEPT.zero_()
    x = inputs[0].clone()
    result, replay = TapeBackend().capture(lambda: work(x))
    found = [[y.clone() for y in leaves(result)]]
    for value in inputs[1:]:
        x.copy_(value)
        replay()
        found.append([y.clone() for y in leaves(result)])
    assert all(
        torch.equal(a, b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)
    )


def alive_at_the_end(x: torch.Tensor, forgets: bool = True) -> list[bool]:
    """Of the tensors that a replay makes one after the other, which are still held when the last one is made."""
    seen: list[weakref.ref[torch.Tensor]] = []
    found: list[bool] = []
    tape = Tape()
    with tape:
        y = x
        for _ in range(4):
            y = y * 2
            tape.do(lambda t: seen.append(weakref.ref(t)), y)
        tape.do(lambda: found.extend(ref() is not None for ref in seen))
    replay = tape.replay_into([y])
    seen.clear()
    found.clear()
    replay()
    return found


@torch.no_grad()
def test_nothing_is_held_after_its_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert alive_at_the_end(torch.ones(3)) == [False, False, False, True]
    with_last_uses = replaying.with_last_uses
    monkeypatch.setattr(replaying, "with_last_uses", lambda *known: [(*s[:3], ()) for s in with_last_uses(*known)])
    assert alive_at_the_end(torch.ones(3)) == [True, True, True, True]


@pytest.mark.parametrize(
    "look",
    [
        torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, bool, float, torch.nonzero,
        lambda x: x[x > 0], lambda x: torch.masked_select(x, x > 0), torch.unique,
    ],
)  # fmt: skip
def test_work_that_decides_by_values_is_refused(look: Work) -> None:
    x = torch.ones(1)
    with pytest.raises(RuntimeError, match="waits for values"):
        TapeBackend().capture(lambda: look(x + 1))


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_is_searched_for_again_after_a_capture(was_on: bool) -> None:
    seen: list[bool] = []

    def work() -> None:
        seen.append(gc.isenabled())

    def refused() -> None:
        work()
        float(torch.ones(1))

    try:
        (gc.enable if was_on else gc.disable)()
        TapeBackend().capture(work)
        after = gc.isenabled()
        with pytest.raises(RuntimeError, match="waits for values"):
            TapeBackend().capture(refused)
        assert (seen, after, gc.isenabled()) == ([False, False], was_on, was_on)
    finally:
        gc.enable()


class Mailbox:
    """One rank that sends to itself: what was posted comes with the next post."""

    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.letters: list[torch.Tensor] = [torch.zeros(2)]
        self.waits = 0

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        self.letters += [message.tensor.clone() for message in sends]
        for message in receives:
            message.tensor.copy_(self.letters.pop(0))
        return self

    def wait(self) -> None:
        self.waits += 1

    def broadcast(self, value: Any) -> Any:
        return value


@torch.no_grad()
def test_messages_are_sent_again_with_what_is_there_now() -> None:
    backend, box = TapeBackend(), Mailbox()
    transport, x = backend.carrying(box), torch.ones(2)

    def work() -> torch.Tensor:
        got = torch.empty(2)
        transport.post([Message(1, x * 10, 7)], [Message(1, got, 7)]).wait()
        return got + 1

    result, replay = backend.capture(work)
    assert result.tolist() == [1, 1]
    for number, expected in ((2.0, 11.0), (3.0, 21.0), (4.0, 31.0)):
        x.fill_(number)
        replay()
        assert result.tolist() == [expected] * 2
    assert box.waits == 4


def test_a_message_that_outlasts_its_call_is_refused() -> None:
    backend = TapeBackend()
    transport = backend.carrying(Mailbox())
    pending, _ = backend.capture(lambda: transport.post([], [Message(1, torch.empty(2), 7)]))
    with pytest.raises(RuntimeError, match="waited for after it"):
        pending.wait()
