"""What a person relies on from diffusers' StableDiffusionXLPipeline, and keeps when it is parallelized.

The facts are those that diffusers tests on its own pipeline; here every call is made by two ranks at once, which must
give the same bits. What one device gives is stated elsewhere; here it is what one call gives beside another.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import SDXLCFGCutoffCallback
from families import PIPELINES, noise
from PIL import Image
from ranks import EXACT, Ranks, own_copy

from distrifusion import unparallelize
from gloo.small_pipelines import SCHEDULERS
from models import image_prompt, relative_error

SMALL = {"height": 72, "width": 88}  # 9x11 latents
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.fixture(scope="module", params=["patch2", "cfg2"])
def shared(request: pytest.FixtureRequest) -> Ranks:
    return Ranks(PIPELINES["StableDiffusionXLPipeline"].make(), request.param)


@pytest.fixture
def ranks(shared: Ranks) -> Iterator[Ranks]:
    """The same ranks for all facts of a plan, with the scheduler and settings they began with."""
    yield shared
    for pipe in shared.pipes:
        pipe.scheduler = SCHEDULERS["ddim"]()
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.disable_tiling()
        pipe.vae.disable_slicing()


def outputs(ranks: Ranks, seed: Any = 5, **changes: Any) -> list[Any]:
    """What the pipeline returns on each rank; `seed` may be several, for a generator each."""

    def call(pipe: Any) -> Any:
        seeds = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
        generator = seeds if isinstance(seed, list) else seeds[0]
        common = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", **SMALL}
        common |= {} if "prompt_embeds" in changes else {"prompt": "a lake"}
        return pipe(generator=generator, **{**common, **changes})

    return ranks.draw(call)


def draw(ranks: Ranks, seed: Any = 5, **changes: Any) -> torch.Tensor:
    """The images of a call, the same bits on both ranks."""
    first, *others = [output.images for output in outputs(ranks, seed, **changes)]
    assert all(torch.equal(first, other) for other in others)
    return first


def same(one: torch.Tensor, other: torch.Tensor, bound: float = EXACT) -> bool:
    return relative_error(one, other) <= bound


def encoded(ranks: Ranks, prompt: Any, **options: Any) -> dict[str, torch.Tensor]:
    """A prompt's embeddings by the names that a call takes them."""
    values = ranks.pipes[0].encode_prompt(prompt, device="cpu", do_classifier_free_guidance=True, **options)
    return dict(zip(EMBEDS, values, strict=True))


def test_embeddings_are_as_good_as_their_prompt(ranks: Ranks) -> None:
    assert same(draw(ranks, **encoded(ranks, "a lake")), draw(ranks))


def test_negative_embeddings_are_as_good_as_their_prompt(ranks: Ranks) -> None:
    by_text = draw(ranks, negative_prompt="fog")
    assert same(draw(ranks, **encoded(ranks, "a lake", negative_prompt="fog")), by_text)
    assert not same(by_text, draw(ranks))


def test_embeddings_of_several_prompts_with_several_images_each(ranks: Ranks) -> None:
    prompts = ["a lake", "a hill"]
    seeds = [1, 2, 3, 4]
    by_text = draw(ranks, seeds, prompt=prompts, num_images_per_prompt=2)
    assert by_text.shape == (4, 4, 9, 11)
    assert same(draw(ranks, seeds, num_images_per_prompt=2, **encoded(ranks, prompts)), by_text)


def test_a_second_prompt_is_for_the_second_encoder(ranks: Ranks) -> None:
    assert same(draw(ranks, prompt_2="a lake"), draw(ranks))
    assert not same(draw(ranks, prompt_2="a hill"), draw(ranks))
    assert same(draw(ranks, negative_prompt="fog", negative_prompt_2="fog"), draw(ranks, negative_prompt="fog"))
    assert not same(draw(ranks, negative_prompt="fog", negative_prompt_2="rain"), draw(ranks, negative_prompt="fog"))


def test_a_batch_of_prompts_is_as_good_as_single_calls(ranks: Ranks) -> None:
    prompts, negatives, seeds = ["a lake", "a hill", "red"], ["fog", "", "rain"], [1, 2, 3]
    batch = draw(ranks, seeds, prompt=prompts, negative_prompt=negatives)
    assert batch.shape[0] == 3
    for i in range(3):
        assert same(draw(ranks, seeds[i], prompt=prompts[i], negative_prompt=negatives[i]), batch[i : i + 1])


