"""The variants that DistriFusion is compared with: each is what it is said to be, and exact where it must be."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors, on_ranks, predictions

from distrifusion import Plan, PlanError
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.handles import Shared
from models import band_by_band, moved, relative_error, run_request, unet_inputs

VARIANTS = (
    "naive",
    "columns.naive",
    "alternating.naive",
    "frozen.all",
    "frozen",
    "displaced.all.stalenorm",
    "displaced.all.separatenorm",
    "frozen.norm.separatenorm",
)
FAR = 1e-3


def steps_of(unet: UNet2DConditionModel, num_steps: int = 4) -> list[dict[str, object]]:
    steps = [unet_inputs(unet, 2, 26, 24)]
    while len(steps) < num_steps:
        steps.append(moved(steps[-1], seed=len(steps)))
    return steps


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.supports("plan", f"patch<N>.{v}")) for v in VARIANTS]
)
def test_a_warm_up_that_covers_the_run_is_exact(sdxl: UNet2DConditionModel, variant: str) -> None:
    assert max(errors(sdxl, f"patch3.{variant}.w4", steps_of(sdxl))) <= EXACT


@pytest.mark.parametrize("variant", VARIANTS)
def test_after_the_warm_up_the_result_is_another(sdxl: UNet2DConditionModel, variant: str) -> None:
    first, second, third, fourth = errors(sdxl, f"patch3.{variant}.w1", steps_of(sdxl))
    assert first <= EXACT
    assert min(third, fourth) > FAR
    assert (second <= EXACT) is ("naive" not in variant), "naive bands need no first call"


@pytest.mark.parametrize("variant", ["frozen.all", "displaced.all.stalenorm", "frozen.all.stalenorm"])
def test_the_same_input_again_is_exact(sdxl: UNet2DConditionModel, variant: str) -> None:
    assert max(errors(sdxl, f"cfg2.patch2.{variant}.w0", 3 * steps_of(sdxl, 1))) <= EXACT


@pytest.mark.parametrize("split", ["rows", "columns", "alternating"])
def test_naive_bands_are_pictures_of_their_own(sdxl: UNet2DConditionModel, split: str) -> None:
    steps = steps_of(sdxl, 3)
    cuts = {"rows": 3 * ["rows"], "columns": 3 * ["columns"], "alternating": ["rows", "columns", "rows"]}[split]
    with torch.no_grad():
        references = [band_by_band(sdxl, x, Plan.parse(f"patch3.{cut}")) for x, cut in zip(steps, cuts, strict=True)]
    for outputs in predictions(sdxl, f"patch3.{split}.naive", steps):
        assert max(map(relative_error, outputs, references)) <= EXACT


def sent(unet: UNet2DConditionModel, plan: str) -> list[Counter[str]]:
    """Bytes by kind of the last of three calls, by rank."""
    steps = steps_of(unet, 3)

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> Counter[str]:
        denoiser.open("request")
        for inputs in steps:
            denoiser.slot = 0
            denoiser.exchange.bytes_sent.clear()
            model(**inputs)
        denoiser.close()
        return denoiser.exchange.bytes_sent

    return on_ranks(unet, plan, work)


@pytest.mark.parametrize("variant", ["naive", "frozen.all.w0"])
def test_naive_and_frozen_bands_send_the_prediction_only(sdxl: UNet2DConditionModel, variant: str) -> None:
    for counts in sent(sdxl, f"patch3.{variant}"):
        assert set(counts) == {"exit"} and counts["exit"] > 0


def test_separate_norms_send_no_statistics(sdxl: UNet2DConditionModel) -> None:
    for published, separate in zip(
        sent(sdxl, "patch3.displaced.all.w0"), sent(sdxl, "patch3.displaced.all.separatenorm.w0"), strict=True
    ):
        assert published["norm"] > 0 and "norm" not in separate
        assert separate["kv"] == published["kv"] and separate["halo"] == published["halo"]


def test_frozen_values_are_those_of_the_last_synchronous_call(sdxl: UNet2DConditionModel) -> None:
    """What the others hold then does not matter any more: their inputs may be anything."""
    first, second, third = steps_of(sdxl, 3)

    def other(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> list[torch.Tensor]:
        rank = denoiser.exchange.transport.rank
        last = third if rank == 0 else {**third, "sample": 5 * third["sample"]}
        return run_request(model, denoiser, [first, second if rank == 0 else last, last])

    rows = slice(0, 9)  # of rank 0: 26 rows in units of 4 are cut 12 + 8 + 6
    plain = predictions(sdxl, "patch3.frozen.all.w0", [first, second, third])[0]
    changed = on_ranks(sdxl, "patch3.frozen.all.w0", other)[0]
    assert relative_error(changed[2][:, :, rows], plain[2][:, :, rows]) <= EXACT
    renewed = on_ranks(sdxl, "patch3.displaced.all.w0", other)[0]
    assert relative_error(renewed[2][:, :, rows], plain[2][:, :, rows]) > FAR


def test_separate_norms_are_those_of_the_own_band(sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(sdxl, 2)
    separate = predictions(sdxl, "patch2.displaced.norm.separatenorm.w0", steps)

    def wait(self: Shared) -> tuple[list[torch.Tensor], None]:
        self.swap.wait()
        return [self.own] * len(self.team), None

    monkeypatch.setattr(Shared, "wait", wait)
    local = predictions(sdxl, "patch2", steps[1:])
    for rank in range(2):
        assert relative_error(separate[rank][1], local[rank][0]) <= EXACT


def test_stale_norms_are_not_the_corrected_ones(sdxl: UNet2DConditionModel) -> None:
    steps = steps_of(sdxl, 2)
    corrected = predictions(sdxl, "patch2.displaced.norm.w0", steps)[0][1]
    stale = predictions(sdxl, "patch2.displaced.norm.stalenorm.w0", steps)[0][1]
    assert relative_error(stale, corrected) > 1e-4


def test_residuals_that_naive_bands_cannot_share_are_an_error(sdxl: UNet2DConditionModel) -> None:
    inputs = unet_inputs(sdxl, 1, 9, 16)
    residuals = [torch.ones(1, 32, 3, 4)]

    def work(model: UNet2DConditionModel, denoiser: ParallelDenoiser) -> None:
        with pytest.raises(PlanError, match="this small"):
            run_request(model, denoiser, [{**inputs, "mid_block_additional_residual": residuals[0]}])

    on_ranks(sdxl, "patch4.naive", work)
