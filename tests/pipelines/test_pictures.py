"""What a run does before and after the denoiser: the VAE in bands, prompts encoded once, and who gets the picture."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from families import PIPELINES, build, picture
from ranks import EXACT, Ranks, own_copy
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from distrifusion import ConfigError, RankFailed, parallelize, unparallelize
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.in_place import coders_of
from models import image_prompt, perturb, relative_error, sdxl_unet
from pipelines.families import SDXL_BLOCKS

TEXT = PIPELINES["StableDiffusionXLPipeline"]
IMAGE = PIPELINES["StableDiffusionXLImg2ImgPipeline"]
paint = partial(TEXT, output_type="pt", num_inference_steps=2)


def two_ranks() -> VirtualTransport:
    return VirtualTransport(VirtualWorld(2), 0)


def divided(model: torch.nn.Module) -> bool:
    return any("forward" in vars(module) for module in model.modules())


@pytest.fixture(scope="module")
def plain() -> DiffusionPipeline:
    return TEXT.make()


@pytest.mark.supports("feature", "pictures in, pictures out")
@pytest.mark.parametrize("plan", ["patch3", "cfg2.patch2.columns"])
@pytest.mark.parametrize("case", [TEXT, IMAGE], ids=["from text", "from an image"])
def test_a_picture_equals_one_device(case: Any, plan: str) -> None:
    pipe = case.make()
    call = partial(case, output_type="pt", num_images_per_prompt=2)
    ranks = Ranks(pipe, plan)
    assert ranks.error(call, call(own_copy(pipe))) <= EXACT
    encoder, decoder = coders_of(ranks.pipes[-1])
    assert decoder.exchange.bytes_sent["kv"] > 0, "the attention in the middle is divided"
    assert (encoder.exchange.bytes_sent["halo"] > 0) == (case is IMAGE)


def test_a_displaced_plan_decodes_exactly(plain: DiffusionPipeline) -> None:
    """The VAE has no last step whose values it could use: what a displaced run has denoised is decoded exactly."""
    latents = Ranks(plain, "patch2.displaced.w0").draw(TEXT)[0]
    pictures = Ranks(plain, "patch2.displaced.w0").draw(partial(TEXT, output_type="pt"))
    vae = own_copy(plain).vae
    with torch.no_grad():
        reference = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    assert relative_error(pictures[0], reference.clamp(0, 1)) <= EXACT


@pytest.mark.supports("feature", "pictures on the first rank only")
@pytest.mark.parametrize("plan", ["patch2", "cfg2.patch2"])
def test_the_first_rank_alone_gets_the_picture_where_that_is_asked_for(plain: DiffusionPipeline, plan: str) -> None:
    world = VirtualWorld(Ranks(plain, plan).plan.num_ranks)

    def body(transport: VirtualTransport) -> tuple[Any, torch.Tensor]:
        pipe = parallelize(own_copy(plain), plan, transport, pictures="first")
        generator = torch.Generator().manual_seed(5)
        arguments = {**TEXT.arguments, "num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator}
        drawn = pipe("a lake", output_type="pt", **arguments)
        return drawn, TEXT(pipe)

    first, *others = world.run(body)
    assert relative_error(first[0].images, paint(own_copy(plain))) <= EXACT
    assert all(drawn is None for drawn, _ in others)
    assert all(torch.equal(latents, first[1]) for _, latents in others)


def test_a_pipeline_that_goes_on_after_decoding_needs_the_picture_everywhere(plain: DiffusionPipeline) -> None:
    def body(transport: VirtualTransport) -> None:
        pipe = parallelize(own_copy(plain), "patch2", transport, pictures="first")
        step = pipe.scheduler.step

        def decode_and_step(*args: Any, **kwargs: Any) -> Any:
            pipe.vae.decode(args[2])
            return step(*args, **kwargs)

        pipe.scheduler.step = decode_and_step
        TEXT(pipe)

    with pytest.raises(ConfigError, match="goes on after it has decoded a picture, which only rank 0 has"):
        VirtualWorld(2).run(body)


def test_a_wrong_word_for_who_gets_pictures_is_refused(plain: DiffusionPipeline) -> None:
    pipe = own_copy(plain)
    for word in ("alone", "rank0", None):
        with pytest.raises(ConfigError, match="must be 'all' or 'first'"):
            parallelize(pipe, "patch2", two_ranks(), pictures=word)
    assert not divided(pipe.vae) and not divided(pipe.unet)


def test_what_a_callback_decodes_its_rank_decodes_alone(plain: DiffusionPipeline) -> None:
    """A preview on one rank only is the usual thing to do; nobody waits for the others there."""
    previews: list[torch.Tensor] = []

    def call(pipe: Any, first: bool) -> torch.Tensor:
        def preview(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if first:
                previews.append(pipe.vae.decode(tensors["latents"]).sample)
                pipe.encode_prompt("a hill", device=torch.device("cpu"))
            return tensors

        return paint(pipe, callback_on_step_end=preview)

    ranks = Ranks(plain, "patch2")
    drawn = ranks.world.run(lambda transport: call(ranks.pipes[transport.rank], transport.rank == 0))
    reference = call(own_copy(plain), True)
    assert max(relative_error(one, reference) for one in drawn) <= EXACT
    assert max(relative_error(one, other) for one, other in zip(previews[:2], previews[2:], strict=True)) <= EXACT


def test_outside_a_run_a_rank_decodes_and_encodes_alone(plain: DiffusionPipeline) -> None:
    one, pipe = own_copy(plain), parallelize(own_copy(plain), "patch2", two_ranks())
    latents = torch.randn(1, 4, 9, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(pipe.vae.decode(latents).sample, one.vae.decode(latents).sample)
        assert torch.equal(pipe.encode_prompt("a hill")[0], one.encode_prompt("a hill")[0])


def test_restoring_restores_the_autoencoder_and_the_methods(plain: DiffusionPipeline) -> None:
    pipe = own_copy(plain)
    before = {name: dict(vars(module)) for name, module in pipe.vae.named_modules()}
    parallelize(pipe, "cfg2", two_ranks())
    assert divided(pipe.vae.encoder) and divided(pipe.vae.decoder)
    assert pipe.encode_prompt.__func__ is not type(plain).encode_prompt
    unparallelize(pipe)
    assert {name: dict(vars(module)) for name, module in pipe.vae.named_modules()} == before
    assert pipe.encode_prompt.__func__ is type(plain).encode_prompt


def test_a_plan_for_one_rank_leaves_the_autoencoder_alone(plain: DiffusionPipeline) -> None:
    pipe = parallelize(own_copy(plain), "patch1", VirtualTransport(VirtualWorld(1), 0))
    assert coders_of(pipe) == () and not divided(pipe.vae)


def test_an_autoencoder_that_was_replaced_is_refused(plain: DiffusionPipeline) -> None:
    pipe = parallelize(own_copy(plain), "patch2", two_ranks())
    pipe.vae = copy.deepcopy(own_copy(plain).vae)
    with pytest.raises(ConfigError, match="or vae of this pipeline was replaced"):
        TEXT(pipe)


def tiny_autoencoder(pipe: Any) -> None:
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": 4 * (4,), "decoder_block_out_channels": 4 * (4,)}
    pipe.vae = AutoencoderTiny(**blocks, num_encoder_blocks=4 * (1,), num_decoder_blocks=4 * (1,)).eval()


def circular(pipe: Any) -> None:
    pipe.vae.decoder.mid_block.resnets[0].conv1.padding_mode = "circular"


@pytest.mark.parametrize(
    ("change", "says"),
    [(circular, r"vae\.decoder: layer 'mid_block.resnets.0.conv1'.*whole on every rank"), (tiny_autoencoder, None)],
)
def test_an_autoencoder_without_a_rule_runs_whole(
    plain: DiffusionPipeline, change: Callable[[Any], None], says: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    pipe = own_copy(plain)
    change(pipe)
    reference = paint(own_copy(pipe))
    ranks = Ranks(pipe, "patch2")
    assert not divided(ranks.pipes[0].vae.decoder)
    assert ranks.error(paint, reference) <= EXACT
    said = [str(w.message) for w in recwarn if "whole on every rank" in str(w.message)]
    assert len(said) == (says is not None)
    assert says is None or re.search(says, said[0])


def test_pipelines_that_share_an_autoencoder_share_its_division(plain: DiffusionPipeline) -> None:
    """A base and a refiner with U-Nets and plans of their own."""
    base, other = own_copy(plain), own_copy(plain)
    other.vae = base.vae
    world = VirtualWorld(2)
    parallelize(base, "patch2", VirtualTransport(world, 0))
    parallelize(other, "cfg2", VirtualTransport(world, 0))
    assert coders_of(base) == coders_of(other)
    third = own_copy(plain)
    third.vae = base.vae
    with pytest.raises(ConfigError, match="divided over 2 ranks for another pipeline"):
        parallelize(third, "patch3", VirtualTransport(VirtualWorld(3), 0))
    assert not divided(third.unet)
    unparallelize(base)
    assert divided(other.vae)
    unparallelize(other)
    assert not divided(other.vae)


def count_calls(pipe: Any, name: str) -> list[int]:
    """Counts the calls of a component from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    getattr(pipe, name).register_forward_pre_hook(count)
    return calls


