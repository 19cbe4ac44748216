"""How far the latents of one run are from those of another, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distrifusion.errors import ConfigError


@dataclass(frozen=True)
class StepDrift:
    """The difference after one denoising step.

    Attributes:
        relative_error: L2 norm of the difference over L2 norm of the reference; 0 for equal latents.
        psnr: in dB, the peak being the reference's range at this step; infinite for equal latents.
    """

    relative_error: float
    psnr: float


def drift(latents: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> tuple[StepDrift, ...]:
    """The drift curve of two runs.

    Args:
        latents: one array of any shape for every step.
        reference: likewise.

    Raises:
        ConfigError: if numbers of steps or shapes differ.
    """
    if [step.shape for step in latents] != [step.shape for step in reference]:
        raise ConfigError(f"latents of {len(latents)} and {len(reference)} steps, or of two shapes, cannot be compared")
    return tuple(_step(ours, theirs) for ours, theirs in zip(latents, reference, strict=True))


def _step(latents: np.ndarray, reference: np.ndarray) -> StepDrift:
    reference = reference.astype(np.float64)
    difference = latents.astype(np.float64) - reference
    mean_square = float(np.mean(difference**2))
    norm = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(difference))
    relative = error / norm if norm else (0.0 if not error else math.inf)
    peak = float(np.ptp(reference))
    psnr = 10 * math.log10(peak**2 / mean_square) if mean_square and peak else math.inf
    return StepDrift(relative, psnr)
