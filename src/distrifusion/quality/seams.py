"""Is there a line in the picture where two bands meet?

A seam is a jump of the *error* (the picture less the reference) from one row of pixels to the next that is larger at a
band border than around it. The error is taken, not the picture, because a picture has edges of its own everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from distrifusion.mesh import RankGrid
from distrifusion.partition import partition_levels
from distrifusion.plan import Plan, Split
from distrifusion.quality.metrics import Picture, pixels

# A tenth of a grey level: no jump that small is seen, so it takes no part in the score.
_INVISIBLE = 0.1 / 255
# Rows on both sides of a border that the decoder's last layers spread a jump over, in latent rows.
_NEAR = 0.5
# How far around a border it is compared with, in latent rows.
_AROUND = 4


def band_borders(plan: Plan, num_rows: int, size: tuple[int, int], vae_factor: int, num_levels: int) -> tuple[int, ...]:
    """Where bands meet, as the first pixel row (or column) of every band but the first.

    Args:
        num_rows: batch rows of one denoiser call: 2 for one picture with guidance, else 1.
        size: width and height of the picture in pixels.
        vae_factor: pixels per latent row.
        num_levels: number of resolutions of the denoiser.
    """
    width, height = size
    bands = RankGrid(plan, 0).num_bands(num_rows)
    levels = partition_levels(height // vae_factor, width // vae_factor, num_levels, bands, plan.split)
    return tuple(band.start * vae_factor for band in (levels[0].bands or ())[1:])


def band_middles(borders: Sequence[int], length: int) -> tuple[int, ...]:
    """The middle of every band: lines where no seam can be, to compare with."""
    return tuple((start + stop) // 2 for start, stop in pairwise((0, *borders, length)))


def jumps(picture: Picture, reference: Picture, split: Split) -> np.ndarray:
    """Mean absolute jump of the error across every line between two rows (or columns), in 0..2.

    Returns: [L - 1] of float64 for L rows; entry i is the line above row i + 1.

    Raises:
        ConfigError: if a picture is of a form that `metrics.pixels` refuses.
    """
    error = pixels(picture) - pixels(reference)
    dim = 0 if split is Split.ROWS else 1
    return np.abs(np.diff(error, axis=dim)).mean(axis=(1 - dim, 2))


def seam_scores(profile: np.ndarray, lines: Sequence[int], vae_factor: int) -> tuple[float, ...]:
    """For every line, the largest jump near it over the usual largest jump in as many rows around it.

    About 1 where there is no seam, 1 exactly for equal pictures; a clear seam is above 2.

    Args:
        profile: what `jumps` returns.
        lines: first row after each line, as `band_borders` returns them.
        vae_factor: pixels per latent row.
    """
    near, around = max(1, round(_NEAR * vae_factor)), _AROUND * vae_factor
    return tuple(_score(profile, line - 1, near, around) for line in lines)


def _score(profile: np.ndarray, line: int, near: int, around: int) -> float:
    distance = np.abs(np.arange(len(profile)) - line)
    beside = profile[(distance > near) & (distance <= around)]
    # The largest of a few numbers is above their mean even without a seam: it is compared with the largest of as many.
    windows = np.array_split(beside, max(1, len(beside) // (2 * near + 1))) if len(beside) else []
    usual = np.mean([window.max() for window in windows]) if windows else 0.0
    return float((profile[distance <= near].max() + _INVISIBLE) / (usual + _INVISIBLE))
