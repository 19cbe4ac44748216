"""Pieces of tokens that flow through stages: exact where all is fresh, and where the same input is given again."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from division import EXACT, errors, on_ranks, predictions

from distrifusion import ConfigError, Plan, PlanError, UnsupportedModel
from distrifusion.anatomy import anatomy_of, blocks
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from distrifusion.layout.partition import balance
from models import moved, relative_error, run_request, sdxl_unet
from transformers_tiny import FAMILIES, flux, flux_inputs, sd3, sd3_inputs, sd35

pytestmark = pytest.mark.usefixtures("unchecked")  # see test_token_memory.py
FLOWING = [name for name in FAMILIES if not name.startswith("Hunyuan")]


@cache
def model_of(family: str) -> Any:
    return FAMILIES[family].make()


def inputs_of(family: str, batch: int = 2) -> dict[str, Any]:
    return FAMILIES[family].inputs(batch, *FAMILIES[family].size)


@pytest.mark.supports("plan", "pipe<N>")
@pytest.mark.parametrize("plan", ["pipe2.sync", "pipe2.m3.w9", "cfg2.pipe2.w9"])
@pytest.mark.parametrize("family", FLOWING)
def test_the_whole_flows_exactly(family: str, plan: str) -> None:
    x = inputs_of(family)
    assert max(errors(model_of(family), plan, [x, moved(x)])) <= EXACT


@pytest.mark.supports("plan", "pipe<N>.m<M>")
@pytest.mark.parametrize("family", FLOWING)
def test_an_input_given_again_is_exact_in_pieces_too(family: str) -> None:
    x = inputs_of(family)
    y = moved(x)
    assert max(errors(model_of(family), "pipe2.m3.w1", [x, y, y, y])) <= EXACT


@pytest.mark.supports("plan", "pipe<N>.ulysses<N>")
@pytest.mark.parametrize(
    ("plan", "batch", "height", "width"),
    [
        ("pipe3.m2", 1, 5, 7),  # fewer pieces than stages
        ("pipe4.m5", 2, 5, 5),
        ("pipe2.m64", 1, 5, 5),  # more pieces than words: as many as words
        ("pipe2.m1", 1, 3, 3),
        ("pipe2.m2", 1, 1, 1),  # one token
        ("pipe2.ulysses2.m2", 2, 5, 3),
        ("pipe2.ulysses5.m1", 1, 7, 5),  # three heads on five ranks
        ("pipe2.ulysses2.m3", 1, 1, 1),
        ("cfg2.pipe2.m4", 3, 3, 3),
        ("cfg2.pipe2.m4", 1, 5, 3),  # one row: both teams evaluate it
        ("dp2.cfg2.pipe2.m2", 4, 3, 5),
        ("dp2.pipe2.ulysses2.m3", 2, 5, 5),
    ],
)
@pytest.mark.parametrize("family", ["SD3.5 medium", "FLUX.1 dev"])
def test_any_plan_and_size_has_its_zeros(family: str, plan: str, batch: int, height: int, width: int) -> None:
    scale = 2 if family == "SD3.5 medium" else 1
    model = sd35(num_layers=4) if scale == 2 else model_of(family)
    x = FAMILIES[family].inputs(batch, scale * height, scale * width)
    y = moved(x)
    assert max(errors(model, f"{plan}.w1", [x, y, y, y])) <= EXACT


@pytest.mark.parametrize("plan", ["pipe3.m4.w0", "cfg2.pipe2.m3.w0", "pipe2.ulysses2.m2.w0"])
def test_all_ranks_have_the_same_bits(plan: str) -> None:
    x = inputs_of("FLUX.1 dev")
    first, *others = predictions(model_of("FLUX.1 dev"), plan, [x, moved(x)])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize("family", ["SD3", "FLUX.1 dev", "PixArt-Sigma", "Wan 2.1"])
def test_a_moved_input_is_near_and_comes_nearer(family: str) -> None:
    x = inputs_of(family)
    y = moved(x, 0.05)
    _, first, second, third = errors(model_of(family), "pipe2.m3.w0", [x, y, y, y])
    alone = errors(model_of(family), "patch3.naive.w1", [x, y])[1]
    assert EXACT < first < alone / 3
    assert third < second < first


def test_half_the_precision_stays_near() -> None:
    model = sd35().to(torch.bfloat16)
    x = {name: value.to(torch.bfloat16) for name, value in sd3_inputs(2, 14, 10).items()}
    assert max(errors(model, "pipe2.m3.w0", [x, x, x])) <= 2e-2


def test_a_request_knows_nothing_of_the_one_before() -> None:
    x, y = inputs_of("SD3"), moved(inputs_of("SD3"), 1.0)

    def work(model: Any, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        run_request(model, denoiser, [y, y, y], "before")
        assert denoiser.pool.num_bytes == 0
        return run_request(model, denoiser, [x, moved(x)], "after")

    after = on_ranks(model_of("SD3"), "pipe2.m3.w0", work)
    fresh = predictions(model_of("SD3"), "pipe2.m3.w0", [x, moved(x)])
    for own, other in zip(after, fresh, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


# Arguments


@pytest.mark.parametrize("name", ["controlnet_block_samples", "controlnet_single_block_samples"])
def test_residuals_of_a_controlnet_are_added_once(name: str) -> None:
    residuals = [torch.randn(2, 35, 24, generator=torch.Generator().manual_seed(8)) for _ in range(2)]
    x = {**inputs_of("FLUX.1 dev"), name: residuals}
    for plan in ("pipe2.sync", "pipe4.m3.w0"):
        assert max(errors(model_of("FLUX.1 dev"), plan, [x, x])) <= EXACT


@pytest.mark.parametrize("skipped", [0, 1])
def test_blocks_are_left_out_at_the_borders_of_stages_too(skipped: int) -> None:
    x = {**inputs_of("SD3"), "skip_layers": [skipped]}
    assert max(errors(model_of("SD3"), "pipe3.m2.w0", [x, x])) <= EXACT


def test_a_last_stage_that_is_left_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="left out of a call"):
        errors(model_of("SD3"), "pipe3.sync", [{**inputs_of("SD3"), "skip_layers": [2]}])


# Weights


def test_a_rank_works_with_the_weights_of_its_stage_alone() -> None:
    model, x = flux(), flux_inputs(1, 7, 5)
    with torch.no_grad():
        reference = model(**x).sample

    def body(transport: Any) -> tuple[float, int]:
        own = copy.deepcopy(model)
        denoiser = ParallelDenoiser(own, Plan.parse("pipe3.m4.w0"), transport)
        denoiser.attach()
        with torch.no_grad():
            for parameter in (p for block in denoiser.aside for p in block.parameters()):
                parameter.fill_(torch.nan)
            outputs = run_request(own, denoiser, [x, x, x])
        return max(relative_error(output, reference) for output in outputs), denoiser.weight_bytes

    results = VirtualWorld(3).run(body)
    assert max(error for error, _ in results) <= EXACT
    in_blocks = sum(p.nbytes for block in blocks.blocks_of(model) for p in block.module.parameters())
    whole = sum(p.nbytes for p in model.parameters())
    assert sum(num_bytes for _, num_bytes in results) == in_blocks + 3 * (whole - in_blocks)


def test_stages_cost_alike() -> None:
    assert [(part.start, part.stop) for part in balance([1, 1, 1, 1], 2)] == [(0, 2), (2, 4)]
    assert [(part.start, part.stop) for part in balance([5, 1, 1, 1, 1, 1], 2)] == [(0, 1), (1, 6)]
    assert [(part.start, part.stop) for part in balance([1, 1, 9], 3)] == [(0, 1), (1, 2), (2, 3)]


def test_double_and_single_blocks_of_flux_do_as_much_for_a_token() -> None:
    """Those of two streams have twice the weights, of which each token meets half."""
    model = flux(num_layers=1, num_single_layers=1, num_attention_heads=12)
    attentions = anatomy_of(model).sites(model)
    double, single = (blocks.operations(block, attentions, 4096) for block in blocks.blocks_of(model))
    assert double == pytest.approx(single, rel=0.01)
    assert double > 2 * 4096 * 96


def test_detaching_restores_the_model() -> None:
    model = sd3()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    denoiser = ParallelDenoiser(model, Plan.parse("pipe2.m4"), VirtualTransport(VirtualWorld(2), 0))
    denoiser.attach()
    denoiser.detach()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


# What is refused


def attached(model: Any, plan: str) -> None:
    ParallelDenoiser(model, Plan.parse(plan), VirtualTransport(VirtualWorld(Plan.parse(plan).num_ranks), 0)).attach()


@pytest.mark.parametrize(
    ("make", "plan", "says"),
    [
        (lambda: model_of("Hunyuan-DiT"), "cfg2.pipe2.m4", "skip connections .* use 'cfg2.ulysses2'"),
        (lambda: model_of("FLUX.1 dev"), "pipe5.m8", "has 4 blocks.* use 'pipe4.m8.w4'"),
        (sdxl_unet, "pipe2.m4", "convolutions too; use 'patch2'"),
    ],
)
def test_models_that_cannot_flow_are_refused_with_a_plan_that_can(make: Any, plan: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        attached(make(), plan)


def test_blocks_that_are_not_known_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: kind for name, kind in blocks.KINDS.items() if name != "JointTransformerBlock"}
    monkeypatch.setattr(blocks, "KINDS", known)
    with pytest.raises(UnsupportedModel, match=r"transformer_blocks\.0.*JointTransformerBlock"):
        attached(sd3(), "pipe2")


@pytest.mark.parametrize("family", ["SD3", "SD3.5 medium", "FLUX.1 dev", "PixArt-Sigma", "CogVideoX 5B", "Qwen-Image"])
def test_the_first_call_of_pieces_is_as_near_as_later_ones(family: str) -> None:
    """Keys of the whole are put in the order of the pieces; all keys old would be farther off."""
    x = inputs_of(family)
    y = moved(x)
    model = model_of(family)
    first, later = errors(model, "pipe2.m3.w0", [x, y])[1], errors(model, "pipe2.m3.w0", [x, x, y])[2]
    assert first == pytest.approx(later, rel=1e-2)
