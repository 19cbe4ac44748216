"""The gates of pieces that flow through stages see what they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from division import EXACT, errors

from distrifusion.exchange.pieces import PieceBuffer
from distrifusion.strategies.pipefusion import StageStrategy
from models import moved
from transformers_tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("unchecked")  # see test_token_memory.py
Break = Callable[[pytest.MonkeyPatch], None]
FAR_OVER = 1e-3
ALL = ("SD3", "FLUX.1 dev", "FLUX.2", "PixArt-Sigma", "CogVideoX 5B", "Qwen-Image")


def nothing_crosses_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage begins with what was embedded."""
    intact = StageStrategy._receive

    def receive(self: StageStrategy, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        intact(self, like)
        return like

    monkeypatch.setattr(StageStrategy, "_receive", receive)


def pieces_land_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = StageStrategy._receive
    monkeypatch.setattr(
        StageStrategy, "_receive", lambda self, like: {k: x.flip(1) for k, x in intact(self, like).items()}
    )


@pytest.mark.parametrize("spoil", [nothing_crosses_the_border, pieces_land_in_reverse])
@pytest.mark.parametrize("family", ALL)
def test_the_gate_of_the_whole_sees(spoil: Break, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = FAMILIES[family].make(), FAMILIES[family].inputs(1, *FAMILIES[family].size)
    spoil(monkeypatch)
    assert errors(model, "pipe2.sync", [x])[0] > FAR_OVER


def own_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PieceBuffer, "renew", lambda self, index, num, *own: own)


def keys_that_are_never_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    def renew(self: PieceBuffer, index: int, num: int, *own: Any) -> Any:
        return self._wholes[-1] if self._wholes else (*self._rooms[-1], self._bias)

    monkeypatch.setattr(PieceBuffer, "renew", renew)


def every_piece_in_the_first_place(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = PieceBuffer.renew

    def renew(self: PieceBuffer, index: int, num: int, *own: Any) -> Any:
        self._start = 0
        return intact(self, index, num, *own)

    monkeypatch.setattr(PieceBuffer, "renew", renew)


@pytest.mark.parametrize("spoil", [own_keys_alone, keys_that_are_never_renewed, every_piece_in_the_first_place])
@pytest.mark.parametrize("family", ALL)
def test_the_gate_of_an_input_given_again_sees(spoil: Break, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces come nearer to the exact result from call to call, if keys are renewed."""
    model, x = FAMILIES[family].make(), FAMILIES[family].inputs(1, *FAMILIES[family].size)
    y = moved(x, 0.5)
    steps = [x, *6 * [y]]
    assert errors(model, "pipe2.m3.w0", steps)[-1] <= EXACT
    spoil(monkeypatch)
    assert not errors(model, "pipe2.m3.w0", steps)[-1] <= FAR_OVER  # places that were never written hold anything
