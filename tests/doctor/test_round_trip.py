"""Two processes exchange messages, or say within the limit why they do not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distrifusion.doctor import rank_processes
from distrifusion.doctor.rank_processes import RoundTripError
from distrifusion.doctor.round_trip import measure


def test_two_processes_measure_every_way_that_ranks_use() -> None:
    links = measure("gloo", limit=200)
    assert {"gloo messages"} <= {link.way for link in links} <= {"gloo messages", "shared memory"}
    assert all(0 < link.microseconds < 1e7 and 0 < link.gigabytes_per_second < 1e4 for link in links)


@pytest.mark.parametrize(
    ("script", "limit", "says"),
    [
        ("import time; time.sleep(100)", 1.0, "did not exchange a message in time"),
        ("import sys; sys.exit('no way to meet')", 60.0, "failed: no way to meet"),
        ("import os; os._exit(3)", 60.0, "failed: exit status 3"),
    ],
)
def test_processes_that_hang_or_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, limit: float, says: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(rank_processes.sys, "executable", str(python))
    with pytest.raises(RoundTripError, match=says):
        measure("gloo", limit)
