"""Pictures, control images and adapters reach the workers of a loaded pipeline, and what they give is one device's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import PIPELINES, noise
from lora_files import write_lora
from PIL import Image
from ranks import EXACT, Ranks
from safetensors.torch import save_file

from distrifusion import ConfigError, PlanError, UnsupportedModel, load
from distrifusion.runtime import call_checks
from distrifusion.runtime.source import PipelineFacts
from models import image_prompt, relative_error


def pil(seed: int) -> Image.Image:
    """A picture of noise, 136x200 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (200, 136, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    common = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe("a lake", generator=torch.Generator().manual_seed(3), **{**common, **arguments}).images


def saved(name: str, folder: Path) -> Path:
    PIPELINES[name].make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("StableDiffusionXLImg2ImgPipeline", tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def image_to_image(image_folder: Path) -> Iterator[Any]:
    with load(image_folder, devices=2, plan="patch2") as pipe:
        pipe.set_progress_bar_config(disable=True)
        yield pipe


@pytest.fixture
def one(image_folder: Path) -> Any:
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(image_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURES = {"image": pil(1), "strength": 0.8}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"image": [pil(1), pil(2)], "prompt": None},
        {"image": np.asarray(pil(2))[None] / 255.0},
        {"guidance_rescale": 0.5, "clip_skip": 1, "aesthetic_score": 7.0},
        {"callback_on_step_end": lambda pipe, step, timestep, tensors: {"latents": tensors["latents"] * 0.9}},
    ],
    ids=["PIL", "two prompts", "numpy", "options", "callback"],
)
def test_image_to_image_on_workers(image_to_image: Any, one: Any, change: dict[str, Any]) -> None:
    def call(pipe: Any) -> torch.Tensor:
        arguments = {**PICTURES, **change}
        if "prompt" not in arguments:
            return draw(pipe, **arguments)
        arguments["prompt"] = ["a lake", "a hill"]
        common = {"num_inference_steps": 4, "output_type": "latent"}
        return pipe(generator=torch.Generator().manual_seed(3), **common, **arguments).images

    assert relative_error(call(image_to_image), call(one)) <= EXACT


def test_lora_on_workers(image_to_image: Any, one: Any, tmp_path: Path) -> None:
    file = write_lora(type(one), one.unet, "convolutions", 1, tmp_path)
    plain = draw(one, **PICTURES)
    steps = [
        lambda pipe: pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="mine"),
        lambda pipe: pipe.set_adapters(["mine"], [0.4]),
        lambda pipe: pipe.fuse_lora(lora_scale=0.5),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    drawn = []
    for step in steps:
        step(image_to_image)
        step(one)
        drawn.append(draw(one, **PICTURES))
        assert relative_error(draw(image_to_image, **PICTURES), drawn[-1]) <= EXACT
    assert relative_error(drawn[0], plain) > 1e-3 and relative_error(drawn[1], drawn[0]) > 1e-3
    assert relative_error(drawn[-1], plain) <= EXACT


def test_an_image_prompt_on_workers(image_to_image: Any, one: Any, tmp_path: Path) -> None:
    """Loaded from a file on every rank, weighed, and taken off."""
    weights = {f"{part}.{name}": t for part, tensors in image_prompt(one.unet).items() for name, t in tensors.items()}
    save_file(weights, tmp_path / "adapter.safetensors")
    plain = draw(one, **PICTURES)
    place = {"subfolder": "", "weight_name": "adapter.safetensors", "image_encoder_folder": None}
    for pipe in (image_to_image, one):
        pipe.load_ip_adapter(str(tmp_path), **place)
        pipe.set_ip_adapter_scale(0.6)
    prompted = {**PICTURES, "ip_adapter_image_embeds": [noise(2, 1, 10, seed=7)]}
    reference = draw(one, **prompted)
    assert relative_error(reference, plain) > 1e-3
    assert relative_error(draw(image_to_image, **prompted), reference) <= EXACT
    image_to_image.unload_ip_adapter()
    assert relative_error(draw(image_to_image, **PICTURES), plain) <= EXACT


def test_freeu_on_workers(image_to_image: Any, one: Any) -> None:
    plain = draw(one, **PICTURES)
    for pipe in (image_to_image, one):
        pipe.enable_freeu(s1=0.6, s2=0.3, b1=1.3, b2=1.5)
    filtered = draw(one, **PICTURES)
    assert relative_error(filtered, plain) > 1e-3
    assert relative_error(draw(image_to_image, **PICTURES), filtered) <= EXACT
    image_to_image.disable_freeu()
    assert relative_error(draw(image_to_image, **PICTURES), plain) <= EXACT


def test_two_controlnets_on_workers(tmp_path: Path) -> None:
    """As on virtual ranks, which are held against one device elsewhere."""
    folder = saved("StableDiffusionXLControlNetPipeline, two nets", tmp_path)
    plain = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(folder)
    controls = {
        "image": [pil(1), pil(2)],
        "controlnet_conditioning_scale": [0.7, 0.4],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.8, 1.0],
    }
    plan = "patch2.displaced.w0"
    ranks = Ranks(plain, plan)
    with load(folder, devices=2, plan=plan) as pipe:
        for mode in (False, True):
            shared = draw(pipe, guess_mode=mode, **controls)
            virtual, _ = ranks.draw(lambda own, mode=mode: draw(own, guess_mode=mode, **controls))
            assert relative_error(shared, virtual) <= EXACT
            assert EXACT < relative_error(shared, draw(plain, guess_mode=mode, **controls)) < 0.3
        with pytest.raises(ConfigError, match=r"did you mean control_guidance_end="):
            draw(pipe, control_guidence_end=1.0, **controls)


@pytest.mark.parametrize(
    ("cls", "plan", "words"),
    [
        ("StableDiffusionXLPAGPipeline", "cfg2", "use 'patch2'"),
        ("StableDiffusionXLPipeline", "ulysses2", "StableDiffusionXLPipeline has convolutions too; use 'patch2'"),
        ("FluxPipeline", "patch2.columns", "FluxPipeline is cut by tokens"),
        ("SanaPipeline", "patch2", "SanaTransformer2DModel has no anatomy here"),
        ("StableCascadeDecoderPipeline", "patch2", "StableCascadeDecoderPipeline has no unet or transformer"),
    ],
)
def test_a_class_that_a_plan_cannot_divide_is_refused_before_weights_are_read(
    tmp_path: Path, cls: str, plan: str, words: str
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls, "_diffusers_version": "0.42.0"}))
    with pytest.raises((PlanError, UnsupportedModel), match=words):
        load(tmp_path, devices=2, plan=plan)


@pytest.mark.parametrize(
    ("cls", "remedy"),
    [
        (diffusers.StableDiffusionXLPipeline, "use callback_on_step_end="),
        (diffusers.StableDiffusionXLAdapterPipeline, "StableDiffusionXLAdapterPipeline has no other; leave it out"),
    ],
)
def test_an_old_callback_is_refused_with_what_to_do(cls: type, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        call_checks.bind(PipelineFacts(cls, 8), (), {"prompt": "a", "callback": print})
