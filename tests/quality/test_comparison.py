"""What is measured of one picture, and what is left out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distrifusion.plan import Split
from distrifusion.quality.comparison import compare
from distrifusion.quality.recording import Recording, Shelf
from distrifusion.quality.seams import Cut


def recording(size: tuple[int, int], seed: int = 0, steps: int = 2) -> Recording:
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    return Recording(picture, tuple(rng.standard_normal((steps, 1, 4, 2, 2)).astype(np.float32)), 0.5, 2.0)


@pytest.mark.parametrize(
    ("size", "missing"), [((176, 176), set()), ((175, 176), {"ms_ssim"}), ((64, 10), {"ms_ssim", "ssim"})]
)
def test_small_pictures_have_fewer_figures(size: tuple[int, int], missing: set[str]) -> None:
    result = compare(0, "a", recording(size), recording(size))
    assert {"psnr", "ssim", "ms_ssim", "latent_error"} - result.values.keys() == missing
    assert result.values["psnr"] == math.inf and result.values["latent_error"] == 0


def test_no_steps_and_no_cuts() -> None:
    result = compare(0, "a", recording((64, 64), 1, steps=0), recording((64, 64), 2, steps=0))
    assert result.drift == () and "latent_error" not in result.values
    assert result.seams == () and "seam" not in result.values


def test_the_worst_border_of_all_cuts_counts() -> None:
    theirs = recording((96, 64))
    noise = np.random.default_rng(3).integers(-2, 3, (64, 96, 3))
    noise[:, 48:] += 20
    picture = Image.fromarray(np.clip(np.asarray(theirs.picture) * 0.8 + 20 + noise, 0, 255).astype(np.uint8))
    reference = Image.fromarray((np.asarray(theirs.picture) * 0.8 + 20).astype(np.uint8))
    ours = Recording(picture, theirs.latents, 0.25, 1.0)
    theirs = Recording(reference, theirs.latents, 0.5, 2.0)
    cuts = (Cut(Split.ROWS, (32,)), Cut(Split.COLUMNS, (48,)))
    result = compare(0, "a", ours, theirs, cuts, vae_factor=8, more={"agreement": 1.0})
    rows, columns = result.seams
    assert result.values["seam"] == max(columns.scores) > 3 > 1.5 > max(rows.scores)
    assert result.values["agreement"] == 1 and result.seconds_per_step == (0.25, 0.5)


def test_a_shelf_gives_back_what_was_put(tmp_path: Path) -> None:
    shelf, kept = Shelf(tmp_path), recording((32, 16))
    shelf.put("plan", 7, kept)
    shelf.put("one-device", 7, recording((32, 16), seed=5, steps=0))
    found = shelf.get("plan", 7)
    assert np.array_equal(found.picture, kept.picture)
    assert len(found.latents) == 2 and all(map(np.array_equal, found.latents, kept.latents))
    assert (found.seconds_per_step, found.seconds) == (0.5, 2.0)
    assert shelf.get("one-device", 7).latents == ()
