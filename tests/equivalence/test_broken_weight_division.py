"""The gates of plans that divide weights see what they are for: what is broken on purpose goes far over the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import errors

from distrifusion.anatomy.units import UnitLayer, Units
from distrifusion.exchange import summing
from distrifusion.exchange.summing import Sum
from distrifusion.layout.partition import Interval
from distrifusion.strategies import tensor
from distrifusion.strategies.tensor import Share, TensorStrategy
from models import unet_inputs
from transformers_tiny import FAMILIES

Break = Callable[[pytest.MonkeyPatch], None]
FAR_OVER = 1e-3
FLUX, WAN = (("FLUX.1 dev", "tp2"), ("Wan 2.1", "tp4"))
UNET = ("U-Net", "tp3")


def own_part_for_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Sum.wait

    def wait(self: Sum) -> torch.Tensor:
        own = self._partial.clone()
        intact(self)
        return own

    monkeypatch.setattr(Sum, "wait", wait)


def one_part_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = summing.add_in_order
    monkeypatch.setattr(summing, "add_in_order", lambda parts, out: intact([parts[0], torch.zeros_like(out)], out))


def a_bias_from_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = TensorStrategy._read

    def read(self: TensorStrategy, layer: UnitLayer, forward: Any, x: torch.Tensor) -> torch.Tensor:
        part, bias = intact(self, layer, forward, x), layer.module.bias
        if self.share.place == 0 or bias is None:
            return part
        return part + (bias.view(-1, 1, 1) if part.dim() == 4 else bias)

    monkeypatch.setattr(TensorStrategy, "_read", read)


def places_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Share.of

    def of(self: Share, units: Units) -> Interval:
        own = intact(self, units)
        return Interval(max(0, own.start - 1), max(0, own.start - 1) + len(own))

    monkeypatch.setattr(Share, "of", of)


def units_of_nobody_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without heads adds those that it computed in their place."""
    intact = TensorStrategy._read

    def read(self: TensorStrategy, layer: UnitLayer, forward: Any, x: torch.Tensor) -> torch.Tensor:
        if all(map(self.share.has, (stretch.units for stretch in layer.stretches))):
            return intact(self, layer, forward, x)
        own = self.share.channels(layer.stretches)
        return tensor._apply(layer.module, x, tensor.take(layer.module.weight, 1, own), None)

    monkeypatch.setattr(TensorStrategy, "_read", read)


def norms_of_the_first_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = TensorStrategy._norm

    def norm(self: TensorStrategy, layer: UnitLayer, forward: Any, x: torch.Tensor) -> torch.Tensor:
        if self.share.place == 0:
            return intact(self, layer, forward, x)
        return torch.nn.functional.group_norm(
            x, len(self.share.of(layer.stretches[0].units)), *(p[: x.shape[1]] for p in layer.module.parameters())
        )

    monkeypatch.setattr(TensorStrategy, "_norm", norm)


def norms_over_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    def span(self: TensorStrategy, place: Any, layer: UnitLayer, forward: Any, x: torch.Tensor) -> torch.Tensor:
        own = tensor.take(layer.module.weight, 0, self.share.channels(layer.stretches))
        return torch.nn.functional.rms_norm(x, x.shape[-1:], own, layer.module.eps)

    monkeypatch.setattr(TensorStrategy, "_span", span)


def channels_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = TensorStrategy._complete
    monkeypatch.setattr(TensorStrategy, "_complete", lambda self, *args: intact(self, *args).flip(1))


@pytest.mark.parametrize(
    ("spoil", "gates"),
    [
        (own_part_for_the_sum, (UNET, FLUX, WAN)),
        (one_part_left_out, (UNET, FLUX, WAN)),
        (a_bias_from_every_rank, (UNET, FLUX, WAN)),
        (places_that_overlap, (UNET, FLUX, WAN)),
        (units_of_nobody_that_count, (WAN, ("FLUX.1 dev", "tp4"))),
        (norms_of_the_first_groups, (UNET,)),
        (norms_over_own_heads, (WAN,)),
        (channels_in_reverse, (UNET,)),
    ],
)
def test_the_gates_see(
    spoil: Break, gates: tuple[tuple[str, str], ...], sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    for family, plan in gates:
        model = sdxl if family == "U-Net" else FAMILIES[family].make()
        inputs = unet_inputs(sdxl, 1, 8, 8) if family == "U-Net" else FAMILIES[family].inputs(1, *FAMILIES[family].size)
        assert max(errors(model, plan, [inputs])) > FAR_OVER
