"""Ranks of this machine are measured at once, and what they are to each other becomes links."""

from __future__ import annotations

import pytest
import torch

from distrifusion.doctor.rank_processes import RoundTripError
from distrifusion.errors import ConfigError
from distrifusion.planner import calibration, company
from distrifusion.planner.company import Company, measure_company
from distrifusion.planner.links import Link

CPU = torch.device("cpu")
NEAR, FAR = ((4, 1e-5), (1000, 1e-4)), ((4, 1e-4), (1000, 1e-3))


def test_two_processes_say_what_messages_of_each_size_take() -> None:
    found = measure_company("gloo", 2, 200)
    assert set(found.pairs) == {"0-1"} and found.way in ("gloo messages", "shared memory")
    assert [size for size, _ in found.pairs["0-1"]] == list(company._SIZES)
    assert all(0 <= seconds < 10 for _, seconds in found.pairs["0-1"])
    assert 0 <= found.overlap <= 1 <= found.slower < 100


def test_every_pair_has_a_link_and_the_slowest_stands_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Company("made up", {"0-1": NEAR, "0-2": FAR, "1-2": NEAR}, 0.5, 1.2)
    monkeypatch.setattr(calibration, "measure_company", lambda *_: known)
    links, slower = calibration.measure_ranks(CPU, 3)
    assert links.pairs == {"0-1": Link.of(NEAR), "0-2": Link.of(FAR), "1-2": Link.of(NEAR)}
    assert links.within == Link.of(FAR) and (links.overlap, slower) == (0.5, 1.2)


def test_one_rank_sends_nothing_and_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Company:
        raise AssertionError

    monkeypatch.setattr(calibration, "measure_company", fail)
    assert calibration.measure_ranks(CPU, 1)[1] == 1.0


def test_ranks_that_do_not_meet_are_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Company:
        raise RoundTripError("nobody came")

    monkeypatch.setattr(calibration, "measure_company", fail)
    with pytest.raises(ConfigError, match="nobody came; name a profile by --on"):
        calibration.measure_ranks(CPU, 2)
