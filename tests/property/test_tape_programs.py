"""Any program of operations, replayed, gives the bits of its own code, whatever of it a tape leaves out.

A program runs on square matrices, so that each operation takes any of them: fresh or a view, transposed or not, of an
argument, of a kept tensor or of what an operation made, changed in place before or later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from distrifusion.exchange.transport import Message
from distrifusion.tape import TapeBackend

SIDE = 4


class Later:
    """Delivers what was posted when it is waited for, and not before: one rank that sends to itself."""

    rank, world_size = 0, 2

    def broadcast(self, value: Any) -> Any:
        return value

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Later:
        self._pair = receives[0].tensor, sends[0].tensor
        return self

    def wait(self) -> None:
        self._pair[0].copy_(self._pair[1])


class Machine:
    """What a program works on.

    Attributes:
        made: matrices, the argument first.
        kept: matrices that outlive a run, a pair of them interleaved by row.
        whole: one more, by itself.
    """

    def __init__(self, x: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor], transport: Any) -> None:
        self.made = [x]
        self.kept, self.whole = kept
        self._transport = transport
        self._pending: list[Any] = []

    def message(self, sent: torch.Tensor) -> torch.Tensor:
        """Post something, which arrives at the end of the run."""
        room = torch.zeros(SIDE, SIDE)
        self._pending.append(self._transport.post([Message(1, sent, 1)], [Message(1, room, 1)]))
        return room

    def end(self) -> None:
        """Wait for what was posted."""
        for pending in self._pending:
            pending.wait()


def _add_to_a_part(machine: Machine, a: torch.Tensor, b: torch.Tensor) -> None:
    a[1:].mul_(0.5)


def _keep(index: int) -> Operation:
    def keep(machine: Machine, a: torch.Tensor, b: torch.Tensor) -> None:
        machine.kept[:, index].copy_(a)

    return keep


def _keep_transposed(machine: Machine, a: torch.Tensor, b: torch.Tensor) -> None:
    machine.whole.t().copy_(a)


def _copy(machine: Machine, a: torch.Tensor, b: torch.Tensor) -> None:
    a.copy_(b)


def _bits(machine: Machine, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.contiguous().view(torch.int32).t().bitwise_and(-8).view(torch.float32)


Operation = Callable[[Machine, torch.Tensor, torch.Tensor], torch.Tensor | None]
OPERATIONS: dict[str, Operation] = {
    "add": lambda m, a, b: a + b,
    "add twice": lambda m, a, b: torch.add(a, b, alpha=2),
    "times": lambda m, a, b: a * b,
    "half": lambda m, a, b: a * 0.5,
    "by one": lambda m, a, b: a / 1.0,
    "times one": lambda m, a, b: a * 1,
    "gelu": lambda m, a, b: torch.nn.functional.gelu(a),
    "silu": lambda m, a, b: torch.nn.functional.silu(a),
    "product": lambda m, a, b: a.tanh() @ b.tanh(),
    "product as it is": lambda m, a, b: a @ b,
    "biased": lambda m, a, b: torch.addmm(b[0], a, b),
    "transposed": lambda m, a, b: a.t(),
    "same": lambda m, a, b: a.view(a.shape),
    "reshaped": lambda m, a, b: a.reshape(-1, 2).reshape(SIDE, SIDE),
    "two halves": lambda m, a, b: torch.cat([a[2:], b[:2]]),
    "columns": lambda m, a, b: torch.cat([part.tanh() for part in a.chunk(2, 1)], 1),
    "turned": lambda m, a, b: (a * 1.5).t_(),
    "strips": lambda m, a, b: torch.stack(a.unbind()),
    "bits": _bits,
    "add in place": lambda m, a, b: a.add_(b.tanh()),
    "add to a part": _add_to_a_part,
    "keep first": _keep(0),
    "keep second": _keep(1),
    "keep transposed": _keep_transposed,
    "copy": _copy,
    "whole": lambda m, a, b: m.whole,
    "first": lambda m, a, b: m.kept[:, 0],
    "second by one": lambda m, a, b: m.kept[:, 1] / 1.0,
    "sent": lambda m, a, b: m.message(a),
}


class Line(NamedTuple):
    """An operation, and which two of the matrices made before it takes, counted from the latest."""

    name: str
    first: int = 0
    second: int = 1


Program = Sequence[Line]
LINES = st.builds(Line, st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5), st.integers(0, 5))


def run(program: Program, machine: Machine, lasts: int) -> list[torch.Tensor]:
    """What a program makes; of its matrices only the last ones are results, which keep others from being left out."""
    for line in program:
        a, b = (machine.made[max(0, len(machine.made) - 1 - back)] for back in (line.first, line.second))
        made = OPERATIONS[line.name](machine, a, b)
        if made is not None:
            machine.made.append(made)
    machine.end()
    return machine.made[-lasts:]


def found_and_expected(program: Program, lasts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of results of a replayed program and of its own code, for three arguments one after the other."""
    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(SIDE, SIDE, generator=generator) for _ in range(3)]
    kept = torch.randn(SIDE, 2, SIDE, generator=generator), torch.randn(SIDE, SIDE, generator=generator)
    expected, own = [], (kept[0].clone(), kept[1].clone())
    for argument in arguments:
        try:
            made = run(program, Machine(argument.clone(), own, Later()), lasts)
        except RuntimeError:  # a copy onto a part of itself
            reject()
        expected.append([x.clone() for x in (*made, *own)])
    backend, fixed = TapeBackend(), arguments[0].clone()
    transport = backend.carrying(Later())
    result, replay = backend.capture(lambda: run(program, Machine(fixed, kept, transport), lasts))
    found = [[x.clone() for x in (*result, *kept)]]
    for argument in arguments[1:]:
        fixed.copy_(argument)
        replay()
        found.append([x.clone() for x in (*result, *kept)])
    return [pair for pairs in zip(found, expected, strict=True) for pair in zip(*pairs, strict=True)]


