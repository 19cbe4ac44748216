"""A line where two bands meet is found, and only that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from distrifusion.plan import Plan, Split
from distrifusion.quality.seams import Cut, band_middles, cuts, jumps, seam_scores, seams

VAE = 8
BORDERS = (64, 128)


def landscape(seed: int, coarseness: int = 16) -> np.ndarray:
    """A smooth random picture [192, 160, 3] in 0.1..0.9."""
    noise = torch.rand(1, 3, 192 // coarseness, 160 // coarseness, generator=torch.Generator().manual_seed(seed))
    smooth = interpolate(noise, (192, 160), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).double().numpy()
    return 0.1 + 0.8 * (smooth - smooth.min()) / np.ptp(smooth)


def smooth_error(seed: int, size: float) -> np.ndarray:
    """An error as displaced plans make it: smooth, and stronger in some places than in others."""
    return size * (landscape(seed, 8) - 0.5) * landscape(seed + 1, 48)


def scores(picture: np.ndarray, reference: np.ndarray, split: Split = Split.ROWS) -> tuple[float, ...]:
    return seam_scores(jumps(picture, reference, split), BORDERS, VAE)


@pytest.mark.parametrize("seed", range(5))
def test_a_clean_picture_has_no_seam(seed: int) -> None:
    reference = landscape(seed)
    found = scores(reference + smooth_error(seed + 50, 0.1), reference)
    assert max(found) < 1.6 and min(found) > 0.4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("split", [Split.ROWS, Split.COLUMNS])
def test_a_planted_seam_is_found_at_its_border(seed: int, split: Split) -> None:
    reference = landscape(seed)
    error = smooth_error(seed + 50, 0.1)
    # The second band is a little brighter: six grey levels, softened over a few rows as by a decoder.
    step = 6 / 255 * np.clip((np.arange(192) - BORDERS[0] + 2) / 3, 0, 1)
    picture = reference + error + step[:, None, None]
    if split is Split.COLUMNS:
        picture, reference = picture.transpose(1, 0, 2), reference.transpose(1, 0, 2)
    found = seams(picture, reference, Cut(split, BORDERS), VAE)
    at_seam, elsewhere = found.scores
    assert at_seam > 2 and elsewhere < 1.6
    assert max(found.control) < 1.6 and len(found.control) == 3 and len(found.profile) == 191


def test_equal_pictures_and_invisible_jumps_score_one() -> None:
    reference = landscape(0)
    assert scores(reference, reference) == (1.0, 1.0)
    picture = reference.copy()
    picture[BORDERS[0] :] += 0.01 / 255
    assert max(scores(picture, reference)) < 1.2


def test_edges_of_the_picture_itself_are_no_seams() -> None:
    reference = landscape(0)
    reference[BORDERS[0] :] /= 2
    assert max(scores(reference + smooth_error(3, 0.1), reference)) < 1.6


def test_a_border_at_the_edge_of_the_picture_can_be_judged() -> None:
    reference = landscape(0)
    picture = reference + smooth_error(3, 0.1)
    profile = jumps(picture, reference, Split.ROWS)
    assert len(profile) == 191
    assert all(np.isfinite(score) for score in seam_scores(profile, (1, 8, 190), VAE))


@pytest.mark.parametrize(
    ("plan", "rows", "size", "where"),
    [
        ("patch2", 2, (512, 512), {"rows": (256,)}),
        ("patch4.columns.displaced.w4", 1, (512, 256), {"columns": (128, 256, 384)}),
        ("patch3", 2, (64, 256), {"rows": (96, 192)}),  # 32 latent rows, 8 of the coarsest: 3, 3 and 2
        ("cfg2.patch2", 2, (256, 256), {"rows": (128,)}),
        ("cfg2.patch2", 1, (256, 256), {"rows": (64, 128, 192)}),  # one row of the batch: four bands
        ("patch2.alternating.naive.w1", 1, (512, 256), {"rows": (128,), "columns": (256,)}),
        ("cfg2", 2, (256, 256), {}),
        ("patch1", 2, (256, 256), {}),
        ("patch8", 1, (256, 32), {}),  # four latent rows: too few to cut
    ],
)
def test_borders_are_where_the_denoiser_cuts(
    plan: str, rows: int, size: tuple[int, int], where: dict[str, tuple[int, ...]]
) -> None:
    found = cuts(Plan.parse(plan), rows, size, VAE, num_levels=3)
    assert {str(cut.split): cut.borders for cut in found} == where


def test_middles_lie_between_borders() -> None:
    assert band_middles((64, 128), 200) == (32, 96, 164)
