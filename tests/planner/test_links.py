"""Profiles of links: known ones, files, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrifusion.errors import ConfigError
from distrifusion.planner.links import PROFILES, Link, Links, find
from distrifusion.planner.rehearsal import Post

TWO_NODES = Links("two", Link(1e-5, 1e9), Link(1e-4, 1e8), 2, 1.0, "made up")


def test_known_profiles_say_where_their_figures_are_from() -> None:
    assert set(PROFILES) == {"nvlink-a100", "nvlink-h100", "pcie4", "ethernet-25g"}
    assert all(links.source for links in PROFILES.values())


def test_a_file_says_what_its_profile_says(tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    file.write_text(json.dumps(TWO_NODES.as_dict()))
    assert find(str(file)) == TWO_NODES


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not readable as JSON"),
        ("[]", "JSON object"),
        ("{}", "name"),
        ('{"name": "x", "within": {"latency": 0, "bandwidth": 0}}', "between"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "links.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        find(str(tmp_path / "links.json"))


SHRINKING = {"latency": 0, "bandwidth": 1, "measured": [[4, 2.0], [8, 1.0]]}


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": {"0-1": SHRINKING}},
        {"within": SHRINKING},
        {"overlap": 2},
        {"per_node": 0},
        {"within": {"latency": -1, "bandwidth": 1}},
    ],
)
def test_a_value_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="bandwidths are above 0"):
        Links.from_dict({**TWO_NODES.as_dict(), **change})


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"nvlink-a100.*pcie4"):
        find("nvlink-a10")


def test_messages_to_another_machine_take_its_link() -> None:
    assert TWO_NODES.seconds(Post({1: 1000}, {}), 0) == pytest.approx(1e-5 + 1e-6)
    assert TWO_NODES.seconds(Post({2: 1000}, {}), 0) == pytest.approx(1e-4 + 1e-5)
    assert TWO_NODES.seconds(Post({1: 1000, 2: 1000}, {}), 0) == pytest.approx(1e-4 + 1e-5)
    assert TWO_NODES.seconds(Post({}, {}), 0) == 0


@given(st.dictionaries(st.integers(1, 7), st.integers(0, 10**9)), st.integers(1, 7), st.integers(0, 10**9))
def test_more_bytes_never_take_less_time(sent: dict[int, int], peer: int, more: int) -> None:
    grown = {**sent, peer: sent.get(peer, 0) + more}
    assert TWO_NODES.seconds(Post(grown, {}), 0) >= TWO_NODES.seconds(Post(sent, {}), 0)


def test_between_measured_sizes_is_interpolated_and_beyond_them_the_bandwidth_says_it() -> None:
    link = Link.of([(0, 1.0), (100, 2.0), (300, 3.0)])
    assert [link.seconds(n) for n in (0, 50, 100, 200)] == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert link.seconds(300) == pytest.approx(3.0) and link.seconds(450) == pytest.approx(4.0)
    assert Link.of([(4, 1.0), (8, 0.5)]).seconds(8) == pytest.approx(
        1.0
    )  # noise is no reason for a larger message to be faster


@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), min_size=2, max_size=6),
    st.integers(0, 10**4),
    st.integers(0, 10**4),
)
def test_a_measured_link_never_takes_less_for_more(seconds: list[float], num_bytes: int, more: int) -> None:
    link = Link.of([(4**i, s) for i, s in enumerate(seconds)])
    assert link.usable and link.seconds(num_bytes + more) >= link.seconds(num_bytes) * (1 - 1e-9)


def test_each_pair_has_its_own_link() -> None:
    pairs = {"0-1": Link(0.0, 1e9), "1-2": Link(0.0, 1e6)}
    links = Links("three", Link(0.0, 1e3), Link(0.0, 1e3), 8, 1.0, "made up", pairs)
    assert links.seconds(Post({0: 1000}, {}), 1) == pytest.approx(1e-6)
    assert links.seconds(Post({0: 1000, 2: 1000}, {}), 1) == pytest.approx(1e-6 + 1e-3)
    assert links.seconds(Post({}, {2: 1000}), 0) == pytest.approx(1.0)  # not measured: as within
    assert Links.from_dict(json.loads(json.dumps(links.as_dict()))) == links
