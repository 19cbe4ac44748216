"""What a plan keeps between calls: predicted from shapes, measured in the pool, and refused where it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import on_ranks
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.errors import PoolTooLarge
from distrifusion.exchange.virtual import VirtualWorld
from distrifusion.memory import check
from distrifusion.memory.prediction import pool_bytes
from distrifusion.plan import DEFAULT_STALE, SiteKind, Split
from models import UNETS, moved, sdxl_unet, share_weights, to_dtype, unet_inputs
from pipelines.families import PIPELINES

ALL = frozenset(SiteKind)
sides = st.integers(1, 30)
KNOBS: tuple[dict[str, int], ...] = (
    {},
    {"forecast": 50},
    {"delta": 2},
    {"resync": 20},
    {"delta": 4, "forecast": 100, "resync": 50},
)


def storage_bytes(root: object) -> int:
    """Bytes of the memory behind all tensors that can be reached from an object of ours; views count nothing."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    reached = [root]
    while reached:
        thing = reached.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            reached += thing.values()
        elif isinstance(thing, list | tuple):
            reached += thing
        elif type(thing).__module__.startswith("distrifusion."):
            reached += vars(thing).values()
    return sum(storages.values())


def held(model: Any, plan: str, inputs: dict[str, Any]) -> list[int]:
    """Bytes in every rank's pool after some calls of one request, which are also what it says that it holds."""

    def work(model: Any, denoiser: ParallelDenoiser) -> int:
        denoiser.open("request")
        for _ in range(3):  # where the first is watched for drift, the second is synchronous too
            denoiser.slot = 0
            model(**inputs)
        for state in denoiser.pool._states.get("request", {}).values():
            for posted in state.posted():
                posted.settle()
            state.times = ()
        found = denoiser.pool.num_bytes
        assert storage_bytes(denoiser.pool) == found
        denoiser.close()
        assert storage_bytes(denoiser.pool) == 0
        return found

    return on_ranks(model, plan, work)


def predicted(model: Any, plan: str, inputs: dict[str, Any]) -> list[int]:
    """The same from the shapes."""
    sample, parsed = inputs["sample"], Plan.parse(plan)
    return [pool_bytes(model, parsed, rank, sample.shape, sample.dtype).total() for rank in range(parsed.num_ranks)]


@settings(max_examples=8)
@given(
    family=st.sampled_from(sorted(UNETS)),
    cfg=st.sampled_from((1, 2)),
    patch=st.integers(2, 5),
    split=st.sampled_from((Split.ROWS, Split.COLUMNS)),
    stale=st.frozensets(st.sampled_from(SiteKind), min_size=1),
    knobs=st.sampled_from(KNOBS),
    batch=st.integers(1, 3),
    height=sides,
    width=sides,
)
@example(family="sdxl_unet", cfg=1, patch=3, split=Split.ROWS, stale=ALL, knobs={}, batch=2, height=25, width=17)
@example(family="sd_unet", cfg=1, patch=5, split=Split.ROWS, stale=ALL, knobs={}, batch=1, height=7, width=7)
@example(family="sd_unet", cfg=2, patch=2, split=Split.COLUMNS, stale=ALL, knobs={}, batch=2, height=9, width=30)
def test_what_is_predicted_is_what_is_held(
    unets: dict[str, UNet2DConditionModel],
    family: str,
    cfg: int,
    patch: int,
    split: Split,
    stale: frozenset[SiteKind],
    knobs: dict[str, int],
    batch: int,
    height: int,
    width: int,
) -> None:
    kinds = stale | DEFAULT_STALE if {"forecast", "resync"} & knobs.keys() else stale
    plan = str(Plan(cfg=cfg, patch=patch, split=split, stale=kinds, warmup=0, **knobs))
    inputs = unet_inputs(unets[family], batch, height, width)
    assert held(unets[family], plan, inputs) == predicted(unets[family], plan, inputs)


@pytest.mark.parametrize("layout", ["patch2", "cfg2.patch2", "patch3.columns"])
@pytest.mark.parametrize(
    "policy",
    [
        "displaced.w0",
        "displaced.all.w0",
        "displaced.forecast.w0",
        "displaced.fresh1.w0",
        "displaced.delta4.w0",
        "displaced.delta1.forecast.fresh2.resync30.w0",
        "delta8",
        "delta1",
    ],
)
def test_every_policy_holds_what_is_predicted(sdxl: UNet2DConditionModel, layout: str, policy: str) -> None:
    inputs, plan = unet_inputs(sdxl, 3, 25, 17), f"{layout}.{policy}"
    found = predicted(sdxl, plan, inputs)
    assert held(sdxl, plan, inputs) == found and min(found) > 0


@pytest.mark.parametrize(
    "plan", ["patch3.frozen.w0", "patch3.displaced.all.separatenorm.w0", "patch3.displaced.all.stalenorm.w0"]
)
def test_variants_hold_what_is_predicted(sdxl: UNet2DConditionModel, plan: str) -> None:
    inputs = unet_inputs(sdxl, 1, 25, 17)
    assert held(sdxl, plan, inputs) == predicted(sdxl, plan, inputs)


@pytest.mark.parametrize("plan", ["patch3", "cfg2.patch2", "patch2.naive", "patch2.delta32"])
def test_plans_that_use_nothing_old_hold_nothing(sdxl: UNet2DConditionModel, plan: str) -> None:
    inputs = unet_inputs(sdxl, 2, 25, 17)
    assert held(sdxl, plan, inputs) == predicted(sdxl, plan, inputs) == [0] * Plan.parse(plan).num_ranks


