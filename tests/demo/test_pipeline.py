"""The shipped weights: a plain diffusers pipeline that fits in the package, and a classifier that can read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTokenizer

from distrifusion import demo
from distrifusion.demo import classifier
from distrifusion.demo.dataset import sample_scenes
from distrifusion.demo.evaluate import accuracy
from distrifusion.demo.painting import render
from distrifusion.demo.scenes import ATTRIBUTES

PROMPT = "a sunset over green mountains with a lake and pine trees"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(demo.path())
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_shipped_files_are_small() -> None:
    beside = [file for file in Path(demo.__file__).parent.iterdir() if file.is_file()]
    files = [*beside, *(file for file in demo.path().rglob("*") if file.is_file())]
    assert sum(file.stat().st_size for file in files) < 25_000_000
    assert not any(os.path.islink(file) for file in demo.path().rglob("*"))


def test_the_folder_loads_as_the_true_classes(pipe: StableDiffusionXLPipeline) -> None:
    assert type(pipe) is StableDiffusionXLPipeline
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.vae_scale_factor == 8
    assert pipe.unet.dtype == torch.float32


@pytest.mark.parametrize("text", ["A Lake, at dawn!", "Ünïcödé 漢字 🌲", "", "x" * 300])
def test_any_text_has_tokens(text: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(demo.path() / "tokenizer")
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in ids


def test_captions_survive_the_tokenizer() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(demo.path() / "tokenizer_2")
    ids = tokenizer(PROMPT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPT
    assert len(ids) == len(PROMPT.split()) + 2


def test_a_picture_is_drawn_from_a_prompt_and_only_from_it(pipe: StableDiffusionXLPipeline) -> None:
    def draw(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        return pipe(prompt, num_inference_steps=4, width=192, height=128, output_type="np", generator=generator).images

    sunset, night = draw(PROMPT), draw("a dark night over blue mountains")
    assert sunset.shape == (1, 128, 192, 3)
    assert np.isfinite(sunset).all()
    assert sunset.std() > 0.05
    assert sunset[..., 0].mean() > night[..., 0].mean() + 0.1


def test_an_image_is_drawn_in_bfloat16() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(demo.path(), torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(PROMPT, num_inference_steps=2, width=64, height=64, output_type="np").images
    assert np.isfinite(image).all()


@pytest.mark.parametrize("size", [(256, 256), (320, 224)])
def test_the_classifier_reads_rendered_scenes(size: tuple[int, int]) -> None:
    scenes = sample_scenes(60, seed=77)
    images = classifier.to_images(np.stack([render(scene, *size) for scene in scenes]))
    shares = accuracy(images, scenes)
    assert set(shares) == set(ATTRIBUTES)
    assert min(shares.values()) >= 0.95, shares


def test_the_frechet_distance_is_zero_for_the_same_pictures_and_grows_with_blur() -> None:
    pictures = [render(scene, 128, 128) for scene in sample_scenes(96, seed=78)]
    blurred = [np.asarray(Image.fromarray(p).resize((8, 8)).resize((128, 128))) for p in pictures]
    real, soft = (classifier.features(classifier.to_images(np.stack(p))) for p in (pictures, blurred))
    assert classifier.frechet_distance(real, real) == pytest.approx(0, abs=1e-3)
    assert classifier.frechet_distance(real, soft) > 0.2


def test_the_classifier_refuses_what_is_no_batch_of_pictures() -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        classifier.read_attributes(torch.zeros(3, 64, 64))
