"""The renderer: a :class:`~distrifusion.demo.scenes.Scene` as a picture of any size.

All geometry is in units of the picture's height: y runs down from 0 to 1, x is 0 in the middle, so a wider picture
shows more of the same world, and a larger one shows the same world with more octaves of detail.
Legend: H, W rows and columns of the picture; colours are RGB in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrifusion.demo.noise import Floats, fractal_2d, ridge_1d
from distrifusion.demo.scenes import Scene
from distrifusion.demo.trees import plant_trees

_SKIES = {  # colours from the zenith down to the horizon
    "day": ((0.16, 0.42, 0.88), (0.42, 0.66, 0.96), (0.80, 0.91, 0.99)),
    "sunset": ((0.30, 0.12, 0.36), (0.86, 0.30, 0.20), (1.00, 0.70, 0.22)),
    "night": ((0.01, 0.02, 0.09), (0.04, 0.07, 0.20), (0.11, 0.16, 0.34)),
    "dawn": ((0.56, 0.56, 0.86), (0.92, 0.72, 0.86), (1.00, 0.88, 0.82)),
}
_LIGHT = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.78, 0.66),
    "night": (0.42, 0.46, 0.64),
    "dawn": (0.98, 0.88, 0.92),
}
_CLOUDS = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.0, 0.52, 0.36),
    "night": (0.15, 0.18, 0.32),
    "dawn": (1.0, 0.93, 0.95),
}
_SUNS = {"day": (1.0, 0.97, 0.70), "sunset": (1.0, 0.90, 0.45), "dawn": (1.0, 0.95, 0.72)}
_MOON = (0.93, 0.94, 0.88)
_MOUNTAINS = {
    "green": (0.22, 0.58, 0.20),
    "blue": (0.16, 0.38, 0.80),
    "purple": (0.54, 0.22, 0.68),
    "red": (0.78, 0.22, 0.14),
    "snowy": (0.42, 0.44, 0.50),
}
_SNOW = (0.97, 0.98, 1.0)
_GRASS = ((0.36, 0.56, 0.18), (0.55, 0.58, 0.22), (0.28, 0.48, 0.20))


@dataclass(frozen=True)
class _View:
    """The pixel grid: centres ``x`` (W) and ``y`` (H, 1) in heights, and the number of rows H."""

    x: Floats
    y: Floats
    rows: int

    @classmethod
    def of_size(cls, width: int, height: int) -> "_View":
        x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height
        y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
        return cls(x, y, height)

    def coverage(self, signed_distance: Floats) -> Floats:
        """Share of each pixel inside a shape, from its signed distance in heights (positive inside)."""
        return np.clip(signed_distance * self.rows + 0.5, 0, 1)


def render(scene: Scene, width: int = 256, height: int = 256) -> NDArray[np.uint8]:
    """Draw ``scene`` as an RGB picture (H, W, 3) of bytes; the same scene and size give the same bytes."""
    if min(width, height) < 16:
        raise ValueError(f"a picture of {width}x{height} is too small to show a scene; use 16 pixels or more")
    view = _View.of_size(width, height)
    rng = np.random.default_rng(scene.seed)
    horizon = rng.uniform(0.58, 0.66)
    light = _rgb(_LIGHT[scene.time])
    texture = fractal_2d(view.x, view.y[:, 0], scene.seed, (6, 9), height)

    image = _sky(view, scene, rng, horizon)
    _mountain_layers(image, view, scene, rng, horizon, texture)
    if scene.foreground == "lake":
        _lake(image, view, scene, horizon)
    _ground(image, view, scene, rng, horizon, texture, light)
    if scene.trees != "none":
        stand = (0.90, 0.97) if scene.foreground == "lake" else (0.76, 0.96)
        plant_trees(image, scene.trees, scene.seed, stand, light)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _rgb(colours: tuple[object, ...]) -> Floats:
    """Colours of the tables above as an array (..., 3)."""
    return np.asarray(colours, np.float32)


def _blend(image: Floats, colour: Floats, alpha: Floats) -> None:
    """Paint ``colour`` over ``image`` (H, W, 3) in place where ``alpha`` (H, W) is above 0."""
    image += alpha[..., None] * (colour - image)


def _sky(view: _View, scene: Scene, rng: np.random.Generator, horizon: float) -> Floats:
    stops = _rgb(_SKIES[scene.time])
    at = view.y[:, 0] / horizon
    column = np.stack([np.interp(at, (0.0, 0.55, 1.0), stops[:, c]) for c in range(3)], axis=-1)
    image = np.repeat(column[:, None, :].astype(np.float32), len(view.x), axis=1)
    if scene.time == "night":
        _stars(image, view, rng)
    cover = rng.uniform(-0.35, 0.22)
    clouds = fractal_2d(view.x, view.y[:, 0], scene.seed + 99, (2.2, 9), min(view.rows, 512))
    alpha = np.clip((clouds + cover) * 3.5, 0, 0.75) * np.clip(1.2 - view.y / horizon, 0, 1)
    _blend(image, _rgb(_CLOUDS[scene.time]), alpha)
    side, top, size = rng.uniform(-0.36, 0.36), rng.uniform(0.11, 0.20), rng.uniform(0.06, 0.085)
    if scene.body != "none":
        _body(image, view, scene, (side * len(view.x) / view.rows, top, size))
    return image


def _stars(image: Floats, view: _View, rng: np.random.Generator) -> None:
    """Stars are points 1/300 of the height wide, never less than a pixel."""
    x, y, brightness = rng.uniform(-1, 1, 160), rng.uniform(0, 0.5, 160), rng.uniform(0.3, 1, 160)
    width = max(1, round(view.rows / 300))
    column = ((x + len(view.x) / view.rows / 2) * view.rows).astype(int)
    row = (y * view.rows).astype(int)
    seen = (column >= 0) & (column < len(view.x) - width)
    for i, j, b in zip(row[seen], column[seen], brightness[seen], strict=True):
        image[i : i + width, j : j + width] = np.maximum(image[i : i + width, j : j + width], np.float32(b))


def _body(image: Floats, view: _View, scene: Scene, place: tuple[float, float, float]) -> None:
    x0, y0, radius = place
    distance = np.sqrt((view.x - x0) ** 2 + (view.y - y0) ** 2)
    disc = view.coverage(radius - distance)
    if scene.body == "moon":
        glow, colour = 0.25 * np.exp(-((distance / (2.2 * radius)) ** 2)), _rgb(_MOON)
    else:
        glow, colour = 0.6 * np.exp(-((distance / (2.6 * radius)) ** 2)), _rgb(_SUNS[scene.time])
    _blend(image, colour, np.maximum(glow, disc))
    if scene.body == "moon":
        for dx, dy, size in ((-0.3, -0.2, 0.3), (0.35, 0.1, 0.22), (-0.05, 0.45, 0.2)):
            spot = np.hypot(view.x - x0 - dx * radius, view.y - y0 - dy * radius)
            _blend(image, _rgb((0.74, 0.76, 0.76)), view.coverage(size * radius - spot) * 0.6)


def _mountain_layers(
    image: Floats, view: _View, scene: Scene, rng: np.random.Generator, horizon: float, texture: Floats
) -> None:
    """Three ranges, back to front: lower, steeper in detail and less hazy as they come nearer."""
    haze_colour = _rgb(_SKIES[scene.time][2]) * 0.6 + _rgb(_SKIES[scene.time][1]) * 0.4
    light = _rgb(_LIGHT[scene.time])
    rows = slice(0, min(view.rows, int(horizon * view.rows) + 2))
    y = view.y[rows]
    layers = ((0.20, 0.30, 2.2, 0.42), (0.13, 0.22, 3.0, 0.22), (0.055, 0.14, 4.2, 0.04))
    for number, (height, spread, frequency, haze) in enumerate(layers):
        ridge = ridge_1d(view.x, scene.seed + 31 * (number + 1), frequency, view.rows, persistence=0.46)
        top = horizon - np.maximum(height * rng.uniform(0.9, 1.15) + spread * 0.62 * ridge, 0.01)
        depth = y - top[None, :]
        shade = 0.94 + 0.55 * texture[rows] - 0.5 * depth
        colour = _rgb(_MOUNTAINS[scene.mountains]) * shade[..., None]
        if scene.mountains == "snowy":
            line = 0.085 - 0.016 * number + 0.11 * texture[rows]
            _blend(colour, _rgb(_SNOW), np.clip((line - depth) * 40, 0, 1))
        _blend(colour, haze_colour / light, np.float32(haze) * np.ones_like(shade))
        _blend(image[rows], colour * light, view.coverage(depth))


def _lake(image: Floats, view: _View, scene: Scene, horizon: float) -> None:
    """Below the horizon the picture mirrors itself, rippled, and dimmed towards the colour of deep water."""
    first = int(horizon * view.rows)
    y = view.y[first:]
    depth = (y - horizon) / (1 - horizon)
    ripple = fractal_2d(view.x, np.log1p(8 * depth[:, 0]) * 2, scene.seed + 7, (3, 12), view.rows)
    source = horizon - (y - horizon) * 1.15 + ripple * 0.035 * (0.15 + depth)
    row = np.clip((source * view.rows).astype(np.int64), 0, max(first - 1, 0))
    water = image[row, np.arange(len(view.x))[None, :]]
    deep = _rgb((0.06, 0.20, 0.34)) * _rgb(_LIGHT[scene.time])
    water += (0.22 + 0.2 * depth).astype(np.float32)[..., None] * (deep - water)
    water *= (1 + 0.25 * ripple)[..., None]
    image[first:] = water


def _ground(
    image: Floats, view: _View, scene: Scene, rng: np.random.Generator, horizon: float, texture: Floats, light: Floats
) -> None:
    """A shore at the bottom of a lake, or two folds of grass from the horizon down."""
    grass = _rgb(_GRASS[rng.integers(len(_GRASS))])
    shore = rng.uniform(0.88, 0.91)
    folds = ((shore, 0.03, 0.8),) if scene.foreground == "lake" else ((horizon, 0.006, 1.12), (0.78, 0.05, 0.92))
    for number, (level, swing, brightness) in enumerate(folds):
        top = level + swing * ridge_1d(view.x, scene.seed + 501 + number, 1.3, min(view.rows, 64))
        rows = slice(int(max(0.0, float(top.min()) - 0.01) * view.rows), None)
        depth = view.y[rows] - top[None, :]
        shade = brightness * (1 - 0.5 * depth) + 0.32 * texture[rows]
        _blend(image[rows], grass * light * shade[..., None], view.coverage(depth))
