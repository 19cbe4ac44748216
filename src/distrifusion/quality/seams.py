"""Is there a line in the picture where two bands meet?

A seam is a jump of the *error* (the picture less the reference) from one row of pixels to the next that is larger at a
band border than around it. The error is taken, not the picture, because a picture has edges of its own everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distrifusion.layout.mesh import RankGrid
from distrifusion.layout.partition import partition_levels
from distrifusion.plan import Plan, Split
from distrifusion.quality.metrics import Picture, pixels

# A tenth of a grey level: no jump that small is seen, so it takes no part in the score.
_INVISIBLE = 0.1 / 255
# Rows on both sides of a border that the decoder's last layers spread a jump over, in latent rows.
_NEAR = 0.5
# How far around a border it is compared with, in latent rows.
_AROUND = 4


@dataclass(frozen=True)
class Cut:
    """Where bands meet.

    Attributes:
        split: rows or columns.
        borders: first pixel row (or column) of every band but the first.
    """

    split: Split
    borders: tuple[int, ...]


def cuts(plan: Plan, num_rows: int, size: tuple[int, int], vae_factor: int, num_levels: int) -> tuple[Cut, ...]:
    """Where a plan cuts a picture: in one direction, in both if they alternate, or nowhere.

    Args:
        num_rows: batch rows of one denoiser call: 2 for one picture with guidance, else 1.
        size: width and height of the picture in pixels.
        vae_factor: pixels per latent row.
        num_levels: number of resolutions of the denoiser.
    """
    width, height = size
    num_bands = RankGrid(plan, 0).num_bands(num_rows)
    found = []
    for split in dict.fromkeys(map(plan.split_of, range(2))):
        finest = partition_levels(height // vae_factor, width // vae_factor, num_levels, num_bands, split)[0]
        if borders := tuple(band.start * vae_factor for band in (finest.bands or ())[1:]):
            found.append(Cut(split, borders))
    return tuple(found)


def band_middles(borders: Sequence[int], length: int) -> tuple[int, ...]:
    """The middle of every band: lines where no seam can be, to compare with."""
    return tuple((start + stop) // 2 for start, stop in pairwise((0, *borders, length)))


@dataclass(frozen=True)
class Seams:
    """What is at the borders of one cut in one picture.

    Attributes:
        scores: of every border.
        control: the same at the middles of the bands, where no seam can be.
        profile: what `jumps` returns.
    """

    cut: Cut
    scores: tuple[float, ...]
    control: tuple[float, ...]
    profile: np.ndarray


def seams(picture: Picture, reference: Picture, cut: Cut, vae_factor: int) -> Seams:
    """Look at the borders of a cut; `vae_factor` is the pixels per latent row.

    Raises:
        ConfigError: if a picture is of a form that `metrics.pixels` refuses.
    """
    profile = jumps(picture, reference, cut.split)
    middles = band_middles(cut.borders, len(profile) + 1)
    scores, control = (seam_scores(profile, lines, vae_factor) for lines in (cut.borders, middles))
    return Seams(cut, scores, control, profile)


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
        lines: first row after each line, as in `Cut.borders`.
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
