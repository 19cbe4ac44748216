"""Asking the worker processes, and judging what comes back: an answer, an error of all, or the failure of one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import diffusers
import transformers

from distrifusion.errors import RankFailed, StepTimeout
from distrifusion.runtime.board import Board
from distrifusion.runtime.faults import where
from distrifusion.runtime.line import PeerGone
from distrifusion.runtime.operations import Open
from distrifusion.runtime.processes import GRACE_STOPPED, Crew, Processes, RankStarter
from distrifusion.runtime.source import PipelineFacts
from distrifusion.runtime.wire import Failure, Reply, Request, StepAnswer, pack, unpack

# Seconds between two looks at the board and the processes while ranks compute.
_LOOK = 0.25
# Seconds that other ranks get to fail likewise after one failed; a rank whose peer failed alone may wait for ever.
_GRACE = 3.0
# Seconds after a process has gone; its peers' errors are only consequences, and say what they waited for.
_GRACE_GONE = 1.5

OnEvent = Callable[[Any, int], None]


class RaisedAlike(Exception):
    """Carries a failure that all ranks reported alike."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class _Answers:
    """What has come back on one request, and since when something is wrong."""

    waiting: set[int]
    values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    trouble: float | None = None
    stopped: float | None = None

    def note_trouble(self) -> None:
        self.trouble = self.trouble or time.monotonic()


