"""The timeline of a pipeline that was parallelized in place, on virtual ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import PIPELINES
from ranks import Ranks, own_copy

from distrifusion import ConfigError, trace
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.in_place import denoisers_of
from distrifusion.timeline import ALONE, DISPLACED, SYNCHRONOUS, Timeline
from distrifusion.tracing import StreamClock, clock_difference

CONTROL = PIPELINES["StableDiffusionControlNetPipeline"]


def in_the_way(pipe: Any) -> list[Any]:
    """What lies between a pipeline, its models and its ranks: equal before and after a trace, not within."""
    denoisers = denoisers_of(pipe)
    forwards = [vars(denoiser.model)["forward"] for denoiser in denoisers]
    return [*forwards, *(d.exchange.transport for d in denoisers), *(set(vars(d.exchange)) for d in denoisers)]


def test_every_rank_traces_and_rank_0_gets_all() -> None:
    ranks = Ranks(CONTROL.make(), "cfg2.patch2.displaced.all.w1")
    before = [in_the_way(pipe) for pipe in ranks.pipes]

    def draw(pipe: Any) -> tuple[torch.Tensor, Timeline]:
        with trace(pipe) as timeline:
            within = in_the_way(pipe)
            assert all(now != then for now, then in zip(within, before[ranks.pipes.index(pipe)], strict=True))
            drawn = CONTROL(pipe)
        return drawn, timeline

    untraced = ranks.draw(CONTROL)
    drawn, timelines = zip(*ranks.world.run(lambda transport: draw(ranks.pipes[transport.rank])), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(drawn, untraced, strict=True))
    assert [[rank.rank for rank in timeline.ranks] for timeline in timelines] == [[0, 1, 2, 3], [1], [2], [3]]
    assert timelines[0].ranks[2] == timelines[2].ranks[0] and timelines[0].plan == "cfg2.patch2.displaced.all.w1"
    for rank in timelines[0].ranks:
        assert {call.model for call in rank.calls} == {"unet", "controlnet"} and rank.uncertainty == 0
        assert [call.mode for call in rank.calls[:5]] == [SYNCHRONOUS] * 4 + [DISPLACED]
        assert {span.kind for span in rank.calls[-1].exchanges} == {"kv", "parcel", "exit"}

    assert [in_the_way(pipe) for pipe in ranks.pipes] == before


def test_a_plain_pipeline_is_one_device() -> None:
    pipe = own_copy(CONTROL.make())
    with trace(pipe) as timeline:
        CONTROL(pipe)
    assert timeline.modes() == [ALONE] and timeline.plan == "patch1"
    assert "forward" not in vars(pipe.unet)
    pipe.unet = pipe.controlnet = None
    with pytest.raises(ConfigError, match="has none of unet, transformer"), trace(pipe):
        pass


def test_the_clock_of_another_machine_is_set_by_rank_0s() -> None:
    skews = [0, 5_000_000_000, -7_000_000_000]

    def measure(transport: VirtualTransport) -> tuple[int, int]:
        moments = iter(range(skews[transport.rank], skews[transport.rank] + 10**9, 100))
        return clock_difference(transport, torch.device("cpu"), lambda: next(moments))

    differences = VirtualWorld(3).run(measure)
    assert differences[0] == (0, 0)
    for skew, (ahead, uncertainty) in zip(skews[1:], differences[1:], strict=True):
        assert abs(ahead + skew) < 100_000 and uncertainty == 50


def test_the_clock_of_a_gpu_counts_from_the_moment_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that stand in for CUDA's: each is recorded 1.5 ms after the one before."""
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)

        def record(self, stream: object) -> None:
            self.at = 1.5 * len(made)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later: Any) -> float:
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = StreamClock(torch.device("cuda"))
    first, second = clock.now(), clock.now()
    assert clock.read(second) - clock.read(first) == 1_500_000