def test_half_precision_holds_half_of_keys_and_values() -> None:
    unet = sdxl_unet().to(torch.bfloat16)
    inputs = to_dtype(unet_inputs(unet, 1, 25, 17), torch.bfloat16)
    for plan in ("patch2.displaced.all.w0", "patch2.displaced.delta4.forecast.resync30.w0"):
        assert held(unet, plan, inputs) == predicted(unet, plan, inputs)
    shape = inputs["sample"].shape
    half, full = (
        pool_bytes(unet, Plan.parse("patch2.displaced.all"), 0, shape, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert full[SiteKind.KV] == 2 * half[SiteKind.KV] > 0 and full[SiteKind.NORM] == half[SiteKind.NORM]


def test_fixed_filters_and_adaptive_norms_hold_what_is_predicted() -> None:
    unet = PIPELINES["StableDiffusionLatentUpscalePipeline"].make().unet
    inputs = {
        "sample": torch.randn(1, 8, 20, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 7, 24),
        "timestep_cond": torch.randn(1, 128 + 24),
    }
    plan = "patch2.displaced.all.w0"
    found = predicted(unet, plan, inputs)
    assert held(unet, plan, inputs) == found and min(found) > 0


def answers(model: Any, plan: str, inputs: dict[str, Any]) -> list[BaseException | int]:
    """What every rank's first call of a request raises, or the bytes that it then holds."""

    def body(transport: Any) -> BaseException | int:
        own = share_weights(model)
        denoiser = ParallelDenoiser(own, Plan.parse(plan), transport)
        denoiser.attach()
        denoiser.open("request")
        try:
            with torch.no_grad():
                own(**inputs)
            return denoiser.pool.num_bytes
        except PoolTooLarge as error:
            assert denoiser.pool.num_bytes == 0
            return error
        finally:
            denoiser.close()

    return VirtualWorld(Plan.parse(plan).num_ranks).run(body)


@pytest.mark.supports("feature", "a plan that keeps more than is free is refused before the first step")
def test_a_pool_that_does_not_fit_is_refused_by_all_ranks_alike(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, plan = unet_inputs(sdxl, 2, 40, 24), "patch4.displaced.w0"
    needed = sum(predicted(sdxl, plan, inputs))
    # Ranks look at different moments, so they do not see the same; only the last one sees too little.
    seen = iter([needed + 3, needed + 2, needed + 1, needed - 1])
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: next(seen))
    errors = answers(sdxl, plan, inputs)
    assert all(isinstance(error, PoolTooLarge) for error in errors), errors
    assert len({str(error) for error in errors}) == 1
    error = errors[0]
    assert (error.needed, error.free) == (needed, needed - 1)
    assert f"'{error.fits}' fits" in str(error) and "high and as wide" in str(error)
    assert 0 < sum(predicted(sdxl, error.fits, inputs)) < needed


def test_a_pool_that_just_fits_is_kept(sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, plan = unet_inputs(sdxl, 2, 40, 24), "patch2.displaced.w0"
    needed = sum(predicted(sdxl, plan, inputs))
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: needed)
    assert all(isinstance(answer, int) and answer > 0 for answer in answers(sdxl, plan, inputs))


@pytest.mark.parametrize(
    ("plan", "fits"),
    [
        ("patch2.displaced.all.forecast.w0", "patch2.displaced.all.w0"),
        ("patch2.displaced.delta4.forecast.w0", "patch2.displaced.delta4.w0"),
        ("patch2.displaced.delta4.forecast.w0", "patch2.displaced.w0"),
        ("patch2.displaced.all.w0", "patch2.displaced.w0"),
        ("patch4.displaced.all.w0", "patch4.displaced.w0"),
        ("patch4.displaced.forecast.w0", "cfg2.patch2.displaced.w0"),
        ("patch3.displaced.forecast.w0", "patch2.displaced.w0"),
        ("patch3.delta4", "patch2.delta4"),
        ("cfg2.patch2.delta8", "cfg2.patch2"),
        ("dp2.patch2.delta8", "dp2.patch2"),
    ],
)
def test_the_plan_that_is_named_is_the_nearest_that_fits(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch, plan: str, fits: str
) -> None:
    inputs = unet_inputs(sdxl, 2, 24, 24)
    free = sum(predicted(sdxl, fits, inputs))
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: free)
    error, *_ = answers(sdxl, plan, inputs)
    assert isinstance(error, PoolTooLarge) and Plan.parse(error.fits) == Plan.parse(fits)
    kept = answers(sdxl, fits, inputs)
    assert all(isinstance(num_bytes, int) for num_bytes in kept) and sum(kept) <= free


def test_where_nothing_else_fits_the_exact_plan_is_named(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: 1)
    inputs = unet_inputs(sdxl, 1, 24, 24)
    error, *_ = answers(sdxl, "patch2.displaced.w0", inputs)
    assert isinstance(error, PoolTooLarge) and error.fits == "patch2"
    assert answers(sdxl, "patch2", inputs) == [0, 0]


def test_a_second_call_of_the_step_is_looked_at_by_itself(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first one keeps is not free any more; further steps ask nothing."""
    asked: list[int] = []
    monkeypatch.setattr(check, "free_bytes", lambda device, wanted: asked.append(wanted) or 2**40)
    inputs = unet_inputs(sdxl, 1, 24, 24)

    def work(model: Any, denoiser: ParallelDenoiser) -> None:
        denoiser.open("request")
        for _ in range(3):
            denoiser.slot = 0
            model(**inputs)
            model(**moved(inputs))
        denoiser.close()

    on_ranks(sdxl, "patch2.displaced.w0", work)
    assert asked == [sum(predicted(sdxl, "patch2.displaced.w0", inputs))] * 4
