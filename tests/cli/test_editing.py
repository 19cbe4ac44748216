"""`distrifusion run` from a picture, with LoRA weights, and with previews."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from shell import run

from distrifusion.cli.drawing import Wish
from distrifusion.cli.editing import Edit
from distrifusion.cli.preview import Preview
from distrifusion.cli.run import Order
from distrifusion.quality.metrics import psnr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture and a mask of 96x80, and what is no picture."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((96, 80), Image.Resampling.BICUBIC).save(folder / "image.png")
    mask = np.zeros((80, 96), np.uint8)
    mask[:, 48:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(noise).resize((97, 80)).save(folder / "odd.png")
    (folder / "text.png").write_text("no picture")
    return folder


def draw(folder: Path, out: Path, *words: object) -> Image.Image:
    done = run("run", folder, "-p", "a", "--steps", "4", "--seed", "3", "-o", out, *words)
    assert done.exit_code == 0, done.stderr
    return Image.open(out)


@pytest.mark.supports("pipeline", "StableDiffusionXLImg2ImgPipeline")
def test_image_to_image_on_two_devices(folder: Path, files: Path, tmp_path: Path) -> None:
    words = ["--image", files / "image.png", "--strength", "0.8", "--plan", "patch2", "--compare"]
    done = run("run", folder, "-p", "a", "--steps", "4", "--seed", "3", "-o", tmp_path / "a.png", *words)
    assert done.exit_code == 0, done.stderr
    found = re.search(r"PSNR (\S+) dB", done.stdout)
    assert found is not None and float(found[1]) > 60
    assert Image.open(tmp_path / "a.png").size == (96, 80)


def test_strength_decides_how_much_of_the_picture_stays(folder: Path, files: Path, tmp_path: Path) -> None:
    little, much, other = (
        draw(folder, tmp_path / f"{name}.png", *words)
        for name, words in {
            "little": ["--image", files / "image.png", "--strength", "0.3"],
            "much": ["--image", files / "image.png", "--strength", "1"],
            "other": ["--image", files / "mask.png", "--strength", "1"],
        }.items()
    )
    assert little.size == much.size == (96, 80)
    assert psnr(much, other) > psnr(little, other)


def test_inpainting_keeps_what_is_black_in_the_mask(folder: Path, files: Path, tmp_path: Path) -> None:
    words = ["--image", files / "image.png", "--mask-image", files / "mask.png", "--strength", "1", "--size", "64x64"]
    one, two = (
        np.asarray(draw(folder, tmp_path / f"{seed}.png", *words, "--seed", seed)).astype(float) for seed in (3, 4)
    )
    assert one.shape == (64, 64, 3)
    difference = np.abs(one - two).mean(axis=(0, 2))
    # The decoder mixes a little over the edge of the mask.
    assert difference[:16].mean() < difference[48:].mean() / 2


def test_lora_weights_change_the_picture(folder: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.manual_seed(0)
    unet.add_adapter(
        LoraConfig(r=3, lora_alpha=30, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    plain = draw(folder, tmp_path / "plain.png")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    changed = draw(folder, tmp_path / "changed.png", "--lora", file)
    assert psnr(changed, plain) < 60


def test_previews_end_in_the_picture(folder: Path, tmp_path: Path) -> None:
    preview = tmp_path / "preview.png"
    picture = draw(folder, tmp_path / "a.png", "--preview", preview)
    assert psnr(Image.open(preview), picture) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "preview.png"]


def test_a_preview_is_decoded_every_few_steps_and_written_by_rank_0(tmp_path: Path) -> None:
    class Vae:
        dtype = torch.float32
        config = type("config", (), {"scaling_factor": 2.0})
        decoded: list[torch.Tensor]

        def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            self.decoded.append(latents)
            return (latents[:, :3],)

    for rank in (0, 1):
        vae = Vae()
        vae.decoded = []
        pipe = type("pipe", (), {"vae": vae})
        for step in range(7):
            Preview(tmp_path / f"{rank}.png", 3, rank)(pipe, step, None, {"latents": torch.ones(2, 4, 8, 8)})
        assert len(vae.decoded) == 2 and torch.equal(vae.decoded[0], torch.full((1, 4, 8, 8), 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


@pytest.mark.parametrize(("typed", "size"), [(None, (96, 80)), ("64x128", (64, 128))])
def test_a_picture_keeps_its_size_unless_one_is_typed(files: Path, typed: str | None, size: tuple[int, int]) -> None:
    wish = Wish("demo", None, None, typed, None, "float32", {"prompt": "a", "num_inference_steps": 4})
    edit = Edit.of(files / "image.png", files / "mask.png", 0.5)
    arguments = Order(wish, edit, seed=0, lora=None, preview=None, trace=None).arguments()
    assert arguments["image"].size == arguments["mask_image"].size == (arguments["width"], arguments["height"]) == size


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mask-image", "mask.png"], "--mask-image needs a picture"),
        (["--strength", "0.5"], "--strength needs a picture"),
        (["--image", "image.png", "--strength", "0"], "must be above 0"),
        (["--image", "image.png", "--strength", "1.5"], "at most 1"),
        (["--image", "image.png", "--strength", "0.1"], "of 4 steps leaves none"),
        (["--image", "text.png"], "is no picture"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", "odd.png"], "is 97x80, no multiples of 8; say --size 96x80"),
        (["--image", "image.png", "--size", "100x64"], "width=100"),
        (["--lora", "nowhere"], "there is no such file or folder"),
        (["--preview", "nowhere/at/all.png"], "there is no folder"),
    ],
)
def test_bad_values_are_one_clear_line(
    folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.chdir(files)
    done = run("run", folder, "-p", "a", "--steps", "4", *words)
    assert done.exit_code == 2 and says in done.stderr and done.stderr.startswith("distrifusion: ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
