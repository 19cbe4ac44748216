"""The worker processes of one pipeline as the caller sees them: their lines, their ends, and a store to meet at."""

from __future__ import annotations

import datetime
import logging
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers

from distrifusion.errors import RankFailed, StepTimeout
from distrifusion.plan import Plan
from distrifusion.runtime import server_process
from distrifusion.runtime.board import Board
from distrifusion.runtime.fork_server import AskExit, EndRanks, OpenOnce, StartRank
from distrifusion.runtime.line import Line, PeerGone
from distrifusion.runtime.source import Source
from distrifusion.runtime.wire import Close, Failure

# Seconds that a process may be stopped: Ctrl-Z stops and continues the caller and the workers one by one.
GRACE_STOPPED = 3.0
# Seconds that a process gets to end by itself, and between two looks at whether it has.
_FAREWELL = 5.0
_LOOK = 0.01
# Seconds in which a killed process leaves its exit status.
_TRACE = 0.5
# Seconds in which the fork server, which has nothing else to do, kills the ranks.
_OBEYS = 3.0
# Letters of the process states of Linux: ended but not yet waited for, and stopped by a signal or a debugger.
_DEAD = ("Z", "X")
_STOPPED = ("T", "t")


@dataclass(frozen=True)
class Crew:
    """What the workers are started with.

    Attributes:
        devices: one per rank.
        threads: CPU threads per rank.
        step_timeout: seconds without a finished step after which a call is given up.
        start_timeout: seconds for starting and for requests outside the loop, reading weights included.
        graphs: as `parallelize` takes it.
    """

    source: Source
    plan: Plan
    devices: tuple[torch.device, ...]
    backend: str
    threads: int
    step_timeout: float
    start_timeout: float
    graphs: bool = False


class RankStarter:
    """The fork server of one pipeline (see `fork_server.py`); it outlives the ranks, so that a restart is quick."""

    def __init__(self, crew: Crew, board: Board) -> None:
        self._server = server_process.started(crew.threads, _verbosity())
        self._imports = _imports(crew.source)
        self._board = board
        self._start_timeout = self._limit = crew.start_timeout
        self._line = Line(self._server.end, self._check)

    @property
    def is_alive(self) -> bool:
        """True while ranks can be started."""
        return self._server.is_alive

    def open_once(self, payload: bytes) -> Failure | None:
        """Open the pipeline for all ranks that are started afterwards, where they can share it.

        Args:
            payload: rank 0's `Open`, packed.

        Raises:
            RankFailed: if the fork server is gone.
            StepTimeout: if it takes longer than `start_timeout`.
        """
        try:
            return self._ask(OpenOnce(payload), self._start_timeout)
        except PeerGone:
            raise self._gone() from None

    def start(self, rank: int) -> tuple[int, Line]:
        """Start the process of a rank; returns its id and the line to it.

        Raises:
            RankFailed: if the fork server is gone.
            StepTimeout: if it takes longer than `start_timeout` to import the libraries.
        """
        here, there = socket.socketpair()
        # Rank 0 warns as the caller's process would; the others would only repeat it.
        levels = _verbosity() if rank == 0 else dict.fromkeys(_verbosity(), logging.ERROR)
        order = StartRank(rank, self._board.num_ranks, self._imports, levels, warns=rank == 0)
        with there:
            try:
                pid = self._ask(order, self._start_timeout, there.fileno(), self._board.fd)
            except BaseException as error:
                here.close()
                if not isinstance(error, PeerGone):
                    raise
                raise self._gone(rank) from None
        return pid, Line(here)

    def exit_of(self, pid: int) -> int | None:
        """The exit status of a rank's process, None while it runs or when nobody knows."""
        try:
            return self._ask(AskExit(pid), _OBEYS)
        except (PeerGone, StepTimeout):
            return None

    def end_ranks(self) -> None:
        """End the ranks' processes at once."""
        with suppress(PeerGone, StepTimeout):
            self._ask(EndRanks(), _OBEYS)

    def close(self) -> None:
        """End the fork server; ranks that still run end with it."""
        self._server.end_now()

    def _gone(self, rank: int | None = None) -> RankFailed:
        with suppress(subprocess.TimeoutExpired):  # its line is cut before its exit status is known
            self._server.process.wait(_TRACE)
        return RankFailed(f"the process that starts the ranks {_ending(self._server.process.returncode)}", rank=rank)

    def _ask(self, order: object, limit: float, *fds: int) -> Any:
        self._limit = limit
        try:
            self._line.send(order)
            for fd in fds:
                self._line.send_fd(fd)
            return self._line.receive()
        except PeerGone:
            raise
        except BaseException:
            # A timeout, or Ctrl-C. An answer that comes late would be taken for that to the next question.
            self._server.process.kill()
            raise

    def _check(self, waited: float) -> None:
        if not self.is_alive:
            raise PeerGone("the fork server has ended")
        if waited > self._limit:
            raise StepTimeout(f"the process that starts the ranks gave no answer for {self._limit:g} s")


