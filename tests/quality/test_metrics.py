"""Figures and pictures of a difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from distrifusion.errors import ConfigError
from distrifusion.quality.metrics import psnr, ssim
from distrifusion.quality.panel import error_map, side_by_side


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 200, (48, 64, 3), dtype=np.uint8))


def test_equal_pictures(picture: Image.Image) -> None:
    assert psnr(picture, picture) == math.inf
    assert ssim(picture, picture) == pytest.approx(1)
    error, gain = error_map(picture, picture)
    assert np.asarray(error).max() == 0 and gain == 1


def test_a_known_difference(picture: Image.Image) -> None:
    brighter = Image.fromarray(np.asarray(picture) + np.uint8(8))
    assert psnr(brighter, picture) == pytest.approx(20 * math.log10(255 / 8), abs=1e-4)
    assert 0 < ssim(brighter, picture) < 1
    assert psnr(np.asarray(brighter) / 255, picture) == pytest.approx(psnr(brighter, picture), abs=1e-4)
    error, gain = error_map(brighter, picture)
    assert gain == 16 and set(np.unique(error)) == {8 * 16}


def test_side_by_side_holds_both_pictures_and_the_map(picture: Image.Image) -> None:
    other = Image.fromarray(255 - np.asarray(picture))
    row = np.asarray(side_by_side(picture, other, "1 device", "patch2.displaced.w4 with a label that is too long"))
    width, height = picture.size
    assert row.shape[1] > 3 * width
    pictures = [np.asarray(p) for p in (picture, other)]
    for index, panel in enumerate(pictures):
        left = 8 + index * (width + 8)
        assert np.array_equal(row[-height - 8 : -8, left : left + width], panel)


def test_what_cannot_be_compared(picture: Image.Image) -> None:
    with pytest.raises(ConfigError, match="64x48 and 32x48"):
        psnr(picture, picture.crop((0, 0, 32, 48)))
    with pytest.raises(ConfigError, match="shape"):
        psnr(np.zeros((4, 4)), picture)
    with pytest.raises(ConfigError, match="int64"):
        psnr(np.zeros((48, 64, 3), dtype=np.int64), picture)
    with pytest.raises(ConfigError, match="11x11"):
        ssim(*[picture.crop((0, 0, 8, 8))] * 2)
