"""The process that starts the ranks of one pipeline: it imports the libraries once and forks a rank when it is asked.

Importing torch and diffusers takes seconds and a few hundred megabytes, which ranks forked here share. For ranks on CPU
it opens the pipeline too: they share its weights page by page, and a rank that writes to a page gets its own copy.

A fork takes only the thread that calls it along, so this process never has a second one and never touches an
accelerator. Where opening the pipeline does either, this process begins anew and every rank opens it; where libraries
do so on import, or off Linux, ranks are programs of their own that import for themselves too.

It ends with the caller, and its ranks end with it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from distrifusion.runtime.line import Line, PeerGone

# Seconds between two looks at whether the caller is still there, while the libraries are imported.
_LOOK = 0.5


@dataclass(frozen=True)
class OpenOnce:
    """Open the pipeline for all ranks that are started afterwards, if they can be forked. Answer: a Failure or None.

    Attributes:
        payload: rank 0's `Open`, packed.
    """

    payload: bytes


@dataclass(frozen=True)
class StartRank:
    """Start a process for a rank; its end of the line and the board follow as file descriptors. Answer: its id.

    Attributes:
        imports: modules that a rank will need, imported here once for all.
        verbosity: levels of the libraries' loggers, by the environment variable that they are read from.
        warns: Python's warnings are shown.
    """

    rank: int
    num_ranks: int
    imports: tuple[str, ...]
    verbosity: dict[str, int]
    warns: bool


@dataclass(frozen=True)
class AskExit:
    """Answer: the exit status of a rank's process, negative if a signal ended it; None while it runs."""

    pid: int


class EndRanks:
    """End the processes of all ranks at once. Answer: None, when they are gone."""


@dataclass
class ForkServer:
    """The ranks' processes that run, and the exit status of those that have ended."""

    line: Line
    parent: int
    pipe: Any = None
    running: set[int] = field(default_factory=set)
    exits: dict[int, int] = field(default_factory=dict)

    def serve(self) -> None:
        """Do what the caller asks until it is gone."""
        while True:
            match self.line.receive():
                case OpenOnce(payload):
                    self._open_once(payload)
                case StartRank() as order:
                    line, board = self.line.receive_fd(), self.line.receive_fd()
                    _import(order.imports)
                    pid = self._fork(order, line, board) if _may_fork() else self._spawn(order, line, board)
                    os.close(line)
                    os.close(board)
                    self.running.add(pid)
                    self.line.send(pid)
                case AskExit(pid):
                    self._reap(pid, os.WNOHANG)
                    self.line.send(self.exits.get(pid))
                case EndRanks():
                    self.end_ranks()
                    self.line.send(None)
                case order:
                    raise AssertionError(f"no order of the caller: {order!r}")

    def check_caller(self, _: float) -> None:
        """Raise PeerGone if the caller is gone; a copy of it may hold the line open."""
        if os.getppid() != self.parent:
            raise PeerGone("the caller is gone")

    def end_ranks(self) -> None:
        """Kill what runs."""
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
        for pid in list(self.running):
            self._reap(pid, 0)

    def _reap(self, pid: int, options: int) -> None:
        if pid in self.running:
            ended, status = os.waitpid(pid, options)
            if ended:
                self.running.discard(pid)
                self.exits[pid] = os.waitstatus_to_exitcode(status)

    def _open_once(self, payload: bytes) -> None:
        from distrifusion.runtime import opening

        if not _may_fork():
            self.line.send(None)
            return
        self.pipe, failure = opening.open_once(payload)
        self.line.send(failure)
        if not _may_fork():
            _begin_anew()
        gc.freeze()

    def _fork(self, order: StartRank, line: int, board: int) -> int:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            # Nothing of this copy may get back into the server's loop.
            exit_after(lambda: self._become_rank(order, line, board, server))
        return pid

    def _become_rank(self, order: StartRank, line: int, board: int, server: int) -> None:
        from distrifusion.runtime import worker

        self.line.close()
        worker.set_loudness(order.verbosity, order.warns)
        worker.run(order.rank, line, board, order.num_ranks, server, self.pipe)

    def _spawn(self, order: StartRank, line: int, board: int) -> int:
        numbers = {
            "rank": order.rank,
            "line": line,
            "board": board,
            "num-ranks": order.num_ranks,
            "parent": os.getpid(),
        }
        command = [sys.executable, "-m", "distrifusion.runtime.worker", *(f"--{k}={v}" for k, v in numbers.items())]
        os.set_inheritable(line, True)
        os.set_inheritable(board, True)
        levels = {name: logging.getLevelName(level).lower() for name, level in order.verbosity.items()}
        warnings = {} if order.warns else {"PYTHONWARNINGS": "ignore"}
        return os.posix_spawn(sys.executable, command, {**os.environ, **levels, **warnings})


@contextmanager
def _ending_with(caller: int) -> Iterator[None]:
    """Within, this process ends when the caller does, although it listens to nobody; without a thread that looks."""

    def look(*_: Any) -> None:
        if os.getppid() != caller:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.siginterrupt(signal.SIGALRM, False)  # nobody's system call is cut short
    signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _import(modules: Iterable[str]) -> None:
    for name in modules:
        with suppress(ImportError):  # a rank that needs it says so
            importlib.import_module(name)
    gc.freeze()


def _may_fork() -> bool:
    """True on Linux in a process of one thread that has not loaded CUDA's driver, which does not survive a fork."""
    if sys.platform != "linux" or len(os.listdir("/proc/self/task")) > 1:
        return False
    return "libcuda.so" not in Path("/proc/self/maps").read_text()


def _begin_anew() -> NoReturn:
    """Become a process without the threads that opening the pipeline left behind; there are no ranks yet."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def exit_after(work: Callable[[], None]) -> NoReturn:
    """Do the work of a process and end it, whatever the work comes to."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        # The threads of a process group can hold up an ordinary exit when a peer left first; nothing is left to save.
        os._exit(status)


def main() -> None:
    """Import, then serve; see `server_process.py` for who calls this."""
    # Ctrl-C reaches the whole terminal group: it is the caller who decides what becomes of the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="distrifusion.runtime.fork_server", description=main.__doc__)
    for name in ("line", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    with _ending_with(args.parent):
        _import(["distrifusion.runtime.worker"])
    server = ForkServer(Line(socket.socket(fileno=args.line)), args.parent)
    server.line.idle = server.check_caller
    with suppress(PeerGone):
        server.serve()
    server.end_ranks()
