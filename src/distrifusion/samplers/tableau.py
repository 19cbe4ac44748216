"""The steps of a sampler as numbers: what a solver of the whole trajectory must know of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch

from distrifusion.errors import ConfigError


class Split(StrEnum):
    """The linear part of a step that is unrolled over the window; it changes the speed, never the solution."""

    DELTA = "delta"  # ParaDiGMS: x_{i+1} - x_i is the drive
    NOISE = "noise"  # ParaTAA: predicted noise is the drive
    DATA = "data"  # the predicted picture is the drive


@dataclass(frozen=True)
class Tableau:
    """N steps x_{i+1} = a_i x_i + b_i D_i + b'_i D_{i-1} + c_i xi_i, with the data prediction D_i = u_i x_i + v_i m_i.

    m_i is the model's output for x_i / s_i. All one-step samplers have this form, b' = 0; DPM-Solver++ 2M has it with
    b'. A state is alpha_i times the picture plus sigma_i times noise. Numbers are in double precision.

    Attributes:
        a, b, b_previous, c: of each step: [N].
        skip, out: u and v: [N].
        input_scale: s: [N].
        alpha, sigma: of each state: [N + 1].
        draws: steps that draw noise, also where c is zero.
        timesteps: what the model is told: [N].
    """

    a: torch.Tensor
    b: torch.Tensor
    b_previous: torch.Tensor
    c: torch.Tensor
    skip: torch.Tensor
    out: torch.Tensor
    input_scale: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    draws: tuple[bool, ...]
    timesteps: torch.Tensor

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.a)

    def since(self, first: int) -> Tableau:
        """The steps from one on, as a run that begins there takes them: its first step has no D before."""
        b, b_previous = self.b[first:].clone(), self.b_previous[first:].clone()
        b[:1] += b_previous[:1]
        b_previous[:1] = 0
        others = ("a", "c", "skip", "out", "input_scale", "alpha", "sigma", "draws", "timesteps")
        cut: dict[str, Any] = {name: getattr(self, name)[first:] for name in others}
        return replace(self, b=b, b_previous=b_previous, **cut)

    @cached_property
    def scale(self) -> torch.Tensor:
        """The size of a state whose picture has size one: [N + 1]."""
        return (self.alpha**2 + self.sigma**2).sqrt()

    @cached_property
    def noise_size(self) -> torch.Tensor:
        """Standard deviation of what a DDPM step would add, in units of the new state's `scale`: [N]."""
        ratio = (self.sigma / self.alpha.clamp(min=1e-12)) ** 2
        before, after = ratio[:-1], ratio[1:]
        return self.alpha[1:] * (after * (before - after).clamp(min=0) / before).sqrt() / self.scale[1:]

    def linear(self, split: Split) -> torch.Tensor:
        """The unrolled factor of each step: [N].

        Raises:
            ConfigError: if a state has no signal, so that the noise split divides by zero.
        """
        if split is Split.DATA:
            return self.a
        if split is Split.DELTA:
            return torch.ones_like(self.a)
        if not bool((self.alpha[:-1] > 0).all()):
            raise ConfigError("split='noise' divides by the signal, which is zero at the first step; use split='data'")
        return self.alpha[1:] / self.alpha[:-1]
