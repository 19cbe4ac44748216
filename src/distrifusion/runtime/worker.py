"""One rank in a process of its own: started by `workers.py`, it serves requests until the caller goes away."""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers

from distrifusion.in_place import parallelize
from distrifusion.runtime import attributes, randomness
from distrifusion.runtime.board import Board
from distrifusion.runtime.cancelling import BoardAgreement, Boundaries
from distrifusion.runtime.operations import (
    Call,
    CallResult,
    Component,
    Get,
    Invoke,
    Method,
    Open,
    Same,
    Set,
    Value,
)
from distrifusion.runtime.source import PipelineFacts, facts_of, takes_step_callback
from distrifusion.runtime.stepping import RelayedBar, StepEnd, WatchedBars
from distrifusion.runtime.timing import StepClock
from distrifusion.runtime.wire import (
    Close,
    Failure,
    Generators,
    Line,
    PeerGone,
    Reply,
    Request,
    StepAnswer,
    pack,
    unpack,
)

# Seconds between two looks at whether the caller is still there.
_LOOK = 0.5


class Worker:
    """The state of one rank: its line to the caller, its place, and after `Open` its pipeline."""

    def __init__(self, rank: int, line: Line, board: Board) -> None:
        self.rank = rank
        self.line = line
        self.board = board
        self.boundaries = Boundaries(BoardAgreement(board, rank), partial(board.write, rank))
        self.device = torch.device("cpu")
        self.pipe: Any = None
        self._operations: dict[type, Callable[..., Any]] = {
            Open: self._open,
            Call: self._call,
            Get: self._get,
            Set: self._set,
            Invoke: self._invoke,
        }

    def serve(self) -> None:
        """Answer requests until the caller says Close or goes away."""
        while True:
            match self.line.receive():
                case Close():
                    return
                case Request() as request:
                    self._answer(request)
                    self.board.write(self.rank, None)
                case StepAnswer():
                    # Of a call that has failed here while the caller's callback ran.
                    continue

    def serve_step(self, call: int) -> StepAnswer:
        """Answer requests that the caller's callback makes, until it ends."""
        while True:
            match self.line.receive():
                case Request() as request:
                    self._answer(request)
                case StepAnswer() as answer if answer.call == call:
                    return answer
                case Close():
                    raise PeerGone("the caller closed the pipeline within a call")

    def _answer(self, request: Request) -> None:
        generators: Generators = {}
        try:
            operation, generators = unpack(request.payload, self.device)
            value = self._operations[type(operation)](operation, request.id, generators)
            reply = Reply(request.id, pack(value)[0])
        except Exception as error:
            step = self.board.step_of(self.rank)
            states = randomness.capture(self.device, generators)
            reply = Reply(request.id, failure=Failure.of(error, step, pack(states)[0]))
        self.line.send(reply)

    def _open(self, op: Open, request: int, generators: Generators) -> PipelineFacts:
        self.device = torch.device(op.device)
        sys.argv[:] = op.argv
        if not op.bars:
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(op.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        limit = datetime.timedelta(seconds=op.limit)
        store = dist.TCPStore("127.0.0.1", op.port, is_master=False, timeout=limit)
        dist.init_process_group(op.backend, store=store, rank=self.rank, world_size=self.board.num_ranks, timeout=limit)
        pipe = op.source.open(self.device)
        # Before parallelize gives it a class of its own, which the caller could not import.
        facts = facts_of(pipe)
        self.pipe = parallelize(pipe, op.plan)
        self.pipe.progress_bar = WatchedBars(partial(RelayedBar, self.line, self.rank), self.boundaries)
        return facts

    def _call(self, op: Call, request: int, generators: Generators) -> CallResult:
        randomness.restore(op.randomness, self.device, {})
        self.boundaries.begin(op.number)
        clock = StepClock(self.device)
        output = self.pipe(**op.arguments, **self._step_end(op, request, generators, clock))
        times = clock.times()
        if self.rank != 0:
            return CallResult()
        return CallResult(output, randomness.capture(self.device, generators), times)

    def _step_end(self, op: Call, request: int, generators: Generators, clock: StepClock) -> dict[str, Any]:
        if not takes_step_callback(type(self.pipe)):
            return {}
        step_end = StepEnd(
            line=self.line,
            request=request,
            rank=self.rank,
            boundaries=self.boundaries,
            device=self.device,
            generators=generators,
            clock=clock,
            serve=self.serve_step,
            relayed=op.tensor_inputs is not None,
        )
        return {
            "callback_on_step_end": step_end,
            "callback_on_step_end_tensor_inputs": list(op.tensor_inputs or ()),
        }

    def _get(self, op: Get, request: int, generators: Generators) -> Value | Method | Component:
        value = attributes.resolve(self.pipe, op.path)
        if isinstance(value, torch.nn.Module):
            return Component(type(value).__name__)
        if inspect.isroutine(value):
            return Method()
        return Value(_plain(value) if isinstance(value, diffusers.SchedulerMixin) else value)

    def _set(self, op: Set, request: int, generators: Generators) -> None:
        attributes.replace(self.pipe, op.path, op.value)

    def _invoke(self, op: Invoke, request: int, generators: Generators) -> tuple[Value | Same, randomness.Randomness]:
        randomness.restore(op.randomness, self.device, {})
        owner = attributes.resolve(self.pipe, op.path.rpartition(".")[0])
        value = attributes.resolve(self.pipe, op.path)(*op.args, **op.kwargs)
        answer = Same() if value is owner else Value(value if self.rank == 0 else None)
        return answer, randomness.capture(self.device, generators)


def _plain(scheduler: Any) -> Any:
    """A copy without the functions that a running call hangs on the object; they belong to this process."""
    plain = copy.copy(scheduler)
    for name in [name for name, value in vars(plain).items() if inspect.isfunction(value)]:
        delattr(plain, name)
    return plain


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, whatever it is doing; the pipe's end alone is seen only when idle."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


def main() -> None:
    """Serve one rank; see `workers.py` for who calls this."""
    parser = argparse.ArgumentParser(prog="distrifusion.runtime.worker", description=main.__doc__)
    for name in ("rank", "world-size", "connection", "board", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    # Ctrl-C reaches the whole terminal group: it is the caller who decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(args.parent,), daemon=True).start()
    os.set_inheritable(args.connection, False)
    worker = Worker(args.rank, Line(Connection(args.connection)), Board(args.board, args.world_size))
    with contextlib.suppress(PeerGone):  # nobody is there to be told
        worker.serve()
    sys.stdout.flush()
    sys.stderr.flush()
    # The threads of a process group can hold up an ordinary exit when a peer left first; nothing is left to save.
    os._exit(0)


if __name__ == "__main__":
    main()
