"""Every transformer pipeline that is known, on virtual ranks: synchronous equals one device, displaced comes close."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from ranks import EXACT, Ranks, own_copy
from transformer_families import PIPELINES, Case


@cache
def plain(name: str) -> tuple[DiffusionPipeline, torch.Tensor]:
    """The pipeline of a case and what it gives on one device."""
    pipe = PIPELINES[name].make()
    return pipe, PIPELINES[name](own_copy(pipe))


def each_case() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test for every case, which proves its line of the support matrix."""
    cases = [pytest.param(name, marks=pytest.mark.supports("pipeline", name)) for name in PIPELINES]
    return pytest.mark.parametrize("name", cases)


@each_case()
def test_a_synchronous_run_equals_one_device(name: str) -> None:
    case: Case = PIPELINES[name]
    pipe, reference = plain(name)
    assert torch.isfinite(reference).all()
    for plan in case.plans:
        assert Ranks(pipe, plan).error(case, reference) <= EXACT, plan


@each_case()
def test_a_displaced_run_comes_close(name: str) -> None:
    case: Case = PIPELINES[name]
    pipe, reference = plain(name)
    error = Ranks(pipe, "patch2.displaced.w0").error(case, reference)
    assert 1e-9 < error < 0.3


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline, dev"])
def test_pictures_are_decoded_by_all_ranks_and_equal_one_device(name: str) -> None:
    case: Case = PIPELINES[name]
    pipe, _ = plain(name)

    def draw(pipe: Any) -> torch.Tensor:
        return case(pipe, output_type="pt")

    assert Ranks(pipe, "patch2").error(draw, draw(own_copy(pipe))) <= EXACT
    assert Ranks(pipe, "ulysses2").error(draw, draw(own_copy(pipe))) <= EXACT
