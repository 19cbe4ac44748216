"""Whole runs whose denoiser calls are captured and replayed, on ranks that are processes."""

from __future__ import annotations

import pytest
from small_pipelines import Call
from work import draw_replayed, shrink_latents
from world import GlooWorld

from distrifusion import Plan

ODD = {"height": 136, "width": 72, "num_inference_steps": 6}


@pytest.mark.parametrize(
    ("scheduler", "plan"),
    [("euler", "patch3"), ("ddim", "patch2.displaced.w1"), ("ddim", "cfg2.patch2.displaced.all.w1")],
)
def test_a_replayed_run_gives_the_bits_of_a_plain_one_and_the_next_run_too(
    gloo: GlooWorld, scheduler: str, plan: str
) -> None:
    ranks = Plan.parse(plan).num_ranks
    calls = Call(ODD, seed=1), Call({**ODD, "callback_on_step_end": shrink_latents}, seed=2)
    found = gloo.run(draw_replayed, "sdxl", scheduler, plan, *calls, ranks=ranks)
    # Of the calls that read old values the first is captured, of others the second.
    before = 1 if Plan.parse(plan).exact else Plan.parse(plan).num_synchronous
    num_replayed = 2 * (6 - before - 1)
    assert found == [(True, (2, num_replayed))] * ranks
