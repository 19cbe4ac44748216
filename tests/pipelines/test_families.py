"""Every U-Net pipeline of diffusers on virtual ranks: synchronous equals one device, displaced comes close."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline
from families import IMAGE_PROMPTS, PIPELINES, Case
from ranks import EXACT, Ranks, own_copy

CASES = {**PIPELINES, **IMAGE_PROMPTS}


@cache
def plain(name: str) -> tuple[DiffusionPipeline, torch.Tensor]:
    """The pipeline of a case and what it gives on one device."""
    pipe = CASES[name].make()
    return pipe, CASES[name](own_copy(pipe))


def each_case() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test for every case, which proves its line of the support matrix."""
    marks = {name: pytest.mark.supports("adapter" if name in IMAGE_PROMPTS else "pipeline", name) for name in CASES}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in CASES])


@each_case()
def test_a_synchronous_run_equals_one_device(name: str) -> None:
    case: Case = CASES[name]
    pipe, reference = plain(name)
    assert torch.isfinite(reference).all()
    for plan in case.plans:
        assert Ranks(pipe, plan).error(case, reference) <= EXACT, plan


@pytest.mark.supports("plan", "patch<N>.displaced")
@each_case()
def test_a_displaced_run_comes_close(name: str) -> None:
    case: Case = CASES[name]
    pipe, reference = plain(name)
    error = Ranks(pipe, "patch2.displaced.w0").error(case, reference)
    assert 1e-9 < error < 0.3
