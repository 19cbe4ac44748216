"""Whole runs of unmodified pipelines in real processes: displaced is near, and exact within the warm-up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from claims import claims
from small_pipelines import Call
from work import draw
from world import GlooWorld

from distrifusion import Plan
from models import relative_error

EXACT = 1e-5
Alone = Callable[[str, str, Call], torch.Tensor]
WithoutExchange = Callable[[str, str, Plan, Call], torch.Tensor]

RUNS = [
    ("sdxl", "ddim", "cfg2.patch2"),
    ("sdxl", "euler", "patch3"),
    ("sd", "euler_ancestral", "patch2"),
    ("sdxl", "dpmpp_2m", "patch4.columns"),
    ("sd", "dpmpp_2m_sde", "cfg2.patch2"),
    ("sdxl", "dpmpp_sde", "patch2"),
    ("sd", "heun", "patch3"),
    ("sd", "pndm", "patch2.columns"),
    ("sd", "pndm_prk", "patch2"),
    ("sdxl", "lcm", "patch2"),
    ("sdxl", "unipc", "patch4"),
]


def worst(gloo: GlooWorld, family: str, scheduler: str, plan: str, call: Call, reference: torch.Tensor) -> float:
    by_rank = gloo.run(draw, family, scheduler, plan, call, ranks=Plan.parse(plan).num_ranks)
    assert all(torch.equal(latents, by_rank[0][0]) for (latents,) in by_rank)
    return relative_error(by_rank[0][0], reference)


@pytest.mark.parametrize(
    ("family", "scheduler", "plan"),
    [pytest.param(*run, marks=claims(*run[:2], plan=f"{run[2]}.displaced.all")) for run in RUNS],
)
def test_a_displaced_run_is_near_and_far_nearer_than_without_exchange(
    gloo: GlooWorld, alone: Alone, without_exchange: WithoutExchange, family: str, scheduler: str, plan: str
) -> None:
    call = Call({"num_inference_steps": 4})
    reference = alone(family, scheduler, call)
    broken = relative_error(without_exchange(family, scheduler, Plan.parse(plan), call), reference)
    displaced = worst(gloo, family, scheduler, f"{plan}.displaced.all.w1", call, reference)
    assert EXACT < displaced < 0.15
    assert displaced < broken / 3


@pytest.mark.parametrize(("family", "scheduler", "plan"), [("sdxl", "euler", "patch3"), ("sd", "ddim", "cfg2.patch2")])
def test_more_warm_up_and_fewer_stale_kinds_are_nearer(
    gloo: GlooWorld, alone: Alone, without_exchange: WithoutExchange, family: str, scheduler: str, plan: str
) -> None:
    call = Call({"num_inference_steps": 4})
    reference = alone(family, scheduler, call)
    no_warmup, warm, keys_only = (
        worst(gloo, family, scheduler, f"{plan}.displaced.{words}", call, reference)
        for words in ("all.w0", "all.w1", "w1")
    )
    broken = relative_error(without_exchange(family, scheduler, Plan.parse(plan), call), reference)
    assert warm > EXACT
    assert keys_only < warm < no_warmup < broken


@pytest.mark.parametrize(
    ("family", "scheduler", "plan", "steps"),
    [
        ("sdxl", "dpmpp_sde", "cfg2.patch2.displaced.all.w5", 3),  # 5 calls
        ("sd", "heun", "patch3.displaced.all.w4", 3),  # 5 calls: the first and four of warm-up
        ("sdxl", "unipc", "patch4.columns.displaced.all.w99", 3),
        ("sd", "lcm", "patch2.displaced.all.w0", 1),  # the first call has nothing stale to use
    ],
)
def test_a_run_within_the_warm_up_equals_the_plain_pipeline(
    gloo: GlooWorld, alone: Alone, family: str, scheduler: str, plan: str, steps: int
) -> None:
    call = Call({"num_inference_steps": steps})
    reference = alone(family, scheduler, call)
    assert worst(gloo, family, scheduler, plan, call, reference) <= EXACT
