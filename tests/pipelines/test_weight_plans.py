"""Pipelines by plans that divide weights: what they put on their models works as on one device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import transformer_families
from families import IMAGE_PROMPTS, PIPELINES
from ranks import EXACT, Ranks, errors, own_copy

from distrifusion import unparallelize
from distrifusion.in_place import coders_of, denoisers_of

CASES: dict[str, Any] = {**PIPELINES, **IMAGE_PROMPTS}
PLANS = {
    "StableDiffusionXLControlNetPipeline": "cfg2.tp2",
    "IP-Adapter on SDXL": "tp3",
    "StableDiffusionXLPAGPipeline": "tp2",
    "StableDiffusionLatentUpscalePipeline": "tp2",
}


@pytest.mark.parametrize(("name", "plan"), PLANS.items())
def test_a_unet_pipeline_equals_one_device(name: str, plan: str) -> None:
    assert errors(CASES[name].make(), plan, CASES[name]) <= EXACT


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline, dev"])
def test_a_transformer_pipeline_equals_one_device(name: str) -> None:
    case = transformer_families.PIPELINES[name]
    assert errors(case.make(), "tp2", case) <= EXACT


def test_guess_mode_and_its_controlnet_equal_one_device() -> None:
    case = CASES["StableDiffusionXLControlNetPipeline"]
    assert errors(case.make(), "cfg2.tp2", partial(case, guess_mode=True)) <= EXACT


def test_pictures_are_decoded_by_all_ranks_and_what_is_restored_is_bit_for_bit() -> None:
    case = PIPELINES["StableDiffusionXLPipeline"]
    pipe = case.make()
    reference = case(own_copy(pipe), output_type="pt")
    ranks = Ranks(pipe, "tp2")
    assert ranks.error(partial(case, output_type="pt"), reference) <= EXACT
    assert coders_of(ranks.pipes[0])[1].exchange.bytes_sent["halo"] > 0
    assert denoisers_of(ranks.pipes[0])[0].exchange.bytes_sent["sum"] > 0
    restored = [unparallelize(own) for own in ranks.pipes]
    assert all(case(own, output_type="pt").equal(reference) for own in restored)
