"""One seed's picture against that of one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from distrifusion.plan import Split
from distrifusion.quality import metrics, seams
from distrifusion.quality.drift import StepDrift, drift
from distrifusion.quality.recording import Recording


@dataclass(frozen=True)
class Bands:
    """Where the picture is cut.

    Attributes:
        split: direction of the cut.
        borders: first pixel row (or column) of every band but the first; empty if the picture is not cut.
        vae_factor: pixels per latent row.
    """

    split: Split
    borders: tuple[int, ...]
    vae_factor: int


@dataclass(frozen=True)
class Result:
    """One picture against the same seed's picture of one device.

    Attributes:
        values: by key of `measures.PICTURE_MEASURES`; what could not be measured is missing.
        drift: after every step; empty if the pipeline does not call back.
        seams: score of every border between bands.
        control: the same score at the middles of bands, where no seam can be.
        profile: mean absolute jump of the error across every line, in 0..2; empty without borders.
        seconds_per_step, seconds: of the picture and of the one-device picture, latents recorded.
    """

    seed: int
    prompt: str
    values: Mapping[str, float]
    drift: tuple[StepDrift, ...]
    seconds_per_step: tuple[float, float]
    seconds: tuple[float, float]
    seams: tuple[float, ...] = ()
    control: tuple[float, ...] = ()
    profile: np.ndarray = field(default_factory=lambda: np.zeros(0))


def compare(
    seed: int, prompt: str, ours: Recording, theirs: Recording, bands: Bands, more: Mapping[str, float]
) -> Result:
    """Measure one picture.

    Args:
        ours: the picture that is judged.
        theirs: the one-device picture.
        bands: where `ours` was cut.
        more: values that were measured elsewhere.

    Raises:
        ConfigError: if sizes or numbers of steps differ.
    """
    picture, reference = ours.picture, theirs.picture
    curve = drift(ours.latents, theirs.latents)
    values = {"psnr": metrics.psnr(picture, reference), "ssim": metrics.ssim(picture, reference)}
    if min(picture.size) >= metrics.MS_SSIM_PIXELS:
        values["ms_ssim"] = metrics.ms_ssim(picture, reference)
    if curve:
        values["latent_error"] = curve[-1].relative_error
    at_borders: tuple[float, ...] = ()
    at_middles: tuple[float, ...] = ()
    profile = np.zeros(0)
    if bands.borders:
        profile = seams.jumps(picture, reference, bands.split)
        at_borders = seams.seam_scores(profile, bands.borders, bands.vae_factor)
        middles = seams.band_middles(bands.borders, len(profile) + 1)
        at_middles = seams.seam_scores(profile, middles, bands.vae_factor)
        values["seam"] = max(at_borders)
    return Result(
        seed,
        prompt,
        {**values, **more},
        curve,
        (ours.seconds_per_step, theirs.seconds_per_step),
        (ours.seconds, theirs.seconds),
        at_borders,
        at_middles,
        profile,
    )
