"""A small denoiser of handwritten-like digits, rendered and trained here in less than a minute, with guidance.

Glyphs of Pillow's own font, turned, shifted and scaled at random, 8x8 pixels in -1 to 1. The network is a residual
multilayer perceptron that predicts noise for Stable Diffusion's schedule; a tenth of its training saw no class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

SIZE = 8
NO_CLASS = 10
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
_LARGE = 64
_WIDTH = 256
_BATCH = 128


def render(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Digits [count, 64] in -1 to 1 and their classes [count]."""
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(52)
    pictures = np.empty((count, SIZE * SIZE), np.float32)
    classes = rng.integers(0, 10, count)
    for i, digit in enumerate(classes):
        canvas = Image.new("L", (_LARGE, _LARGE))
        ImageDraw.Draw(canvas).text((_LARGE // 2, _LARGE // 2), str(digit), 255, font, anchor="mm")
        angle, zoom = math.radians(rng.uniform(-15, 15)), rng.uniform(0.85, 1.15)
        cos, sin, middle = zoom * math.cos(angle), zoom * math.sin(angle), _LARGE / 2
        dx, dy = rng.uniform(-5, 5, 2)
        turn = (
            cos,
            sin,
            middle - cos * middle - sin * middle + dx,
            -sin,
            cos,
            middle + sin * middle - cos * middle + dy,
        )
        turned = canvas.transform(canvas.size, Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR)
        pictures[i] = np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32).ravel() / 127.5 - 1
    return torch.from_numpy(pictures), torch.from_numpy(classes)


class DigitDenoiser(nn.Module):
    """Noise in x [R, 64] at timesteps [R] for classes [R]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(SIZE * SIZE, _WIDTH)
        self.classes = nn.Embedding(NO_CLASS + 1, _WIDTH)
        self.time = nn.Sequential(nn.Linear(64, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
            for _ in range(3)
        )
        self.leave = nn.Linear(_WIDTH, SIZE * SIZE)

    def forward(self, x: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(32, dtype=x.dtype) / 32)
        angles = timesteps.to(x.dtype)[:, None] * frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.classes(classes)
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = hidden + block(hidden + condition)
        return self.leave(hidden)


def train(num_steps: int = 2000, seed: int = 0) -> DigitDenoiser:
    """A trained network in double precision."""
    torch.manual_seed(seed)
    pictures, classes = render(6000)
    abar = DDIMScheduler(**BETAS).alphas_cumprod
    model = DigitDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        chosen = torch.randint(len(pictures), (_BATCH,))
        t = torch.randint(1000, (_BATCH,))
        noise = torch.randn(_BATCH, SIZE * SIZE)
        a = abar[t][:, None]
        label = torch.where(torch.rand(_BATCH) < 0.1, NO_CLASS, classes[chosen])
        loss = (model(a.sqrt() * pictures[chosen] + (1 - a).sqrt() * noise, t, label) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.double().eval()


def guided(model: DigitDenoiser, classes: Tensor, weight: float = 2.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided prediction for x [R, B, 64] at timesteps [R]; classes [B]."""

    @torch.no_grad()
    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        rows, pictures = x.shape[:2]
        flat, t = x.flatten(0, 1), timesteps.repeat_interleave(pictures)
        label = classes.repeat(rows)
        without, with_class = model(
            torch.cat([flat, flat]), torch.cat([t, t]), torch.cat([torch.full_like(label, NO_CLASS), label])
        ).chunk(2)
        return (without + weight * (with_class - without)).view_as(x)

    return denoise
