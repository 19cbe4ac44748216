"""The timeline of ranks that are processes of a group of the caller's own."""

from __future__ import annotations

from small_pipelines import Call
from work import draw_traced
from world import GlooWorld

from distrifusion.timeline import POST, SYNCHRONOUS, WAIT


def test_rank_0_gets_the_timelines_of_all_processes_by_one_clock(gloo: GlooWorld) -> None:
    call = Call({"height": 72, "width": 72, "num_inference_steps": 2})
    timelines = gloo.run(draw_traced, "sdxl", "ddim", "patch3", call, ranks=3)
    assert [[rank.rank for rank in timeline.ranks] for timeline in timelines] == [[0, 1, 2], [1], [2]]
    for number in (0, 1):
        calls = [rank.calls[number] for rank in timelines[0].ranks]
        assert {call.mode for call in calls} == {SYNCHRONOUS}
        # Every call ends with an exchange of all: none ends before the last has begun.
        assert min(call.end for call in calls) > max(call.start for call in calls)
        for what in (POST, WAIT):
            assert {span.kind for call in calls for span in call.exchanges if span.what == what} == {
                "kv", "halo", "norm", "exit",
            }  # fmt: skip
