"""Bytes of one call of a plan that divides weights, counted against the formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from listening import traffic

from distrifusion import Plan
from distrifusion.anatomy.unit_sites import unit_sites
from distrifusion.anatomy.units import PartSite
from distrifusion.layout.partition import split_evenly
from models import unet_inputs
from transformers_tiny import FAMILIES

FP32 = 4


def summed(numel: int, num_ranks: int, rank: int) -> int:
    """Bytes of a sum: every stretch to the rank that adds it, the own one back to all; for two ranks, one whole."""
    stretches = [len(stretch) for stretch in split_evenly(numel, num_ranks)]
    return FP32 * (numel - stretches[rank] + (num_ranks - 1) * stretches[rank])


def output_shapes(model: Any, inputs: dict[str, Any]) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of what is summed, and of what ranks make in parts, from a call on one device."""
    sums: list[torch.Size] = []
    parts: list[torch.Size] = []
    hooks = []
    for site in unit_sites(model):
        layers, found = ([site.module], parts) if isinstance(site, PartSite) else ([s.module for s in site.sums], sums)
        hooks += [m.register_forward_hook(lambda _, __, out, found=found: found.append(out.shape)) for m in layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return sums, parts


def expected(shapes: tuple[list[torch.Size], list[torch.Size]], num_ranks: int, rank: int) -> Counter[str]:
    sums, parts = shapes
    total = Counter({"sum": sum(summed(shape.numel(), num_ranks, rank) for shape in sums)})
    for batch, channels, height, width in parts:
        own = len(split_evenly(channels, num_ranks)[rank])
        total["part"] += (num_ranks - 1) * FP32 * batch * own * height * width
    return +total


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_a_call_of_a_unet_sends_what_the_shapes_say(sdxl: UNet2DConditionModel, num_ranks: int) -> None:
    inputs = unet_inputs(sdxl, 1, 9, 8)
    shapes = output_shapes(sdxl, inputs)
    # A sum for every residual block, and three for every block of a transformer.
    assert len(shapes[0]) == 11 + 3 * 11
    for rank, sent in enumerate(traffic(sdxl, Plan(tp=num_ranks), [inputs])):
        assert Counter(sent.by_kind) == expected(shapes, num_ranks, rank)
        assert sum(message.tensor.nbytes for message in sent.messages) == sum(sent.by_kind.values())


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_call_of_a_transformer_sends_what_the_shapes_say(num_ranks: int) -> None:
    model, inputs = FAMILIES["FLUX.1 dev"].make(), FAMILIES["FLUX.1 dev"].inputs(2, 7, 5)
    batch, words, tokens, channels = 2, 7, 35, 24
    for rank, sent in enumerate(traffic(model, Plan(tp=num_ranks), [inputs])):
        # Two sums of each stream in two blocks of two streams, one in each of two blocks of one.
        double = summed(batch * words * channels, num_ranks, rank) + summed(batch * tokens * channels, num_ranks, rank)
        single = summed(batch * (words + tokens) * channels, num_ranks, rank)
        assert sent.by_kind == {"sum": 2 * (2 * double + single)}


def test_norms_over_all_heads_send_a_number_for_each_token() -> None:
    model, inputs = FAMILIES["Wan 2.1"].make(), FAMILIES["Wan 2.1"].inputs(1, 6, 10)
    tokens, words, channels, num_blocks = 3 * 3 * 5, 7, 36, 2
    (sent, _) = traffic(model, Plan(tp=2), [inputs])
    squares = 2 * tokens + tokens + words  # of queries and keys: of the picture, then of the picture and the text
    assert sent.by_kind == {"sum": FP32 * num_blocks * (squares + 3 * tokens * channels)}


def test_branches_trade_whole_predictions_and_sums_stay_within_them(sdxl: UNet2DConditionModel) -> None:
    inputs = unet_inputs(sdxl, 2, 9, 8)
    for rank, sent in enumerate(traffic(sdxl, Plan(cfg=2, tp=2), [inputs])):
        assert {m.peer for m in sent.messages if m.peer // 2 != rank // 2} == {(rank + 2) % 4}
        assert sent.by_kind["exit"] == FP32 * 4 * 9 * 8
