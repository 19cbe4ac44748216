"""A calibration is measured once, read afterwards, and measured again when something has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blueprints import FAST, SPEED, unet

from distrifusion.errors import ConfigError
from distrifusion.planner import calibration, kernels, rank_calls
from distrifusion.planner.calibration import Circumstances, calibrated

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Counts measurements, which give made-up figures."""
    count: list[int] = []
    monkeypatch.setenv("DISTRIFUSION_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "measure_speed", lambda *_: count.append(1) or SPEED)
    monkeypatch.setattr(calibration, "measure_ranks", lambda *_: (FAST, 1.0))
    return count


def test_it_is_measured_once_for_a_model_a_dtype_and_a_number_of_threads(measured: list[int]) -> None:
    first = calibrated(unet(), CPU, 1, 2)
    again = calibrated(unet(), CPU, 1, 2)
    assert (again.speed, again.links, again.stale) == (first.speed, first.links, {})
    assert len(measured) == 1
    calibrated(unet(), CPU, 2, 2)
    assert len(measured) == 2


def test_other_versions_make_it_stale(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    file = Circumstances.here(unet(), CPU, 1, 2).file
    calibrated(unet(), CPU, 1, 2)
    kept = json.loads(file.read_text())
    kept["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(kept))
    assert calibrated(unet(), CPU, 1, 2).stale == {"torch": "1.0"}
    assert calibrated(unet(), CPU, 1, 2).stale == {}
    assert len(measured) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"versions": {}}'])
def test_one_that_cannot_be_read_names_its_file_and_the_remedy(measured: list[int], content: str) -> None:
    file = Circumstances.here(unet(), CPU, 1, 2).file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"calibration-.*delete it"):
        calibrated(unet(), CPU, 1, 2)


def test_a_rate_that_cannot_be_is_refused(measured: list[int]) -> None:
    file = Circumstances.here(unet(), CPU, 1, 2).file
    calibrated(unet(), CPU, 1, 2)
    kept = json.loads(file.read_text())
    kept["speed"]["rates"]["linear"] = 0
    file.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match="calibrate it again"):
        calibrated(unet(), CPU, 1, 2)


def test_this_machine_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BUDGET", 0.0)
    monkeypatch.setattr(rank_calls, "_BUDGET", 0.0)
    speed = kernels.measure_speed(unet(), CPU, 1)
    assert min(*speed.rates.values(), speed.bandwidth) > 0 and speed.memory > 0 and speed.places >= 1
    assert speed.source == "measured here, whole calls" and speed.post >= 0
