"""What a process has taken of memory: by the system's counters, also of what it has given back since."""

from __future__ import annotations

import mmap
import multiprocessing as mp
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from distrifusion.memory import use
from distrifusion.memory.use import MemoryUse, weighing

CPU = torch.device("cpu")
MIB = 2**20
SIZE = 64 * MIB
NOISE = 16 * MIB  # of a process that has run other tests

linux = pytest.mark.skipif(sys.platform != "linux", reason="the counters are Linux's")


def fill(size: int = SIZE) -> torch.Tensor:
    """Pages mapped for it alone: the system has them back when the tensor is gone, whatever the C library keeps."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


@linux
def test_what_was_held_at_once_counts_though_it_is_gone() -> None:
    kept = fill()
    found = weighing(CPU)
    for _ in range(3):
        fill()
    first = found()
    assert not first.missing and first.grown is not None and first.peak is not None and first.own is not None
    assert abs(first.grown - SIZE) < NOISE
    assert first.peak > 2 * SIZE and SIZE < first.own < first.peak
    del kept


@linux
def test_what_was_before_is_forgotten() -> None:
    fill(3 * SIZE)
    found = weighing(CPU)
    grown = found().grown
    assert grown is not None and grown < NOISE


@linux
def test_pages_of_files_are_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(SIZE))
    found = weighing(CPU)
    read = torch.from_file(str(file), size=SIZE, dtype=torch.uint8)
    assert read.max() == 0
    grown = found().grown
    assert grown is not None and grown < NOISE


def _in_copy(line: Connection, inherited: bytearray, writes: bool) -> None:
    found = weighing(CPU)
    for place in range(0, len(inherited), mmap.PAGESIZE):
        value = inherited[place]
        if writes:
            inherited[place] = value + 1
    line.send(found())


@linux
@pytest.mark.parametrize("writes", [True, False])
def test_a_page_that_a_fork_shares_counts_once_it_is_written_to(writes: bool) -> None:
    here, there = mp.Pipe()
    inherited = bytearray(b"1") * SIZE  # no tensor: a fork takes no threads along that could compute
    copy = mp.get_context("fork").Process(target=_in_copy, args=(there, inherited, writes))
    copy.start()
    there.close()
    found: MemoryUse = here.recv()
    copy.join()
    expected = SIZE if writes else 0
    assert found.grown is not None and abs(found.grown - expected) < NOISE


def test_where_the_system_does_not_tell_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(use, "_PROCESS", tmp_path / "nowhere")
    found = weighing(CPU)()
    assert found.grown is None and found.peak is None and found.own is None
    assert "nowhere/smaps" in found.missing and "No such file" in found.missing


def test_on_a_gpu_it_is_what_tensors_held(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(name: str, value: int | None) -> None:
        monkeypatch.setattr(torch.cuda, name, lambda _device: asked.append(name) or value)

    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 5 * MIB)):
        answer(name, value)
    answer("max_memory_allocated", 12 * MIB)
    found = weighing(torch.device("cuda:1"))
    assert asked == ["synchronize", "reset_peak_memory_stats", "memory_allocated"]
    assert found() == MemoryUse(grown=7 * MIB, peak=12 * MIB)
