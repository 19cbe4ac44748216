"""`cancel()` ends the running call on all ranks at one step boundary, and nothing of it reaches the next call."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from distrifusion import Cancelled, ConfigError, load
from distrifusion.runtime.pipeline import LoadedPipeline
from distrifusion.runtime.spawned import SpawnedPipeline

STEPS = 900  # far more than are drawn before a cancel is heard
PLACES = {"one device": (1, "patch1"), "two workers": (2, "patch2.displaced.w0")}


@pytest.fixture(scope="module", params=list(PLACES))
def pipe(sdxl_folder: Path, request: pytest.FixtureRequest) -> Iterator[LoadedPipeline]:
    devices, plan = PLACES[request.param]
    with load(sdxl_folder, devices=devices, plan=plan) as pipe:
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def draw(pipe: Any, seed: int = 7, steps: int = 4, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe("a lake", num_inference_steps=steps, generator=generator, output_type="latent", **arguments).images


def at_step(wanted: int, act: Callable[[], Any]) -> dict[str, Any]:
    """Arguments for a call that does something once, at the end of a step."""

    def callback(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == wanted:
            act()
        return tensors

    return {"callback_on_step_end": callback}


def cancelled(pipe: LoadedPipeline, **arguments: Any) -> Cancelled:
    """The error of a call that ends by `cancel()`; then the next call is as if there had been none."""
    before = draw(pipe)
    pids = getattr(pipe, "pids", None)
    with pytest.raises(Cancelled) as caught:
        draw(pipe, steps=STEPS, **arguments)
    assert torch.equal(draw(pipe), before)
    assert getattr(pipe, "pids", None) == pids
    return caught.value


@pytest.mark.supports("feature", "cancel()")
@pytest.mark.parametrize("step", [0, 3])
def test_a_callback_ends_the_call_at_its_own_step(pipe: LoadedPipeline, step: int) -> None:
    assert cancelled(pipe, **at_step(step, pipe.cancel)).step == step


def test_anybody_may_look_at_the_step(pipe: LoadedPipeline) -> None:
    seen = []

    def look(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, pipe.current_step))
        return tensors

    assert pipe.current_step is None
    draw(pipe, callback_on_step_end=look)
    assert seen == [(step, step) for step in range(4)] and pipe.current_step is None


def test_arguments_are_checked_without_a_call(pipe: LoadedPipeline) -> None:
    pipe.check(prompt="a lake", width=64, height=72, num_inference_steps=3)
    with pytest.raises(ConfigError, match="width=70 must be a multiple of 8"):
        pipe.check(prompt="a lake", width=70)
    with pytest.raises(ConfigError, match="did you mean prompt="):
        pipe.check(promt="a lake")


def test_another_thread_ends_the_call(pipe: LoadedPipeline) -> None:
    """Nobody waits for the caller between the steps: the ranks agree by themselves."""

    def cancel() -> None:
        time.sleep(0.3)
        pipe.cancel()

    thread = threading.Thread(target=cancel)
    expected = draw(pipe)
    thread.start()
    with pytest.raises(Cancelled) as caught:
        draw(pipe, steps=STEPS)
    thread.join()
    assert caught.value.step is not None and caught.value.step < STEPS - 1
    assert torch.equal(draw(pipe), expected)


def test_a_signal_handler_ends_the_call(pipe: LoadedPipeline) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: pipe.cancel())
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
        error = cancelled(pipe, **at_step(1, timer.start))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert error.step is not None and error.step < STEPS - 1


def test_a_cancel_without_a_call_does_not_reach_the_next(pipe: LoadedPipeline) -> None:
    expected = draw(pipe)
    pipe.cancel()
    assert torch.equal(draw(pipe), expected)


def test_only_the_call_that_is_served_ends(pipe: LoadedPipeline) -> None:
    expected = draw(pipe)
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(draw(pipe)))
    cancelled(pipe, **at_step(1, lambda: (waiting.start(), pipe.cancel())))
    waiting.join(60)
    assert len(answers) == 1 and torch.equal(answers[0], expected)


def test_a_pipeline_without_callbacks_ends_too(sdxl_folder: Path) -> None:
    """Its loop is seen by its progress bar alone, over which it iterates."""

    def build() -> Any:
        class Plain(diffusers.DiffusionPipeline):
            def __init__(self, unet: Any, scheduler: Any) -> None:
                super().__init__()
                self.register_modules(unet=unet, scheduler=scheduler)

            @torch.no_grad()
            def __call__(self, num_inference_steps: int, generator: Any = None) -> torch.Tensor:
                self.scheduler.set_timesteps(num_inference_steps)
                sample = torch.randn(1, 4, 8, 8, generator=generator)
                states, pooled = (
                    torch.zeros(1, 16, 32),
                    {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)},
                )
                for t in self.progress_bar(self.scheduler.timesteps):
                    noise = self.unet(sample, t, states, added_cond_kwargs=pooled).sample
                    sample = self.scheduler.step(noise, t, sample).prev_sample
                return sample

        whole = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
        return Plain(whole.unet, whole.scheduler)

    with load(build, devices=2) as pipe:
        assert isinstance(pipe, SpawnedPipeline)
        pipe.set_progress_bar_config(disable=True)
        expected, pids = pipe(4, generator=torch.Generator().manual_seed(1)), pipe.pids
        timer = threading.Timer(0.5, pipe.cancel)
        timer.start()
        with pytest.raises(Cancelled) as caught:
            pipe(1000)
        assert caught.value.step is not None and caught.value.step < 999
        assert torch.equal(pipe(4, generator=torch.Generator().manual_seed(1)), expected)
        assert pipe.pids == pids
