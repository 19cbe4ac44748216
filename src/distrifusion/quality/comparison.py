"""One seed's picture against that of one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distrifusion.quality import metrics
from distrifusion.quality.drift import StepDrift, drift
from distrifusion.quality.recording import Recording
from distrifusion.quality.seams import Cut, Seams, seams


@dataclass(frozen=True)
class Result:
    """One picture against the same seed's picture of one device.

    Attributes:
        values: by key of `measures.PICTURE_MEASURES`; what could not be measured is missing.
        drift: after every step; empty if the pipeline does not call back.
        seams: one for every direction in which the picture was cut.
        seconds_per_step, seconds: of the picture and of the one-device picture, latents recorded.
    """

    seed: int
    prompt: str
    values: Mapping[str, float]
    drift: tuple[StepDrift, ...]
    seconds_per_step: tuple[float, float]
    seconds: tuple[float, float]
    seams: tuple[Seams, ...] = ()


def compare(
    seed: int,
    prompt: str,
    ours: Recording,
    theirs: Recording,
    cuts: Sequence[Cut] = (),
    vae_factor: int = 1,
    more: Mapping[str, float] | None = None,
) -> Result:
    """Measure one picture.

    Args:
        ours: the picture that is judged.
        theirs: the one-device picture.
        cuts: where `ours` was cut.
        vae_factor: pixels per latent row.
        more: values that were measured elsewhere.

    Raises:
        ConfigError: if sizes or numbers of steps differ.
    """
    picture, reference = ours.picture, theirs.picture
    curve = drift(ours.latents, theirs.latents)
    values = {"psnr": metrics.psnr(picture, reference)}
    if min(picture.size) >= metrics.SSIM_PIXELS:
        values["ssim"] = metrics.ssim(picture, reference)
    if min(picture.size) >= metrics.MS_SSIM_PIXELS:
        values["ms_ssim"] = metrics.ms_ssim(picture, reference)
    if curve:
        values["latent_error"] = curve[-1].relative_error
    found = tuple(seams(picture, reference, cut, vae_factor) for cut in cuts)
    if found:
        values["seam"] = max(score for one in found for score in one.scores)
    return Result(
        seed,
        prompt,
        {**values, **(more or {})},
        curve,
        (ours.seconds_per_step, theirs.seconds_per_step),
        (ours.seconds, theirs.seconds),
        found,
    )
