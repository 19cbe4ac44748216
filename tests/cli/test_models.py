"""`distrifusion models` tells what the tests prove."""

from __future__ import annotations

import json

import pytest
from shell import run

from distrifusion import support
from distrifusion.support import Line

LINES = (Line("pipeline", "StableDiffusionXLPipeline", 12), Line("plan", "cfg2", 1))


@pytest.fixture(autouse=True)
def matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "matrix", lambda: LINES)


def test_lines_stand_under_their_area() -> None:
    done = run("models")
    assert done.exit_code == 0
    assert done.stdout == (
        "Pipelines\n  StableDiffusionXLPipeline  12 tests\nPlans\n  cfg2                       1 test\n"
    )


def test_the_answer_as_json() -> None:
    rows = json.loads(run("models", "--format=json").stdout)
    assert [Line(**row) for row in rows] == list(LINES)
