"""Displaced bands whose last attentions use this call's keys and values, against a whole U-Net that attends so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from division import EXACT, errors, predictions

from distrifusion import Plan
from distrifusion.exchange.pool import CallState
from distrifusion.layout.partition import Level, partition_levels
from models import moved, relative_error, share_weights, unet_inputs
from transformers_tiny import flux, flux_inputs

FAR_OVER = 1e-3
NUM_LEVELS = 3


class _Attending:
    """Self-attention of a whole model, band by band: the others' keys and values are those of the call before.

    Attributes:
        num_fresh: layers, the last ones of a call, at which they are this call's.
    """

    def __init__(self, unet: UNet2DConditionModel, levels: tuple[Level, ...], num_fresh: int) -> None:
        self.num_fresh = num_fresh
        self._levels = {level.height * level.width: level for level in levels}
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # in the order of the first call
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                module.set_processor(lambda *args, name=name, **_: self._attend(name, *args))

    def _attend(self, name: str, attention: Any, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        query, *now = (project(hidden) for project in (attention.to_q, attention.to_k, attention.to_v))
        fresh = name not in self._kept or name in list(self._kept)[len(self._kept) - self.num_fresh :]
        before = now if fresh else self._kept[name]
        self._kept[name] = (now[0], now[1])
        level = self._levels[hidden.shape[1]]
        bands = [slice(b.start * level.width, b.stop * level.width) for b in level.bands or ()]
        outputs = []
        for band in bands or [slice(None)]:
            seen = [old.clone() for old in before]
            for old, own in zip(seen, now, strict=True):
                old[:, band] = own[:, band]
            q, k, v = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query[:, band], *seen))
            outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attention.to_out[0](torch.cat(outputs, 1))


def whole(unet: UNet2DConditionModel, plan: str, steps: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The predictions of one device that attends as the bands of a plan do."""
    parsed = Plan.parse(plan)
    size = steps[0]["sample"].shape[2:]
    own = share_weights(unet)
    _Attending(own, partition_levels(*size, NUM_LEVELS, parsed.patch, parsed.split), parsed.fresh)
    with torch.no_grad():
        return [own(**inputs).sample for inputs in steps]


def distance(unet: UNet2DConditionModel, plan: str, steps: list[dict[str, Any]]) -> float:
    """How far a plan's predictions are from what they should be, the worst of all steps and ranks."""
    expected = whole(unet, plan, steps)
    by_rank = predictions(unet, f"{plan}.w0", steps)
    return max(relative_error(a, b) for rank in by_rank for a, b in zip(rank, expected, strict=True))


def walk(unet: UNet2DConditionModel, height: int, width: int) -> list[dict[str, Any]]:
    """Three calls that are unlike each other."""
    x = unet_inputs(unet, 1, height, width)
    return [x, moved(x), moved(x, seed=1)]


@pytest.mark.supports("plan", "patch<N>.displaced.fresh<N>")
@pytest.mark.parametrize(
    ("patch", "num_fresh", "height", "width"), [(2, 0, 24, 16), (2, 1, 25, 17), (3, 2, 25, 17), (4, 1, 33, 9)]
)
def test_only_the_last_attentions_of_a_call_are_fresh(
    sdxl: UNet2DConditionModel, patch: int, num_fresh: int, height: int, width: int
) -> None:
    assert distance(sdxl, f"patch{patch}.displaced.fresh{num_fresh}", walk(sdxl, height, width)) <= EXACT


def test_the_gate_sees_last_attentions_that_are_old(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = walk(sdxl, 25, 17)
    monkeypatch.setattr(CallState, "gathers_last", lambda self, name, count: False)
    assert distance(sdxl, "patch2.displaced.fresh1", steps) > FAR_OVER


def test_the_gate_sees_first_attentions_in_place_of_the_last(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = walk(sdxl, 25, 17)
    monkeypatch.setattr(CallState, "gathers_last", lambda self, name, count: name in list(self.gathers)[:count])
    assert distance(sdxl, "patch2.displaced.fresh1", steps) > FAR_OVER


@pytest.mark.parametrize("words", ["displaced", "displaced.forecast", "displaced.all", "displaced.delta4"])
def test_none_is_the_plan_without_the_word(words: str) -> None:
    assert Plan.parse(f"patch3.{words}.fresh0") == Plan.parse(f"patch3.{words}") != Plan.parse(f"patch3.{words}.fresh1")


@pytest.mark.parametrize(
    "plan", ["cfg2.patch2.columns.displaced", "patch3.displaced.forecast", "patch4.displaced.delta32"]
)
def test_as_many_as_there_are_make_every_call_exact(sdxl: UNet2DConditionModel, plan: str) -> None:
    x = unet_inputs(sdxl, 2, 25, 17)
    assert max(errors(sdxl, f"{plan}.fresh99.w0", [x, moved(x), moved(x, seed=1)])) <= EXACT


def test_an_input_given_again_is_exact_with_a_forecast_and_codes(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    y = moved(x)
    assert max(errors(sdxl, "patch3.displaced.forecast.fresh1.w2", [x, y, y, y])) <= EXACT
    by_step = errors(sdxl, "patch2.displaced.delta8.fresh1.w0", [x] + 4 * [y])
    assert by_step[-1] < by_step[1] / 3


def test_a_transformer_has_last_attentions_too() -> None:
    x = flux_inputs(1, 7, 5)
    steps = [x, moved(x)]
    stale, fresh = (max(errors(flux(), f"patch3.displaced.{words}.w0", steps)) for words in ("fresh0", "fresh99"))
    assert fresh <= EXACT < stale
