"""Whole runs of unmodified pipelines in real processes: synchronous equals the plain pipeline."""

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

# Pairwise: every scheduler, every number of ranks, both families, rows and columns; sizes in pixels.
RUNS = [
    ("sdxl", "ddim", "cfg2.patch2", (328, 200)),
    ("sdxl", "euler", "patch3", (328, 200)),
    ("sdxl", "euler_ancestral", "cfg2", (200, 136)),
    ("sdxl", "dpmpp_2m", "patch4.columns", (136, 200)),
    ("sdxl", "dpmpp_2m_sde", "patch2", (72, 136)),
    ("sdxl", "heun", "patch3.columns", (136, 200)),
    ("sdxl", "unipc", "patch1", (136, 72)),
    ("sd", "dpmpp_sde", "cfg2.patch2", (136, 104)),
    ("sd", "pndm", "patch2.columns", (200, 328)),
    ("sd", "heun", "cfg2", (136, 72)),
    ("sd", "pndm_prk", "cfg2.patch2.columns", (72, 104)),
    ("sd", "lcm", "patch4", (200, 72)),
    ("sd", "ddim", "patch3", (136, 72)),
]


@pytest.mark.parametrize(
    ("family", "scheduler", "plan", "size"), [pytest.param(*run, marks=claims(*run[:3])) for run in RUNS]
)
def test_a_synchronous_run_equals_the_plain_pipeline_on_every_rank(
    gloo: GlooWorld, alone: Alone, family: str, scheduler: str, plan: str, size: tuple[int, int]
) -> None:
    # PNDM's Runge-Kutta start needs four timesteps.
    call = Call({"height": size[0], "width": size[1], "num_inference_steps": 4 if scheduler == "pndm_prk" else 3})
    reference = alone(family, scheduler, call)
    assert reference.shape[2:] == (size[0] // 8, size[1] // 8)
    by_rank = gloo.run(draw, family, scheduler, plan, call, ranks=Plan.parse(plan).num_ranks)
    assert max(relative_error(latents, reference) for (latents,) in by_rank) <= EXACT
    assert all(torch.equal(latents, by_rank[0][0]) for (latents,) in by_rank)