class Workers:
    """One process per rank, started by `start` and serving requests until `close`."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.board = Board.create(len(crew.devices))
        self.facts: PipelineFacts | None = None
        self._owner = os.getpid()
        self._starter: RankStarter | None = None
        self._started: Processes | None = None
        self._requests = 0
        self._open_requests = 0
        self._early: dict[int, dict[int, Reply]] = {}

    @property
    def running(self) -> bool:
        """True if the processes can be asked; one that is gone while nothing is asked is no failure of a call."""
        return self._started is not None and (self._open_requests > 0 or self._started.are_alive)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in rank order; empty when nothing runs."""
        return self._started.pids if self._started else ()

    def start(self) -> None:
        """Start the processes and open the pipeline in each.

        Raises:
            RankFailed, OutOfMemory, StepTimeout: if a rank fails alone or `start_timeout` passes.
            Whatever all ranks raise alike when they open the pipeline.
        """
        if self._open_requests:
            self._running()  # raises: a new crew knows nothing of the call within whose callback this is asked
        self.end()
        self._early = {}
        self.board.clear()
        try:
            if self._starter is None or not self._starter.is_alive:
                self._starter = RankStarter(self.crew, self.board)
                self._open_once(self._starter)
            self._started = Processes.start(self.crew, self._starter)
            opens = [self._open(rank, self._started.store.port) for rank in range(len(self.crew.devices))]
            self.facts = self.request(opens, self.crew.start_timeout)[0]
        except RaisedAlike as alike:
            self._dismiss()
            raise alike.failure.error() from alike.failure.cause()
        except BaseException:
            self._dismiss()
            raise

    def request(self, payloads: Sequence[bytes], limit: float, on_event: OnEvent | None = None) -> list[Any]:
        """Ask ranks 0 to n-1 for one operation each; returns their answers.

        Args:
            payloads: a packed operation for every rank that is asked.
            limit: seconds without any sign of progress after which all workers are ended.
            on_event: called with every message that rank 0 sends meanwhile, and the id of the request.

        Raises:
            RaisedAlike: if all ranks asked raised the same error; the workers live on.
            RankFailed, OutOfMemory, StepTimeout: otherwise; all workers are ended.
        """
        started = self._running()
        self._requests += 1
        number = self._requests
        answers = _Answers(set(range(len(payloads))))
        self._open_requests += 1
        try:
            for rank, payload in enumerate(payloads):
                if not started.tell(rank, Request(number, payload)):
                    self._lose(rank, answers)
            self._collect(number, answers, limit, on_event)
            self._judge(answers)
        except RaisedAlike:
            raise
        except BaseException:
            # A verdict, or Ctrl-C: where the ranks stand is not known any more.
            self.end()
            raise
        finally:
            self._open_requests -= 1
        return [answers.values[rank] for rank in range(len(payloads))]

    def answer_step(self, answer: StepAnswer) -> None:
        """Tell every rank how the caller's callback ended; one that is gone is found where answers are collected."""
        if self._started is not None:
            for rank in range(len(self._started.lines)):
                self._started.tell(rank, answer)

    def end(self) -> None:
        """End all processes at once."""
        started, self._started = self._started, None
        if started is not None:
            started.end()

    def close(self) -> None:
        """Let the processes end; a forked copy of the caller, whose they are not, does nothing."""
        if self._owner != os.getpid():
            return
        started, self._started = self._started, None
        if started is not None:
            started.close()
        self._dismiss()
        self.board.close()

    def _dismiss(self) -> None:
        """End the ranks and what starts them."""
        self.end()
        starter, self._starter = self._starter, None
        if starter is not None:
            starter.close()

    def _open_once(self, starter: RankStarter) -> None:
        """Let ranks on CPU share the memory of one pipeline."""
        if self.crew.devices[0].type != "cpu":
            return
        failure = starter.open_once(self._open(0, 0))
        if failure is not None:
            raise failure.error() if failure.is_out_of_memory else RaisedAlike(failure)

    def _open(self, rank: int, port: int) -> bytes:
        crew = self.crew
        # The caller judges time; the collectives' own limit only frees a rank that nobody judges any more.
        limit = max(crew.step_timeout, crew.start_timeout) + 60
        bars = [log.is_progress_bar_enabled() for log in (diffusers.utils.logging, transformers.utils.logging)]
        op = Open(
            device=str(crew.devices[rank]),
            backend=crew.backend,
            plan=str(crew.plan),
            port=port,
            threads=crew.threads,
            limit=limit,
            source=crew.source,
            bars=rank == 0 and all(bars),
            argv=tuple(sys.argv),
            graphs=crew.graphs,
        )
        return pack(op, modules=True)[0]

    def _running(self) -> Processes:
        if self._started is None:
            raise RankFailed("the workers were ended by a failure within the callback")
        return self._started

    def _collect(self, number: int, answers: _Answers, limit: float, on_event: OnEvent | None) -> None:
        seen, progress = self.board.read(), time.monotonic()
        while not self._settled(answers):
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
            steps = self.board.read()
            if steps != seen:
                seen, progress = steps, time.monotonic()
            self._look_for_stopped(answers)
            if _overdue(progress, limit):
                raise self._timed_out(answers, limit)

    def _settled(self, answers: _Answers) -> bool:
        """True if nothing more is to be waited for."""
        return not answers.waiting or _overdue(answers.trouble, _GRACE_GONE if answers.gone else _GRACE)

    def _ready(self, answers: _Answers) -> list[int]:
        started = self._running()
        ranks = {started.lines[rank].fileno(): rank for rank in sorted(answers.waiting)}
        return [ranks[fd] for fd in wait(list(ranks), timeout=_LOOK)]  # type: ignore[index]

    def _hear(self, rank: int, answers: _Answers) -> Any:
        try:
            return self._running().lines[rank].receive()
        except PeerGone:
            self._lose(rank, answers)
            return None

    def _lose(self, rank: int, answers: _Answers) -> None:
        answers.waiting.discard(rank)
        answers.gone.append(rank)
        answers.note_trouble()

    def _sort(self, number: int, rank: int, reply: Reply, answers: _Answers) -> None:
        if reply.id == number:
            self._note(rank, reply, answers)
        else:
            # The end of the call within whose callback this request is made.
            self._early.setdefault(reply.id, {})[rank] = reply

    def _note(self, rank: int, reply: Reply, answers: _Answers) -> None:
        answers.waiting.discard(rank)
        if reply.failure is None:
            answers.values[rank] = unpack(reply.value, self.crew.devices[0])[0]
        else:
            answers.failures[rank] = reply.failure
            answers.note_trouble()

    def _look_for_stopped(self, answers: _Answers) -> None:
        """Raise if a process that is waited for has been stopped by a signal for some time."""
        started = self._running()
        stopped = [rank for rank in sorted(answers.waiting) if started.is_stopped(rank)]
        answers.stopped = (answers.stopped or time.monotonic()) if stopped else None
        if _overdue(answers.stopped, GRACE_STOPPED):
            raise self._failed(stopped[0], "was stopped by a signal", answers)

    def _judge(self, answers: _Answers) -> None:
        """Raise if anything went wrong: who is gone first, then an error of all, then the first that failed."""
        started = self._running()
        if answers.gone:
            rank = answers.gone[0]
            raise self._failed(rank, started.ending(rank), answers)
        if not answers.failures:
            return
        if short := [failure for failure in answers.failures.values() if failure.is_out_of_memory]:
            # Each may have stopped at another place, so what they sent each other is not in step any more.
            raise short[0].error()
        rank, failure = next(iter(answers.failures.items()))
        alike = all(other.like(failure) for other in answers.failures.values())
        if alike and not answers.waiting and not answers.values:
            raise RaisedAlike(failure)
        what = f"rank {rank} failed {where(failure.step)}: {failure.kind}: {failure.message}"
        raise RankFailed(what, rank=rank, step=failure.step, exchange=failure.exchange) from failure.error()

    def _timed_out(self, answers: _Answers, limit: float) -> StepTimeout:
        rank = min(answers.waiting, key=self.board.progress_of)
        what = f"no rank moved on for {limit:g} s; rank {rank} is last, {self._place(rank)}"
        return StepTimeout(what, rank=rank, step=self.board.step_of(rank))

    def _failed(self, rank: int, how: str, answers: _Answers) -> RankFailed:
        what = f"the process of rank {rank} {how} {self._place(rank)}"
        exchange = next((failure.exchange for failure in answers.failures.values() if failure.exchange), None)
        if exchange is not None:
            what += f", while another waited for {exchange}"
        if signal.SIGKILL.name in how:
            what += "; the system ends processes in this way when memory runs out, see its log"
        return RankFailed(what, rank=rank, step=self.board.step_of(rank), exchange=exchange)

    def _place(self, rank: int) -> str:
        step = self.board.step_of(rank)
        return where(step) if step is None else f"{where(step)}, after exchange {self.board.num_exchanges(rank)}"


def _overdue(since: float | None, limit: float) -> bool:
    return since is not None and time.monotonic() - since > limit
