"""Pipelines of diffusers whose transformers are divided in depth: what overlaps changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import EXACT, Ranks, own_copy
from transformer_families import PIPELINES

from distrifusion import load
from distrifusion.exchange import arriving
from distrifusion.rules import predictions
from models import relative_error

NAMES = ["StableDiffusion3Pipeline", "FluxPipeline, dev", "PixArtSigmaPipeline"]
OVERLAPPING = [*NAMES, "FluxPipeline, true guidance", "FluxInpaintPipeline"]


@pytest.mark.supports("plan", "pipe<N>")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_all_warm_up_equals_one_device(name: str) -> None:
    case, pipe = PIPELINES[name], PIPELINES[name].make()
    reference = case(own_copy(pipe))
    for plan in ("pipe2.sync", "cfg2.pipe2.m3.w9"):
        assert Ranks(pipe, plan).error(case, reference) <= EXACT, plan


@pytest.mark.supports("plan", "pipe<N>.m<M>")
@pytest.mark.parametrize("plan", ["pipe2.m3.w0", "cfg2.pipe2.m2.w0"])
@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_steps_have_the_bits_of_steps_apart(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe = PIPELINES[name], PIPELINES[name].make()
    reference = case(own_copy(pipe), num_inference_steps=5)
    by_bands: list[str] = []
    intact = arriving._by_bands
    monkeypatch.setattr(
        arriving, "_by_bands", lambda func, *args: by_bands.append(func.__name__) or intact(func, *args)
    )
    overlapped = Ranks(pipe, plan).draw(lambda own: case(own, num_inference_steps=5))
    assert by_bands
    assert all(type(latents) is torch.Tensor for latents in overlapped)
    assert 1e-9 < relative_error(overlapped[0], reference) < 0.3
    by_bands.clear()
    monkeypatch.setattr(predictions, "bands_of", lambda *_: None)
    apart = Ranks(pipe, plan).draw(lambda own: case(own, num_inference_steps=5))
    assert not by_bands
    assert all(torch.equal(latents, overlapped[0]) for latents in (*overlapped, *apart))


def test_callbacks_see_latents_that_are_there_and_may_change_them() -> None:
    case, pipe = PIPELINES["FluxPipeline, dev"], PIPELINES["FluxPipeline, dev"].make()

    def halve(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert torch.isfinite(tensors["latents"]).all()
        return {"latents": tensors["latents"].mul_(0.5 if step == 2 else 1.0)}

    def call(own: Any) -> torch.Tensor:
        return case(own, num_inference_steps=5, callback_on_step_end=halve)

    assert Ranks(pipe, "pipe2.m3.w9").error(call, call(own_copy(pipe))) <= EXACT
    near = Ranks(pipe, "pipe2.m3.w0").draw(call)
    assert torch.equal(near[0], near[1])
    assert relative_error(near[0], call(own_copy(pipe))) < 0.1


def test_workers_draw_in_pieces_what_virtual_ranks_draw() -> None:
    case = PIPELINES["StableDiffusion3Pipeline"]
    expected = Ranks(case.make(), "pipe2.m3.w0").draw(lambda own: case(own, num_inference_steps=5))[0]
    with load(case.make, devices=2, plan="pipe2.m3.w0") as loaded:
        loaded.set_progress_bar_config(disable=True)
        for _ in range(2):
            assert relative_error(case(loaded, num_inference_steps=5), expected) <= EXACT
        assert case(loaded, output_type="pt").shape == (1, 3, 112, 80)
