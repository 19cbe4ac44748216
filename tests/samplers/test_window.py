"""Windows of steps end where the sequential sampler does, in few calls, and never in more calls than steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from mixture import SCHEDULES, ddim, distance, means, mixture, noise, rough, sequential, start
from test_diffusers_loop import OPTIONS, by_hand, denoise, set_up

from distrifusion.errors import ConfigError
from distrifusion.samplers.evaluations import Sample, drive, drive_together
from distrifusion.samplers.knobs import Knobs, Method, knobs_of
from distrifusion.samplers.noise import RunningNoise, SeededNoise
from distrifusion.samplers.schedules import tableau_of
from distrifusion.samplers.tableau import Split
from distrifusion.samplers.unrolled import unrolled
from distrifusion.samplers.window import Start, solve

ONE_STEP = ("ddim", "ddim, eta", "euler", "euler ancestral", "flow euler", "dpm++ 2m")


def solved(name: str, num_steps: int, seed: int = 0, **knobs: Any) -> tuple[Sample, float]:
    """A sample of the mixture, and its distance from the sequential sampler's."""
    make, eta = SCHEDULES[name]
    scheduler = make(num_steps)
    model = mixture(scheduler)
    sample = drive(solve(start(seed), tableau_of(scheduler, eta), noise(seed), Knobs(**knobs)), model)
    return sample, distance(sample.x, sequential(start(seed), scheduler, model, seed, eta))


