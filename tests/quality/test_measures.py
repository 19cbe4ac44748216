"""Limits on measures, and what missed them."""

from __future__ import annotations

import math

import pytest

from distrifusion.errors import ConfigError
from distrifusion.quality.measures import MEASURES, PICTURE_MEASURES, SET_MEASURES, Miss, check_limits, misses

PICTURES = {3: {"psnr": 40.0, "latent_error": 0.02}, 9: {"psnr": 31.5, "latent_error": 0.05}}
TOGETHER = {"frechet": 0.4}


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        ({}, []),
        ({"psnr": 31.5, "latent_error": 0.05, "frechet": 0.4}, []),
        ({"psnr": 35}, [Miss("psnr", 9, 31.5, 35)]),
        ({"latent_error": 0.01}, [Miss("latent_error", 3, 0.02, 0.01), Miss("latent_error", 9, 0.05, 0.01)]),
        ({"frechet": 0.1, "psnr": 30}, [Miss("frechet", None, 0.4, 0.1)]),
    ],
)
def test_a_limit_is_on_every_picture(limits: dict[str, float], missed: list[Miss]) -> None:
    assert list(misses(limits, PICTURES, TOGETHER)) == missed


def test_what_is_not_a_number_keeps_no_limit() -> None:
    assert misses({"psnr": 1.0}, {0: {"psnr": math.nan}}, {}) and misses({"seam": 9.0}, {0: {"seam": math.nan}}, {})
    assert not misses({"psnr": 99.0}, {0: {"psnr": math.inf}}, {})


def test_a_miss_says_which_seed_and_by_how_much() -> None:
    assert str(Miss("psnr", 9, 31.5, 35)) == (
        "seed 9: PSNR of the picture 31.5 dB is below the limit of 35.0 dB by 3.5 dB"
    )
    said = str(Miss("frechet", None, 0.4, 0.1))
    assert said.startswith("all pictures: Frechet") and "above the limit of 0.1 by 0.3" in said


def test_what_was_not_measured_keeps_no_limit() -> None:
    (miss,) = misses({"ssim": 0.9}, PICTURES, TOGETHER)
    assert miss == Miss("ssim", None, None, 0.9)
    assert str(miss) == "SSIM of the picture was not measured, so the limit of 0.9000 is not kept"


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="no measure 'psrn'"):
        check_limits({"psrn": 3})
    with pytest.raises(ConfigError, match=r"nan of 'psnr' must be a finite"):
        check_limits({"psnr": math.nan})


def test_values_for_a_reader() -> None:
    assert MEASURES["psnr"].text(math.inf) == "equal"
    assert MEASURES["psnr"].text(38.26) == "38.3 dB"
    assert MEASURES["latent_error"].text(6.5e-07) == "6.5e-07"
    assert len(MEASURES) == len(PICTURE_MEASURES) + len(SET_MEASURES)
    assert MEASURES["psnr"].worst([30, 40]) == 30 and MEASURES["seam"].worst([1, 2]) == 2
