"""The shipped SD3 model: true classes, small, follows its prompts, and is divided exactly with trained weights."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from ranks import EXACT, Ranks, own_copy

from distrifusion import demo
from distrifusion.demo import classifier
from distrifusion.demo.scenes import ATTRIBUTES
from distrifusion.quality.landscapes import PROMPTS
from distrifusion.runtime import source

FEW_TOKENS = {"max_sequence_length": 1}  # tokens of zeros in the place of T5


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = source.find("demo-dit", {}).open(torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = {"width": 144, "height": 112}
    call = {"prompt": "a dark night with the moon", "num_inference_steps": 3, "output_type": "latent", **size}
    return pipe(**{**call, **FEW_TOKENS, **changes}, generator=generator).images


def test_the_folder_is_small_and_has_everything() -> None:
    files = [file for file in demo.path("demo-dit").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25_000_000
    assert not any(os.path.islink(file) for file in files)
    assert not any("http" in file.read_text() for file in files if file.name.endswith("config.json"))


def test_the_folder_loads_as_the_true_classes(pipe: StableDiffusion3Pipeline) -> None:
    assert type(pipe) is StableDiffusion3Pipeline
    assert type(pipe.transformer) is SD3Transformer2DModel
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipe.text_encoder_3 is pipe.tokenizer_3 is None
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("plan", ["patch2", "patch3", "ulysses2", "ring2", "cfg2.patch2"])
def test_trained_weights_are_divided_exactly(pipe: StableDiffusion3Pipeline, plan: str) -> None:
    assert Ranks(pipe, plan).error(draw, draw(own_copy(pipe))) <= EXACT


def test_stale_keys_and_values_come_close(pipe: StableDiffusion3Pipeline) -> None:
    error = Ranks(pipe, "patch2.displaced.w1").error(draw, draw(own_copy(pipe)))
    assert 1e-6 < error < 0.3


def test_pictures_show_what_prompts_ask_for(pipe: StableDiffusion3Pipeline) -> None:
    asked = list(PROMPTS)[:6]
    size = {"width": 256, "height": 256}
    images = draw(pipe, prompt=asked, num_inference_steps=14, guidance_scale=5.0, output_type="pt", **size)
    read = classifier.read_attributes(images)
    right = [
        [got[name] == word for name, word in zip(ATTRIBUTES, PROMPTS[prompt].split(), strict=True)]
        for prompt, got in zip(asked, read, strict=True)
    ]
    assert np.mean(right) >= 0.85


def test_pictures_hardly_depend_on_the_tokens_of_zeros(pipe: StableDiffusion3Pipeline) -> None:
    few, many = (draw(pipe, max_sequence_length=length) for length in (1, 256))
    assert 0 < (few - many).norm() / many.norm() < 0.3
