"""`distrifusion plan` ranks plans, and says why and what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from shell import run


def plan(folder: Path, *words: object) -> dict:
    done = run("plan", folder, "--size", "64x64", "--on", "nvlink-a100", "--format=json", *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_table_is_sorted_and_the_reason_names_the_plan(folder: Path) -> None:
    done = run("plan", folder, "--devices", 2, "--size", "64x64", "--on", "pcie4", "--fidelity", "any", "--explain")
    assert done.exit_code == 0, done.output
    assert "predicted for a100" in done.stdout
    chosen = [line for line in done.stdout.splitlines() if line.startswith("* ")]
    assert len(chosen) == 1 and "sends" in done.stdout and "outside" in done.stdout
    assert "tp2" in done.stdout and "async2" in done.stdout


def test_the_answer_as_json_says_that_it_is_predicted(folder: Path) -> None:
    answer = plan(folder, "--devices", 2)
    times = [row["seconds_per_picture"] for row in answer["plans"]]
    assert times == sorted(times) and answer["predicted"] is True
    assert all(row["predicted"] and row["exact"] for row in answer["plans"])
    assert {row["devices"] for row in answer["plans"]} == {1, 2}
    assert answer["links"]["name"] == "nvlink-a100" and answer["speed"]["name"] == "a100"
    # So small a picture is all kernel starts.
    assert answer["chosen"] in {row["plan"] for row in answer["plans"]}


def test_what_is_not_counted_is_said_with_the_reason(folder: Path, tmp_path: Path) -> None:
    assert plan(folder)["left_out"] == []
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    index["text_encoder"], index["text_encoder_2"] = ["kolors", "ChatGLMModel"], ["transformers", "CLIPModel"]
    (other / "model_index.json").write_text(json.dumps(index))
    reasons = {left["part"]: left["reason"] for left in plan(other)["left_out"]}
    assert "ChatGLMModel of kolors" in reasons["text_encoder"]
    assert "CLIPModel, called with word numbers alone: AttributeError" in reasons["text_encoder_2"]
    words = ("plan", other, "--size", "64x64", "--on", "pcie4")
    explained, brief = run(*words, "--explain").stdout, run(*words).stdout
    assert all(f"not counted, {part}: {reason}" in explained for part, reason in reasons.items())
    assert "not counted" not in brief


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", 0], "1 to 64"),
        (["--devices", 65], "1 to 64"),
        (["--size", "60x64"], "width 60 is not a multiple"),
        (["--size", "large"], "WIDTHxHEIGHT"),
        (["--fidelity", "near"], "exact, close, any"),
        (["--on", "nvlink"], "neither a known one"),
        (["--on", "pcie4", "--device", "a1000"], "a100, h100"),
        (["--device", "a100"], "say also --on"),
        (["--steps", 0], "0 steps"),
        (["--dtype", "int8"], "dtype 'int8'"),
    ],
)
def test_what_cannot_be_is_said_with_the_remedy(folder: Path, words: list[object], said: str) -> None:
    done = run("plan", folder, *([] if "--on" in words or "--device" in words else ["--on", "pcie4"]), *words)
    assert done.exit_code == 2 and said in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_fidelity_without_auto_is_refused(folder: Path) -> None:
    done = run("run", folder, "-p", "x", "--fidelity", "close")
    assert done.exit_code == 2 and "--plan auto" in done.output
