"""`distrifusion doctor` as a person types it."""

from __future__ import annotations

import json

import pytest
from shell import run

from distrifusion.doctor import examination, round_trip
from distrifusion.doctor.rank_processes import RoundTripError
from distrifusion.doctor.round_trip import Link

LINKS = (Link("gloo messages", 300.0, 1.5), Link("shared memory", 50.0, 9.0))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two processes are tested by themselves."""
    monkeypatch.setattr(examination.round_trip, "measure", lambda backend, limit: LINKS)
    monkeypatch.setattr(examination.versions, "packages", lambda: ())


def test_a_healthy_machine(quick: None) -> None:
    done = run("doctor", "--devices=1")
    assert done.exit_code == 0, done.stderr
    for word in ("processor", "memory", "network", "shared memory: 50 us there and back, 9.00 GB/s"):
        assert word in done.stdout
    assert done.stdout.endswith("\nhealthy\n")


def test_advice_does_not_make_it_unhealthy(quick: None) -> None:
    done = run("doctor", "--devices=4096", "--format=json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["healthy"] is True and answer["num_ranks"] == 4096
    assert any("take turns" in finding["says"] for finding in answer["findings"])
    assert [link["way"] for link in answer["links"]] == ["gloo messages", "shared memory"]


def test_ranks_that_cannot_exchange_are_a_problem(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(backend: str, limit: float) -> tuple[Link, ...]:
        raise RoundTripError("two processes did not exchange a message in time")

    monkeypatch.setattr(round_trip, "measure", fail)
    done = run("doctor")
    assert done.exit_code == 1
    assert "problem: gloo: two processes did not exchange a message in time" in done.stdout
    assert done.stdout.endswith("\nnot healthy\n")


@pytest.mark.parametrize(
    ("words", "says"), [(["--devices", "0"], "--devices 0"), (["--limit", "0"], "above 0"), (["--limit", "nan"], "nan")]
)
def test_bad_values_are_one_clear_line(words: list[str], says: str) -> None:
    done = run("doctor", *words)
    assert done.exit_code == 2 and says in done.stderr and done.stderr.startswith("distrifusion: ")