@pytest.mark.supports("feature", "prompts encoded by one rank for all")
@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusionInstructPix2PixPipeline"])
def test_text_is_encoded_by_the_first_rank_for_all(name: str) -> None:
    case = PIPELINES[name]
    pipe = case.make()
    reference = case(own_copy(pipe), negative_prompt="fog")
    ranks = Ranks(pipe, "patch3")
    calls = ranks.each(lambda own: count_calls(own, "text_encoder"))
    assert ranks.error(partial(case, negative_prompt="fog"), reference) <= EXACT
    assert [count[0] for count in calls] == [2, 0, 0]


def test_an_image_prompt_is_encoded_by_the_first_rank_for_all() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, projection_dim=10, image_size=32, patch_size=16)
    unet = sdxl_unet(**SDXL_BLOCKS)
    unet._load_ip_adapter_weights([image_prompt(unet)], low_cpu_mem_usage=False)
    encoder = perturb(CLIPVisionModelWithProjection(vision))
    pipe = build(type(TEXT.make()), "sdxl", unet=unet, image_encoder=encoder)
    prompt = {"ip_adapter_image": picture(32, 32)}
    reference = TEXT(own_copy(pipe), **prompt)
    ranks = Ranks(pipe, "patch2")
    calls = ranks.each(lambda own: count_calls(own, "image_encoder"))
    assert ranks.error(partial(TEXT, **prompt), reference) <= EXACT
    assert calls[0][0] > 0 and calls[1][0] == 0


