"""Drawing from a picture: image-to-image and inpainting with the weights of a text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from PIL.Image import Image


@dataclass(frozen=True)
class Edit:
    """What to draw from.

    Attributes:
        image: the picture.
        mask: what is white in it is drawn anew; None for the whole picture.
        strength: how much is drawn anew, in (0, 1]; None for the pipeline's own.
    """

    image: Path
    mask: Path | None
    strength: float | None

    @classmethod
    def of(cls, image: Path | None, mask: Path | None, strength: float | None) -> Edit | None:
        """From the options; None if nothing is drawn from a picture.

        Raises:
            ConfigError: if an option has no effect without another, or cannot work.
        """
        if image is None and (mask is not None or strength is not None):
            raise ConfigError(f"--{'strength' if mask is None else 'mask-image'} needs a picture: say --image")
        if strength is not None and not 0 < strength <= 1:
            raise ConfigError(f"--strength {strength} must be above 0 and at most 1")
        return None if image is None else cls(image, mask, strength)

    def source(self, model: str, keywords: dict[str, Any]) -> Callable[[], DiffusionPipeline]:
        """What `load` opens instead of the model's own pipeline."""
        from distrifusion.runtime import source

        found = source.find(model, keywords)
        return partial(_open, str(found.origin), self.mask is not None, dict(found.keywords))

    def arguments(self, drawing: dict[str, Any], to_size: bool) -> dict[str, Any]:
        """Arguments of the call, from those of drawing without a picture.

        Args:
            to_size: bring the picture to the size of `drawing`; else its own size is drawn.

        Raises:
            ConfigError: if a file is no picture, its own size cannot be drawn, or no step would be left.
            OSError: if a file cannot be read.
        """
        steps, strength = drawing["num_inference_steps"], self.strength
        if strength is not None and int(steps * strength) < 1:
            raise ConfigError(f"--strength {strength} of {steps} steps leaves none; raise one of the two")
        size = (drawing["width"], drawing["height"]) if to_size else None
        given = {key: value for key, value in drawing.items() if key not in ("width", "height")}
        given["image"] = _picture(self.image, size, "RGB")
        if strength is not None:
            given["strength"] = strength
        if self.mask is not None:
            width, height = given["image"].size
            given |= {"mask_image": _picture(self.mask, (width, height), "L"), "width": width, "height": height}
        return given


def _open(folder: str, inpaint: bool, keywords: dict[str, Any]) -> DiffusionPipeline:
    """The pipeline of the same weights for the task; every rank calls it."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    kind = AutoPipelineForInpainting if inpaint else AutoPipelineForImage2Image
    return kind.from_pretrained(folder, **keywords)


def _picture(file: Path, size: tuple[int, int] | None, mode: str) -> Image:
    """The picture, cut to the shape of `size` about its middle and scaled to it."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert(mode)
    except UnidentifiedImageError as error:
        raise ConfigError(f"'{file}' is no picture") from error
    if size is not None:
        return ImageOps.fit(picture, size)
    if picture.width % 8 or picture.height % 8:
        near = f"{max(8, picture.width // 8 * 8)}x{max(8, picture.height // 8 * 8)}"
        raise ConfigError(f"'{file}' is {picture.width}x{picture.height}, no multiples of 8; say --size {near}")
    return picture
