"""A loaded pipeline is called like the diffusers pipeline and gives what it gives."""

from __future__ import annotations

import io
import threading
from contextlib import redirect_stderr
from typing import Any

import diffusers
import pytest
import torch

from distrifusion.errors import ConfigError
from distrifusion.runtime.spawned import SpawnedPipeline
from models import relative_error

EXACT = 1e-5


def both(one: Any, two: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of one device and of two, from the same global seed."""
    latents = []
    for pipe in (one, two):
        torch.manual_seed(11)
        call = {"prompt": "a lake", "num_inference_steps": 4, "output_type": "latent", **arguments}
        latents.append(pipe(**call).images)
    return latents[0], latents[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"height": 104, "width": 72},
        {"guidance_scale": 1.0},
        {"prompt": ["a", "b"], "num_images_per_prompt": 2, "negative_prompt": ["c", "d"]},
        {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))},
    ],
    ids=["plain", "size", "no guidance", "batch", "latents"],
)
def test_equals_one_device(one: Any, two: SpawnedPipeline, arguments: dict[str, Any]) -> None:
    alone, shared = both(one, two, **arguments)
    assert alone.shape == shared.shape
    assert relative_error(shared, alone) < EXACT


def test_global_seed_is_followed_and_left_where_one_device_leaves_it(one: Any, two: SpawnedPipeline) -> None:
    draws = []
    for pipe in (one, two):
        torch.manual_seed(3)
        pipe("a", num_inference_steps=1, output_type="latent")
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_generators_are_used_and_advanced(one: Any, two: SpawnedPipeline) -> None:
    pairs = [[torch.Generator().manual_seed(s) for s in (5, 6)] for _ in range(2)]
    alone, shared = (
        pipe(["a", "b"], num_inference_steps=2, generator=generators, output_type="latent").images
        for pipe, generators in zip((one, two), pairs, strict=True)
    )
    assert relative_error(shared, alone) < EXACT
    for mine, theirs in zip(*pairs, strict=True):
        assert torch.equal(mine.get_state(), theirs.get_state())


def test_noise_of_the_steps_follows_the_generator(one: Any, two: SpawnedPipeline) -> None:
    latents = []
    for pipe in (one, two):
        before = pipe.scheduler
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(before.config)
        generator = torch.Generator().manual_seed(1)
        latents.append(pipe("a", num_inference_steps=4, generator=generator, output_type="latent").images)
        pipe.scheduler = before
    assert relative_error(latents[1], latents[0]) < EXACT


def test_pictures_and_outputs(two: SpawnedPipeline) -> None:
    output = two("a", num_inference_steps=1, width=72)
    assert isinstance(output, diffusers.pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput)
    assert output.images[0].size == (72, 64)
    (images,) = two("a", num_inference_steps=1, output_type="np", return_dict=False)
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.supports("feature", "callback_on_step_end that changes latents, across processes")
def test_callback_runs_here_and_its_changes_hold_on_all_ranks(one: Any, two: SpawnedPipeline) -> None:
    seen: list[tuple[int, int, int]] = []

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, int(timestep), pipe.num_timesteps))
        if step == 1:
            tensors["latents"] = tensors["latents"] * 0.9
        if step == 2:
            tensors["latents"].mul_(1.1)
        return tensors

    alone, shared = both(one, two, callback_on_step_end=change)
    assert relative_error(shared, alone) < EXACT
    assert seen[:4] == seen[4:] and len(seen) == 8


def test_a_callback_may_draw_numbers_of_its_own(one: Any, two: SpawnedPipeline) -> None:
    latents = []
    for pipe in (one, two):
        generator = torch.Generator().manual_seed(1)
        before = pipe.scheduler
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(before.config)

        def noise(p: Any, i: int, t: Any, tensors: dict[str, Any], source: Any = generator) -> dict[str, Any]:
            drawn = torch.randn(tensors["latents"].shape, generator=source) + torch.randn(tensors["latents"].shape)
            return {"latents": tensors["latents"] + 0.1 * drawn}

        torch.manual_seed(2)
        call = {"generator": generator, "num_inference_steps": 3, "output_type": "latent"}
        latents.append(pipe("a", callback_on_step_end=noise, **call).images + torch.rand(1))
        pipe.scheduler = before
    assert relative_error(latents[1], latents[0]) < EXACT


def test_callback_gets_the_tensors_it_asks_for(two: SpawnedPipeline) -> None:
    asked = ["latents", "prompt_embeds", "add_time_ids"]
    seen: list[str] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.extend(tensors)
        return {}

    two("a", num_inference_steps=1, callback_on_step_end=look, callback_on_step_end_tensor_inputs=asked)
    assert seen == asked


@pytest.mark.supports("feature", "diffusers' own callback objects")
def test_diffusers_own_callback_objects(one: Any, two: SpawnedPipeline) -> None:
    cutoff = diffusers.callbacks.SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    alone, shared = both(one, two, callback_on_step_end=cutoff)
    assert relative_error(shared, alone) < EXACT


@pytest.mark.supports("feature", "pipe._interrupt set by a callback")
def test_interrupt_from_a_callback(one: Any, two: SpawnedPipeline) -> None:
    steps: list[int] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    alone, shared = both(one, two, callback_on_step_end=stop)
    assert steps == [0, 1, 0, 1]
    assert relative_error(shared, alone) < EXACT


@pytest.mark.supports("feature", "previews decoded by a callback")
def test_callback_can_look_at_the_scheduler_and_decode_a_preview(two: SpawnedPipeline) -> None:
    previews: list[torch.Tensor] = []

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipe.scheduler.config.num_train_timesteps == 1000
        latents = tensors["latents"] / pipe.vae.config.scaling_factor
        previews.append(pipe.vae.decode(latents, return_dict=False)[0])
        return tensors

    two("a", num_inference_steps=2, callback_on_step_end=preview)
    assert [tuple(p.shape) for p in previews] == [(1, 3, 64, 64)] * 2


def test_an_error_in_a_callback_is_the_callers_own(two: SpawnedPipeline) -> None:
    pids = two.pids

    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise LookupError("of the callback")

    with pytest.raises(LookupError, match="of the callback"):
        two("a", num_inference_steps=3, callback_on_step_end=fail)
    two("a", num_inference_steps=1)
    assert two.pids == pids


def test_a_callback_cannot_call_its_pipeline(two: SpawnedPipeline) -> None:
    def again(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return pipe("b", num_inference_steps=1)

    def close(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return pipe.close()

    with pytest.raises(ConfigError, match="cannot call the pipeline"):
        two("a", num_inference_steps=1, callback_on_step_end=again)
    with pytest.raises(ConfigError, match="cannot close the pipeline"):
        two("a", num_inference_steps=1, callback_on_step_end=close)


@pytest.mark.supports("feature", "progress bar, set_progress_bar_config")
def test_progress_bar_is_drawn_here(two: SpawnedPipeline) -> None:
    two.set_progress_bar_config(desc="painting", mininterval=0)
    with redirect_stderr(io.StringIO()) as shown:
        two("a", num_inference_steps=3)
    assert "painting" in shown.getvalue() and "3/3" in shown.getvalue()
    two.set_progress_bar_config(disable=True)
    with redirect_stderr(io.StringIO()) as shown:
        two("a", num_inference_steps=3)
    assert shown.getvalue() == ""


@pytest.mark.supports("feature", "several threads call one pipeline")
def test_threads_are_served_one_after_the_other(two: SpawnedPipeline) -> None:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return two("a", num_inference_steps=2, generator=generator, output_type="latent").images

    alone = [draw(seed) for seed in range(4)]
    together: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda s=s: together.update({s: draw(s)})) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(4))


def test_times_of_the_last_run(two: SpawnedPipeline) -> None:
    two("a", num_inference_steps=3)
    times = two.last_run
    assert times is not None and len(times.steps) == 3
    assert sorted(times.steps) == list(times.steps) and times.steps[-1] <= times.total


def test_a_call_that_is_weighed_tells_what_every_rank_took(two: SpawnedPipeline) -> None:
    with two.weigh() as found:
        assert found == []
        two("a lake", num_inference_steps=1, output_type="latent")
        with pytest.raises(ConfigError, match="weighed already"), two.weigh():
            pass
    assert len(found) == 2
    for use in found:
        assert use.missing or 0 < use.grown < use.peak
    before = list(found)
    two("a lake", num_inference_steps=1, output_type="latent")  # after the block nothing is weighed
    assert found == before
