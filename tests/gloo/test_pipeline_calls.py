"""What a pipeline's call can be given, and that one call leaves nothing to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_pipelines import Call
from work import (
    draw,
    draw_after_a_stopped_run,
    draw_and_restore,
    draw_fresh,
    draw_unseeded,
    draw_with_adapter,
    shrink_latents,
)
from world import GlooWorld

from distrifusion import Plan
from models import relative_error

EXACT = 1e-5
Alone = Callable[[str, str, Call], torch.Tensor]


def embeddings(batch: int) -> dict[str, Any]:
    """Prompts as tensors, for SD."""
    generator = torch.Generator().manual_seed(7)
    positive, negative = torch.randn(2, batch, 16, 24, generator=generator)
    return {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}


CALLS = {
    "two images of a prompt": {"num_images_per_prompt": 2},
    "two prompts": {"prompt": ["a calm lake", "a hill"]},
    "a negative prompt": {"negative_prompt": "fog"},
    "guidance off": {"guidance_scale": 1.0},
    "guidance off, three images": {"guidance_scale": 1.0, "num_images_per_prompt": 3},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "latents": {"latents": torch.randn(1, 4, 25, 17, generator=torch.Generator().manual_seed(2))},
    "a callback that changes the latents": {"callback_on_step_end": shrink_latents},
}


FEATURES = {
    "two images of a prompt": "several pictures of a prompt",
    "two prompts": "several prompts in one call",
    "a negative prompt": "negative prompt",
    "guidance off": "guidance off",
    "guidance off, three images": "guidance off",
    "rescaled guidance": "guidance_rescale",
    "latents": "latents=",
    "a callback that changes the latents": "callback that returns other latents",
}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(call, id=name, marks=pytest.mark.supports("feature", FEATURES[name]))
        for name, call in CALLS.items()
    ],
)
@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_a_call_with_arguments_equals_the_plain_pipeline(
    gloo: GlooWorld, alone: Alone, family: str, arguments: dict[str, Any]
) -> None:
    call = Call(arguments)
    reference = alone(family, "ddim", call)
    by_rank = gloo.run(draw, family, "ddim", "cfg2.patch2", call)
    assert all(relative_error(latents, reference) <= EXACT for (latents,) in by_rank)


@pytest.mark.parametrize("plan", ["dp2", "dp3", "dp2.cfg2", "dp2.patch2.displaced.w5"])
def test_prompts_spread_over_groups_of_ranks_equal_the_plain_pipeline(gloo: GlooWorld, alone: Alone, plan: str) -> None:
    call = Call({"prompt": ["a calm lake", "a hill", "a road"], "num_inference_steps": 3})
    reference = alone("sdxl", "ddim", call)
    by_rank = gloo.run(draw, "sdxl", "ddim", plan, call, ranks=Plan.parse(plan).num_ranks)
    assert all(relative_error(latents, reference) <= EXACT for (latents,) in by_rank)


@pytest.mark.supports("feature", "prompt_embeds")
def test_prompts_given_as_tensors_equal_the_plain_pipeline(gloo: GlooWorld, alone: Alone) -> None:
    call = Call(embeddings(2))
    by_rank = gloo.run(draw, "sd", "euler", "cfg2", call, ranks=2)
    assert all(relative_error(latents, alone("sd", "euler", call)) <= EXACT for (latents,) in by_rank)


def test_decoded_pictures_equal_the_plain_pipeline(gloo: GlooWorld, alone: Alone) -> None:
    call = Call({"output_type": "pt", "num_inference_steps": 2})
    reference = alone("sdxl", "euler", call)
    assert reference.shape == (1, 3, 200, 136)
    by_rank = gloo.run(draw, "sdxl", "euler", "patch2", call, ranks=2)
    assert all(relative_error(picture, reference) <= EXACT for (picture,) in by_rank)


@pytest.mark.supports("feature", "generator")
@pytest.mark.parametrize(("family", "scheduler"), [("sdxl", "euler_ancestral"), ("sd", "lcm"), ("sd", "dpmpp_2m_sde")])
def test_a_generator_gives_the_plain_pipelines_noise_whatever_the_other_ranks_pass(
    gloo: GlooWorld, alone: Alone, family: str, scheduler: str
) -> None:
    """The scheduler draws from the given generator too; the global ones may differ."""
    call = Call(generator=11)
    reference = alone(family, scheduler, Call(generator=11, seed=12345))
    by_rank = gloo.run(draw, family, scheduler, "patch2", call, ranks=2)
    assert all(relative_error(latents, reference) <= EXACT for (latents,) in by_rank)


@pytest.mark.supports("feature", "eta")
def test_eta_reaches_the_scheduler(gloo: GlooWorld, alone: Alone) -> None:
    call = Call({"eta": 0.8}, generator=11)
    reference = alone("sdxl", "ddim", call)
    assert relative_error(reference, alone("sdxl", "ddim", Call(generator=11))) > 0.01
    by_rank = gloo.run(draw, "sdxl", "ddim", "patch2", call, ranks=2)
    assert all(relative_error(latents, reference) <= EXACT for (latents,) in by_rank)


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "dpmpp_sde"])
def test_runs_that_nobody_seeded_agree_on_all_ranks_and_differ_from_each_other(gloo: GlooWorld, scheduler: str) -> None:
    first, second = (gloo.run(draw_unseeded, "sd", scheduler, "patch3", ranks=3) for _ in range(2))
    for by_rank in (first, second):
        assert all(torch.equal(latents, by_rank[0]) for latents in by_rank)
    assert relative_error(first[0], second[0]) > 0.1


SIZES = [Call({"height": height, "width": width}) for height, width in ((200, 136), (136, 328), (72, 72))]


@pytest.mark.supports("feature", "another size in every call")
def test_sizes_change_between_calls_without_rebuilding(gloo: GlooWorld, alone: Alone) -> None:
    references = [alone("sdxl", "euler", call) for call in SIZES]
    for latents in gloo.run(draw, "sdxl", "euler", "patch4", *SIZES):
        assert max(map(relative_error, latents, references)) <= EXACT


@pytest.mark.parametrize(("family", "plan"), [("sdxl", "patch2.displaced.all.w0"), ("sd", "patch2.displaced.kv.w0")])
def test_a_displaced_call_has_the_bits_of_one_on_a_new_pipeline(gloo: GlooWorld, family: str, plan: str) -> None:
    calls = [*SIZES[:2], Call({"num_images_per_prompt": 2}), SIZES[0]]
    used = gloo.run(draw, family, "dpmpp_2m", plan, *calls, ranks=2)
    fresh = gloo.run(draw_fresh, family, "dpmpp_2m", plan, *calls, ranks=2)
    for rank_used, rank_fresh in zip(used, fresh, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rank_used, rank_fresh, strict=True))


def test_a_run_after_one_that_ended_with_an_error_has_the_bits_of_one_on_a_new_pipeline(gloo: GlooWorld) -> None:
    call, plan = Call(), "patch3.displaced.all.w0"
    after = gloo.run(draw_after_a_stopped_run, "sdxl", "ddim", plan, call, ranks=3)
    fresh = gloo.run(draw, "sdxl", "ddim", plan, call, ranks=3)
    assert all(torch.equal(latents, new[0]) for latents, new in zip(after, fresh, strict=True))


@pytest.mark.parametrize(("family", "plan"), [("sdxl", "patch2.displaced.all.w0"), ("sd", "cfg2")])
def test_a_restored_pipeline_is_what_it_was(gloo: GlooWorld, family: str, plan: str) -> None:
    for facts in gloo.run(draw_and_restore, family, "ddim", plan, Call(), ranks=2):
        assert [fact for fact, holds in facts.items() if not holds] == []


@pytest.mark.supports("adapter", "LoRA, added to a parallelized pipeline")
def test_an_adapter_added_to_a_parallelized_pipeline_takes_part(gloo: GlooWorld, alone: Alone) -> None:
    call = Call()
    (reference,) = gloo.run(draw_with_adapter, "sdxl", "ddim", None, call, ranks=1)
    assert relative_error(reference, alone("sdxl", "ddim", call)) > 0.01
    by_rank = gloo.run(draw_with_adapter, "sdxl", "ddim", "cfg2.patch2", call)
    assert all(relative_error(latents, reference) <= EXACT for latents in by_rank)
