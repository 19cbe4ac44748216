"""Value noise on integer lattices: a function of position alone, so a picture of any size sees the same world."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]


def hash_lattice(columns: NDArray[np.int64], rows: NDArray[np.int64] | int, seed: int) -> Floats:
    """Uniform [0, 1) values of lattice points, the same for the same (column, row, seed) in every call."""
    mixed = columns * 0x9E3779B1 + np.asarray(rows, dtype=np.int64) * 0x85EBCA77 + seed * 0xC2B2AE3D
    h = (mixed & 0xFFFFFFFF).astype(np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return ((h ^ (h >> np.uint32(16))) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def num_octaves(frequency: float, pixels_per_unit: int) -> int:
    """Octaves from ``frequency`` up whose wavelength is at least two pixels: a larger picture has more of them."""
    return max(1, int(np.log2(pixels_per_unit / (2 * frequency))) + 1)


def noise_1d(x: Floats, seed: int) -> Floats:
    """Smooth noise in [0, 1] at positions ``x`` (lattice spacing 1)."""
    cell = np.floor(x)
    t = _smoothstep(x - cell)
    i = cell.astype(np.int64)
    return (1 - t) * hash_lattice(i, 0, seed) + t * hash_lattice(i + 1, 0, seed)


def ridge_1d(x: Floats, seed: int, frequency: float, pixels_per_unit: int, persistence: float = 0.5) -> Floats:
    """Fractal skyline about 0 with sharp summits: folded noise (1/2 - |2n - 1|), octave on octave."""
    total = np.zeros_like(x)
    amplitude = 1.0
    for octave in range(num_octaves(frequency, pixels_per_unit)):
        n = noise_1d(x * (frequency * 2**octave) + 17.3 * octave, seed + octave)
        total += amplitude * (0.5 - np.abs(2 * n - 1))
        amplitude *= persistence
    return total


def fractal_2d(x: Floats, y: Floats, seed: int, frequency: tuple[float, float], pixels_per_unit: int) -> Floats:
    """Fractal noise about 0, mostly in [-1/2, 1/2], on the grid ``y`` (H) by ``x`` (W): (H, W).

    Interpolation of a lattice is separable, so each octave is two small matrix products, rows @ lattice @ columns.
    """
    total = np.zeros((len(y), len(x)), np.float32)
    amplitude = 1.0
    for octave in range(num_octaves(max(frequency), pixels_per_unit)):
        columns, left = _interpolation(x * (frequency[0] * 2**octave))
        rows, top = _interpolation(y * (frequency[1] * 2**octave))
        i = np.arange(left, left + columns.shape[1])[None, :]
        j = np.arange(top, top + rows.shape[1])[:, None]
        total += amplitude * (rows @ (hash_lattice(i, j, seed + octave) - 0.5) @ columns.T)
        amplitude *= 0.5
    return total


def _interpolation(positions: Floats) -> tuple[Floats, int]:
    """Matrix (positions, lattice points) of smooth interpolation weights, and the first lattice index."""
    cell = np.floor(positions).astype(np.int64)
    first = int(cell[0])
    t = _smoothstep(positions - cell)
    weights = np.zeros((len(positions), int(cell[-1]) - first + 2), np.float32)
    at = np.arange(len(positions))
    weights[at, cell - first] = 1 - t
    weights[at, cell - first + 1] = t
    return weights, first


def _smoothstep(t: Floats) -> Floats:
    return (t * t * (3 - 2 * t)).astype(np.float32)
