"""What is wrong is found, and what is right is not."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from distrifusion.doctor import advice, machine, network, versions
from distrifusion.doctor.advice import Level
from distrifusion.doctor.gpus import Gpu, parse_topology
from distrifusion.doctor.machine import Machine
from distrifusion.doctor.network import Network
from distrifusion.doctor.versions import Package
from distrifusion.memory import free

GIB = 2**30
LARGE = Machine("Linux", "a processor", 16, None, 64 * GIB, 60 * GIB, 32 * GIB, 32 * GIB, 4096)
GPUS = tuple(Gpu(i, "a GPU", 80 * GIB, 79 * GIB, "9.0", tuple({0, 1} - {i})) for i in range(2))
TOPOLOGY = """\
\x1b[4m        GPU0    GPU1    GPU2    CPU Affinity\x1b[0m
GPU0     X      NV18    SYS     0-31
GPU1    NV18     X      PHB     0-31
GPU2    SYS     PHB      X      32-63

Legend:
  X    = Self
"""


def test_a_large_machine_needs_no_advice() -> None:
    assert list(advice.on_machine(LARGE, 8, 0)) == []
    assert list(advice.on_machine(LARGE, 2, 2)) == []


@pytest.mark.parametrize(
    ("changes", "num_gpus", "says"),
    [
        ({"cores": 4}, 0, "8 CPU ranks on 4 core"),
        ({"cpu_quota": 8.0}, 0, "shows 16 cores and grants the time of 8"),
        ({"free_memory": 2 * GIB}, 0, "2.0 GiB of memory are free"),
        ({"shm": 64 * 2**20}, 2, "/dev/shm has 64 MiB"),
        ({"open_files": 64}, 0, "may open 64 files"),
    ],
)
def test_too_little_of_something(changes: dict[str, object], num_gpus: int, says: str) -> None:
    (finding,) = advice.on_machine(replace(LARGE, **changes), 8, num_gpus)
    assert finding.level is Level.ADVICE and says in finding.says and finding.remedy


def test_cores_do_not_matter_where_there_are_gpus_and_shm_does_not_without() -> None:
    assert list(advice.on_machine(replace(LARGE, cores=2), 8, 8)) == []
    assert list(advice.on_machine(replace(LARGE, shm=1), 8, 1)) == []


@pytest.mark.parametrize(
    ("package", "level"),
    [
        (Package("torch", "2.8.0+cpu", ">=2.6,<2.14", None), None),
        (Package("torch", "2.5.1", ">=2.6,<2.14", None), Level.PROBLEM),
        (Package("torch", "2.14.0", ">=2.6,<2.14", None), Level.ADVICE),
        (Package("torch", None, ">=2.6,<2.14", None), Level.PROBLEM),
        (Package("torchsde", None, ">=0.2.6,<0.3", "sde"), None),
        (Package("torchsde", "0.1", ">=0.2.6,<0.3", "sde"), Level.PROBLEM),
    ],
)
def test_versions_are_judged_by_the_tested_range(package: Package, level: Level | None) -> None:
    assert [finding.level for finding in advice.on_packages([package])] == ([] if level is None else [level])


def test_the_ranges_are_those_of_the_project() -> None:
    found = {package.name: package for package in versions.packages()}
    assert found["torch"].tested.startswith(">=2.6,<") and found["torch"].extra is None
    assert found["torchsde"].extra == "sde" and "pytest" not in found
    assert versions.versions()["torch"] == found["torch"].version


def test_gpus() -> None:
    assert list(advice.on_gpus(GPUS, "a GPU, 580", "13.0")) == [] and list(advice.on_gpus((), None, None)) == []
    (built_without,) = advice.on_gpus((), "a GPU, 580", None)
    (cannot_use,) = advice.on_gpus((), "a GPU, 580", "13.0")
    assert "built without CUDA" in built_without.says and "CUDA_VISIBLE_DEVICES" in cannot_use.remedy
    assert {built_without.level, cannot_use.level} == {Level.PROBLEM}
    (apart,) = advice.on_gpus([replace(gpu, peers=()) for gpu in GPUS], None, "13.0")
    assert apart.level is Level.ADVICE and apart.says.endswith("directly: 0-1")


def test_links_of_gpus_are_read_from_the_drivers_table() -> None:
    assert parse_topology(TOPOLOGY) == {"0-1": "NV18", "0-2": "SYS", "1-2": "PHB"}
    assert parse_topology("") == {}


def test_network() -> None:
    good = Network({"lo": "127.0.0.1", "eth0": "10.0.0.2"}, "here", "10.0.0.2", "eth0", {"GLOO_SOCKET_IFNAME": "eth0"})
    assert list(advice.on_network(good)) == []
    (wrong,) = advice.on_network(replace(good, settings={"GLOO_SOCKET_IFNAME": "eth7"}))
    assert wrong.level is Level.PROBLEM and "eth7 names no interface" in wrong.says and "eth0" in wrong.remedy
    (nameless,) = advice.on_network(replace(good, address=None, interface=None))
    assert nameless.level is Level.ADVICE and "'here' has no address" in nameless.says


def test_a_name_that_is_never_resolved_is_waited_for_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_LIMIT", 0.05)
    never = threading.Event()
    monkeypatch.setattr(network.socket, "gethostbyname", lambda name: never.wait(30))
    assert network.look().address is None
    never.set()


def test_this_machine() -> None:
    here = machine.look()
    assert here.cores >= 1 and 0 < here.free_memory <= here.memory and here.cpu


def test_limits_of_a_container_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(free, "_CGROUP", tmp_path)
    monkeypatch.setattr(free, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    (tmp_path / "memory.current").write_text(f"{2**28}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2**27}\n")
    here = machine.look()
    assert here.cpu_quota == 1.5 and here.memory == 2**29 and here.free_memory == 2**28 + 2**27
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    here = machine.look()
    assert here.cpu_quota is None and here.memory > 2**29