@dataclass
class Processes:
    """Running processes in rank order."""

    starter: RankStarter
    store: dist.TCPStore
    step_timeout: float
    lines: list[Line] = field(default_factory=list)
    pids: tuple[int, ...] = ()

    @classmethod
    def start(cls, crew: Crew, starter: RankStarter) -> Processes:
        """Start one process per rank of the crew."""
        limit = datetime.timedelta(seconds=crew.start_timeout)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit, wait_for_workers=False)
        started = cls(starter, store, crew.step_timeout)
        try:
            for rank in range(len(crew.devices)):
                started._add(rank)
        except BaseException:
            for line in started.lines:
                line.close()
            raise
        return started

    @property
    def are_alive(self) -> bool:
        """False if a process is gone; its line may stay open while its memory is being freed."""
        return not any(line.is_cut or self._state(rank) in _DEAD for rank, line in enumerate(self.lines))

    def tell(self, rank: int, message: object) -> bool:
        """Send a message to a rank; False if its process is gone or does not read."""
        try:
            self.lines[rank].send(message)
        except PeerGone:
            return False
        return True

    def is_stopped(self, rank: int) -> bool:
        """True if the process was stopped by a signal, where the system says so (Linux)."""
        return self._state(rank) in _STOPPED

    def _state(self, rank: int) -> str | None:
        """The letter that Linux has for what a process does; None where the system does not say."""
        try:
            return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return None

    def ending(self, rank: int) -> str:
        """How the process of a rank that is gone came to its end, in words."""
        if self.is_stopped(rank):
            return "was stopped by a signal"
        return _ending(self._exit_within(rank, time.monotonic() + _TRACE))

    def end(self) -> None:
        """End all processes at once."""
        for line in self.lines:
            line.close()
        self.starter.end_ranks()

    def close(self) -> None:
        """Let the processes end, and end those that do not within seconds."""
        for rank in range(len(self.lines)):
            self.tell(rank, Close())
        until = time.monotonic() + _FAREWELL
        for rank in range(len(self.lines)):
            self._exit_within(rank, until)
        self.end()

    def _add(self, rank: int) -> None:
        pid, line = self.starter.start(rank)
        self.pids = (*self.pids, pid)
        self.lines.append(line)

        def check(waited: float) -> None:
            if waited > self.step_timeout or (waited > GRACE_STOPPED and self.is_stopped(rank)):
                raise PeerGone(f"rank {rank} stopped within a message")

        line.idle = check

    def _exit_within(self, rank: int, until: float) -> int | None:
        while (code := self.starter.exit_of(self.pids[rank])) is None and time.monotonic() < until:
            time.sleep(_LOOK)
        return code


def _ending(code: int | None) -> str:
    if code is None:
        return "does not answer any more"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"


def _imports(source: Source) -> tuple[str, ...]:
    """Modules for the fork server: the pipeline; for a factory, the pipelines that the caller imported."""
    if source.facts is None:
        return tuple(name for name in sys.modules if name.startswith("diffusers.pipelines."))
    return (source.facts.cls.__module__,)


def _verbosity() -> dict[str, int]:
    """Levels of the libraries' loggers, by the environment variable that they are read from."""
    levels = (library.utils.logging.get_verbosity() for library in (diffusers, transformers))
    return dict(zip(server_process.VERBOSITY, levels, strict=True))
