"""The timeline of the denoiser calls of every rank, and what it costs when nobody asks for one."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distrifusion import ConfigError, load
from distrifusion.runtime.pipeline import LoadedPipeline
from distrifusion.timeline import ALONE, COMPUTE, DISPLACED, POST, SYNCHRONOUS, WAIT, Timeline, longest_waits, shares

STEPS = 4
SYNCHRONOUS_STEPS = 2


@pytest.fixture(scope="module")
def three(sdxl_folder: Path) -> Iterator[LoadedPipeline]:
    with load(sdxl_folder, devices=["cpu"] * 3, plan="patch3.displaced.all.w1") as pipe:
        pipe.set_progress_bar_config(disable=True)
        yield pipe


@pytest.fixture(scope="module")
def one_device(sdxl_folder: Path) -> Iterator[LoadedPipeline]:
    with load(sdxl_folder) as pipe:
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def draw(pipe: LoadedPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    arguments: dict[str, Any] = {"height": 96, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe("a lake", generator=generator, guidance_scale=1.0, **arguments).images


@pytest.fixture(scope="module")
def timeline(three: LoadedPipeline) -> Timeline:
    with three.trace() as timeline:
        draw(three)
    return timeline


def test_the_spans_of_a_call_fill_it_exactly(timeline: Timeline) -> None:
    assert [rank.rank for rank in timeline.ranks] == [0, 1, 2]
    for rank in timeline.ranks:
        modes = [SYNCHRONOUS] * SYNCHRONOUS_STEPS + [DISPLACED] * (STEPS - SYNCHRONOUS_STEPS)
        assert [call.mode for call in rank.calls] == modes
        assert [call.number for call in rank.calls] == list(range(1, STEPS + 1))
        for call in rank.calls:
            spans = list(call.spans())
            assert spans[0].start == call.start and spans[-1].end == call.end
            assert all(a.end == b.start and a.end > a.start for a, b in itertools.pairwise(spans))
            assert {span.what for span in spans} == {COMPUTE, POST, WAIT}


def test_every_exchange_of_a_synchronous_call_is_named(timeline: Timeline) -> None:
    unet = {"conv_norm_out": "norm", "conv_out": "halo", "exit": "exit"}
    for rank in timeline.ranks:
        call = rank.calls[0]
        waits = {(span.kind, span.layer) for span in call.exchanges if span.what == WAIT}
        posts = {(span.kind, span.layer) for span in call.exchanges if span.what == POST}
        assert waits == posts and {kind for kind, _ in waits} == {"kv", "halo", "norm", "exit"}
        named = {layer: kind for kind, layer in waits}
        assert {layer: named[layer] for layer in unet} == unet
        assert named["down_blocks.1.attentions.0.transformer_blocks.0.attn1"] == "kv"
        assert all(span.layer and rank.rank not in span.peers and span.peers for span in call.exchanges)


def test_displaced_calls_wait_for_what_was_posted_in_the_last_one(timeline: Timeline) -> None:
    call = timeline.ranks[1].calls[-1]
    kinds = {span.kind for span in call.exchanges if span.what == WAIT}
    assert kinds == {"kv", "parcel", "exit"}
    assert {span.kind for span in timeline.ranks[1].outside} == {"kv", "parcel"}


def test_bytes_and_clock_agree_between_the_ranks(timeline: Timeline) -> None:
    for number in range(STEPS):
        calls = [rank.calls[number] for rank in timeline.ranks]
        posts = [span for call in calls for span in call.exchanges if span.what == POST]
        assert sum(span.sent for span in posts) == sum(span.received for span in posts) > 0
        # Every call ends with an exchange of all: none ends before the last has begun.
        assert min(call.end for call in calls) > max(call.start for call in calls)


def test_shares_and_longest_waits(timeline: Timeline) -> None:
    for mode in timeline.modes():
        calls = timeline.calls(mode)
        found = shares(calls)
        assert found[0].what == COMPUTE and sum(share.share for share in found) == pytest.approx(1)
        waits = longest_waits(calls, 3)
        assert len(waits) == 3 and waits[0].seconds >= waits[-1].seconds > 0 and waits[0].longest > 0
        of_waits = sum(share.seconds for share in found if share.what == WAIT)
        assert sum(wait.seconds for wait in longest_waits(calls, 10_000)) == pytest.approx(of_waits)
        assert mode in timeline.text()
    # The first call of a run is not counted, because there is another synchronous one.
    assert {call.number for call in timeline.calls(SYNCHRONOUS)} == {2}


def test_a_chrome_trace_has_a_process_for_every_rank(timeline: Timeline, tmp_path: Path) -> None:
    timeline.write(tmp_path / "trace.json")
    timeline.write(tmp_path / "trace.json.gz")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes())) == trace
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {rank: f"rank {rank}, cpu" for rank in range(3)}
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] > 0 for event in spans) and min(e["ts"] for e in spans) == 0
    calls = [event for event in spans if event["cat"] == "call"]
    assert len(calls) == 3 * STEPS
    first = calls[0]
    within = [e for e in spans if e["pid"] == first["pid"] and first["ts"] <= e["ts"] < first["ts"] + first["dur"]]
    assert sum(event["dur"] for event in within[1:]) == pytest.approx(first["dur"])


def test_the_picture_is_the_same_and_nothing_stays_in_the_way(three: LoadedPipeline) -> None:
    before = draw(three)
    with three.trace() as timeline:
        assert torch.equal(draw(three), before)
        draw(three)
    assert len(timeline.ranks[0].calls) == 2 * STEPS
    assert torch.equal(draw(three), before)


def test_one_device_computes_all_the_time(one_device: LoadedPipeline) -> None:
    with one_device.trace() as timeline:
        with pytest.raises(ConfigError, match="traced already"), one_device.trace():
            pass
        draw(one_device)
    assert timeline.modes() == [ALONE] and len(timeline.ranks[0].calls) == STEPS
    assert [span.what for call in timeline.ranks[0].calls for span in call.spans()] == [COMPUTE] * STEPS
    assert timeline.plan == "patch1"


def test_a_call_that_fails_adds_nothing(one_device: LoadedPipeline) -> None:
    with one_device.trace() as timeline, pytest.raises(ValueError, match="prompt"):
        one_device(None, num_inference_steps=1)
    assert timeline.ranks == [] and timeline.modes() == [] and timeline.text() == ""
    assert "forward" not in vars(one_device.unet)