# What a tape must not leave out, or write over: each is wrong without one look.
@example([Line("gelu"), Line("transposed"), Line("add"), Line("gelu")], 1)  # the same, transposed, is read beside it
@example([Line("gelu"), Line("by one"), Line("transposed"), Line("half", 2), Line("silu"), Line("add", 0, 2)], 1)
@example(
    [Line("gelu"), Line("transposed"), Line("add", 2, 0), Line("transposed"), Line("half")], 1
)  # it lies otherwise
@example([Line("add", 0, 0), Line("add", 0, 1), Line("add", 0, 2)], 2)  # what is written over something is a result
@example([Line("gelu"), Line("sent"), Line("half", 1)], 2)  # it is still to be sent
@example([Line("sent"), Line("by one"), Line("transposed")], 1)  # it is still to come
@example([Line("turned"), Line("transposed"), Line("half")], 1)  # it lies otherwise than it was made
@example([Line("whole"), Line("gelu"), Line("half")], 1)  # it is kept
@example([Line("product"), Line("keep first")], 1)  # the product is a result too
@example([Line("product"), Line("transposed"), Line("keep first"), Line("gelu", 9)], 1)  # it is kept in another order
@example([Line("product"), Line("keep transposed"), Line("gelu", 9)], 1)  # or by columns
@example([Line("product"), Line("gelu", 9), Line("copy", 0, 1), Line("half")], 1)  # where it goes, nothing is kept
@example(
    [Line("gelu"), Line("product as it is", 0, 0), Line("add in place", 1), Line("keep first", 1), Line("half")], 1
)
@example([Line("product as it is", 0, 0), Line("add", 1, 1), Line("copy", 2, 1), Line("add", 0, 2)], 1)  # onto a factor
@given(st.lists(LINES, min_size=1, max_size=14), st.integers(1, 2))
@settings(max_examples=300)
@torch.no_grad()
def test_a_replayed_program_gives_the_bits_of_its_own_code(program: Program, lasts: int) -> None:
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in found_and_expected(program, lasts))
