"""Diffusion transformers on any number of ranks: exact where the plan is, and where a displaced plan has its zeros."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from division import EXACT, errors, on_ranks, predictions

from distrifusion.denoiser import ParallelDenoiser
from models import moved, relative_error
from transformers_tiny import FAMILIES, flux, flux_inputs, qwen, qwen_inputs, sd3, sd3_inputs, sd35

pytestmark = pytest.mark.usefixtures("unchecked")  # see test_token_memory.py

EXACT_PLANS = ["patch3", "cfg2.patch2", "ulysses2", "ring3", "ulysses2.ring2", "cfg2.ring2"]


@cache
def model_of(family: str) -> Any:
    return FAMILIES[family].make()


def inputs_of(family: str, batch: int = 2) -> dict[str, Any]:
    return FAMILIES[family].inputs(batch, *FAMILIES[family].size)


def each_family() -> Any:
    """A test for every family, which proves its line of the support matrix."""
    return pytest.mark.parametrize(
        "family", [pytest.param(name, marks=pytest.mark.supports("transformer", name)) for name in FAMILIES]
    )


@pytest.mark.parametrize("plan", EXACT_PLANS)
@each_family()
def test_every_family_equals_one_device(family: str, plan: str) -> None:
    assert max(errors(model_of(family), plan, [inputs_of(family)])) <= EXACT


@pytest.mark.supports("plan", "ulysses<N>")
@pytest.mark.supports("plan", "ring<N>")
@pytest.mark.supports("plan", "ulysses<N>.ring<N>")
@pytest.mark.parametrize(
    ("plan", "batch", "height", "width"),
    [
        ("patch1", 2, 7, 3),
        ("patch4", 1, 5, 5),
        ("patch5", 3, 3, 7),
        ("ulysses3", 1, 5, 7),
        ("ulysses5", 1, 5, 5),  # three heads on five ranks
        ("ring2", 3, 3, 3),
        ("ring5", 1, 7, 5),
        ("ulysses2.ring3", 1, 5, 5),
        ("ulysses4.ring2", 1, 3, 5),
        ("cfg2.ulysses2", 3, 5, 5),
        ("dp2.cfg2.ulysses2", 4, 5, 3),
        ("dp2.ring2", 2, 5, 3),
        ("dp2.patch2", 1, 5, 3),  # one picture: all four ranks take tokens
        ("cfg2.ulysses2.ring2", 2, 5, 3),
        ("cfg2.ulysses2", 1, 5, 5),  # one picture without branches: all four ranks take heads
        ("cfg2.ring2", 1, 5, 5),
        ("cfg2.ulysses2.ring2", 1, 5, 5),
        ("patch8", 1, 3, 3),  # seven words on eight ranks
        ("patch4", 1, 1, 3),  # three tokens on four ranks
        ("ulysses4", 1, 1, 3),
        ("ring4", 1, 1, 3),
        ("ulysses2.ring2", 1, 1, 1),
    ],
)
@pytest.mark.parametrize("family", ["SD3.5 medium", "FLUX.1 dev", "Qwen-Image"])
def test_any_plan_and_size_equals_one_device(family: str, plan: str, batch: int, height: int, width: int) -> None:
    scale = 2 if family == "SD3.5 medium" else 1
    inputs = FAMILIES[family].inputs(batch, scale * height, scale * width)
    assert max(errors(model_of(family), plan, [inputs])) <= EXACT


@pytest.mark.parametrize("plan", EXACT_PLANS)
def test_all_ranks_have_the_same_bits(plan: str) -> None:
    first, *others = predictions(model_of("SD3"), plan, [inputs_of("SD3")])
    assert all(torch.equal(other[0], first[0]) for other in others)


@pytest.mark.parametrize("plan", ["patch3", "cfg2.ulysses2"])
def test_a_call_by_position_that_wants_a_tuple_gets_one(plan: str) -> None:
    model, inputs = model_of("SD3"), inputs_of("SD3")
    with torch.no_grad():
        (reference,) = model(*inputs.values(), return_dict=False)
    by_rank = on_ranks(model, plan, lambda model, _: model(*inputs.values(), return_dict=False))
    assert all(isinstance(output, tuple) and len(output) == 1 for output in by_rank)
    assert max(relative_error(output[0], reference) for output in by_rank) <= EXACT


@pytest.mark.parametrize("plan", ["patch3", "ulysses2.ring2", "cfg2.ring2"])
def test_half_the_precision_stays_near(plan: str) -> None:
    model = sd35().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in sd3_inputs(2, 14, 10).items()}
    assert max(errors(model, plan, [inputs])) <= 2e-2


# Arguments


@pytest.mark.parametrize("plan", ["patch3", "cfg2.ulysses2", "ring2"])
def test_residuals_of_a_controlnet_are_cut_like_the_picture(plan: str) -> None:
    generator = torch.Generator().manual_seed(8)
    for family, name, tokens in (
        ("SD3", "block_controlnet_hidden_states", 35),
        ("FLUX.1 dev", "controlnet_block_samples", 35),
        ("FLUX.1 dev", "controlnet_single_block_samples", 35),
    ):
        residuals = [torch.randn(2, tokens, 24, generator=generator) for _ in range(2)]
        plain, controlled = inputs_of(family), {**inputs_of(family), name: residuals}
        with torch.no_grad():
            assert relative_error(model_of(family)(**controlled).sample, model_of(family)(**plain).sample) > 0.1
        assert max(errors(model_of(family), plan, [controlled])) <= EXACT


@pytest.mark.parametrize("plan", ["patch2", "ulysses2", "ring3"])
def test_blocks_that_are_skipped_exchange_nothing(plan: str) -> None:
    assert max(errors(model_of("SD3"), plan, [{**inputs_of("SD3"), "skip_layers": [1]}])) <= EXACT


@pytest.mark.parametrize("plan", ["patch4", "ulysses2", "ring4", "ulysses2.ring2", "cfg2.patch2"])
def test_words_that_are_masked_stay_so_on_every_rank(plan: str) -> None:
    """With four ranks all words of the last one are masked."""
    model, inputs = qwen(), qwen_inputs(2, 3, 3)
    inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        unmasked = model(**{**inputs, "encoder_hidden_states_mask": None}).sample
        assert relative_error(model(**inputs).sample, unmasked) > 1e-2
    assert max(errors(model, plan, [inputs])) <= EXACT


def test_fused_projections_equal_one_device() -> None:
    model = sd3()
    model.fuse_qkv_projections()
    assert max(errors(model, "patch2", [sd3_inputs(2, 14, 10)])) <= EXACT


# Displaced plans


@pytest.mark.parametrize("plan", ["patch3.displaced.w1", "cfg2.patch2.displaced.all.w1"])
@each_family()
def test_an_input_given_again_is_exact(family: str, plan: str) -> None:
    x = inputs_of(family)
    y = moved(x)
    assert max(errors(model_of(family), plan, [x, y, y])) <= EXACT


@pytest.mark.parametrize("family", ["SD3", "FLUX.1 dev", "PixArt-Sigma", "Hunyuan-DiT", "Wan 2.1"])
def test_a_moved_input_is_worse_than_synchronous_and_far_better_than_no_exchange(family: str) -> None:
    x = inputs_of(family)
    y = moved(x, 0.05)
    synchronous = errors(model_of(family), "patch3", [x, y])[1]
    displaced = errors(model_of(family), "patch3.displaced.w0", [x, y])[1]
    alone = errors(model_of(family), "patch3.naive.w1", [x, y])[1]
    assert synchronous <= EXACT < displaced < alone / 3


@pytest.mark.parametrize("family", ["SD3.5 medium", "FLUX.1 schnell"])
@pytest.mark.parametrize(
    "plan",
    ["patch3.delta32", "patch3.displaced.resync0", "cfg2.patch2.delta32", "patch3.displaced.w9", "patch2.naive.w9"],
)
def test_the_zeros_of_the_knobs_are_exact(family: str, plan: str) -> None:
    x = inputs_of(family)
    assert max(errors(model_of(family), plan, [x, moved(x), moved(x, seed=1)])) <= EXACT


@pytest.mark.parametrize("family", ["SD3", "FLUX.1 dev"])
def test_a_forecast_of_nothing_and_codes_in_full_are_the_plain_stale_values(family: str) -> None:
    x = inputs_of(family)
    steps = [{**moved(x, 0.1 * i), "timestep": x["timestep"] * (1 - 2e-5 * i)} for i in range(4)]
    plain = predictions(model_of(family), "patch3.displaced.w0", steps)[0]
    for words in ("displaced.forecast0", "displaced.delta32"):
        zero = predictions(model_of(family), f"patch3.{words}.w0", steps)[0]
        assert max(relative_error(a, b) for a, b in zip(zero, plain, strict=True)) <= EXACT


@pytest.mark.parametrize("family", ["SD3", "FLUX.1 dev"])
def test_a_forecast_is_nearer_where_values_move_on_a_line(family: str) -> None:
    x = inputs_of(family)
    y = moved(x, 0.3)["hidden_states"]
    steps = [
        {**x, "hidden_states": torch.lerp(x["hidden_states"], y, i / 5), "timestep": x["timestep"] * (1 - 2e-5 * i)}
        for i in range(6)
    ]
    plain, carried = (
        errors(model_of(family), f"patch3.displaced.{word}.w1", steps)[-1] for word in ("forecast0", "forecast100")
    )
    assert carried < plain / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_coded_differences_are_near_and_more_bits_nearer(bits: int) -> None:
    x = inputs_of("FLUX.1 dev")
    steps = [x, moved(x)]
    first, second = errors(model_of("FLUX.1 dev"), f"patch3.delta{bits}", steps)
    coarser = errors(model_of("FLUX.1 dev"), f"patch3.delta{bits // 2}", steps)[1]
    assert first <= EXACT < second < coarser


def test_a_text_of_another_length_within_a_run_starts_afresh() -> None:
    x = flux_inputs(1, 7, 5)
    longer = {
        **x,
        "encoder_hidden_states": torch.cat([x["encoder_hidden_states"]] * 2, 1),
        "txt_ids": torch.zeros(14, 3),
    }
    assert max(errors(flux(), "patch3.displaced.w0", [x, longer])) <= EXACT


@pytest.mark.parametrize(("keeps_apart", "bound"), [(True, EXACT), (False, None)], ids=["apart", "mixed"])
def test_two_calls_of_one_step_keep_values_of_their_own(keeps_apart: bool, bound: float | None) -> None:
    """True guidance calls the transformer twice per step: with a prompt, and with what not to draw."""
    wanted, unwanted = flux_inputs(1, 7, 5), moved(flux_inputs(1, 7, 5), 0.5)
    with torch.no_grad():
        references = [flux()(**inputs).sample for inputs in (wanted, unwanted)]

    def work(model: Any, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        denoiser.open("request")
        for _ in range(3):
            denoiser.slot = 0
            outputs = [model(**wanted).sample]
            denoiser.slot = denoiser.slot if keeps_apart else 0
            outputs.append(model(**unwanted).sample)
        denoiser.close()
        return outputs

    by_rank = on_ranks(flux(), "patch2.displaced.w0", work)
    error = max(relative_error(a, b) for outputs in by_rank for a, b in zip(outputs, references, strict=True))
    assert error <= bound if bound else error > 1e-3


def test_residuals_that_end_within_a_run_leave_the_kept_values() -> None:
    """A ControlNet may be asked for some steps only; the values of the step before are used again, not begun anew."""
    x = inputs_of("SD3")
    generator = torch.Generator().manual_seed(8)
    controlled = {**x, "block_controlnet_hidden_states": [1e-6 * torch.randn(2, 35, 24, generator=generator)]}
    by_step = errors(model_of("SD3"), "patch3.displaced.w0", [controlled, moved(x)])
    assert by_step[0] <= EXACT < by_step[1]
