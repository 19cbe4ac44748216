"""Bytes and messages of one call, counted against a formula from the layers' shapes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from division import Inputs
from listening import traffic
from torch import nn

from distrifusion import Plan
from distrifusion.exchange.pool import PARCEL_SITES
from distrifusion.layout.partition import partition_levels
from models import moved, unet_inputs

HEIGHT, WIDTH, BATCH = 41, 25, 2


def layer_inputs(unet: UNet2DConditionModel, inputs: Inputs) -> list[tuple[nn.Module, torch.Size]]:
    """Every convolution, group norm and self-attention with the shape of its input, from a call on one device."""
    seen: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((module, args[0].shape))

    layers = [m for m in unet.modules() if isinstance(m, nn.Conv2d | nn.GroupNorm | Attention)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        unet(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def expected_bytes(unet: UNet2DConditionModel, plan: Plan, rank: int, inputs: Inputs) -> Counter[str]:
    """What a rank must send in a synchronous fp32 call of a plan with rows, where every level is cut."""
    num_bytes, num_peers = 4, plan.patch - 1
    batch, channels, height, width = inputs["sample"].shape
    levels = {level.height: level for level in partition_levels(height, width, 3, plan.patch, plan.split)}
    widths = {level.height * level.width: level for level in levels.values()}
    neighbours = (rank > 0) + (rank < plan.patch - 1)
    after_upsampling = [m.conv for m in unet.modules() if isinstance(m, Upsample2D)]
    total: Counter[str] = Counter()
    for layer, shape in layer_inputs(unet, inputs):
        if isinstance(layer, nn.GroupNorm):
            total["norm"] += num_peers * 2 * batch * layer.num_groups * num_bytes
        elif isinstance(layer, Attention) and not layer.is_cross_attention:
            level = widths[shape[1]]
            tokens = len(level.bands[rank]) * level.width
            total["kv"] += num_peers * 2 * batch * tokens * layer.inner_dim * num_bytes
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer is not unet.conv_in:
            # A strided convolution begins its bands on even rows: it reads one row above and none below.
            takers = neighbours if layer.stride == (1, 1) else int(rank < plan.patch - 1)
            # What is upsampled travels before: one row of half the width.
            length = -(-shape[3] // 2) if layer in after_upsampling else shape[3]
            total["halo"] += takers * batch * shape[1] * length * num_bytes
    total["exit"] = num_peers * batch * channels * len(levels[height].bands[rank]) * width * num_bytes
    return total


@pytest.mark.parametrize("num_bands", [2, 4])
def test_a_synchronous_call_sends_what_the_shapes_say_and_nothing_twice(
    sdxl: UNet2DConditionModel, num_bands: int
) -> None:
    plan = Plan(patch=num_bands)
    inputs = unet_inputs(sdxl, BATCH, HEIGHT, WIDTH)
    for rank, sent in enumerate(traffic(sdxl, plan, [inputs])):
        assert Counter(sent.by_kind) == expected_bytes(sdxl, plan, rank, inputs)
        assert sum(message.tensor.nbytes for message in sent.messages) == sum(sent.by_kind.values())


@pytest.mark.parametrize("num_bands", [2, 4])
def test_a_displaced_call_sends_the_same_bytes_in_few_messages(sdxl: UNet2DConditionModel, num_bands: int) -> None:
    plan = Plan.parse(f"patch{num_bands}.displaced.all.w0")
    x = unet_inputs(sdxl, BATCH, HEIGHT, WIDTH)
    synchronous = traffic(sdxl, Plan(patch=num_bands), [x])
    displaced = traffic(sdxl, plan, [x, moved(x)])
    sites = [layer for layer, _ in layer_inputs(sdxl, x)]
    num_attention = sum(isinstance(site, Attention) and not site.is_cross_attention for site in sites)
    num_small = sum(isinstance(site, nn.GroupNorm) for site in sites)
    num_small += sum(isinstance(site, nn.Conv2d) and site.kernel_size == (3, 3) for site in sites) - 1
    for before, after in zip(synchronous, displaced, strict=True):
        assert after.by_kind == before.by_kind
        assert before.num_posts == num_attention + num_small + 1
        assert after.num_posts == num_attention + -(-num_small // PARCEL_SITES) + 1
        padding = 15 * num_small * (num_bands - 1)
        sent = sum(message.tensor.nbytes for message in after.messages)
        assert 0 <= sent - sum(after.by_kind.values()) <= padding


def test_only_neighbours_hear_more_than_statistics_and_keys(sdxl: UNet2DConditionModel) -> None:
    """Between ranks that are no neighbours, halos are the bytes that are missing."""
    plan = Plan(patch=4)
    inputs = unet_inputs(sdxl, BATCH, HEIGHT, WIDTH)
    for rank, sent in enumerate(traffic(sdxl, plan, [inputs])):
        by_peer: Counter[int] = Counter()
        for message in sent.messages:
            by_peer[message.peer] += message.tensor.nbytes
        total = expected_bytes(sdxl, plan, rank, inputs)
        to_each = (total["norm"] + total["kv"] + total["exit"]) // 3
        assert {peer for peer, n in by_peer.items() if n > to_each} == {rank - 1, rank + 1} & set(range(4))
        assert min(by_peer.values()) >= to_each


def test_a_cfg_split_exchanges_only_the_prediction(sdxl: UNet2DConditionModel) -> None:
    inputs = unet_inputs(sdxl, 2, HEIGHT, WIDTH)
    for sent in traffic(sdxl, Plan(cfg=2), [inputs]):
        assert sent.by_kind == {"exit": 4 * HEIGHT * WIDTH * 4}
        assert sent.num_posts == 1
