"""The gates of the transformers see what they are for: each exchange, broken on purpose, goes far over its bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from division import EXACT, errors

from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.exchange.gathering import GatherBuffer
from distrifusion.exchange.handles import Swap
from distrifusion.exchange.verbs import Exchange
from distrifusion.strategies import ring, ulysses
from distrifusion.strategies.tokens import TokenStrategy
from models import moved
from transformers_tiny import FAMILIES

Break = Callable[[pytest.MonkeyPatch], None]
FAR_OVER = 1e-3
ALL = ("SD3", "SD3.5 medium", "FLUX.1 dev", "PixArt-Sigma", "Hunyuan-DiT", "Wan 2.1", "Qwen-Image", "LTX-Video")


def own_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenStrategy, "_attention", lambda self, site, forward, *args, **kw: forward(*args, **kw))


def keys_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: GatherBuffer) -> tuple[torch.Tensor, ...]:
        for rank, part in self.parts.items():
            if rank != self.rank:
                part.zero_()
        return tuple(piece.transpose(0, 1) for piece in self.buffer.unbind(2))

    monkeypatch.setattr(GatherBuffer, "read", read)


def tokens_joined_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Exchange.collect

    def collect(self: Exchange, site: str, *args: Any) -> Swap:
        swap = intact(self, site, *args)
        if site.endswith(".lengths"):
            return swap
        return Swap(lambda: {rank: tensor.flip(1) for rank, tensor in swap.wait().items()})

    monkeypatch.setattr(Exchange, "collect", collect)


@pytest.mark.parametrize("spoil", [own_keys_alone, keys_of_zeros, tokens_joined_in_reverse])
@pytest.mark.parametrize("family", ALL)
def test_the_gate_of_patches_sees(spoil: Break, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(1, *FAMILIES[family].size)
    spoil(monkeypatch)
    assert max(errors(model, "patch3", [inputs])) > FAR_OVER


def unmerged_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block replaces what the others gave."""
    monkeypatch.setattr(ring, "merge_", lambda out, lse, part, part_lse: out.copy_(part))


def blocks_of_equal_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = ring.merge_
    monkeypatch.setattr(
        ring, "merge_", lambda out, lse, part, part_lse: intact(out, lse, part, torch.zeros_like(part_lse))
    )


@pytest.mark.parametrize("spoil", [unmerged_blocks, blocks_of_equal_weight])
@pytest.mark.parametrize("family", ALL)
def test_the_gate_of_rings_sees(spoil: Break, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(1, *FAMILIES[family].size)
    spoil(monkeypatch)
    assert max(errors(model, "ring3", [inputs])) > FAR_OVER


def heads_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = ulysses.attend
    monkeypatch.setattr(ulysses, "attend", lambda query, *args: intact(query.flip(2), *args))


@pytest.mark.parametrize("family", ALL)
def test_the_gate_of_ulysses_sees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs(1, *FAMILIES[family].size)
    heads_of_another(monkeypatch)
    assert max(errors(model, "ulysses2", [inputs])) > FAR_OVER


def test_the_gate_of_families_sees_attention_that_an_anatomy_forgot(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES["SD3.5 medium"].make(), FAMILIES["SD3.5 medium"].inputs(1, 14, 10)
    intact = TokenAnatomy.sites
    monkeypatch.setattr(
        TokenAnatomy, "sites", lambda self, model: [s for s in intact(self, model) if not s.name.endswith("attn2")]
    )
    assert max(errors(model, "patch2", [inputs])) > FAR_OVER


def test_the_gate_of_masks_sees_one_that_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = FAMILIES["Qwen-Image"].make(), FAMILIES["Qwen-Image"].inputs(2, 7, 5)
    intact = TokenStrategy._bias
    monkeypatch.setattr(TokenStrategy, "_bias", lambda self, *args: torch.zeros_like(intact(self, *args)))
    assert max(errors(model, "patch2", [inputs])) > FAR_OVER


def test_the_gate_of_an_input_given_again_sees_keys_that_are_not_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = FAMILIES["SD3"].make(), FAMILIES["SD3"].inputs(1, 14, 10)
    y = moved(x, 0.5)
    assert errors(model, "patch3.displaced.w1", [x, y, y])[2] <= EXACT
    assert errors(model, "patch3.frozen.w0", [x, y, y])[2] > FAR_OVER
