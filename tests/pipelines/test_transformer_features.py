"""Adapters, worker processes and cancelling with transformers: divided, they give what one device gives."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from ranks import EXACT, Ranks, own_copy
from transformer_families import PIPELINES

from distrifusion import Cancelled, ConfigError, load, parallelize, unparallelize
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.runtime import call_checks
from distrifusion.runtime.source import PipelineFacts
from models import relative_error

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "proj_out", "x_embedder", "context_embedder"]


def write_lora(pipe: Any, folder: Path, seed: int) -> Path:
    """A LoRA of random weights for a pipeline's transformer, saved by the pipeline's class: the folder."""
    adapted = copy.deepcopy(pipe.transformer)
    torch.manual_seed(seed)
    adapted.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=LAYERS, init_lora_weights=False))
    layers = get_peft_model_state_dict(adapted)
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def give(pipe: Any, folder: Path) -> None:
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param("StableDiffusion3Pipeline", "patch3", marks=pytest.mark.supports("adapter", "LoRA on SD3")),
        pytest.param("FluxPipeline, dev", "ulysses2", marks=pytest.mark.supports("adapter", "LoRA on FLUX")),
        ("FluxPipeline, dev", "pipe2.sync"),
    ],
)
def test_lora_before_and_after_parallelizing(name: str, plan: str, tmp_path: Path) -> None:
    """It wraps layers at which tokens are cut and joined."""
    case, pipe = PIPELINES[name], PIPELINES[name].make()
    folder = write_lora(pipe, tmp_path, 1)
    adapted = own_copy(pipe)
    give(adapted, folder)
    without, reference = case(own_copy(pipe)), case(adapted)
    assert relative_error(reference, without) > 1e-2
    assert Ranks(adapted, plan).error(case, reference) <= EXACT
    ranks = Ranks(pipe, plan)
    assert ranks.error(case, without) <= EXACT
    ranks.each(lambda own: give(own, folder))
    assert ranks.error(case, reference) <= EXACT
    ranks.each(lambda own: own.unload_lora_weights())
    assert ranks.error(case, without) <= EXACT


def test_a_pipeline_is_restored_as_it_was() -> None:
    pipe = PIPELINES["WanPipeline, two transformers"].make()
    models = (pipe.transformer, pipe.transformer_2)
    before = [{name: dict(vars(m)) for name, m in model.named_modules()} for model in models]
    parallelize(pipe, "ring2", VirtualTransport(VirtualWorld(2), 0))
    assert [{name: dict(vars(m)) for name, m in model.named_modules()} for model in models] != before
    unparallelize(pipe)
    assert [{name: dict(vars(m)) for name, m in model.named_modules()} for model in models] == before


def test_workers_give_what_one_device_gives_also_where_a_text_encoder_was_left_out(tmp_path: Path) -> None:
    case, pipe = PIPELINES["StableDiffusion3Pipeline"], PIPELINES["StableDiffusion3Pipeline"].make()
    pipe.save_pretrained(tmp_path)
    with load(tmp_path, devices=2, plan="ring2") as loaded:
        loaded.set_progress_bar_config(disable=True)
        assert relative_error(case(loaded), case(own_copy(pipe))) <= EXACT
        assert relative_error(case(loaded, output_type="pt"), case(own_copy(pipe), output_type="pt")) <= EXACT


def test_a_video_comes_from_workers() -> None:
    case = PIPELINES["WanPipeline"]
    with load(case.make, devices=2, plan="ulysses2") as loaded:
        loaded.set_progress_bar_config(disable=True)
        frames = case(loaded, output_type="np")
        assert frames.shape == (1, 9, 48, 80, 3)
        assert abs(frames - case(own_copy(case.make()), output_type="np")).max() <= 1e-4


@pytest.mark.parametrize(("devices", "plan"), [(1, "patch1"), (2, "pipe2.w0")])
def test_a_pipeline_with_the_old_callback_alone_can_be_cancelled(devices: int, plan: str) -> None:
    case = PIPELINES["PixArtSigmaPipeline"]
    with load(case.make, devices=devices, plan=plan) as loaded:
        loaded.set_progress_bar_config(disable=True)
        expected = case(loaded)
        timer = threading.Timer(0.3, loaded.cancel)
        timer.start()
        with pytest.raises(Cancelled) as caught:
            case(loaded, num_inference_steps=900)
        assert caught.value.step is not None and caught.value.step < 899
        assert torch.equal(case(loaded), expected)
    with pytest.raises(ConfigError, match="PixArtSigmaPipeline has no other; leave it out"):
        call_checks.bind(PipelineFacts(type(case.make()), 8), (), {"callback": print})


def test_the_old_callback_is_called_on_a_pipeline_that_was_parallelized_in_place() -> None:
    case, pipe = PIPELINES["PixArtAlphaPipeline"], PIPELINES["PixArtAlphaPipeline"].make()
    steps: list[int] = []
    ranks = Ranks(pipe, "patch2")
    ranks.draw(lambda own: case(own, callback=lambda step, *_: steps.append(step), callback_steps=1))
    assert sorted(steps) == [0, 0, 1, 1, 2, 2]
