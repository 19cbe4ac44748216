"""Old values of the same step, one call old, vanish where the window stands still: displaced patches become exact."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from mixture import DIM, Denoise, ddim, distance, mixture, noise, sequential, start
from torch import Tensor

from distrifusion.samplers.evaluations import Sample, drive
from distrifusion.samplers.knobs import Knobs
from distrifusion.samplers.schedules import tableau_of
from distrifusion.samplers.window import solve

SEEDS = range(6)
# What was kept in the last call for the same ... is used, by a row's place in the call and its timestep.
Key = Callable[[int, float], float]
KEYS: dict[str, Key] = {
    "timestep": lambda place, timestep: timestep,
    "place": lambda place, timestep: place,
    "call": lambda place, timestep: 0.0,
}


class TwoPatches:
    """A denoiser of which each half sees its own half of x as it is and the other as it was kept under the same key."""

    def __init__(self, denoise: Denoise, key: Key) -> None:
        self._denoise = denoise
        self._key = key
        self._seen: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        keys = [self._key(place, float(t)) for place, t in enumerate(timesteps)]
        # What was not there yet is synchronous.
        old = torch.stack([self._seen.get(key, row) for key, row in zip(keys, x, strict=True)])
        self._seen.update(zip(keys, x, strict=True))
        half = DIM // 2
        first = self._denoise(torch.cat([x[..., :half], old[..., half:]], -1), timesteps)
        second = self._denoise(torch.cat([old[..., :half], x[..., half:]], -1), timesteps)
        return torch.cat([first[..., :half], second[..., half:]], -1)


@cache
def run(seed: int, num_steps: int, key: str | None = None, **knobs: Any) -> tuple[Sample, float]:
    """Picard's iteration on the mixture, and the distance of its sample from the sequential one."""
    scheduler = ddim(num_steps)
    denoise = denoiser(num_steps, key)
    sample = drive(solve(start(seed), tableau_of(scheduler), noise(seed), Knobs(memory=1, **knobs)), denoise)
    return sample, distance(sample.x, stepped(seed, num_steps))


@cache
def stepped(seed: int, num_steps: int, key: str | None = None) -> Tensor:
    """The sample of one step after the other."""
    return sequential(start(seed), ddim(num_steps), denoiser(num_steps, key), seed)


def denoiser(num_steps: int, key: str | None) -> Denoise:
    exact = mixture(ddim(num_steps))
    return TwoPatches(exact, KEYS[key]) if key else exact


@pytest.mark.parametrize("key", ["timestep", "place"])
@pytest.mark.parametrize("num_steps", [25, 50, 100])
def test_old_values_of_the_same_step_vanish(num_steps: int, key: str) -> None:
    far, near = [], []
    for seed in SEEDS:
        picard, _ = run(seed, num_steps)
        sample, away = run(seed, num_steps, key, hits=2, tolerance=1e-4, fixed=key == "place")
        assert away <= 5e-4
        assert sample.calls <= picard.calls + 4
        near.append(away)
        far.append(distance(stepped(seed, num_steps, "call"), stepped(seed, num_steps)))
    assert statistics.median(far) > 3 * statistics.median(near)


@pytest.mark.parametrize("window", [7, 20])
def test_rows_keep_their_place_in_windows_that_move_on(window: int) -> None:
    for seed in SEEDS:
        sample, away = run(seed, 50, "place", hits=2, fixed=True, window=window)
        assert away <= 5e-4
        assert sample.rows == window * sample.calls


def test_rows_that_move_in_the_call_use_old_values_of_other_steps() -> None:
    for seed in SEEDS:
        fixed, _ = run(seed, 50, "place", hits=2, fixed=True)
        moving, _ = run(seed, 50, "place", hits=2)
        assert moving.calls > fixed.calls + 3


def test_one_hit_is_not_enough() -> None:
    one, two = (max(run(seed, 50, "timestep", hits=hits)[1] for seed in SEEDS) for hits in (1, 2))
    assert one > 3 * two


def test_places_change_nothing_for_an_exact_denoiser() -> None:
    for window in (None, 6):
        plain, _ = run(0, 25, window=window)
        fixed, away = run(0, 25, window=window, fixed=True)
        assert distance(fixed.x, plain.x) <= 1e-12 and fixed.calls == plain.calls
        twice, away = run(0, 25, window=window, hits=2)
        assert away <= 1e-4 and plain.calls < twice.calls