def test_an_error_of_the_text_encoder_is_the_error_of_every_rank(plain: DiffusionPipeline) -> None:
    ranks = Ranks(plain, "patch3")

    def call(pipe: Any) -> BaseException:
        with pytest.raises(ValueError, match="has batch size 2, but `prompt`") as caught:
            TEXT(pipe, prompt=["a", "b", "c"], negative_prompt=["d", "e"])
        return caught.value

    # The pipeline's own check of its arguments is passed over, as where it does not look.
    ranks.each(lambda pipe: setattr(pipe, "check_inputs", lambda *args, **kwargs: None))
    assert len({str(error) for error in ranks.draw(call)}) == 1
    assert ranks.error(TEXT, TEXT(own_copy(plain))) <= EXACT


def test_the_memory_of_the_first_rank_is_its_own_affair(plain: DiffusionPipeline) -> None:
    ranks = Ranks(plain, "patch2")
    ranks.pipes[0].text_encoder.register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8))

    def call(pipe: Any) -> BaseException:
        try:
            TEXT(pipe)
        except RuntimeError as error:
            return error
        raise AssertionError("no error")

    first, second = ranks.draw(call)
    assert not isinstance(first, RankFailed)
    assert isinstance(second, RankFailed) and second.rank == 0 and "ran out of memory while it encoded" in str(second)
