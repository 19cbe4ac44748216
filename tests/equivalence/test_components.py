"""Components in depth: exact where a plan says so, in the warm-up, and where an input is given again."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks, predictions

from distrifusion import Plan, PlanError
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from models import moved, relative_error, run_request, sdxl_unet, unet_inputs, with_residuals
from transformers_tiny import FAMILIES, sd3

UNET_PLANS = [
    pytest.param("async2", 1, 25, 17, marks=pytest.mark.supports("plan", "async<N>")),
    ("async3", 2, 24, 16),
    ("async4", 1, 9, 7),
    ("cfg2.async2", 2, 25, 17),
    ("dp2.async2", 3, 17, 9),
    ("cfg2.async2", 1, 9, 7),  # one picture without guidance: two teams do the same
    pytest.param("async2.stride2", 1, 25, 17, marks=pytest.mark.supports("plan", "async<N>.stride2")),
    ("async3.stride2", 1, 17, 9),
]
DIT_PLANS = ["async2", "cfg2.async3", "async2.stride2"]


def exact(plan: str) -> str:
    """The plan in which nothing is late."""
    return f"{plan.removesuffix('.stride2')}.sync"


def settled(plan: str) -> int:
    """Calls with an input given again until what it gave has gone through every component."""
    return Plan.parse(plan).components * Plan.parse(plan).stride


@cache
def model_of(family: str) -> Any:
    return FAMILIES[family].make()


def inputs_of(family: str, batch: int = 2) -> dict[str, Any]:
    return FAMILIES[family].inputs(batch, *FAMILIES[family].size)


@pytest.mark.parametrize(("plan", "batch", "height", "width"), UNET_PLANS)
def test_a_unet_in_components_has_its_zeros(
    sdxl: UNet2DConditionModel, plan: str, batch: int, height: int, width: int
) -> None:
    check_zeros(sdxl, plan, unet_inputs(sdxl, batch, height, width))


def test_every_unet_in_components_has_its_zeros(unet: UNet2DConditionModel) -> None:
    check_zeros(unet, "async3", unet_inputs(unet, 1, 17, 9))


@pytest.mark.parametrize("plan", DIT_PLANS)
@pytest.mark.parametrize("family", ["SD3.5 medium", "FLUX.1 dev", "PixArt-Sigma", "Hunyuan-DiT"])
def test_a_transformer_in_components_has_its_zeros(family: str, plan: str) -> None:
    check_zeros(model_of(family), plan, inputs_of(family))


def check_zeros(model: Any, plan: str, x: dict[str, Any]) -> None:
    """Nothing late; the warm-up; and an input that is given again, once it has gone through every component."""
    y = moved(x)
    assert max(errors(model, exact(plan), [x, y])) <= EXACT
    by_call = errors(model, f"{plan}.w1", [x, y, moved(x, seed=1)] + settled(plan) * [y])
    assert max(by_call[:2]) <= EXACT
    assert 1e-4 < by_call[2] < 0.5
    assert by_call[-1] <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_handed_over_exactly_and_settles(family: str) -> None:
    x = inputs_of(family, batch=1)
    y = moved(x)
    assert max(errors(model_of(family), "async3.sync", [x, y])) <= EXACT
    assert errors(model_of(family), "async2.forecast.w0", [x, y, y, y])[-1] <= EXACT


@pytest.mark.parametrize("plan", ["async2", "async3", "cfg2.async2"])
def test_all_ranks_have_the_same_bits_and_so_have_two_runs(sdxl: UNet2DConditionModel, plan: str) -> None:
    x = unet_inputs(sdxl, 2, 24, 20)
    steps = [moved(x, seed=seed) for seed in range(4)]
    first, second = (predictions(sdxl, f"{plan}.forecast.w0", steps) for _ in range(2))
    for outputs in (*first, *second):
        assert all(torch.equal(a, b) for a, b in zip(outputs, first[0], strict=True))


def test_the_first_late_call_is_the_one_after_the_warm_up(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)
    for warmup in (0, 1, 3):
        by_call = errors(sdxl, f"async2.w{warmup}", [moved(x, seed=seed) for seed in range(warmup + 3)])
        assert max(by_call[: warmup + 1]) <= EXACT
        assert min(by_call[warmup + 1 :]) > 1e-3


def test_the_error_shrinks_with_the_movement(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    by_movement = [errors(sdxl, "async2.w0", [x, moved(x, amount)])[1] for amount in (0.3, 0.03, 0.003)]
    assert by_movement[0] > 3 * by_movement[1] > 9 * by_movement[2] > 0


@pytest.mark.supports("plan", "async<N>.forecast")
@pytest.mark.parametrize("stride", ["", ".stride2"])
def test_a_forecast_follows_an_input_that_moves_evenly_in_uneven_steps_of_time(stride: str) -> None:
    model = sdxl_unet()
    # The same for every timestep, so that the input alone moves.
    model.get_time_embed = lambda sample, timestep: torch.zeros(1, 16)
    start, end = (unet_inputs(model, 1, 17, 9, seed=seed) for seed in (3, 4))
    way = end["sample"] - start["sample"]
    times = [900, 860, 800, 750, 710, 650, 600, 540, 500]
    steps = [{**start, "sample": start["sample"] + way * (900 - t) / 5000, "timestep": torch.tensor(t)} for t in times]
    plain, carried = (errors(model, f"async2{stride}{word}.w1", steps) for word in ("", ".forecast100"))
    assert max(carried[-3:]) < max(plain[-3:]) / 2


def test_the_first_call_of_another_kind_within_a_run_is_exact_and_the_run_goes_on(sdxl: UNet2DConditionModel) -> None:
    """The residuals of a ControlNet may begin and end within a run: more is read, and the values kept are the same."""
    x = unet_inputs(sdxl, 1, 17, 9)
    controlled = with_residuals(x)
    for plan in ("async2.w0", "async2.stride2.w0"):
        by_call = errors(sdxl, plan, [x, x, controlled, controlled, controlled, x, x])
        assert max(by_call[:3]) <= EXACT < by_call[5]
        assert errors(sdxl, plan, [x, x, controlled, controlled, controlled, controlled])[-1] <= EXACT


def test_freeu_and_skipped_blocks_are_what_they_are_on_one_device(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)
    sdxl.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    try:
        assert max(errors(sdxl, "async3.w0", [x, x, x, x])) <= EXACT
    finally:
        sdxl.disable_freeu()
    x, model = inputs_of("SD3"), model_of("SD3")
    skipping = {**x, "skip_layers": [1]}
    with torch.no_grad():
        assert relative_error(model(**skipping).sample, model(**x).sample) > 1e-2
    assert max(errors(model, "async2.sync", [x, skipping, x, skipping])) <= EXACT


def test_a_rank_runs_the_layers_of_its_component_alone(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[set[str]]:
        ran: list[set[str]] = []
        for name, module in model.named_modules():
            # A layer of the chain is called and does not run; what lies in it tells.
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and "emb" not in name and "." in name:
                module.register_forward_pre_hook(lambda *_, name=name: ran[-1].add(name))
        denoiser.open("request")
        for _ in range(3):
            ran.append(set())
            denoiser.slot = 0
            model(**x)
        denoiser.close()
        return ran

    for plan in ("async3.sync", "async3.w0"):
        by_rank = on_ranks(sdxl, plan, work)
        everything = {name for ran in by_rank for name in ran[0]}
        assert everything > by_rank[0][0]
        for call in (0, 1, 2):
            first, second, last = (ran[call] for ran in by_rank)
            assert first | second | last == everything
            assert first.isdisjoint(second) and second.isdisjoint(last)
            assert len(first & last) < len(everything) / 4
    even, odd = ([len(ran[call]) for ran in on_ranks(sdxl, "async2.stride2.w0", work)] for call in (1, 2))
    assert min(even) > 0 and odd == [0, even[1]]


def test_more_components_than_layers_are_refused_with_the_most_there_can_be() -> None:
    denoiser = ParallelDenoiser(sd3(), Plan.parse("async5"), VirtualTransport(VirtualWorld(5), 0))
    with pytest.raises(PlanError, match="a chain of 4 layers cannot be cut into 5 components; use 'async4'"):
        denoiser.attach()
    assert max(errors(sd3(), "async4.sync", 2 * [inputs_of("SD3")])) <= EXACT


# What is kept


def test_a_second_request_has_the_bits_of_a_fresh_one(sdxl: UNet2DConditionModel) -> None:
    first = [unet_inputs(sdxl, 1, 25, 17, seed=seed) for seed in (1, 2, 3)]
    second = [unet_inputs(sdxl, 1, 25, 17, seed=seed) for seed in (4, 5, 6)]

    def after_another(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        run_request(model, denoiser, first, request=1)
        return run_request(model, denoiser, second, request=2)

    used = on_ranks(sdxl, "async2.forecast.w0", after_another)
    fresh = predictions(sdxl, "async2.forecast.w0", second)
    for a, b in zip(used, fresh, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_requests_that_take_turns_and_two_calls_of_a_step_do_not_meet(sdxl: UNet2DConditionModel) -> None:
    """Each repeats its own input, so each stays exact if what is kept is its own."""
    inputs = {key: unet_inputs(sdxl, 1, 17, 9, seed=seed) for seed, key in enumerate(("a0", "a1", "b0", "b1"))}

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[tuple[str, torch.Tensor]]:
        outputs = []
        for request in "abab":
            denoiser.open(request)
            outputs += [(f"{request}{slot}", model(**inputs[f"{request}{slot}"]).sample) for slot in range(2)]
        held = denoiser.pool.num_bytes
        for request in "ab":
            denoiser.open(request)
            denoiser.close()
        assert held > 0 == denoiser.pool.num_bytes + denoiser.pool.num_requests
        return outputs

    with torch.no_grad():
        references = {key: sdxl(**x).sample for key, x in inputs.items()}
    for outputs in on_ranks(sdxl, "async3.w0", work):
        assert max(relative_error(output, references[key]) for key, output in outputs) <= EXACT


def test_calls_outside_a_request_keep_nothing_and_are_exact(sdxl: UNet2DConditionModel) -> None:
    steps = [unet_inputs(sdxl, 1, 17, 9, seed=seed) for seed in (1, 2, 3)]

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> tuple[list[torch.Tensor], int]:
        return [model(**inputs).sample for inputs in steps], denoiser.pool.num_bytes

    with torch.no_grad():
        references = [sdxl(**inputs).sample for inputs in steps]
    for outputs, held in on_ranks(sdxl, "async2.w0", work):
        assert held == 0
        assert max(map(relative_error, outputs, references)) <= EXACT


def test_detaching_leaves_nothing_behind(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> tuple[bool, torch.Tensor]:
        run_request(model, denoiser, [x, moved(x)])
        denoiser.detach()
        return any("forward" in vars(module) for module in model.modules()), model(**x).sample

    with torch.no_grad():
        reference = sdxl(**x).sample
    for left, output in on_ranks(sdxl, "async2.w0", work):
        assert not left and torch.equal(output, reference)
