"""A calibration is measured once, read afterwards, and measured again when something has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blueprints import FAST, SPEED, flux, unet

from distrifusion.errors import ConfigError
from distrifusion.plan import Plan
from distrifusion.planner import calibration, kernels, rank_calls
from distrifusion.planner.calibration import Circumstances, calibrated
from distrifusion.planner.costs import Costs
from distrifusion.planner.operations import LayerKind
from distrifusion.planner.rank_calls import MeasuredCalls, RankCall
from distrifusion.planner.speeds import Speed
from distrifusion.planner.turns import in_turns

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


def _calls(device: Speed, hand: float) -> MeasuredCalls:
    """What a device would take that is as given, and whose stages' posts cost so much."""
    blueprint = flux()
    found = MeasuredCalls()
    for pixels in (96, 192):
        work = Costs(blueprint, blueprint.arguments(pixels, pixels)).of(Plan()).fresh.operations
        found.whole.append((work, device.seconds(work)))
    small = Costs(blueprint, blueprint.arguments(96, 96))
    parts = [small.of(Plan.parse(text)).steady for text in ("patch2", "pipe2.m4.w0")]
    times = [device.seconds(part.operations) for part in parts]
    found.bands = RankCall(parts[0], times[0] + len(parts[0].posts) * device.post)
    found.stages = RankCall(parts[1], times[1] + len(parts[1].posts) * hand)
    return found


def test_what_posts_of_bands_and_of_stages_cost_is_told_apart() -> None:
    device = replace(SPEED, rates=dict.fromkeys(LayerKind, 5e8), bandwidth=5e8, layer=4e-6, post=9e-5)
    speed = kernels._agreeing(SPEED, _calls(device, hand=2e-5))
    assert (speed.layer, speed.post, speed.hand) == pytest.approx((4e-6, 9e-5, 2e-5), rel=1e-3)
    assert list(speed.rates.values()) == pytest.approx([5e8] * 3, rel=1e-3)
    # Were a stage's posts taken to cost what those of bands do, pieces would be said to be slower than they are.
    assert speed.a_post(Plan.parse("pipe2.m4")) < speed.a_post(Plan.parse("patch2"))


def test_a_cost_that_would_be_below_zero_is_none_and_the_others_make_up_for_it() -> None:
    device = replace(SPEED, layer=4e-6, post=9e-5)
    speed = kernels._agreeing(SPEED, _calls(device, hand=-1e-6))
    assert speed.hand == 0.0 and 0 < speed.layer < 4e-6 and speed.post > 0


def test_the_least_squares_have_no_negative_part() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert kernels._not_negative(rows, torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)) == pytest.approx([2.0, 3.0])
    held = kernels._not_negative(rows, torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64))
    assert held == pytest.approx([1.5, 0.0])


def test_things_are_timed_by_turns() -> None:
    order: list[str] = []
    times = in_turns([lambda: order.append("a"), lambda: order.append("b")], CPU, 0.0)
    assert order == ["a", "b"] * 4 and len(times) == 2 and min(times) >= 0


def test_this_machine_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BUDGET", 0.0)
    monkeypatch.setattr(rank_calls, "_BUDGET", 0.0)
    speed = kernels.measure_speed(unet(), CPU, 1)
    assert min(*speed.rates.values(), speed.bandwidth) > 0 and speed.memory > 0 and speed.places >= 1
    assert speed.source == "measured here, whole calls" and min(speed.post, speed.hand) >= 0


def test_calls_of_a_transformer_are_measured_whole_in_bands_and_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_calls, "_BUDGET", 0.0)
    blueprint = flux()
    with torch.no_grad():
        found = rank_calls.measured_calls(blueprint, CPU)
    assert len(found.whole) == 3 and found.bands is not None and found.stages is not None
    own = Costs(blueprint, replace(blueprint, guided=False).arguments(128, 128))
    assert found.bands.work.posts == own.of(Plan.parse("patch2")).steady.posts
    assert len(found.stages.work.posts) > len(found.bands.work.posts)