def test_images_per_prompt_multiply_the_prompts(ranks: Ranks) -> None:
    assert draw(ranks, num_images_per_prompt=3).shape == (3, 4, 9, 11)
    assert draw(ranks, prompt=["a", "b"], num_images_per_prompt=2).shape == (4, 4, 9, 11)
    single = [draw(ranks, seed) for seed in (1, 2)]
    assert same(draw(ranks, [1, 2], num_images_per_prompt=2), torch.cat(single))


def test_latents_of_ones_own_are_where_the_run_begins(ranks: Ranks) -> None:
    begin = noise(1, 4, 9, 11, seed=8)
    assert torch.equal(draw(ranks, seed=1, latents=begin), draw(ranks, seed=2, latents=begin))
    assert not same(draw(ranks, latents=begin), draw(ranks))


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_ones(ranks: Ranks) -> None:
    assert torch.equal(draw(ranks), draw(ranks))
    assert not same(draw(ranks, seed=6), draw(ranks))


def test_guidance_off_takes_half_the_batch_and_no_negative_prompt(ranks: Ranks) -> None:
    off = draw(ranks, guidance_scale=1.0)
    assert not any(pipe.do_classifier_free_guidance for pipe in ranks.pipes)
    assert same(draw(ranks, guidance_scale=1.0, negative_prompt="fog"), off)
    assert not same(off, draw(ranks))


def test_a_callback_sees_every_step_and_what_it_asked_for(ranks: Ranks) -> None:
    seen: dict[int, list[tuple[int, int, list[str]]]] = {id(pipe): [] for pipe in ranks.pipes}

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[id(pipe)].append((step, int(timestep), sorted(tensors)))
        return tensors

    asked = ["latents", "prompt_embeds"]
    draw(ranks, callback_on_step_end=look, callback_on_step_end_tensor_inputs=asked)
    first, second = seen.values()
    assert first == second
    assert [step for step, _, _ in first] == [0, 1, 2]
    timesteps = [timestep for _, timestep, _ in first]
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(names == asked for _, _, names in first)


def test_every_tensor_that_the_pipeline_names_can_be_asked_for(ranks: Ranks) -> None:
    names = list(ranks.pipes[0]._callback_tensor_inputs)
    assert "add_time_ids" in names

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == set(names)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    asked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
    assert draw(ranks, **asked).abs().max() == 0
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        draw(ranks, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["no such tensor"])


def test_guidance_that_a_callback_switches_off_in_mid_run(ranks: Ranks) -> None:
    """From then on a call has half the rows: another layout, on all ranks alike."""
    cut = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    rows: list[int] = []
    first = ranks.pipes[0].unet
    hook = first.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    switched = draw(ranks, num_inference_steps=4, callback_on_step_end=cut)
    hook.remove()
    assert rows == [2, 2, 1, 1]
    assert not same(switched, draw(ranks, num_inference_steps=4))


def test_an_interrupt_ends_the_run_after_its_step(ranks: Ranks) -> None:
    kept: dict[int, list[torch.Tensor]] = {id(pipe): [] for pipe in ranks.pipes}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept[id(pipe)].append(tensors["latents"].clone())
        pipe._interrupt = step == 1
        return tensors

    stopped = draw(ranks, num_inference_steps=4, callback_on_step_end=keep)
    states = kept[id(ranks.pipes[0])]
    assert len(states) == 2 and torch.equal(stopped, states[-1])


def test_steps_and_timesteps_are_counted(ranks: Ranks) -> None:
    for steps in (1, 4):
        draw(ranks, num_inference_steps=steps)
        assert [pipe.num_timesteps for pipe in ranks.pipes] == [steps, steps]


def test_more_steps_come_nearer_to_many(ranks: Ranks) -> None:
    """The step size alone changes: without guidance, a deterministic sampler comes closer with every doubling."""
    few, more, many = (draw(ranks, num_inference_steps=n, guidance_scale=1.0) for n in (2, 8, 32))
    assert relative_error(more, many) < relative_error(few, many)


