"""The plain loop gives what a loop over the scheduler itself gives, and several are served in one denoiser call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from mixture import BETAS, DIM, distance
from torch import Tensor

from distrifusion.samplers.diffusers_loop import diffusers_loop
from distrifusion.samplers.evaluations import drive, drive_together
from distrifusion.samplers.noise import RunningNoise, SeededNoise

_SHAPE = (2, 4, 6, 5)
_BETAS = {name: value for name, value in BETAS.items() if name != "clip_sample"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(**BETAS, set_alpha_to_one=False),
    "ddim, eta": lambda: DDIMScheduler(**BETAS, set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(**_BETAS),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**_BETAS),
    "dpm++ 2m": lambda: DPMSolverMultistepScheduler(**_BETAS, use_karras_sigmas=True),
    "heun": lambda: HeunDiscreteScheduler(**_BETAS),
    "flow euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
OPTIONS = {"ddim, eta": {"eta": 0.7}}


def set_up(name: str, num_steps: int = 7) -> tuple[Any, Tensor]:
    """A scheduler with its timesteps, and noise of its size."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(num_steps)
    x = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    return scheduler, x * getattr(scheduler, "init_noise_sigma", 1.0)


def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
    """Mixes neither rows nor pictures."""
    time = timesteps.float().view(-1, *(1,) * (x.dim() - 1)) / 1000
    return torch.tanh(x * (1 + time)) + 0.3 * x.roll(1, -1)


def by_hand(name: str, generator: torch.Generator) -> Tensor:
    """As a diffusers pipeline writes it."""
    scheduler, x = set_up(name)
    more = {**OPTIONS.get(name, {})}
    if name not in ("heun", "dpm++ 2m"):
        more["generator"] = generator
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(denoise(scaled[None], t[None])[0], t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_is_the_loop_of_a_pipeline(name: str) -> None:
    expected = by_hand(name, torch.Generator().manual_seed(4))
    scheduler, x = set_up(name)
    noise = RunningNoise(torch.Generator().manual_seed(4))
    sample = drive(diffusers_loop(x, scheduler, noise, **OPTIONS.get(name, {})), denoise)
    assert torch.equal(sample.x, expected)
    assert sample.calls == sample.rows == len(scheduler.timesteps)
    # The scheduler that was given has not counted: a second run is the same.
    noise = RunningNoise(torch.Generator().manual_seed(4))
    again = drive(diffusers_loop(x, scheduler, noise, **OPTIONS.get(name, {})), denoise)
    assert torch.equal(again.x, expected)


def test_several_in_one_call_equal_each_alone() -> None:
    names = list(SCHEDULERS)
    calls: list[Sequence[int]] = []

    def together(x: Tensor, timesteps: Tensor, owners: Sequence[int]) -> Tensor:
        calls.append(owners)
        return denoise(x, timesteps)

    def sampler(number: int) -> Any:
        scheduler, x = set_up(names[number], num_steps=4 + number)
        return diffusers_loop(x, scheduler, SeededNoise([number, 50 + number]), **OPTIONS.get(names[number], {}))

    samples = drive_together([sampler(i) for i in range(len(names))], together)
    for number, sample in enumerate(samples):
        alone = drive(sampler(number), denoise)
        assert distance(sample.x, alone.x) <= 1e-5
        assert sample.calls == alone.calls
    assert list(calls[0]) == list(range(len(names)))
    assert len(calls) == max(sample.calls for sample in samples)


def test_noise_follows_from_the_seed_and_the_step_alone() -> None:
    def draw(noise: SeededNoise, step: int) -> Tensor:
        return torch.stack([torch.randn(DIM, generator=generator) for generator in noise.at(step)])

    noise = SeededNoise([3, 4])
    late, early = draw(noise, 9), draw(noise, 2)
    assert torch.equal(draw(SeededNoise([3, 4]), 2), early)
    assert torch.equal(draw(noise, 9), late)
    assert torch.equal(draw(SeededNoise([4, 3]), 2), early.flip(0)), "a picture's noise is its own"
    assert not torch.equal(draw(noise, 3), early)
