"""Real processes joined by gloo, started once, that run functions sent to them by name."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Imported once by the server from which the ranks are forked.
_PRELOADED = [
    "torch.distributed.device_mesh",
    "distrifusion",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
]

# Seconds that the others have once a rank has failed: they wait for it, and what they say is not the cause.
_AFTER_AN_ERROR = 10.0


@dataclass(frozen=True)
class Answer:
    """What came of a function on one rank: its value, or the traceback of its error, or nothing if the rank died."""

    value: Any = None
    error: str | None = None
    died: bool = False


class GlooWorld:
    """`num_ranks` processes in one gloo group, each with one thread.

    Args:
        num_ranks: at least 1.
        timeout: limit in seconds of every wait between ranks, and of the wait for an answer beyond that.
    """

    def __init__(self, num_ranks: int, timeout: float) -> None:
        self.num_ranks = num_ranks
        self.timeout = timeout
        self._ranks: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory()

    def run(self, work: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """The results, by rank, of `work(mesh, *args)` on the first `ranks` ranks (all, if None).

        Raises:
            AssertionError: if a rank failed; the world is stopped, and started anew for the next run.
        """
        answers = self.ask(work, *args, ranks=ranks)
        failed = [f"rank {i}: {a.error or 'died'}" for i, a in enumerate(answers) if a.error or a.died]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [answer.value for answer in answers]

    def ask(self, work: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Answer]:
        """As `run`, but errors and deaths of ranks are answers; a world that lost a rank is started anew."""
        self._start()
        asked = self._ranks[:ranks]
        for _, connection in asked:
            connection.send_bytes(pickle.dumps((work, len(asked), args)))
        answers = self._collect([connection for _, connection in asked])
        if any(answer.died for answer in answers):
            self.stop()
        return answers

    def stop(self) -> None:
        """End the processes: a closed connection ends a rank, unless it waits for another one."""
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(3.0)
            process.kill()
            process.join()
        self._ranks = []
        self._folder.cleanup()

    def _start(self) -> None:
        if self._ranks:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "gloo"
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self.num_ranks, str(meeting), self.timeout, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _collect(self, connections: Sequence[Connection]) -> list[Answer]:
        answers: dict[Connection, Answer] = {}
        patience = 2 * self.timeout
        while len(answers) < len(connections):
            missing = [connection for connection in connections if connection not in answers]
            ready = wait(missing, patience)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    answers[connection] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    answers[connection] = Answer(died=True)
                if answers[connection].error:
                    patience = _AFTER_AN_ERROR
            if not ready:
                answers.update((connection, Answer(error="no answer in time")) for connection in missing)
        return [answers[connection] for connection in connections]


def _serve(rank: int, num_ranks: int, meeting: str, timeout: float, connection: Connection) -> None:
    """One rank: join the group, then answer until the connection is closed."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_ranks, timeout=limit)
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in range(1, num_ranks + 1)}
    while True:
        try:
            work, ranks, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = Answer(work(meshes[ranks], *args))
        except Exception:
            answer = Answer(error=traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