def test_output_types_show_one_picture(ranks: Ranks) -> None:
    pixels = draw(ranks, output_type="pt")
    assert pixels.shape == (1, 3, 72, 88) and pixels.min() >= 0 and pixels.max() <= 1
    array = outputs(ranks, output_type="np")[0].images
    assert isinstance(array, np.ndarray) and array.shape == (1, 72, 88, 3)
    assert np.allclose(array[0], pixels[0].permute(1, 2, 0).numpy())
    (image,) = outputs(ranks, output_type="pil")[1].images
    assert isinstance(image, Image.Image) and image.size == (88, 72)
    assert np.abs(np.asarray(image) / 255 - array[0]).max() < 1 / 255


def test_a_tuple_holds_what_the_output_object_holds(ranks: Ranks) -> None:
    output = outputs(ranks)[0]
    assert isinstance(output, diffusers.pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput)
    (images,) = outputs(ranks, return_dict=False)[0]
    assert torch.equal(images, output.images)


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m", "unipc", "lcm", "heun"])
def test_schedulers_are_exchanged_between_calls(ranks: Ranks, scheduler: str) -> None:
    before = draw(ranks)
    for pipe in ranks.pipes:
        pipe.scheduler = type(SCHEDULERS[scheduler]()).from_config(pipe.scheduler.config)
    assert not same(draw(ranks), before)
    for pipe in ranks.pipes:
        pipe.scheduler = SCHEDULERS["ddim"]()
    assert torch.equal(draw(ranks), before)


def test_timesteps_of_ones_own_are_those_of_the_same_count(ranks: Ranks) -> None:
    for pipe in ranks.pipes:
        pipe.scheduler = SCHEDULERS["euler"]()
    counted = draw(ranks, num_inference_steps=4)
    timesteps = [int(t) for t in ranks.pipes[0].scheduler.timesteps]
    sigmas = ranks.pipes[0].scheduler.sigmas[:-1].tolist()
    assert same(draw(ranks, timesteps=timesteps), counted)
    assert same(draw(ranks, sigmas=sigmas), counted, 1e-2)  # between two table entries
    with pytest.raises(ValueError, match="timesteps"):
        draw(ranks, timesteps=timesteps, sigmas=sigmas)


