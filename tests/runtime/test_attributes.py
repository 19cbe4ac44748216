"""What else a diffusers person types on a pipeline: schedulers, components, methods."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from distrifusion import load
from distrifusion.errors import ConfigError
from distrifusion.runtime.spawned import SpawnedPipeline
from models import relative_error


def latents(pipe: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pipe("a lake", num_inference_steps=3, generator=generator, output_type="latent", **arguments).images


def test_scheduler_is_read_as_a_copy_and_set_on_all_ranks(one: Any, two: SpawnedPipeline) -> None:
    assert type(two.scheduler) is diffusers.DDIMScheduler
    two.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(two.scheduler.config)
    before, one.scheduler = one.scheduler, diffusers.EulerAncestralDiscreteScheduler.from_config(one.scheduler.config)
    shared, alone = latents(two), latents(one)
    one.scheduler = before
    assert relative_error(shared, alone) < 1e-5


def test_values_and_components(two: SpawnedPipeline) -> None:
    assert two.config["unet"] == ("diffusers", "UNet2DConditionModel")
    assert two.vae_scale_factor == 8
    assert two.vae.config.scaling_factor == pytest.approx(0.18215)
    assert two.unet.dtype == torch.float32
    assert two.tokenizer.model_max_length == 16
    assert "AutoencoderKL" in repr(two.vae)
    assert {"encode_prompt", "close"} <= set(dir(two))


def test_methods_run_on_every_rank(one: Any, two: SpawnedPipeline) -> None:
    embeds, *_ = two.encode_prompt("a lake", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    expected, *_ = one.encode_prompt("a lake", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert torch.equal(embeds, expected)
    two.vae.enable_slicing()
    assert two.vae.use_slicing is True
    two.vae.use_slicing = False
    assert two.vae.use_slicing is False


def test_lora_is_loaded_on_every_rank(one: Any, two: SpawnedPipeline, tmp_path: Path) -> None:
    plain = latents(one)
    torch.manual_seed(0)
    one.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), "mine"
    )
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(one.unet, adapter_name="mine"))
    one.save_lora_weights(tmp_path, unet_lora_layers=layers)
    adapted = latents(one)
    one.delete_adapters("mine")
    assert relative_error(adapted, plain) > 1e-3
    two.load_lora_weights(tmp_path, adapter_name="mine")
    assert relative_error(latents(two), adapted) < 1e-5
    two.unload_lora_weights()
    assert relative_error(latents(two), plain) < 1e-5


def test_saving_is_done_once(two: SpawnedPipeline, tmp_path: Path) -> None:
    two.save_pretrained(tmp_path / "copy")
    with load(tmp_path / "copy") as again:
        assert again.config["unet"] == ("diffusers", "UNet2DConditionModel")


@pytest.mark.parametrize("name", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "from_pipe"])
def test_what_cannot_be_forwarded_says_so(two: SpawnedPipeline, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        getattr(two, name)("cuda")


def test_modules_do_not_cross(two: SpawnedPipeline) -> None:
    with pytest.raises(ConfigError, match="give it to load"):
        two.vae = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="cannot pass between"):
        _ = two.components
    with pytest.raises(ConfigError, match="cannot be sent"):
        two.encode_prompt(threading.Lock())


def test_unknown_names_are_errors_that_name_the_nearest(two: SpawnedPipeline) -> None:
    with pytest.raises(AttributeError, match="did you mean 'scheduler'"):
        _ = two.schedular
    with pytest.raises(AttributeError, match="did you mean 'scheduler'"):
        two.schedular = two.scheduler
    assert not hasattr(two, "nothing_like_it")


def test_what_load_chose_cannot_be_set(two: SpawnedPipeline) -> None:
    with pytest.raises(AttributeError, match="chosen by load"):
        two.devices = ()


def test_one_device_has_the_same_interface(sdxl_folder: Path, one: Any) -> None:
    with load(sdxl_folder, devices=1) as pipe:
        pipe.set_progress_bar_config(disable=True)
        assert str(pipe.plan) == "patch1" and pipe.rank == 0
        assert torch.equal(latents(pipe), latents(one))
        assert pipe.last_run is not None and len(pipe.last_run.steps) == 3
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
        steps: list[int] = []
        latents(pipe, callback_on_step_end=lambda p, i, t, k: (steps.append(i), k)[1])
        assert steps == [0, 1, 2]
        with pytest.raises(AttributeError, match="did you mean 'scheduler'"):
            pipe.schedular = None
        with pytest.raises(ConfigError, match="num_inference_stepz"):
            pipe("a", num_inference_stepz=3)
    with pytest.raises(ConfigError, match="closed"):
        pipe("a")
