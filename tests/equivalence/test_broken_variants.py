"""The gates see what they are for: each exchange, broken on purpose, pushes the error far over its bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, errors

from distrifusion.exchange.codec import Codec
from distrifusion.exchange.gathering import GatherBuffer
from distrifusion.exchange.handles import Halo, Shared, Swap
from distrifusion.exchange.pool import CallState, Parcel
from distrifusion.exchange.verbs import Exchange
from distrifusion.strategies import patch
from models import moved, unet_inputs

Break = Callable[[pytest.MonkeyPatch], None]
FAR_OVER = 1e-3


def halo_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Halo.wait

    def wait(self: Halo) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        before, after = intact(self)
        return [torch.zeros_like(rows) for rows in before], [torch.zeros_like(rows) for rows in after]

    monkeypatch.setattr(Halo, "wait", wait)


def halo_from_the_wrong_side(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Halo.wait

    def wait(self: Halo) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        before, after = intact(self)
        return (after, before) if before and after else (before, after)

    monkeypatch.setattr(Halo, "wait", wait)


def local_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: GatherBuffer) -> tuple[torch.Tensor, ...]:
        return tuple(piece.transpose(0, 1) for piece in self.parts[self.rank].unbind(2))

    monkeypatch.setattr(GatherBuffer, "read", read)


def local_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: Shared) -> tuple[list[torch.Tensor], None]:
        self.swap.wait()
        return [self.own] * len(self.team), None

    monkeypatch.setattr(Shared, "wait", wait)


def variance_over_n_minus_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference implementation does, with the local count."""
    intact = patch.local_moments

    def local_moments(x: torch.Tensor, num_groups: int) -> torch.Tensor:
        count = x[0].numel() / num_groups
        mean, variance = intact(x, num_groups)
        return torch.stack([mean, variance * count / (count - 1)])

    monkeypatch.setattr(patch, "local_moments", local_moments)


def norm_that_counts_bands_not_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = patch.merge_moments
    monkeypatch.setattr(
        patch, "merge_moments", lambda moments, weights: intact(moments, torch.full_like(weights, 1 / len(weights)))
    )


def bands_joined_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Exchange.collect

    def collect(self: Exchange, *args: Any) -> Swap:
        swap = intact(self, *args)
        return Swap(lambda: {rank: tensor.flip(2) for rank, tensor in swap.wait().items()})

    monkeypatch.setattr(Exchange, "collect", collect)


SYNCHRONOUS: list[Break] = [
    halo_of_zeros,
    halo_from_the_wrong_side,
    local_keys_and_values,
    local_norm,
    variance_over_n_minus_one,
    norm_that_counts_bands_not_rows,
    bands_joined_in_reverse,
]


@pytest.mark.parametrize("spoil", SYNCHRONOUS)
def test_the_synchronous_gate_sees(spoil: Break, unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = unet_inputs(unet, 1, 25, 9)
    spoil(monkeypatch)
    assert max(errors(unet, "patch3", [inputs])) > FAR_OVER


def frozen_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh exchanges work; what a displaced call would post is never sent."""
    intact = Exchange._flush

    def flush(self: Exchange) -> None:
        self._deferred = [(kind, posted) for kind, posted in self._deferred if isinstance(posted, Parcel)]
        intact(self)

    monkeypatch.setattr(Exchange, "_flush", flush)


def frozen_halos_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parcel, "messages", lambda self: ([], []))


@pytest.mark.parametrize("spoil", [frozen_keys_and_values, frozen_halos_and_statistics])
def test_the_convergence_of_a_repeated_input_sees(
    spoil: Break, sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)
    steps = [x] + 10 * [moved(x, 0.5)]
    intact = errors(sdxl, "patch2.displaced.all.w0", steps)
    spoil(monkeypatch)
    frozen = errors(sdxl, "patch2.displaced.all.w0", steps)
    assert frozen[0] <= EXACT, "the first call is synchronous"
    assert intact[-1] < intact[1] / 30
    assert frozen[-1] > 10 * intact[-1]


def values_kept_from_the_first_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A synchronous call computes with fresh values but leaves the old ones for the next call."""
    intact = CallState.keep

    def keep(state: CallState, name: str, *values: Any) -> None:
        if name not in state.swaps:
            intact(state, name, *values)

    monkeypatch.setattr(CallState, "keep", keep)


def test_the_gate_of_an_input_given_again_sees_values_that_were_not_kept(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    y = moved(x, 0.5)
    steps = [x, y, y]
    assert max(errors(sdxl, "patch3.displaced.all.w1", steps)) <= EXACT
    values_kept_from_the_first_call_only(monkeypatch)
    spoilt = errors(sdxl, "patch3.displaced.all.w1", steps)
    assert max(spoilt[:2]) <= EXACT
    assert spoilt[2] > FAR_OVER


def test_the_gate_of_coded_values_sees_errors_that_are_not_fed_back(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact = Codec.encode_

    def encode_(self: Codec, pieces: Any, base: torch.Tensor, out: torch.Tensor) -> None:
        exact = torch.stack([piece.transpose(0, 1) for piece in pieces], 2)
        intact(self, pieces, base, out)
        base.copy_(exact)

    x = unet_inputs(sdxl, 1, 25, 17)
    steps = [x] + 9 * [moved(x)]
    by_step = errors(sdxl, "patch3.delta2", steps)
    assert by_step[-1] < by_step[1] / 3
    monkeypatch.setattr(Codec, "encode_", encode_)
    spoilt = errors(sdxl, "patch3.delta2", steps)
    assert spoilt[-1] > by_step[1] / 3


def test_the_gate_of_forecasts_sees_values_carried_back(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = unet_inputs(sdxl, 1, 25, 17)
    y = moved(x, 0.3)
    steps = [
        {**x, "sample": torch.lerp(x["sample"], y["sample"], i / 4), "timestep": torch.tensor(900 - 0.01 * i)}
        for i in range(5)
    ]
    intact = GatherBuffer.advance
    plain, forecast = (errors(sdxl, f"patch3.displaced.{word}.w1", steps)[-1] for word in ("forecast0", "forecast50"))
    assert forecast < plain
    monkeypatch.setattr(GatherBuffer, "advance", lambda self, weight: intact(self, weight and -weight))
    assert errors(sdxl, "patch3.displaced.forecast50.w1", steps)[-1] > plain
