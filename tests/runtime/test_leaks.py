"""Pipelines come and go and leave nothing: no process, no thread, no file descriptor, no shared memory."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distrifusion import load
from distrifusion.errors import RankFailed, StepTimeout
from distrifusion.runtime.spawned import SpawnedPipeline
from runtime.faulty import gone_within, hit, is_alive, parent_of

NUM_CYCLES = 200 if os.environ.get("DISTRIFUSION_LONG_TESTS") == "1" else 1  # beside the one that all are compared with


@dataclass
class Traces:
    """What this process holds or has started."""

    processes: Counter[int]
    threads: int
    descriptors: Counter[str]
    shared_memory: Counter[str]

    @classmethod
    def now(cls) -> Traces:
        gc.collect()
        return cls(
            Counter(children(os.getpid())),
            len(os.listdir("/proc/self/task")),
            Counter(targets()),
            Counter(shared_memory()),
        )

    def since(self, before: Traces) -> list[Any]:
        """What is here and was not before; libraries may have ended threads of their own meanwhile."""
        new = [self.processes - before.processes, self.descriptors - before.descriptors]
        new += [self.shared_memory - before.shared_memory]
        more = self.threads - before.threads
        return [traces for traces in new if traces] + [f"{more} threads"] * (more > 0)


def targets() -> Iterator[str]:
    """Where the open file descriptors lead; sockets and pipes by their kind."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            yield os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0]


def shared_memory() -> list[str]:
    """Names in shared memory; semaphores are those of other programs' multiprocessing, which nothing here uses."""
    return [name for name in os.listdir("/dev/shm") if not name.startswith("sem.")]


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdecimal() and parent_of(int(entry.name)) == pid:
                found.append(int(entry.name))
    return found


def closed(pipe: SpawnedPipeline) -> None:
    pipe.close()


def forgotten(pipe: SpawnedPipeline) -> None:
    """The last name of a pipeline goes out of use, without a close."""


def closed_after_a_failure(pipe: SpawnedPipeline) -> None:
    hit(pipe.pids[1], "stop")
    hit(pipe.pids[0], "kill")
    with pytest.raises(RankFailed):
        pipe._workers.request([b"", b""], 60)
    pipe.close()


@pytest.fixture(scope="module")
def settled(sdxl_folder: Path) -> Traces:
    """The traces after a first pipeline, whose libraries keep what they need."""
    come_and_go(sdxl_folder, closed)
    return Traces.now()


def come_and_go(folder: Path, end: Callable[[SpawnedPipeline], None]) -> None:
    pipe = load(folder, devices=2)
    assert isinstance(pipe, SpawnedPipeline)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("a", num_inference_steps=1).images) == 1
    pids = [parent_of(pipe.pids[0]), *pipe.pids]
    assert all(map(is_alive, pids))
    end(pipe)
    del pipe
    gc.collect()
    assert gone_within(pids, 10)


@pytest.mark.parametrize("end", [forgotten, closed_after_a_failure])
def test_nothing_is_left(sdxl_folder: Path, settled: Traces, end: Callable[[SpawnedPipeline], None]) -> None:
    come_and_go(sdxl_folder, end)
    assert not Traces.now().since(settled)


@pytest.mark.timeout(60 + 30 * NUM_CYCLES)
def test_many_pipelines_leave_nothing(sdxl_folder: Path, settled: Traces) -> None:
    for cycle in range(NUM_CYCLES):
        come_and_go(sdxl_folder, closed)
        assert not Traces.now().since(settled), f"in cycle {cycle}"


def test_restarts_leave_nothing(sdxl_folder: Path) -> None:
    with load(sdxl_folder, devices=2) as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        before: Traces | None = None
        for _ in range(4):
            pids = pipe.pids
            hit(pids[0], "kill")
            assert gone_within(pids[:1], 10)
            pipe("a", num_inference_steps=1)
            assert gone_within(pids, 10)
            before = before or Traces.now()
        assert before is not None and not Traces.now().since(before)


def test_a_load_that_takes_too_long_says_so_and_leaves_nothing(sdxl_folder: Path, settled: Traces) -> None:
    with pytest.raises(StepTimeout, match=r"starts the ranks gave no answer for 0\.5 s"):
        load(sdxl_folder, devices=2, start_timeout=0.5)
    assert not Traces.now().since(settled)


def test_a_load_that_fails_leaves_nothing(settled: Traces) -> None:
    def build() -> Any:
        raise LookupError("no weights")

    with pytest.raises(LookupError, match="no weights"):
        load(build, devices=2)
    assert not Traces.now().since(settled)
