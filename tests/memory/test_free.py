"""What is free for this process: of the machine, or of the tightest control group around it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from distrifusion.memory import free

MIB = 2**20


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of the system's control groups; `own` in it says which are this process's."""
    monkeypatch.setattr(free, "_CGROUP", tmp_path)
    monkeypatch.setattr(free, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


def test_without_limits_it_is_the_machines(groups: Path) -> None:
    found = free.node_memory()
    assert found.total == psutil.virtual_memory().total and 0 < found.free <= found.total
    put(groups, own="0::/a")
    put(groups / "a", memory__max="max", memory__current=100 * MIB)
    assert free.node_memory().total == found.total


@pytest.mark.parametrize("outer", [512, 64])
def test_the_tightest_group_counts_and_read_files_do_not(groups: Path, outer: int) -> None:
    put(groups, own="0::/a/b")
    put(groups / "a" / "b", memory__max=256 * MIB, memory__current=200 * MIB)
    put(groups / "a" / "b", memory__stat=f"anon 5\ninactive_file {30 * MIB}\nactive_file 7")
    put(groups / "a", memory__max=outer * MIB, memory__current=60 * MIB)
    found = free.node_memory()
    assert found.total == min(256, outer) * MIB
    assert found.free == min(86, outer - 60) * MIB


def test_version_1_is_read_too(groups: Path) -> None:
    put(groups, own="7:blkio:/\n4:memory:/x\n0::/")
    put(groups / "memory" / "x", memory__limit_in_bytes=128 * MIB, memory__usage_in_bytes=100 * MIB)
    put(groups / "memory" / "x", memory__stat=f"inactive_file 1\ntotal_inactive_file {8 * MIB}")
    assert free.node_memory() == free.NodeMemory(128 * MIB, 36 * MIB)


def test_a_group_over_its_limit_has_nothing_free(groups: Path) -> None:
    put(groups, own="0::/")
    put(groups, memory__max=64 * MIB, memory__current=65 * MIB)
    assert free.node_memory().free == 0


def test_what_lies_idle_is_given_back_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(free, "trim", lambda: trims.append(1))
    monkeypatch.setattr(free, "node_memory", lambda: free.NodeMemory(100, 50))
    cpu = torch.device("cpu")
    assert (free.free_bytes(cpu, 50), trims) == (50, [])
    assert (free.free_bytes(cpu, 51), trims) == (50, [1])


def test_trimming_leaves_tensors_alone() -> None:
    kept = torch.arange(1000)
    del_me = [torch.ones(5000) for _ in range(100)]
    del del_me
    free.trim()
    assert kept.sum().item() == 499500


def test_a_gpu_is_asked_and_what_its_allocator_holds_unused_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def answer(value: object) -> object:
        return lambda device: asked.append(device) or value

    monkeypatch.setattr(torch.cuda, "mem_get_info", answer((7 * MIB, 80 * MIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", answer(5 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", answer(2 * MIB))
    gpu = torch.device("cuda:1")
    assert free.free_bytes(gpu, wanted=100 * MIB) == 10 * MIB
    assert set(asked) == {gpu} and len(asked) == 3
