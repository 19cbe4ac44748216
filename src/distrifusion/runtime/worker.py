"""One rank in a process of its own: it serves requests until the caller goes away."""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import datetime
import inspect
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers

from distrifusion.exchange.meeting import transport_of
from distrifusion.in_place import called_alike, parallelize
from distrifusion.memory.use import weighing
from distrifusion.runtime import attributes, randomness
from distrifusion.runtime.board import Board
from distrifusion.runtime.cancelling import BoardAgreement, Boundaries
from distrifusion.runtime.counting import CountedTransport
from distrifusion.runtime.faults import typed
from distrifusion.runtime.fork_server import exit_after
from distrifusion.runtime.line import Line, PeerGone
from distrifusion.runtime.opening import prepare
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
from distrifusion.runtime.timing import StepClock, timed_tensors
from distrifusion.runtime.wire import (
    Close,
    Failure,
    Generators,
    Reply,
    Request,
    StepAnswer,
    pack,
    unpack,
)
from distrifusion.tracing import Tracer

# Seconds between two looks at whether the caller is still there.
_LOOK = 0.5
_PR_SET_PDEATHSIG = 1


class Worker:
    """The state of one rank: its line to the caller, its place, and after `Open` its pipeline."""

    def __init__(self, rank: int, line: Line, board: Board, opened: Any) -> None:
        self.rank = rank
        self.line = line
        self.board = board
        self.opened = opened
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
                    self.boundaries.loop_ends()
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
            states = randomness.capture(self.device, generators)
            error = typed(error, self.rank, self.boundaries.step)
            reply = Reply(request.id, failure=Failure.of(error, self.boundaries.step, pack(states)[0]))
        self.line.send(reply)

    def _open(self, op: Open, request: int, generators: Generators) -> PipelineFacts:
        self.device = torch.device(op.device)
        prepare(op)
        torch.set_num_threads(op.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        limit = datetime.timedelta(seconds=op.limit)
        store = dist.TCPStore("127.0.0.1", op.port, is_master=False, timeout=limit)
        dist.init_process_group(op.backend, store=store, rank=self.rank, world_size=self.board.num_ranks, timeout=limit)
        # One that was opened for all ranks is on the host, as they are.
        pipe, device = (op.source.open(), self.device) if self.opened is None else (self.opened, None)
        # Before parallelize gives it a class of its own, which the caller could not import.
        facts = facts_of(pipe)
        assert dist.group.WORLD is not None, "initialised above"
        transport = transport_of(dist.group.WORLD, self.device)
        counted = CountedTransport(transport, partial(self.board.count, self.rank))
        # A pipeline of somebody's own may go on after it has decoded, and then every rank needs the picture.
        pictures = "first" if facts.cls.__module__.startswith("diffusers.") else "all"
        self.pipe = parallelize(pipe, op.plan, counted, pictures, op.graphs, device)
        self.pipe.progress_bar = WatchedBars(partial(RelayedBar, self.line, self.rank), self.boundaries)
        return facts

    def _call(self, op: Call, request: int, generators: Generators) -> CallResult:
        randomness.restore(op.randomness, self.device, {})
        self.boundaries.begin(op.number)
        tracer = Tracer(self.pipe) if op.traced else None
        use = weighing(self.device) if op.weighed else None
        clock = StepClock(self.device)
        with tracer or contextlib.nullcontext():
            output = self.pipe(**op.arguments, **self._step_end(op, request, generators, clock))
        times, timeline = clock.times(), tracer.timeline() if tracer else None
        memory = use() if use else None
        if self.rank != 0:
            return CallResult(timeline=timeline, memory=memory)
        return CallResult(output, randomness.capture(self.device, generators), times, timeline, memory)

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
            "callback_on_step_end_tensor_inputs": list(
                timed_tensors(type(self.pipe)) if op.tensor_inputs is None else op.tensor_inputs
            ),
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
        with called_alike(self.pipe):
            value = attributes.resolve(self.pipe, op.path)(*op.args, **op.kwargs)
        answer = Same() if value is owner else Value(value if self.rank == 0 else None)
        return answer, randomness.capture(self.device, generators)


def _plain(scheduler: Any) -> Any:
    """A copy without the functions that a running call hangs on the object; they belong to this process."""
    plain = copy.copy(scheduler)
    for name in [name for name, value in vars(plain).items() if inspect.isfunction(value)]:
        delattr(plain, name)
    return plain


def set_loudness(verbosity: Mapping[str, int], warns: bool) -> None:
    """What a rank forked from a process with the libraries imported says; others read it from their environment."""
    diffusers.utils.logging.set_verbosity(verbosity["DIFFUSERS_VERBOSITY"])
    transformers.utils.logging.set_verbosity(verbosity["TRANSFORMERS_VERBOSITY"])
    if not warns:
        warnings.simplefilter("ignore")


def run(rank: int, line: int, board: int, num_ranks: int, parent: int, opened: Any = None) -> None:
    """Serve one rank until the caller or this process's parent is gone.

    Args:
        line: file descriptor of this end of the line to the caller.
        board: file descriptor of the board.
        parent: process id of the fork server.
        opened: the pipeline, where the fork server has opened it; None if this rank is to open it.
    """
    _end_with(parent)
    worker = Worker(rank, Line(socket.socket(fileno=line)), Board(board, num_ranks), opened)
    with contextlib.suppress(PeerGone):  # nobody is there to be told
        worker.serve()


def _end_with(parent: int) -> None:
    """Let this process end when its parent does, whatever it is doing then, stopped included where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    else:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


def main() -> None:
    """Serve one rank in a process that imported for itself; see `fork_server.py` for who calls this."""
    parser = argparse.ArgumentParser(prog="distrifusion.runtime.worker", description=main.__doc__)
    for name in ("rank", "line", "board", "num-ranks", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    exit_after(partial(run, args.rank, args.line, args.board, args.num_ranks, args.parent))


if __name__ == "__main__":
    main()
