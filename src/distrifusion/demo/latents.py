"""Stage ``latents``: what both denoisers learn from, rendered and encoded once, and how a step draws from it.

For each picture size and rank there is one file with latents (N, 4, H/8, W/8) in fp16, times the scaling factor.
The scenes follow from the size alone, so captions are worded afresh whenever a sample is drawn.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from distrifusion.demo.autoencoder import to_input
from distrifusion.demo.dataset import Size, sample_scenes
from distrifusion.demo.painting import render
from distrifusion.demo.processes import num_ranks, rank
from distrifusion.demo.scenes import Scene
from distrifusion.demo.training import autocast, device


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size, and how many there are."""

    size: Size
    count: int

    def scenes(self) -> list[Scene]:
        """The scenes of this bucket, in the order of its latents."""
        return sample_scenes(self.count, seed=2_000_000 + self.size[0] * 1000 + self.size[1])


BUCKETS = (
    Bucket((128, 128), 8000),
    Bucket((256, 256), 6000),
    Bucket((384, 256), 300),
    Bucket((256, 384), 300),
    Bucket((384, 384), 300),
    Bucket((512, 384), 150),
    Bucket((384, 512), 150),
    Bucket((512, 512), 200),
)
_ENCODED_TOGETHER = 8


@dataclass(frozen=True)
class Portion:
    """What one size gets of a denoiser's training: the batch of a rank in a step, and the share of steps (any unit)."""

    size: Size
    batch: int
    share: float


class Samples:
    """Cached latents and their scenes, drawn in the given portions; a size is read when it is first drawn."""

    def __init__(self, cache: Path, portions: tuple[Portion, ...]) -> None:
        self._cache = cache
        self._portions = portions
        self._shares = np.array([portion.share for portion in portions])
        self._read: dict[Size, tuple[NDArray[np.float16], list[Scene]]] = {}

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, list[Scene]]:
        """One batch, all of one size: latents (B, 4, H/8, W/8) in fp32, and what each shows."""
        portion = self._portions[rng.choice(len(self._portions), p=self._shares / self._shares.sum())]
        latents, scenes = self._of(portion.size)
        chosen = rng.integers(len(scenes), size=portion.batch)
        return torch.from_numpy(latents[chosen]).float().to(device()), [scenes[i] for i in chosen]

    def _of(self, size: Size) -> tuple[NDArray[np.float16], list[Scene]]:
        if size not in self._read:
            bucket = next(bucket for bucket in BUCKETS if bucket.size == size)
            self._read[size] = _load_latents(self._cache, bucket), bucket.scenes()
        return self._read[size]


@torch.no_grad()
def encode_latents(autoencoder: Path, cache: Path) -> None:
    """Render and encode every bucket that has no file yet; each rank takes its share of every bucket."""
    model = AutoencoderKL.from_pretrained(autoencoder).to(device(), memory_format=torch.channels_last).eval()
    for bucket in BUCKETS:
        target = _file(cache, bucket, rank(), num_ranks())
        if target.exists():
            continue
        scenes = bucket.scenes()
        mine = scenes[len(scenes) * rank() // num_ranks() : len(scenes) * (rank() + 1) // num_ranks()]
        batches = [mine[i : i + _ENCODED_TOGETHER] for i in range(0, len(mine), _ENCODED_TOGETHER)]
        pictures = (np.stack([render(scene, *bucket.size) for scene in batch]) for batch in batches)
        draft = target.with_name(f"draft-{target.name}")
        np.save(draft, np.concatenate([_encode(model, batch) for batch in pictures]))
        os.replace(draft, target)


def _load_latents(cache: Path, bucket: Bucket) -> NDArray[np.float16]:
    """The latents (N, 4, H/8, W/8) of a bucket, as many ranks as there were put together."""
    files = sorted(cache.glob(_file(cache, bucket, 0, 1).name.replace("0of1", "*of*")))
    latents = np.concatenate([np.load(file) for file in files])
    if len(latents) != bucket.count:
        raise ValueError(f"{len(latents)} latents of {bucket.size}, not {bucket.count}; empty {cache}")
    return latents


def _encode(model: AutoencoderKL, pictures: NDArray[np.uint8]) -> NDArray[np.float16]:
    with autocast():
        mode = model.encode(to_input(pictures)).latent_dist.mode()
    return (mode.float() * model.config.scaling_factor).half().cpu().numpy()


def _file(cache: Path, bucket: Bucket, part: int, parts: int) -> Path:
    return cache / f"latents-{bucket.size[0]}x{bucket.size[1]}-{part}of{parts}.npy"
