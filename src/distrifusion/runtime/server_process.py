"""The process of a fork server as the caller starts it: when ranks are wanted, or before anybody knows what they draw.

The caller and the fork server import the same libraries, which takes either of them seconds. A command whose words say
that it will want ranks starts this process before it imports them itself, so that both do so at once. Nothing heavy is
imported here for that reason.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# The variables that diffusers and transformers read the levels of their loggers from.
VERBOSITY = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY")

# Its orders are pickled by the names of their classes, which a module that is run as a program would not have.
_SERVE = "from distrifusion.runtime.fork_server import main; main()"


@dataclass(frozen=True)
class ServerProcess:
    """A process that imports what all ranks need and then waits for orders (see `fork_server.py`).

    Attributes:
        threads: CPU threads of every rank, which its libraries read when they are imported.
        end: this side's end of the line to it.
    """

    threads: int
    process: subprocess.Popen[bytes]
    end: socket.socket

    @classmethod
    def start(cls, threads: int, verbosity: Mapping[str, int]) -> ServerProcess:
        """Start one; it ends with this process.

        Args:
            verbosity: levels of the libraries' loggers, by the names of `VERBOSITY`.
        """
        here, there = socket.socketpair()
        with there:
            numbers = {"line": there.fileno(), "parent": os.getpid()}
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, *(f"--{name}={number}" for name, number in numbers.items())],
                stdin=subprocess.DEVNULL,
                pass_fds=(there.fileno(),),
                env=_environment(threads, verbosity),
            )
        return cls(threads, process, here)

    @property
    def is_alive(self) -> bool:
        """True while it can be asked."""
        return self.process.poll() is None

    def end_now(self) -> None:
        """End it; ranks that still run end with it."""
        self.process.kill()
        self.process.wait()
        self.end.close()


class _Waiting:
    """The one process that was started early, until somebody takes it."""

    server: ServerProcess | None = None


@contextmanager
def started_early(threads: int, verbosity: Mapping[str, int]) -> Iterator[None]:
    """Within, the first fork server that is wanted for ranks of so many threads is there already.

    One that nobody has taken until the end, because the command went wrong or was interrupted, is ended.
    """
    _Waiting.server = ServerProcess.start(threads, verbosity)
    try:
        yield
    finally:
        left, _Waiting.server = _Waiting.server, None
        if left is not None:
            left.end_now()


def started(threads: int, verbosity: Mapping[str, int]) -> ServerProcess:
    """The process that was started early if it is one for such ranks, else a new one; whoever asks ends it."""
    early = _Waiting.server
    if early is None or early.threads != threads or not early.is_alive:
        return ServerProcess.start(threads, verbosity)
    _Waiting.server = None
    return early


def _environment(threads: int, verbosity: Mapping[str, int]) -> dict[str, str]:
    """The caller's environment, its import path, and what must stand before the libraries are imported."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *(os.path.abspath(path) for path in sys.path if path != package)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Numpy's and scipy's linear algebra would start threads on import, and a fork leaves threads behind.
        "OPENBLAS_NUM_THREADS": "1",
        # Asking the driver itself whether there is a GPU would forbid its use after a fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **{name: logging.getLevelName(level).lower() for name, level in verbosity.items()},
        # All ranks are on this machine, whatever its name resolves to.
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
