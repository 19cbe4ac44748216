"""Pipelines whose denoiser is cut in depth, on virtual ranks: exact where nothing is late, near where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from families import PIPELINES as UNETS
from lora_files import write_lora
from ranks import EXACT, Ranks, own_copy
from transformer_families import PIPELINES as TRANSFORMERS

from distrifusion import PlanError, parallelize, trace, unparallelize
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.in_place import denoisers_of
from distrifusion.memory.prediction import pool_bytes
from distrifusion.plan import Plan
from distrifusion.timeline import DISPLACED, SYNCHRONOUS, Timeline
from weights_away import pretend_accelerator

CASES = {**UNETS, **TRANSFORMERS}


@pytest.mark.supports("plan", "async<N>.sync")
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("StableDiffusionXLPipeline", "cfg2.async2"),
        ("StableDiffusionControlNetPipeline", "async2"),
        ("StableDiffusionXLControlNetPipeline, guess mode", "cfg2.async2"),
        ("StableDiffusion3Pipeline", "async3"),
        ("FluxPipeline, dev", "async2"),
    ],
)
def test_a_run_in_components_equals_one_device_or_comes_close(name: str, plan: str) -> None:
    case, pipe = CASES[name], CASES[name].make()
    reference = case(own_copy(pipe))
    assert Ranks(pipe, f"{plan}.sync").error(case, reference) <= EXACT
    assert Ranks(pipe, f"{plan}.w9").error(case, reference) <= EXACT
    assert 1e-9 < Ranks(pipe, f"{plan}.w0").error(case, reference) < 0.3


def test_a_trace_tells_which_hidden_states_were_waited_for() -> None:
    case = UNETS["StableDiffusionControlNetPipeline"]
    ranks = Ranks(case.make(), "async2.w0")

    def draw(pipe: Any) -> Timeline:
        with trace(pipe) as timeline:
            case(pipe)
        return timeline

    timeline = ranks.world.run(lambda transport: draw(ranks.pipes[transport.rank]))[0]
    unets = [[call for call in rank.calls if call.model == "unet"] for rank in timeline.ranks]
    for calls in unets:
        assert [call.mode for call in calls] == [SYNCHRONOUS, DISPLACED, DISPLACED]
        assert {span.kind for span in calls[-1].exchanges} == {"hidden", "exit"}
    assert all("resnets" in s.layer or "attentions" in s.layer for s in unets[1][-1].exchanges if s.kind == "hidden")
    assert [denoiser.exchange.num_synchronous for denoiser in denoisers_of(ranks.pipes[0])] == [1, 1]


def test_what_components_keep_is_not_predicted() -> None:
    pipe = UNETS["StableDiffusionPipeline"].make()
    with pytest.raises(PlanError, match="known after its first call"):
        pool_bytes(pipe.unet, Plan.parse("async2"), 0, (2, 4, 25, 17), torch.float32)


def test_too_many_components_are_refused_before_a_run_and_leave_the_pipeline_whole() -> None:
    pipe = TRANSFORMERS["FluxPipeline, dev"].make()
    with pytest.raises(PlanError, match="cannot be cut into 40 components; use 'async"):
        parallelize(pipe, "async40", VirtualTransport(VirtualWorld(40), 0))
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


def test_adapters_that_come_and_go_go_where_their_layers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, exchanged and unloaded between calls, while the layers of other components are aside."""
    away = pretend_accelerator(monkeypatch)
    case, pipe = UNETS["StableDiffusionPipeline"], UNETS["StableDiffusionPipeline"].make()
    files = [write_lora(StableDiffusionPipeline, pipe.unet, "attention", seed, tmp_path / str(seed)) for seed in (1, 2)]
    ranks, one = Ranks(pipe, "async2.sync"), own_copy(pipe)

    def load(file: Path | None) -> None:
        for own in (one, *ranks.pipes):
            own.unload_lora_weights()
            if file is not None:
                own.load_lora_weights(file.parent, weight_name=file.name)

    for file in (None, *files, None):
        load(file)
        assert ranks.error(case, case(one)) <= EXACT
        assert away
    ranks.each(unparallelize)
    assert not away
    for own in ranks.pipes:
        assert all(torch.equal(a, b) for a, b in zip(own.unet.parameters(), one.unet.parameters(), strict=True))
