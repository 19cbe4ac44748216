"""Stage ``latents``: the training set of the U-Net, rendered and encoded once.

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

from distrifusion.demo.autoencoder import to_input
from distrifusion.demo.dataset import Size, sample_scenes
from distrifusion.demo.painting import render
from distrifusion.demo.processes import num_ranks, rank
from distrifusion.demo.scenes import Scene
from distrifusion.demo.training import autocast, device


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size: how many there are, the batch of one rank in a step, and the share of steps that use it."""

    size: Size
    count: int
    batch: int
    share: float

    def scenes(self) -> list[Scene]:
        """The scenes of this bucket, in the order of its latents."""
        return sample_scenes(self.count, seed=2_000_000 + self.size[0] * 1000 + self.size[1])


BUCKETS = (
    Bucket((256, 256), 6000, 8, 0.70),
    Bucket((384, 256), 300, 5, 0.07),
    Bucket((256, 384), 300, 5, 0.07),
    Bucket((384, 384), 300, 4, 0.05),
    Bucket((512, 384), 150, 3, 0.03),
    Bucket((384, 512), 150, 3, 0.03),
    Bucket((512, 512), 200, 2, 0.05),
)


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
        batches = [mine[i : i + bucket.batch] for i in range(0, len(mine), bucket.batch)]
        pictures = (np.stack([render(scene, *bucket.size) for scene in batch]) for batch in batches)
        draft = target.with_name(f"draft-{target.name}")
        np.save(draft, np.concatenate([_encode(model, batch) for batch in pictures]))
        os.replace(draft, target)


def load_latents(cache: Path) -> dict[Size, NDArray[np.float16]]:
    """The latents (N, 4, H/8, W/8) of each bucket's size, as many ranks as there were put together."""
    latents = {}
    for bucket in BUCKETS:
        files = sorted(cache.glob(_file(cache, bucket, 0, 1).name.replace("0of1", "*of*")))
        latents[bucket.size] = np.concatenate([np.load(file) for file in files])
        if len(latents[bucket.size]) != bucket.count:
            raise ValueError(f"{len(latents[bucket.size])} latents of {bucket.size}, not {bucket.count}; empty {cache}")
    return latents


def _encode(model: AutoencoderKL, pictures: NDArray[np.uint8]) -> NDArray[np.float16]:
    with autocast():
        mode = model.encode(to_input(pictures)).latent_dist.mode()
    return (mode.float() * model.config.scaling_factor).half().cpu().numpy()


def _file(cache: Path, bucket: Bucket, part: int, parts: int) -> Path:
    return cache / f"latents-{bucket.size[0]}x{bucket.size[1]}-{part}of{parts}.npy"
