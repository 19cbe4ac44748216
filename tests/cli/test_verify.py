"""`distrifusion verify` as a person types it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from shell import run

from distrifusion.cli.verify import _seeds
from distrifusion.errors import ConfigError


class Links(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")]


@pytest.fixture(scope="module")
def displaced(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A displaced plan with limits, one of which cannot be kept, and its report."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    words = ["--plan=patch2.columns.displaced.w0", "--prompt=a <b> lake", "--size=72x64", "--steps=4", "--seeds=0,4"]
    limits = ["--max-latent-error=1e-9", "--min-psnr=5", "--max-seam=99"]
    done = run(
        "verify",
        folder,
        *words,
        *limits,
        "--guidance=1",
        "--report",
        out,
        "--bfloat16-floor",
        "--trace",
        out / "t.json",
    )
    return done, out


def test_a_missed_limit_is_told_and_is_the_exit_status(displaced: Any) -> None:
    done, out = displaced
    assert done.exit_code == 1, done.stderr
    missed = re.findall(r"^missed: seed (\d+): relative error .* is above the limit of 1e-09 by ", done.stdout, re.M)
    assert missed == ["0", "4"]
    assert re.match(r"patch2\.columns\.displaced\.w0 against one device, .*, 2 pictures\n", done.stdout)
    assert f"report: {out / 'index.html'}\nsynchronous calls: " in done.stdout
    assert done.stdout.endswith(f" %\ntrace: {out / 't.json'}\nmissed\n")
    assert "skipped: MS-SSIM of the picture: a side of the picture is below 176 pixels" in done.stdout
    assert (
        "skipped: Frechet distance to one device: the classifier reads pictures of the demo models only" in done.stdout
    )


def test_the_first_seed_is_traced(displaced: Any) -> None:
    _, out = displaced
    events = json.loads((out / "t.json").read_text())["traceEvents"]
    calls = [event["name"] for event in events if event.get("cat") == "call" and event["pid"] == 1]
    assert calls == [f"unet call {n}, {'synchronous' if n == 1 else 'displaced'}" for n in range(1, 5)]
    assert set(json.loads((out / "report.json").read_text())["timeline"]["calls"]) == {"synchronous", "displaced"}
    page = (out / "index.html").read_text()
    assert page.count('<svg class="strip"') == 2 and page.count(">rank 1</text>") == 2
    assert "Displaced: call " in page and "keys and values (kv)" in page


def test_the_data_holds_every_step_of_every_seed(displaced: Any) -> None:
    _, out = displaced
    data = json.loads((out / "report.json").read_text())
    assert data["passed"] is False and [miss["seed"] for miss in data["missed"]] == [0, 4]
    assert data["borders"] == {"columns": [48]}  # 9 latent columns, 5 of the coarsest: 3 and 2
    for row in data["pictures"]:
        curve = row["relative_latent_error_by_step"]
        # The first call is exact, and every later one is not.
        assert len(curve) == 4 and curve[0] < 1e-5 < curve[-1] == row["latent_error"]
        assert len(row["seam_by_border"]["columns"]) == 1 and row["prompt"] == "a <b> lake"
    assert data["pictures"][0]["psnr"] != data["pictures"][1]["psnr"]
    threads, half = data["noise_floors"]
    assert "thread" in threads["title"] and half["title"] == "in bfloat16"
    assert all(row["latent_error"] < 1e-5 for row in threads["pictures"])
    assert all(row["latent_error"] > 1e-4 for row in half["pictures"])
    assert data["setting"]["versions"].keys() >= {"torch", "diffusers", "distrifusion", "python"}
    assert "--plan patch2.columns.displaced.w0" in data["setting"]["command"]


def test_the_page_needs_nothing_else(displaced: Any) -> None:
    _, out = displaced
    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) == 6 and all(link.startswith("data:image/webp;base64,") for link in links.found)
    assert "http" not in page and "@import" not in page and "<script" not in page
    assert "a &lt;b&gt; lake" in page and "<b>" not in page
    assert page.count("<svg") == 5 and "2 limits missed" in page


def test_the_demo_on_one_device_equals_itself() -> None:
    words = ["--plan=patch1", "--size=64x64", "--steps=2", "--seeds=0-1", "--format=json"]
    done = run("verify", "demo", *words, "--min-psnr=99", "--min-agreement=1", "--max-frechet=0.001")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["passed"] is True and data["summary"]["psnr"]["worst"] is None  # infinite
    assert data["summary"]["latent_error"]["worst"] == 0
    assert data["frechet"]["plan to one device"] < 0.001 and set(data["accuracy"]) == {"plan", "one device"}
    assert data["skipped"]["seam"] == "the picture is not cut into bands"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "say --plan, --devices, or both"),
        (["--plan", "pach2"], "did you mean 'patch2'"),
        (["--plan", "patch2", "--devices", "3"], "nearest plan for 3"),
        (["--plan", "patch2", "--seeds", "1-"], "'1-' is neither a number nor a range"),
        (["--plan", "patch2", "--seeds", "7-1"], "the range 7-1 is empty"),
        (["--plan", "patch2", "--seeds", "1,0-3"], "names a seed twice"),
        (["--plan", "patch2", "--size", "100x64"], "width=100 must be a multiple of 8"),
        (["--plan", "patch2", "--prompts", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--plan", "patch2", "--prompts", "/dev/null"], "there is no prompt in '/dev/null'"),
        (["--plan", "patch2", "--prompts", "/dev/null", "-p", "a"], "keep one"),
        (["--plan", "patch2", "--min-psnr", "nan"], "must be a finite number"),
        (["--plan", "patch2", "--min-ms-ssim", "0.9", "--size", "128x512"], "at least 176 pixels"),
        (["--plan", "cfg2", "--max-seam", "2"], "needs a plan that cuts the picture"),
        (["--plan", "patch2", "--max-frechet", "2", "--seeds", "5"], "at least two seeds"),
        (["--plan", "patch2", "--report", "/dev/null"], "is a file; name a folder"),
        (["--plan", "patch2", "--trace", "/nowhere/at/all/t.json"], "there is no folder '/nowhere/at/all'"),
        (["--plan", "patch2", "--trace", "t.html"], "does not end in .json or .json.gz"),
        (["--plan", "patch2", "--scheduler", "eular"], "scheduler 'eular'"),
        (["--plan", "patch2", "--dtype", "int8"], "dtype 'int8'"),
    ],
)
def test_bad_values_are_one_clear_line(words: list[str], says: str) -> None:
    done = run("verify", "demo", *words)
    assert done.exit_code == 2
    assert says in done.stderr and done.stderr.startswith("distrifusion: ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "has no prompts of its own"),
        (["-p", "a", "--min-agreement", "1"], "for the demo model"),
    ],
)
def test_what_only_the_demo_has(folder: Path, words: list[str], says: str) -> None:
    done = run("verify", folder, "--plan=patch2", *words)
    assert done.exit_code == 2 and says in done.stderr


def test_verify_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    done = run("verify", "demo", "--plan=patch2")
    assert done.exit_code == 2 and "torchrun" in done.stderr


def test_seeds() -> None:
    assert _seeds("0-3") == (0, 1, 2, 3) and _seeds(" 7, 1-2") == (7, 1, 2)
    with pytest.raises(ConfigError, match="above 10000"):
        _seeds("0-99999")
