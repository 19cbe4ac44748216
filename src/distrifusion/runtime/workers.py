"""The caller's side of the worker processes: starting them, asking them, and ending them whatever has happened."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers

from distrifusion.errors import RankFailed, StepTimeout
from distrifusion.plan import Plan
from distrifusion.runtime.board import Board
from distrifusion.runtime.operations import Open
from distrifusion.runtime.source import PipelineFacts, Source
from distrifusion.runtime.wire import Close, Failure, Line, PeerGone, Reply, Request, StepAnswer, pack, unpack

# Seconds between two looks at the board and the processes while ranks compute.
_LOOK = 0.25
# Seconds that other ranks get to fail likewise after one failed: an error of the arguments comes from all of them
# within moments, and a rank whose peer failed alone waits in an exchange for ever.
_GRACE = 3.0
# Seconds that a worker gets to end by itself.
_FAREWELL = 5.0


@dataclass(frozen=True)
class Crew:
    """What the workers are started with.

    Attributes:
        devices: one per rank.
        threads: CPU threads per rank.
        step_timeout: seconds without a finished step after which a call is given up.
        start_timeout: seconds for starting and for requests outside the loop, reading weights included.
    """

    source: Source
    plan: Plan
    devices: tuple[torch.device, ...]
    backend: str
    threads: int
    step_timeout: float
    start_timeout: float


@dataclass
class _Started:
    """Processes that run, in rank order, and what they share with the caller."""

    processes: list[subprocess.Popen[bytes]]
    lines: list[Line]
    board: Board
    store: dist.TCPStore


@dataclass
class _Answers:
    """What has come back on one request."""

    waiting: set[int]
    values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    first_trouble: float | None = None

    def trouble(self) -> None:
        self.first_trouble = self.first_trouble or time.monotonic()


class Workers:
    """One process per rank, started by `start` and serving requests until `close`."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.facts: PipelineFacts | None = None
        self._started: _Started | None = None
        self._owner = os.getpid()
        self._requests = 0
        self._early: dict[int, dict[int, Reply]] = {}

    @property
    def running(self) -> bool:
        """True between a start and the end of the processes."""
        return self._started is not None

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in rank order; empty when nothing runs."""
        return tuple(process.pid for process in self._started.processes) if self._started else ()

    def start(self) -> PipelineFacts:
        """Start the processes and open the pipeline in each.

        Raises:
            RankFailed, StepTimeout: if a rank fails alone or `start_timeout` passes. Any error that all ranks raise
                alike when they open the pipeline.
        """
        num_ranks = len(self.crew.devices)
        limit = datetime.timedelta(seconds=self.crew.start_timeout)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit, wait_for_workers=False)
        board = Board.create(num_ranks)
        self._started = _Started([], [], board, store)
        self._early = {}
        try:
            for rank in range(num_ranks):
                self._spawn(rank, self._started)
            opens = [self._open(rank, store.port) for rank in range(num_ranks)]
            self.facts = self.request(opens, self.crew.start_timeout)[0]
        except RaisedAlike as alike:
            self.end()
            raise alike.failure.error() from alike.failure.cause()
        except BaseException:
            self.end()
            raise
        assert self.facts is not None
        return self.facts

    def request(
        self,
        payloads: Sequence[bytes],
        limit: float,
        on_event: Callable[[Any, int], None] | None = None,
    ) -> list[Any]:
        """Ask ranks 0 to n-1 for one operation each; returns their answers.

        Args:
            payloads: a packed operation for every rank that is asked.
            limit: seconds without any sign of progress after which all workers are ended.
            on_event: called with every message that rank 0 sends meanwhile, and the id of the request.

        Raises:
            RaisedAlike: if all ranks asked raised the same error; the workers live on.
            RankFailed, StepTimeout: otherwise; all workers are ended.
        """
        assert self._started is not None
        self._requests += 1
        number = self._requests
        answers = _Answers(set(range(len(payloads))))
        try:
            for rank, payload in enumerate(payloads):
                self._tell(rank, Request(number, payload), answers)
            self._collect(number, answers, limit, on_event)
        except BaseException:
            # Ctrl-C, or a verdict: where the ranks stand is not known any more.
            if answers.waiting or answers.gone:
                self.end()
            raise
        return [answers.values[rank] for rank in range(len(payloads))]

    def answer_step(self, answer: StepAnswer) -> None:
        """Tell every rank how the caller's callback ended."""
        for line in self._started.lines if self._started else ():
            # A rank that is gone is found, and named, by the collecting of answers.
            _try_send(line, answer)

    def end(self) -> None:
        """End all processes at once."""
        started, self._started = self._started, None
        if started is None:
            return
        for line in started.lines:
            line.close()
        for process in started.processes:
            process.kill()
        for process in started.processes:
            process.wait()
        started.board.close()

    def close(self) -> None:
        """Let the processes end, and end those that do not within seconds; a forked copy of the caller does nothing."""
        if self._started is None or os.getpid() != self._owner:
            return
        for line in self._started.lines:
            _try_send(line, Close())
        until = time.monotonic() + _FAREWELL
        for process in self._started.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.end()

    def _spawn(self, rank: int, started: _Started) -> None:
        here, there = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            here.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(self.crew.step_timeout) + 1, 0))
        numbers = {
            "rank": rank,
            "world-size": len(self.crew.devices),
            "connection": there.fileno(),
            "board": started.board.fd,
            "parent": os.getpid(),
        }
        command = [sys.executable, "-m", "distrifusion.runtime.worker", *(f"--{k}={v}" for k, v in numbers.items())]
        with there:
            started.lines.append(Line(Connection(here.detach())))
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(there.fileno(), started.board.fd),
                env=_environment(self.crew, rank),
            )
        started.processes.append(process)

    def _open(self, rank: int, port: int) -> bytes:
        crew = self.crew
        # The caller judges time; the collectives' own limit only frees a rank that nobody judges any more.
        limit = max(crew.step_timeout, crew.start_timeout) + 60
        bars = [log.is_progress_bar_enabled() for log in (diffusers.utils.logging, transformers.utils.logging)]
        device, plan = str(crew.devices[rank]), str(crew.plan)
        op = Open(device, crew.backend, plan, port, crew.threads, limit, crew.source, rank == 0 and all(bars))
        return pack(op, modules=True)[0]

    def _tell(self, rank: int, message: object, answers: _Answers) -> None:
        assert self._started is not None
        if not _try_send(self._started.lines[rank], message):
            answers.waiting.discard(rank)
            answers.gone.append(rank)
            answers.trouble()

    def _collect(
        self, number: int, answers: _Answers, limit: float, on_event: Callable[[Any, int], None] | None
    ) -> None:
        assert self._started is not None
        board = self._started.board
        seen, progress = board.read(), time.monotonic()
        while answers.waiting and not _overdue(answers.first_trouble, _GRACE):
            for rank in self._ready(answers):
                message = self._hear(rank, answers)
                if isinstance(message, Reply):
                    self._sort(number, rank, message, answers)
                elif message is not None and on_event is not None:
                    on_event(message, number)
                progress = time.monotonic()
            # Ends of this call that came while a callback of the caller made requests of its own.
            for rank, reply in self._early.pop(number, {}).items():
                self._note(rank, reply, answers)
            if self._started is None:
                raise RankFailed("the workers were ended by a request that the callback made")
            if board.read() != seen:
                seen, progress = board.read(), time.monotonic()
            if _overdue(progress, limit):
                raise self._timed_out(answers, limit)
        self._judge(answers)

    def _ready(self, answers: _Answers) -> Iterable[int]:
        assert self._started is not None
        lines = {self._started.lines[rank].fileno(): rank for rank in sorted(answers.waiting)}
        return [lines[fd] for fd in wait(list(lines), timeout=_LOOK)]  # type: ignore[index]

    def _hear(self, rank: int, answers: _Answers) -> Any:
        assert self._started is not None
        try:
            return self._started.lines[rank].receive()
        except PeerGone:
            answers.waiting.discard(rank)
            answers.gone.append(rank)
            answers.trouble()
            return None

    def _sort(self, number: int, rank: int, reply: Reply, answers: _Answers) -> None:
        if reply.id == number:
            self._note(rank, reply, answers)
        elif reply.id < number:
            # A rank's end of the call within whose callback this request is made.
            self._early.setdefault(reply.id, {})[rank] = reply

    def _note(self, rank: int, reply: Reply, answers: _Answers) -> None:
        answers.waiting.discard(rank)
        if reply.failure is None:
            answers.values[rank] = unpack(reply.value, self.crew.devices[0])[0]
        else:
            answers.failures[rank] = reply.failure
            answers.trouble()

    def _judge(self, answers: _Answers) -> None:
        failures = answers.failures
        if answers.gone:
            raise self._gone(min(answers.gone))
        if not failures:
            return
        rank, failure = next(iter(failures.items()))
        if not answers.waiting and not answers.values and all(f.like(failure) for f in failures.values()):
            raise RaisedAlike(failure)
        step = self._step(rank)
        self.end()
        message = f"rank {rank} failed {_where(step)}: {failure.kind}: {failure.message}"
        raise RankFailed(message, rank=rank, step=step) from failure.error()

    def _gone(self, rank: int) -> RankFailed:
        assert self._started is not None
        step, process = self._step(rank), self._started.processes[rank]
        try:
            code = process.wait(_LOOK)
        except subprocess.TimeoutExpired:
            how = "does not answer any more"
        else:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
        self.end()
        return RankFailed(f"the process of rank {rank} {how} {_where(step)}", rank=rank, step=step)

    def _timed_out(self, answers: _Answers, limit: float) -> StepTimeout:
        assert self._started is not None
        steps = self._started.board.read()
        rank = min(answers.waiting, key=lambda waiting: (steps[waiting], waiting))
        step = self._step(rank)
        self.end()
        return StepTimeout(
            f"no rank moved on for {limit:g} s; rank {rank} is last, {_where(step)}", rank=rank, step=step
        )

    def _step(self, rank: int) -> int | None:
        return self._started.board.step_of(rank) if self._started else None


class RaisedAlike(Exception):
    """Carries a failure that all ranks reported alike."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _where(step: int | None) -> str:
    return "outside the denoising loop" if step is None else f"in step {step}"


def _overdue(since: float | None, limit: float) -> bool:
    return since is not None and time.monotonic() - since > limit


def _try_send(line: Line, message: object) -> bool:
    try:
        line.send(message)
    except PeerGone:
        return False
    return True


def _environment(crew: Crew, rank: int) -> dict[str, str]:
    """The caller's environment, its import path, and what must stand before the libraries are imported.

    Rank 0 warns as the caller's process would; the others would only repeat it.
    """
    levels = {
        "DIFFUSERS_VERBOSITY": diffusers.utils.logging.get_verbosity(),
        "TRANSFORMERS_VERBOSITY": transformers.utils.logging.get_verbosity(),
    }
    first = rank == 0
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *(os.path.abspath(path) for path in sys.path if path != package)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(crew.threads),
        "MKL_NUM_THREADS": str(crew.threads),
        **{name: logging.getLevelName(level if first else logging.ERROR).lower() for name, level in levels.items()},
        **({} if first else {"PYTHONWARNINGS": "ignore"}),
        # All ranks are on this machine, whatever its name resolves to.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
