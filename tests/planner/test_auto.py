"""`load(..., plan="auto")` takes what is predicted to be fastest, and one device where that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blueprints import FAST, SLOW, SPEED
from typer.testing import CliRunner

from distrifusion import ConfigError, load
from distrifusion.cli import app
from distrifusion.planner import auto, calibration
from distrifusion.planner.links import Link, Links
from runtime.tiny import write_sdxl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("auto"))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes this machine one with the given links."""

    def set_links(links: Links) -> None:
        monkeypatch.setenv("DISTRIFUSION_CACHE", str(tmp_path))
        monkeypatch.setattr(calibration, "measure_speed", lambda *_: SPEED)
        monkeypatch.setattr(calibration, "measure_ranks", lambda *_: (links, 1.0))

    return set_links


def test_on_slow_links_one_of_two_devices_is_used_and_draws(on, folder: Path) -> None:
    on(replace(SLOW, within=Link(10.0, 1e6)))
    with load(folder, devices=2, plan="auto", fidelity="any", size=(64, 64)) as pipe:
        assert len(pipe.devices) == 1 and str(pipe.plan) == "patch1"
        picture = pipe("x", width=64, height=64, num_inference_steps=1, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)


def test_on_fast_links_all_devices_are_used(on, folder: Path) -> None:
    on(FAST)
    ranking = auto.choose(str(folder), (CPU, CPU), size=(64, 64), steps=4)
    assert ranking.chosen.plan.num_ranks == 2 and ranking.chosen.plan.exact


def test_without_guidance_there_are_no_branches_to_divide(on, folder: Path) -> None:
    on(FAST)
    ranking = auto.choose(str(folder), (CPU, CPU), size=(64, 64), guided=False)
    assert all(p.plan.cfg == 1 for p in ranking.predictions)


def test_what_cannot_be_chosen_for_is_said(on, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(FAST)
    with pytest.raises(ConfigError, match="a function has none; name a plan"):
        load(lambda: None, devices=2, plan="auto")  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="exact, close, any"):
        load(str(folder), devices=2, plan="auto", fidelity="near")
    with pytest.raises(ConfigError, match="width 63"):
        load(str(folder), devices=2, plan="auto", size=(63, 64))
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun"):
        load(str(folder), plan="auto")


def test_the_command_line_takes_what_is_chosen_and_says_why(on, folder: Path, tmp_path: Path) -> None:
    on(replace(SLOW, within=Link(10.0, 1e6)))
    words = ["run", str(folder), "-p", "x", "-d", "2", "--plan", "auto", "--fidelity", "any", "--size", "64x64"]
    done = CliRunner().invoke(app, [*words, "--steps", "1", "-o", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("patch1 on 1 CPU") and "one device" in done.stderr.lower()
    assert (tmp_path / "a.png").is_file()
