"""Distances between two videos, frame by frame, and both side by side. A picture is a video of one frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from distrifusion.errors import ConfigError
from distrifusion.quality import metrics
from distrifusion.quality.panel import side_by_side

Frames = Sequence[Image.Image]


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of all frames; infinite for equal ones.

    Raises:
        ConfigError: if numbers of frames or sizes differ.
    """
    _check_alike(frames, reference)
    return metrics.psnr(*(np.concatenate([metrics.pixels(frame) for frame in film]) for film in (frames, reference)))


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity, the mean over frames; errors as for `psnr` and `metrics.ssim`."""
    _check_alike(frames, reference)
    return float(np.mean([metrics.ssim(*pair) for pair in zip(frames, reference, strict=True)]))


def all_side_by_side(reference: Frames, frames: Frames, reference_label: str, label: str) -> list[Image.Image]:
    """Of every frame: reference, frame and error map in a row, each under its label; errors as for `psnr`."""
    _check_alike(frames, reference)
    return [side_by_side(*pair, reference_label, label) for pair in zip(reference, frames, strict=True)]


def _check_alike(frames: Frames, reference: Frames) -> None:
    if len(frames) != len(reference):
        raise ConfigError(
            f"videos of {len(frames)} and {len(reference)} frames cannot be compared; draw both at one length"
        )
