"""Trees of the foreground: tiered pines and round crowns, drawn as small sprites at their own resolution."""

import numpy as np

from distrifusion.demo.noise import Floats, noise_1d

_SPACING = 0.19  # heights between neighbours
_NEEDLES, _LEAVES, _BARK = (0.05, 0.30, 0.22), (0.30, 0.50, 0.10), (0.34, 0.22, 0.13)


def plant_trees(image: Floats, kind: str, seed: int, stand: tuple[float, float], light: Floats) -> None:
    """Draw a row of trees into ``image`` (H, W, 3) in place, those further away first.

    ``kind`` is ``pine`` or ``round``; ``stand`` is the range of y (in heights) of their feet; ``light`` an RGB factor.
    Trees stand on a jittered grid in x, so the size and shape of the picture decide only how many of them are seen.
    """
    height, width = image.shape[:2]
    reach = int(width / height / 2 / _SPACING) + 1
    trees = []
    for place in range(-reach, reach + 1):
        rng = np.random.default_rng((seed, place + 1000))
        x = (place + rng.uniform(-0.3, 0.3)) * _SPACING
        foot = rng.uniform(*stand)
        trees.append((foot, x, rng.uniform(0.20, 0.30) * (foot / stand[1]) ** 2, rng.uniform(0.85, 1.15), place))
    for foot, x, size, tint, place in sorted(trees):
        _draw_tree(image, kind, (x, foot, size), light * tint, seed + 13 * place)


def _draw_tree(image: Floats, kind: str, place: tuple[float, float, float], light: Floats, seed: int) -> None:
    height, width = image.shape[:2]
    x0, foot, size = place
    half = 0.42 * size
    left, right = (int((x + width / height / 2) * height) for x in (x0 - half, x0 + half))
    top, bottom = int((foot - size) * height), min(height, int(foot * height) + 1)
    left, right, top = max(left, 0), min(right + 1, width), max(top, 0)
    if left >= right or top >= bottom:
        return
    # u is 0 on the trunk; v is 0 at the tip and 1 at the foot; both in units of the tree's size
    u = ((np.arange(left, right, dtype=np.float32) + 0.5 - width / 2) / height - x0)[None, :] / size
    v = 1 - (foot - (np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5) / height) / size
    trunk = np.minimum(0.035 - np.abs(u), np.minimum(v - 0.5, 1 - v))
    inside, shade = (_pine if kind == "pine" else _crown)(u, v, seed)
    leaves = np.asarray(_NEEDLES if kind == "pine" else _LEAVES, np.float32) * shade[..., None]
    box = image[top:bottom, left:right]
    for colour, distance in ((np.asarray(_BARK, np.float32), trunk), (leaves, inside)):
        alpha = np.clip(distance * size * height + 0.5, 0, 1)
        box += alpha[..., None] * (colour * light - box)


def _pine(u: Floats, v: Floats, seed: int) -> tuple[Floats, Floats]:
    """Signed distance (positive inside) and shade of five tiers, each flaring out to its lower edge."""
    tier = v / 0.88 * 5
    step = np.floor(tier)
    flare = tier - step
    half = 0.035 + 0.052 * step * (0.62 + 0.10 * flare) + 0.10 * flare
    half = half + 0.03 * (noise_1d(v * 40, seed) - 0.5)
    inside = np.minimum(half - np.abs(u), np.minimum(v, 0.88 - v))
    return inside, 1.25 - 0.55 * flare - 0.9 * u


def _crown(u: Floats, v: Floats, seed: int) -> tuple[Floats, Floats]:
    """Signed distance (positive inside) and shade of a crown of overlapping balls, lit from the upper left."""
    rng = np.random.default_rng(abs(seed))
    inside = np.full(np.broadcast_shapes(u.shape, v.shape), -1, np.float32)
    shade = np.ones_like(inside)
    for du, dv, radius in ((0, 0.34, 0.26), (-0.17, 0.44, 0.17), (0.17, 0.44, 0.17), (0.02, 0.22, 0.18)):
        du, dv = du + rng.uniform(-0.03, 0.03), dv + rng.uniform(-0.03, 0.03)
        ball = radius - np.hypot(u - du, v - dv)
        lit = 1.15 - 1.1 * (u - du) - 1.6 * (v - dv)
        shade = np.where(ball > inside, lit, shade)
        inside = np.maximum(inside, ball)
    return inside, np.clip(shade, 0.55, 1.6)
