"""Two pictures and the map of their difference, side by side with labels."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distrifusion.quality.metrics import Picture, pixels

_MARGIN = 8
_MAX_GAIN = 64


def error_map(picture: Picture, reference: Picture) -> tuple[Image.Image, int]:
    """The absolute difference, mean over channels, as a grey picture, and the factor by which it is brightened.

    The factor is the largest power of two up to 64 that leaves 99.5 % of the pixels below white; 1 if all are equal.

    Raises:
        ConfigError: if a picture is of a form that `metrics.pixels` refuses.
    """
    error = np.abs(pixels(picture) - pixels(reference)).mean(axis=-1)
    level = float(np.quantile(error, 0.995)) or float(error.max())
    gain = int(2 ** np.clip(np.floor(np.log2(1 / level)), 0, np.log2(_MAX_GAIN))) if level > 0 else 1
    return Image.fromarray((np.clip(error * gain, 0, 1) * 255).round().astype(np.uint8)), gain


def side_by_side(reference: Image.Image, picture: Image.Image, reference_label: str, label: str) -> Image.Image:
    """Reference, picture and error map in a row, each under its label.

    Raises:
        ConfigError: if a picture is of a form that `metrics.pixels` refuses.
    """
    error, gain = error_map(picture, reference)
    panels = [(reference, reference_label), (picture, label), (error.convert("RGB"), f"error x {gain}")]
    width, height = picture.size
    size = max(12, min(22, width // 16))
    font = ImageFont.load_default(size)
    band = size + 2 * _MARGIN
    row = Image.new("RGB", (len(panels) * (width + _MARGIN) + _MARGIN, height + band + _MARGIN), "white")
    draw = ImageDraw.Draw(row)
    for index, (panel, text) in enumerate(panels):
        left = _MARGIN + index * (width + _MARGIN)
        draw.text((left, band // 2), _fitted(text, font, width), font=font, fill="black", anchor="lm")
        row.paste(panel, (left, band))
    return row


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut where it would run into the next panel."""
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text