def solved_pictures(name: str, **knobs: Any) -> tuple[Sample, torch.Tensor]:
    """A sample of the toy denoiser in single precision by one of diffusers' schedulers, and what its own loop gives."""
    scheduler, x = set_up(name)
    steps = tableau_of(scheduler, OPTIONS.get(name, {}).get("eta", 0.0))
    sampler = solve(x, steps, RunningNoise(torch.Generator().manual_seed(4)), Knobs(**knobs))
    return drive(sampler, denoise), by_hand(name, torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", ONE_STEP)
def test_a_window_of_one_is_the_sequential_sampler_of_diffusers(name: str) -> None:
    sample, expected = solved_pictures(name, window=1)
    assert distance(sample.x, expected) <= 3e-6
    assert sample.calls == sample.rows == 7


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("name", ONE_STEP)
def test_tolerance_zero_is_the_sequential_sampler(name: str, split: Split) -> None:
    if name == "flow euler" and split is Split.NOISE:
        pytest.skip("its first state has no signal")
    for memory, order in ((1, None), (3, None), (3, 2)):
        sample, expected = solved_pictures(name, split=split, memory=memory, order=order, tolerance=0.0)
        assert distance(sample.x, expected) <= 1e-5
        assert sample.calls <= 7


@pytest.mark.parametrize("num_steps", [25, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_sample_is_the_sequential_one(name: str, num_steps: int) -> None:
    for memory, most in ((1, 10), (3, 20)):
        sample, away = solved(name, num_steps, memory=memory)
        assert away <= 1e-3
        assert sample.calls <= most


@pytest.mark.parametrize("split", Split)
def test_every_split_order_and_window_has_the_same_solution(split: Split) -> None:
    for knobs in ({"window": 7}, {"order": 3}, {"window": 9, "order": 4, "memory": 5}, {"memory": 2}):
        sample, away = solved("ddim, eta 0.5", 25, split=split, **knobs)
        assert away <= 1e-3
        assert sample.calls < 25


@pytest.mark.parametrize("window", [None, 9])
def test_a_rough_network_takes_no_more_calls_than_steps(window: int | None) -> None:
    scheduler = ddim(50)
    steps, model = tableau_of(scheduler), rough(scheduler)
    for seed in range(2):
        exact = drive(solve(start(seed), steps, noise(seed), Knobs(window=1)), model)
        assert distance(exact.x, sequential(start(seed), scheduler, model, seed)) <= 1e-6
        sample = drive(solve(start(seed), steps, noise(seed), Knobs(window=window, tolerance=1e-11)), model)
        assert distance(sample.x, exact.x) <= 1e-9
        assert sample.calls <= 50


def test_without_the_safeguard_a_rough_network_is_lost() -> None:
    scheduler = ddim(50)
    steps, model = tableau_of(scheduler), rough(scheduler)
    exact = drive(solve(start(), steps, noise(), Knobs(window=1)), model)
    sample = drive(solve(start(), steps, noise(), Knobs(safeguard=False, tolerance=1e-11)), model)
    assert distance(sample.x, exact.x) >= 1e-4


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=7), st.integers(1, 7))
def test_unrolled_equations_are_those_of_single_steps(factors: list[float], order: int) -> None:
    linear = torch.tensor(factors, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x, drives = (torch.randn(len(linear), generator=g, dtype=torch.float64) for _ in range(2))
    first, rest = unrolled(linear, order)
    got = first @ x + rest @ drives
    for j in range(len(linear)):
        begin = max(j + 1 - order, 0)
        expected = x[begin]
        for r in range(begin, j + 1):
            expected = linear[r] * expected + drives[r]
        assert torch.isclose(got[j], expected)


def test_pictures_of_one_run_do_not_depend_on_each_other() -> None:
    scheduler = ddim(25)
    steps, model = tableau_of(scheduler, 1.0), mixture(scheduler)
    x = start(num_pictures=3)
    seeds = [5, 6, 7]
    together = drive(solve(x, steps, SeededNoise(seeds), Knobs(window=11)), model).x
    order = [2, 0, 1]
    mixed = drive(solve(x[order], steps, SeededNoise([seeds[i] for i in order]), Knobs(window=11)), model).x
    assert distance(mixed, together[order]) <= 1e-12
    alone = drive(solve(x[1:2], steps, SeededNoise(seeds[1:2]), Knobs(window=11)), model).x
    assert distance(alone, together[1:2]) <= 1e-4


def test_windows_of_several_samplers_in_one_call_equal_each_alone() -> None:
    schedulers = [ddim(12), ddim(20), ddim(9)]
    model = mixture(schedulers[0])  # the same betas
    knobs = [Knobs(), Knobs(window=6), Knobs(window=4, memory=1)]

    def sampler(i: int) -> Any:
        return solve(start(i), tableau_of(schedulers[i], 0.5 * i), noise(i), knobs[i])

    samples = drive_together([sampler(i) for i in range(3)], lambda x, timesteps, owners: model(x, timesteps))
    for i, sample in enumerate(samples):
        alone = drive(sampler(i), model)
        assert distance(sample.x, alone.x) <= 1e-5
        assert (sample.calls, sample.rows) == (alone.calls, alone.rows)


def test_a_stored_trajectory_of_another_prompt_is_a_head_start() -> None:
    scheduler = ddim(50)
    steps = tableau_of(scheduler)
    stored = drive(solve(start(), steps, noise()), mixture(scheduler)).trajectory
    assert stored is not None
    other = mixture(scheduler, means(moved=0.1))
    exact = sequential(start(), scheduler, other)

    def calls_until(begin: Start | None, bound: float) -> int:
        samples = (
            drive(solve(start(), steps, noise(), Knobs(max_calls=n, memory=1), start=begin), other)
            for n in range(1, 50)
        )
        return next(n for n, sample in enumerate(samples, 1) if distance(sample.x, exact) <= bound)

    assert calls_until(Start(stored), 1e-2) < calls_until(None, 1e-2)
    # The first steps of the other run are kept as they are, bit for bit.
    varied = drive(solve(start(), steps, noise(), start=Start(stored, num_kept=20)), other)
    assert varied.trajectory is not None
    assert torch.equal(varied.trajectory[:21], stored[:21])
    assert varied.calls <= 30
    # A run that starts from its own end is over at once.
    assert drive(solve(start(), steps, noise(), start=Start(stored)), mixture(scheduler)).calls == 1


def test_an_estimate_of_the_final_sample_exists_from_the_first_call() -> None:
    scheduler = ddim(50)
    steps, model = tableau_of(scheduler), mixture(scheduler)
    exact = sequential(start(), scheduler, model)
    for window in (None, 12):
        sampler = solve(start(), steps, noise(), Knobs(window=window))
        wanted, away = next(sampler), []
        with pytest.raises(StopIteration):
            while True:
                wanted = sampler.send(model(wanted.x, wanted.timesteps))
                away.append(distance(wanted.estimate, exact))
        assert away[0] < 1.5 and away[-1] < 0.2, "nearer and nearer"
    early = drive(solve(start(), steps, noise(), Knobs(max_calls=3)), model)
    assert early.calls == 3 and 1e-6 < distance(early.x, exact) < 0.5


def test_a_tolerance_relative_to_the_noise_of_a_step_stops_earlier() -> None:
    _, exact = solved("ddpm", 50, memory=1, split=Split.DELTA)
    loose, away = solved("ddpm", 50, memory=1, split=Split.DELTA, noise_tolerance=0.1)
    tight, _ = solved("ddpm", 50, memory=1, split=Split.DELTA)
    assert exact < away < 0.2
    assert loose.calls < tight.calls


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"window": 8}, "window=8 is more than the 7 steps"),
        ({"window": 0}, "window=0 must be"),
        ({"window": 2.0}, "window=2.0 must be"),
        ({"order": 5, "window": 4}, "order=5 unrolls more"),
        ({"tolerance": -1e-3}, "tolerance=-0.001 must be"),
        ({"tolerance": float("nan")}, "tolerance=nan must be"),
        ({"memory": 0}, "memory=0 must be"),
        ({"split": "eps"}, "one of delta, noise, data"),
        ({"max_calls": 0}, "max_calls=0"),
    ],
)
def test_bad_knobs_are_errors_that_say_what_to_use(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        solved_pictures("ddim", **knobs)


def test_picard_has_no_memory() -> None:
    assert knobs_of(Method.PICARD).memory == 1
    with pytest.raises(ConfigError, match="memory=3 is of sampler='taa'"):
        knobs_of(Method.PICARD, memory=3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: set_up("heun")[0], "HeunDiscreteScheduler is not known as a map"),
        (lambda: reset("ddim", clip_sample=True), "clip_sample=True cannot be solved"),
        (lambda: reset("dpm++ 2m", solver_order=3), "solver_order=3"),
        (lambda: reset("dpm++ 2m", algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-dpmsolver\\+\\+'"),
    ],
)
def test_schedulers_that_are_no_such_maps_are_refused(change: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tableau_of(change())


def reset(name: str, **config: Any) -> Any:
    scheduler, _ = set_up(name)
    changed = type(scheduler).from_config(scheduler.config, **config)
    changed.set_timesteps(7)
    return changed


def test_the_noise_split_of_flow_matching_is_refused() -> None:
    with pytest.raises(ConfigError, match="use split='data'"):
        solved_pictures("flow euler", split="noise")


def test_a_start_that_does_not_fit_is_refused() -> None:
    scheduler, x = set_up("dpm++ 2m")
    steps = tableau_of(scheduler)
    whole = x.new_zeros(8, *x.shape)
    for begin, says in (
        (Start(whole[:-1]), "use the same steps"),
        (Start(whole, num_kept=7), "keep 0 to 6"),
        (Start(whole, num_kept=3), "cannot be kept"),
    ):
        with pytest.raises(ConfigError, match=says):
            solve(x, steps, RunningNoise(None), start=begin)


def test_dpm_solver_with_many_steps_ends_by_its_configuration() -> None:
    for options in ({}, {"euler_at_final": True}, {"final_sigmas_type": "sigma_min"}, {"solver_order": 1}):
        scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", **options)
        scheduler.set_timesteps(16)
        x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
        sample = drive(solve(x, tableau_of(scheduler), RunningNoise(None), Knobs(window=1)), denoise)
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x[None], t[None])[0], t, x).prev_sample
        assert distance(sample.x, x) <= 3e-6, options
