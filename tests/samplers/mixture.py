"""Denoisers that are formulas: the exact score of a mixture of Gaussians, and a rough network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from distrifusion.samplers.diffusers_loop import diffusers_loop
from distrifusion.samplers.evaluations import drive
from distrifusion.samplers.noise import SeededNoise

DIM = 64
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
Denoise = Callable[[Tensor, Tensor], Tensor]


def ddim(num_steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(num_steps)
    return scheduler


def ddpm(num_steps: int) -> DDPMScheduler:
    scheduler = DDPMScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(num_steps)
    return scheduler


def abar_of(scheduler: DDIMScheduler | DDPMScheduler, timesteps: Tensor, like: Tensor) -> Tensor:
    return scheduler.alphas_cumprod.double()[timesteps.long()].view(-1, *(1,) * (like.dim() - 1))


def means(moved: float = 0.0) -> Tensor:
    """Of ten components; `moved` carries each away by a share of its length."""
    g = torch.Generator().manual_seed(7)
    mu = torch.randn(10, DIM, generator=g, dtype=torch.float64)
    away = torch.randn(10, DIM, generator=g, dtype=torch.float64)
    return mu + moved * away


def mixture(scheduler: DDIMScheduler, mu: Tensor | None = None, spread: float = 0.1) -> Denoise:
    """The noise of x [R, B, DIM] at timesteps [R], predicted exactly: components of equal weight, N(mu, spread^2)."""
    mu = means() if mu is None else mu

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        abar = abar_of(scheduler, timesteps, x)
        variance = abar * spread**2 + 1 - abar
        away = x[..., None, :] - abar.sqrt()[..., None] * mu
        weight = (-0.5 * away.square().sum(-1) / variance).softmax(-1)
        score = -(weight[..., None] * away).sum(-2) / variance
        return -(1 - abar).sqrt() * score

    return denoise


def rough(scheduler: DDIMScheduler) -> Denoise:
    """Sines of random directions: neighbouring states get unlike answers."""
    g = torch.Generator().manual_seed(3)
    inward = 3 * torch.randn(DIM, DIM, generator=g, dtype=torch.float64) / DIM**0.5
    outward = torch.randn(DIM, DIM, generator=g, dtype=torch.float64) / DIM**0.5

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        phase = timesteps.double().view(-1, 1, 1) / 50
        return torch.sin(x @ inward + phase) @ outward

    return denoise


def start(seed: int = 0, num_pictures: int = 1) -> Tensor:
    """Noise [B, DIM]."""
    return torch.randn(num_pictures, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(seed: int = 0, num_pictures: int = 1) -> SeededNoise:
    return SeededNoise([100 + seed + i for i in range(num_pictures)])


def sequential(x: Tensor, scheduler: DDIMScheduler, denoise: Denoise, seed: int = 0, eta: float = 0.0) -> Tensor:
    """What diffusers' own steps give."""
    options = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    return drive(diffusers_loop(x, scheduler, noise(seed, len(x)), **options), denoise).x


def distance(x: Tensor, reference: Tensor) -> float:
    """Relative L2."""
    return float((x - reference).norm() / reference.norm())


SCHEDULES = {"ddim": (ddim, 0.0), "ddim, eta 0.5": (ddim, 0.5), "ddim, eta 1": (ddim, 1.0), "ddpm": (ddpm, 0.0)}
