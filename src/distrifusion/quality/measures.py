"""What is measured of a drawn picture against the one-device picture, and limits on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distrifusion.errors import ConfigError


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        key: its name in the data.
        title: its name for a reader.
        unit: empty if it has none.
        higher_is_better: which direction is nearer to one device.
        meaning: what a value says, in a sentence or two.
    """

    key: str
    title: str
    unit: str
    higher_is_better: bool
    meaning: str

    def worst(self, values: Sequence[float]) -> float:
        """The value that is furthest from one device."""
        return min(values) if self.higher_is_better else max(values)

    def text(self, value: float) -> str:
        """The value for a reader."""
        if math.isinf(value):
            return "equal"
        digits = f"{value:.1f}" if self.unit == "dB" else f"{value:.4f}" if self.higher_is_better else f"{value:.3g}"
        return f"{digits} {self.unit}".rstrip()


# One value for every seed.
PICTURE_MEASURES = (
    Measure("psnr", "PSNR of the picture", "dB", True,
            "Peak signal-to-noise ratio of all pixels. Above 40 dB the difference is hard to see even side by side; "
            "from 30 to 40 dB fine detail differs; below 25 dB it is another picture of the same scene."),
    Measure("ssim", "SSIM of the picture", "", True,
            "Structural similarity in windows of 11 pixels: 1 means equal, above 0.95 hard to see."),
    Measure("ms_ssim", "MS-SSIM of the picture", "", True,
            "The same over five scales; less strict about fine detail."),
    Measure("latent_error", "relative error of the last latents", "", False,
            "L2 norm of the difference over that of the one-device latents after the last step. About 1e-6 is "
            "rounding in fp32; a few percent is usual for displaced plans."),
    Measure("seam", "seam score, worst border", "", False,
            "The largest jump of the error near a border between two bands, over the usual jump beside it. About 1 "
            "means no line is there; above 2 a line may be seen."),
    Measure("agreement", "attributes read alike", "", True,
            "Share of the attributes (time of day, sun or moon, mountains, foreground, trees) that the demo models' "
            "classifier reads alike in both pictures."),
    Measure("lpips", "LPIPS of the picture", "", False,
            "Distance in the features of a trained network (AlexNet); below 0.05 hard to see."),
    Measure("clip_loss", "loss of CLIP score", "", False,
            "CLIP score of the one-device picture less that of this one, on a scale of 100: how much less the picture "
            "shows what the prompt says. Near 0 and of both signs where nothing is lost."),
)  # fmt: skip
# One value for all pictures together.
SET_MEASURES = (
    Measure("frechet", "Frechet distance to one device", "", False,
            "Between Gaussians fitted to the demo classifier's 64 features of both sets of pictures; 0 means equal "
            "statistics. It depends on the number of pictures: compare it only between runs of as many seeds."),
    Measure("fid", "FID to one device", "", False,
            "The same with 2048 features of Inception v3; with fewer than thousands of pictures only the order of "
            "plans means something."),
)  # fmt: skip
MEASURES = {measure.key: measure for measure in (*PICTURE_MEASURES, *SET_MEASURES)}


@dataclass(frozen=True)
class Miss:
    """A limit that was not kept.

    Attributes:
        key: of the measure.
        seed: of the picture, None for a figure of all pictures together.
        value: that was measured, None if it could not be.
    """

    key: str
    seed: int | None
    value: float | None
    limit: float

    def __str__(self) -> str:
        measure = MEASURES[self.key]
        if self.value is None:
            return f"{measure.title} was not measured, so the limit of {measure.text(self.limit)} is not kept"
        where = "all pictures" if self.seed is None else f"seed {self.seed}"
        side = "below" if measure.higher_is_better else "above"
        return (
            f"{where}: {measure.title} {measure.text(self.value)} is {side} the limit of {measure.text(self.limit)} "
            f"by {measure.text(abs(self.value - self.limit))}"
        )


def check_limits(limits: Mapping[str, float]) -> None:
    """Check limits by key of their measure.

    Raises:
        ConfigError: if a key is no measure or a limit is no finite number.
    """
    for key, limit in limits.items():
        if key not in MEASURES:
            raise ConfigError(f"there is no measure '{key}' to limit; there are {', '.join(MEASURES)}")
        if not math.isfinite(limit):
            raise ConfigError(f"the limit {limit} of '{key}' must be a finite number")


def misses(
    limits: Mapping[str, float], pictures: Mapping[int, Mapping[str, float]], together: Mapping[str, float]
) -> tuple[Miss, ...]:
    """Every limit that a value does not keep, or that nothing was measured for.

    Args:
        limits: by key of the measure.
        pictures: values of each picture by seed.
        together: values of all pictures together.
    """
    found = []
    for key, limit in limits.items():
        rows: list[tuple[int | None, float]] = [(seed, own[key]) for seed, own in pictures.items() if key in own]
        rows += [(None, together[key])] if key in together else []
        if not rows:
            found.append(Miss(key, None, None, limit))
        found += [Miss(key, seed, value, limit) for seed, value in rows if not _kept(MEASURES[key], value, limit)]
    return tuple(found)


def _kept(measure: Measure, value: float, limit: float) -> bool:
    """True if the value keeps the limit; one that is not a number never does."""
    return value >= limit if measure.higher_is_better else value <= limit
