"""`distrifusion bench`: what is measured, what is written, and what is wrong with an order."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distrifusion.bench import measuring, plots, report
from distrifusion.bench.cases import CEILING, PLAIN, Case, Row, Run, plans_for
from distrifusion.cli import app
from distrifusion.errors import ConfigError, OutOfMemory
from distrifusion.memory.use import MemoryUse
from distrifusion.plan import Plan

SIZE = (64, 48)
HERE = report.Circumstances("distrifusion bench", "abc", "2 CPU processes", 2, 1, "Linux", {"torch": "2"})


def row(label: str, plan: str | None, devices: int, seconds: list[float], error: str = "") -> Row:
    runs = [Run(s, s / 10) for s in seconds] + [Run(error=error)] * bool(error)
    return Row(Case(label, None if plan is None else Plan.parse(plan), devices, SIZE), runs)


ROWS = [
    row(PLAIN, None, 1, [4.0, 5.0, 3.0]),
    row(CEILING, "dp2", 2, [4.4]),
    row("patch2", "patch2", 2, [2.5, 2.0]),
    row("auto", "cfg2", 2, [2.0]),
    row("patch2.displaced.w4", "patch2.displaced", 2, [], "OutOfMemory: too large"),
]


def run(*words: object):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def test_lines_hold_medians_ratios_and_failures() -> None:
    lines = {line["case"]: line for line in report.summary(ROWS)}
    assert lines["patch2"]["per_picture"] == 2.25 and lines["patch2"]["per_picture_range"] == "2 to 2.5"
    assert lines["patch2"]["speedup"] == pytest.approx(4 / 2.25)
    ceiling = 2 * 0.4 / 0.44  # two pictures in hardly more than the time of one
    assert lines[CEILING]["speedup_per_step"] == pytest.approx(ceiling)
    assert lines["patch2"]["of_ceiling"] == pytest.approx(0.4 / 0.225 / ceiling)
    failed = lines["patch2.displaced.w4"]
    assert failed["status"] == "OutOfMemory: too large" and failed["per_step"] is None and failed["speedup"] is None


def test_memory_is_that_of_the_rank_with_most_beside_what_was_predicted(tmp_path: Path) -> None:
    plain = row(PLAIN, None, 1, [4.0])
    divided, elsewhere = (row(plan, plan, 2, [2.0]) for plan in ("patch2", "cfg2"))
    plain.memory, plain.counted = [MemoryUse(40_000_000, 900_000_000, 1)], {"grown": 30_000_000, "memory": 130_000_000}
    divided.memory = [MemoryUse(21_000_000, 600_000_000, 1), MemoryUse(22_500_000, 590_000_000, 1)]
    elsewhere.memory = [MemoryUse(missing="/proc/self/clear_refs: No such file or directory")] * 2
    lines = report.write(tmp_path, [plain, divided, elsewhere, ROWS[-1]], HERE)
    assert [line["memory_grown"] for line in lines] == [40_000_000, 22_500_000, None, None]
    assert [line["memory_peak"] for line in lines] == [900_000_000, 600_000_000, None, None]
    assert lines[0]["memory_grown_predicted"] == 30_000_000 and lines[1]["memory_grown_by_rank"] == "21000000 22500000"
    assert json.loads((tmp_path / "bench.json").read_text())["runs"][1]["memory"][1]["grown"] == 22_500_000
    text = (tmp_path / "bench.md").read_text()
    assert "| 40 | 30 | 900 |" in text and "| 21, 22.5 |  | 600 |" in text
    assert "clear_refs: No such file" in text and text.count("OutOfMemory") == 2


def test_equal_pictures_leave_json_that_others_read(tmp_path: Path) -> None:
    equal = row("cfg2", "cfg2", 2, [2.0])
    equal.psnr, equal.ssim = float("inf"), 1.0
    report.write(tmp_path, [equal], HERE)
    text = (tmp_path / "bench.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rows"][0]["psnr_db"] is None
    assert "| inf | 1.0000 |" in (tmp_path / "bench.md").read_text()


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    lines = report.write(tmp_path, ROWS, HERE)
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["rows"] == lines and document["circumstances"]["commit"] == "abc"
    assert [len(case["runs"]) for case in document["runs"]] == [3, 1, 2, 1, 1]
    with (tmp_path / "bench.csv").open() as file:
        assert [line["case"] for line in csv.DictReader(file)] == [line["case"] for line in lines]
    text = (tmp_path / "bench.md").read_text()
    assert "`auto` = `cfg2`" in text and "OutOfMemory" in text and "`diffusers`" in text


def test_plots_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [*ROWS[:3], row("cfg2", "cfg2", 2, [2.0])]
    rows[-1].psnr, rows[2].counted = float("inf"), {"per_step": 0.2}
    names = {path.name for path in plots.draw(report.summary(rows), tmp_path)}
    assert names == {"speedup.webp", "quality.webp", "predicted.webp"}
    assert plots.draw([], tmp_path) == []


def test_plans_take_their_own_number_of_devices() -> None:
    found = plans_for(["auto", "cfg2", "patch1"], [1, 2])
    assert [(label, n) for label, _, n in found] == [("auto", 1), ("auto", 2), ("cfg2", 2), ("patch1", 1)]
    with pytest.raises(ConfigError, match=r"takes 4 devices.*add 4, or use 'cfg2'"):
        plans_for(["cfg2.patch2"], [1, 2])
    with pytest.raises(ConfigError, match="named twice"):
        plans_for(["cfg2", "cfg2"], [2])


def test_a_row_that_runs_out_of_memory_stays_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Plan | None] = []

    class NoPipelines(measuring._Pipelines):
        def get(self, plan: Plan | None) -> Plan | None:
            return plan

        def drop(self, plan: Plan | None) -> None:
            closed.append(plan)

    def draw(_order: object, case: Case, _pipe: object) -> tuple[float, float, None]:
        if case.label == "patch2":
            raise OutOfMemory("no room\nfor it")
        if case.label == "cfg2":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if case.label == "async2":
            raise KeyError  # no error of ours, and without a word
        return 2.0, 0.2, None

    monkeypatch.setattr(measuring, "_Pipelines", NoPipelines)
    monkeypatch.setattr(measuring, "_draw", draw)
    cases = [Case(label, Plan.parse(text), 2, SIZE) for label, text in ((t, t) for t in ("patch2", "cfg2", "async2"))]
    order = measuring.Order("x", {}, 0, {}, (torch.device("cpu"),) * 2, 1, 3, None)
    rows = measuring.measure(order, [Case(PLAIN, None, 1, SIZE), *cases], lambda _: None)
    plain, bands, branches, parts = report.summary(rows)
    assert plain["status"] == "ok" and len(rows[0].runs) == 3
    assert bands["status"] == "OutOfMemory: no room" and "CUDA out of memory" in branches["status"]
    assert parts["status"] == "KeyError" and plain["memory_grown"] is not None and parts["memory_grown"] is None
    assert [len(row.runs) for row in rows[1:]] == [1, 1, 1] and closed == [case.plan for case in cases]


@pytest.mark.slow
def test_a_whole_bench(folder: Path, tmp_path: Path) -> None:
    words = ["--sizes", 64, "--plans", "auto,cfg2", "--steps", 2, "--repeat", 1, "--threads", 1, "--prompt", "x"]
    done = run(folder, *words, "--traces", "--no-ceiling", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    rows = {(r["case"], r["devices"]): r for r in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert set(rows) == {("diffusers", 1), ("auto", 1), ("auto", 2), ("cfg2", 2)}
    assert all(r["status"] == "ok" for r in rows.values())
    # The prediction of one branch, four latent channels of 8 x 8 in fp32, to the other rank.
    assert rows["cfg2", 2]["sent_per_step"] == 4 * 4 * 8 * 8
    assert rows["cfg2", 2]["psnr_db"] > 50 and rows["cfg2", 2]["predicted_per_step"] > 0
    assert {file.name for file in (tmp_path / "traces").iterdir()} == {r["trace"] for r in rows.values()} - {""}
    if sys.platform == "linux":
        ranks = {case: [int(n) for n in r["memory_grown_by_rank"].split()] for case, r in rows.items()}
        assert len(ranks["diffusers", 1]) == 1 and len(ranks["cfg2", 2]) == 2
        assert all(0 < min(grown) <= max(grown) < rows[case]["memory_peak"] for case, grown in ranks.items())
        assert all(r["memory_grown_predicted"] > 0 for r in rows.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "0"], "at least 1"),
        (["--devices", "1,1"], "each once"),
        (["--devices", "two"], "no numbers"),
        (["--plans", "cfg3"], "cfg3"),
        (["--plans", "patch4"], "takes 4 devices"),
        (["--sizes", "0"], "0"),
        (["--sizes", "big"], "WIDTHxHEIGHT"),
        (["--repeat", "0"], "--repeat 0"),
        (["--threads", "0"], "--threads 0"),
        (["--fidelity", "near"], "exact, close, any"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_drawn(
    folder: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    done = run(folder, "--prompt", "x", "--out", tmp_path / "out", *words)
    assert done.exit_code == 2 and said in done.output