def test_a_run_that_is_split_goes_on_where_it_stopped(ranks: Ranks) -> None:
    """denoising_end leaves the rest of the noise in; the part it runs is that of the whole run."""
    states: dict[int, torch.Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if pipe is ranks.pipes[0]:
            states[step] = tensors["latents"].clone()
        return tensors

    draw(ranks, num_inference_steps=5, callback_on_step_end=keep)
    assert torch.equal(draw(ranks, num_inference_steps=5, denoising_end=0.6), states[2])
    assert ranks.pipes[0].num_timesteps == 3


def test_the_conditions_on_size_matter(ranks: Ranks) -> None:
    plain = draw(ranks)
    assert same(draw(ranks, original_size=(72, 88), target_size=(72, 88)), plain)
    assert not same(draw(ranks, original_size=(700, 700)), plain, 1e-4)
    assert not same(draw(ranks, negative_original_size=(700, 700), negative_target_size=(72, 88)), plain, 1e-4)


def test_the_size_by_default_is_that_of_the_unet(ranks: Ranks) -> None:
    config = ranks.pipes[0].unet.config
    side = config.sample_size * ranks.pipes[0].vae_scale_factor
    assert draw(ranks, height=None, width=None).shape[2:] == (side // 8, side // 8)


def test_attention_slices_change_nothing(ranks: Ranks) -> None:
    whole = draw(ranks)
    for size in ("auto", "max", 1):
        for pipe in ranks.pipes:
            pipe.enable_attention_slicing(size)
        assert same(draw(ranks), whole)
    for pipe in ranks.pipes:
        pipe.disable_attention_slicing()
    assert same(draw(ranks), whole)


def test_a_sliced_decoder_gives_the_pictures_of_a_plain_one_and_a_tiled_one_similar_ones(ranks: Ranks) -> None:
    seeds = [1, 2]
    plain = draw(ranks, seeds, num_images_per_prompt=2, output_type="pt")
    for pipe in ranks.pipes:
        pipe.vae.enable_slicing()
    assert same(draw(ranks, seeds, num_images_per_prompt=2, output_type="pt"), plain)
    for pipe in ranks.pipes:
        pipe.vae.enable_tiling()
    tiled = draw(ranks, seeds, num_images_per_prompt=2, output_type="pt")
    assert not same(tiled, plain) and relative_error(tiled, plain) < 0.5


def test_progress_is_shown_unless_it_is_switched_off(ranks: Ranks) -> None:
    ranks.pipes[0].set_progress_bar_config(disable=False, desc="painting")
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        draw(ranks)
    assert "painting" in shown.getvalue() and "3/3" in shown.getvalue()


def test_what_the_pipeline_says_of_itself_is_unchanged(ranks: Ranks) -> None:
    pipe = ranks.pipes[0]
    assert isinstance(pipe, StableDiffusionXLPipeline) and type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert inspect.signature(type(pipe).__call__) == inspect.signature(StableDiffusionXLPipeline.__call__)
    assert pipe.config["unet"] == ("diffusers", "UNet2DConditionModel")
    assert set(pipe.components) == set(StableDiffusionXLPipeline._get_signature_keys(pipe)[0])
    assert pipe.device.type == "cpu" and pipe.dtype == torch.float32


def test_saved_and_loaded_it_is_the_plain_pipeline(ranks: Ranks, tmp_path: Path) -> None:
    drawn = draw(ranks)
    ranks.pipes[0].save_pretrained(tmp_path)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionXLPipeline
    assert not any("forward" in vars(module) for module in loaded.unet.modules())
    again = Ranks(loaded, str(ranks.plan))
    assert same(draw(again), drawn)


def test_components_build_another_pipeline(ranks: Ranks) -> None:
    """They share its models, which are plain again for both after unparallelize."""
    own = Ranks(PIPELINES["StableDiffusionXLPipeline"].make(), str(ranks.plan))
    drawn = draw(own)
    own.each(unparallelize)
    plain = StableDiffusionXLPipeline(**own.pipes[0].components, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", **SMALL}
    alone = plain("a lake", generator=torch.Generator().manual_seed(5), **common).images
    assert same(alone, drawn)


def test_encoders_may_be_left_out_when_embeddings_are_given(ranks: Ranks) -> None:
    embeds = encoded(ranks, "a lake")
    pipe = PIPELINES["StableDiffusionXLPipeline"].make()
    nameless = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    bare = StableDiffusionXLPipeline(**{**pipe.components, **nameless}, add_watermarker=False)
    assert same(draw(Ranks(bare, str(ranks.plan)), **embeds), draw(ranks))


@pytest.mark.supports("dtype", "bfloat16")
def test_another_dtype_is_taken_after_parallelizing(ranks: Ranks) -> None:
    own = Ranks(PIPELINES["StableDiffusionXLPipeline"].make(), str(ranks.plan))
    own.each(lambda pipe: pipe.to(torch.bfloat16))
    half = draw(own, num_inference_steps=1)
    assert half.dtype == torch.bfloat16
    one = own_copy(PIPELINES["StableDiffusionXLPipeline"].make()).to(torch.bfloat16)
    alone = draw(Ranks(one, "patch1"), num_inference_steps=1)
    exact = draw(ranks, num_inference_steps=1)
    assert relative_error(half, exact) < 1.2 * relative_error(alone, exact) < 0.5
    own.each(lambda pipe: pipe.to(torch.float32))
    assert draw(own).dtype == torch.float32


def test_an_image_prompt_is_loaded_weighed_and_taken_off(ranks: Ranks) -> None:
    own = Ranks(PIPELINES["StableDiffusionXLPipeline"].make(), str(ranks.plan))
    plain = draw(own)
    weights = image_prompt(own.pipes[0].unet)
    for pipe in own.pipes:
        pipe.unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    embeds = [noise(2, 1, 10, seed=7)]
    drawn = {}
    for scale in (0.0, 0.5, 1.0):
        for pipe in own.pipes:
            pipe.set_ip_adapter_scale(scale)
        drawn[scale] = draw(own, ip_adapter_image_embeds=embeds)
    assert same(drawn[0.0], plain)
    assert relative_error(drawn[1.0], plain) > relative_error(drawn[0.5], plain) > 1e-3
    for pipe in own.pipes:
        pipe.unload_ip_adapter()
    assert same(draw(own), plain)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"height": 71}, "divisible by 8"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "batch size|negative_prompt"),
    ],
)
def test_bad_arguments_are_diffusers_own_errors_on_every_rank(
    ranks: Ranks, arguments: dict[str, Any], named: str
) -> None:
    before = draw(ranks)
    fresh = Ranks(PIPELINES["StableDiffusionXLPipeline"].make(), str(ranks.plan))
    with pytest.raises((ValueError, TypeError, IndexError), match=named):
        draw(fresh, **arguments)
    assert torch.equal(draw(ranks), before)
