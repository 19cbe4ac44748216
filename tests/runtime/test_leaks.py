"""Pipelines come and go and leave nothing: no process, no thread, no file descriptor, no shared memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from distrifusion import load
from distrifusion.errors import RankFailed
from distrifusion.runtime.spawned import SpawnedPipeline
from runtime.faulty import gone_within, hit, is_alive, parent_of

NUM_CYCLES = 200 if os.environ.get("DISTRIFUSION_LONG_TESTS") == "1" else 2


def traces() -> dict[str, Any]:
    """What this process holds or has started."""
    gc.collect()
    return {
        "processes": sorted(children(os.getpid())),
        "threads": len(os.listdir("/proc/self/task")),
        "file descriptors": sorted(targets()),
        "shared memory": sorted(unused_shared_memory()),
    }


def targets() -> Iterator[str]:
    """Where the open file descriptors lead; sockets and pipes by their kind."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            yield os.readlink(f"/proc/self/fd/{fd}").partition(":[")[0]


def unused_shared_memory() -> Iterator[str]:
    """What lies in shared memory and no running program uses."""
    maps = ""
    for entry in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            maps += entry.read_text()
    for name in os.listdir("/dev/shm"):
        if f"/dev/shm/{name}" not in maps:
            yield name


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
def settled(sdxl_folder: Path) -> dict[str, Any]:
    """The traces after a first pipeline, whose libraries keep what they need."""
    come_and_go(sdxl_folder, closed)
    return traces()


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
def test_nothing_is_left(sdxl_folder: Path, settled: dict[str, Any], end: Callable[[SpawnedPipeline], None]) -> None:
    come_and_go(sdxl_folder, end)
    assert traces() == settled


@pytest.mark.timeout(60 + 30 * NUM_CYCLES)
def test_many_pipelines_leave_nothing(sdxl_folder: Path, settled: dict[str, Any]) -> None:
    for cycle in range(NUM_CYCLES):
        come_and_go(sdxl_folder, closed)
        assert traces() == settled, f"in cycle {cycle}"


def test_a_load_that_fails_leaves_nothing(settled: dict[str, Any]) -> None:
    def build() -> Any:
        raise LookupError("no weights")

    with pytest.raises(LookupError, match="no weights"):
        load(build, devices=2)
    assert traces() == settled
