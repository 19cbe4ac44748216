"""What `parallelize` refuses, in words that say what to do instead; nothing is changed then."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from small_pipelines import PIPELINES, SCHEDULERS, Call

from distrifusion import ConfigError, PlanError, UnsupportedModel, parallelize, unparallelize
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.in_place import denoiser_of


@pytest.fixture
def pipe() -> DiffusionPipeline:
    return PIPELINES["sd"]("ddim")


def two_ranks() -> VirtualTransport:
    return VirtualTransport(VirtualWorld(2), 0)


def untouched(pipe: DiffusionPipeline) -> bool:
    plain = not any("forward" in vars(module) for module in pipe.unet.modules())
    return type(pipe) is StableDiffusionPipeline and plain


def test_a_plan_for_another_number_of_ranks_names_the_nearest(pipe: DiffusionPipeline) -> None:
    with pytest.raises(PlanError, match=r"nearest plan for 2 is 'cfg2'"):
        parallelize(pipe, "cfg2.patch4", mesh=two_ranks())
    assert untouched(pipe)


def test_an_unknown_word_of_the_plan_is_named(pipe: DiffusionPipeline) -> None:
    with pytest.raises(PlanError, match="unknown word 'stripes2'"):
        parallelize(pipe, "stripes2", mesh=two_ranks())
    assert untouched(pipe)


def test_without_a_process_group_the_remedy_is_named(pipe: DiffusionPipeline) -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        parallelize(pipe, "patch2")
    assert untouched(pipe)


def test_a_pipeline_is_parallelized_once(pipe: DiffusionPipeline) -> None:
    parallelize(pipe, "patch2", mesh=two_ranks())
    with pytest.raises(ConfigError, match="unparallelize"):
        parallelize(pipe, "patch2", mesh=two_ranks())
    unparallelize(pipe)
    assert untouched(pipe)


@pytest.mark.parametrize("function", [unparallelize, denoiser_of])
def test_a_plain_pipeline_has_nothing_to_restore(pipe: DiffusionPipeline, function: object) -> None:
    with pytest.raises(ConfigError, match="not parallelized"):
        function(pipe)


def test_a_layer_without_a_rule_is_named_and_the_pipeline_left_alone(pipe: DiffusionPipeline) -> None:
    pipe.unet.conv_out.padding_mode = "circular"
    with pytest.raises(UnsupportedModel, match="conv_out"):
        parallelize(pipe, "patch2", mesh=two_ranks())
    assert untouched(pipe)


def test_a_layer_changed_after_parallelizing_is_named_by_the_next_call(pipe: DiffusionPipeline) -> None:
    parallelize(pipe, "patch2", mesh=two_ranks())
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(UnsupportedModel, match="unfuse_qkv_projections"):
        Call()(pipe)


def test_a_pipeline_without_a_unet_is_refused() -> None:
    pipe = DiffusionPipeline()
    pipe.register_modules(scheduler=SCHEDULERS["ddim"]())
    with pytest.raises(UnsupportedModel, match="no unet"):
        parallelize(pipe, "patch1")


def test_one_rank_without_a_process_group_has_the_plain_pipelines_bits(pipe: DiffusionPipeline) -> None:
    reference = Call()(pipe)
    assert torch.equal(Call()(parallelize(pipe, "patch1")), reference)
