"""The drift of latents, step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distrifusion.errors import ConfigError
from distrifusion.quality.drift import drift


def latents(seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((3, 1, 4, 8, 6)).astype(np.float32))


def test_equal_latents() -> None:
    for step in drift(latents(0), latents(0)):
        assert step.relative_error == 0 and step.psnr == math.inf


def test_a_known_difference() -> None:
    reference = latents(0)
    curve = drift([step * 1.01 for step in reference], reference)
    assert [step.relative_error for step in curve] == pytest.approx([0.01] * 3, rel=1e-4)
    peak, mean_square = np.ptp(reference[1]), np.mean((0.01 * reference[1]) ** 2)
    assert curve[1].psnr == pytest.approx(10 * math.log10(peak**2 / mean_square), abs=1e-3)


def test_a_reference_of_zeros() -> None:
    zeros = [np.zeros((1, 4, 2, 2), np.float32)]
    assert drift(zeros, zeros)[0].relative_error == 0
    assert drift([zeros[0] + 1], zeros)[0].relative_error == math.inf


def test_no_steps_and_steps_that_do_not_match() -> None:
    assert drift([], []) == ()
    with pytest.raises(ConfigError, match="2 and 3 steps"):
        drift(latents(0)[:2], latents(0))
    with pytest.raises(ConfigError, match="two shapes"):
        drift([step[..., :3] for step in latents(0)], latents(0))
