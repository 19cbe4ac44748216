"""A tiny pipeline that is measured, and a machine that need not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrifusion.planner import calibration
from distrifusion.planner.links import PROFILES
from distrifusion.planner.speeds import DEVICES
from runtime.tiny import write_sdxl


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTRIFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure_speed", lambda *_: DEVICES["a100"])
    monkeypatch.setattr(calibration, "measure_ranks", lambda *_: (PROFILES["pcie4"], 1.1))
