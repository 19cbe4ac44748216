"""The worker processes of one pipeline and what they share with the caller: lines, board, and a store to meet at."""

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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers

from distrifusion.plan import Plan
from distrifusion.runtime.board import Board
from distrifusion.runtime.source import Source
from distrifusion.runtime.wire import Close, Line, PeerGone

# Seconds that a worker gets to end by itself.
_FAREWELL = 5.0
# Seconds in which a killed process leaves its exit status.
_TRACE = 0.5


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
class Processes:
    """Running processes in rank order."""

    board: Board
    store: dist.TCPStore
    lines: list[Line] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    owner: int = field(default_factory=os.getpid)

    @classmethod
    def start(cls, crew: Crew, board: Board) -> Processes:
        """Start one process per rank of the crew."""
        limit = datetime.timedelta(seconds=crew.start_timeout)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit, wait_for_workers=False)
        started = cls(board, store)
        try:
            for rank in range(len(crew.devices)):
                started._spawn(crew, rank)
        except BaseException:
            started.end()
            raise
        return started

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in rank order."""
        return tuple(process.pid for process in self.processes)

    def tell(self, rank: int, message: object) -> bool:
        """Send a message to a rank; False if its process is gone or does not read."""
        try:
            self.lines[rank].send(message)
        except PeerGone:
            return False
        return True

    def is_stopped(self, rank: int) -> bool:
        """True if the process was stopped by a signal, where the system says so (Linux)."""
        try:
            state = Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state in ("T", "t")

    def ending(self, rank: int) -> str:
        """How the process of a rank that is gone came to its end, in words."""
        try:
            code = self.processes[rank].wait(_TRACE)
        except subprocess.TimeoutExpired:
            return "does not answer any more"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"

    def end(self) -> None:
        """End all processes at once."""
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def close(self) -> None:
        """Let the processes end, and end those that do not within seconds."""
        for rank in range(len(self.lines)):
            self.tell(rank, Close())
        until = time.monotonic() + _FAREWELL
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.end()

    def _spawn(self, crew: Crew, rank: int) -> None:
        here, there = socket.socketpair()
        self.lines.append(Line(Connection(here.detach())))
        with there:
            _limit_waits(self.lines[rank].fileno(), crew.step_timeout)
            numbers = {
                "rank": rank,
                "world-size": len(crew.devices),
                "connection": there.fileno(),
                "board": self.board.fd,
                "parent": self.owner,
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "distrifusion.runtime.worker", *(f"--{k}={v}" for k, v in numbers.items())],
                stdin=subprocess.DEVNULL,
                pass_fds=(there.fileno(), self.board.fd),
                env=_environment(crew, rank),
            )
        self.processes.append(process)


def _limit_waits(fd: int, seconds: float) -> None:
    """A worker that stops within a message must not hold the caller for ever."""
    limit = struct.pack("ll", int(min(seconds, 1e6)) + 1, 0)
    with socket.socket(fileno=os.dup(fd)) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, limit)


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
