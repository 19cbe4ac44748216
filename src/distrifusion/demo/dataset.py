"""Rendered pictures on disk: which sizes, which scenes, and how a few processes draw them once for all stages."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrifusion.demo.painting import render
from distrifusion.demo.scenes import Scene, sample_scene

Size = tuple[int, int]
"""(width, height) in pixels."""

PICTURES: dict[Size, int] = {(256, 256): 3000, (384, 384): 400, (512, 512): 400, (384, 256): 300, (256, 384): 300}
"""How many pictures of each size the autoencoder and the classifier learn from."""


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """``count`` scenes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def render_all(scenes: Sequence[Scene], size: Size, processes: int = 2) -> Iterator[NDArray[np.uint8]]:
    """Render scenes at ``size`` on several processes; yields the pictures (H, W, 3) in order."""
    chunks = [scenes[i : i + 16] for i in range(0, len(scenes), 16)]
    with ProcessPoolExecutor(processes) as pool:
        for pictures in pool.map(partial(_render_chunk, size=size), chunks):
            yield from pictures


def _render_chunk(scenes: Sequence[Scene], size: Size) -> list[NDArray[np.uint8]]:
    return [render(scene, *size) for scene in scenes]


def render_pictures(cache: Path) -> None:
    """Stage ``renders``: write the pictures of :data:`PICTURES`, one array file (N, H, W, 3) for each size."""
    cache.mkdir(parents=True, exist_ok=True)
    for size, count in PICTURES.items():
        target = _file(cache, size)
        if target.exists():
            continue
        draft = target.with_suffix(".part")
        shape = (count, size[1], size[0], 3)
        pictures = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
        for i, picture in enumerate(render_all(picture_scenes(size), size)):
            pictures[i] = picture
        pictures.flush()
        os.replace(draft, target)


def picture_scenes(size: Size) -> list[Scene]:
    """The scenes of the cached pictures of one size, in order; no two sizes share a scene."""
    return sample_scenes(PICTURES[size], seed=1_000_000 + size[0] * 1000 + size[1])


def load_pictures(cache: Path) -> dict[Size, NDArray[np.uint8]]:
    """The cached pictures (N, H, W, 3) of each size, mapped from disk."""
    return {size: np.load(_file(cache, size), mmap_mode="r") for size in PICTURES}


def _file(cache: Path, size: Size) -> Path:
    return cache / f"pictures-{size[0]}x{size[1]}.npy"
