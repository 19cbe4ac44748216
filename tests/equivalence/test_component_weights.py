"""A rank of components needs the weights of its own alone, from the first call on; the others come back whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from division import EXACT, Inputs
from torch.utils.weak import WeakTensorKeyDictionary

from distrifusion import Plan
from distrifusion.anatomy import anatomy_of
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.virtual import VirtualWorld
from distrifusion.planner.rehearsal import SilentTransport
from distrifusion.strategies import weights
from distrifusion.strategies.components import ComponentStrategy
from distrifusion.strategies.weights import Aside
from models import moved, relative_error, run_request, unet_inputs
from transformers_tiny import FAMILIES
from weights_away import pretend_accelerator


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch) -> WeakTensorKeyDictionary:
    """Weights that are set aside are no numbers until they are back."""
    return pretend_accelerator(monkeypatch)


@dataclass
class Ran:
    """What a rank gave in its requests, and with which weights."""

    outputs: list[torch.Tensor]
    weight_bytes: int
    own: dict[str, bool]
    first_is_there: bool
    came_back: bool


def run(model: Any, plan: str, requests: Sequence[Sequence[Inputs]]) -> list[Ran]:
    """Requests one after the other on all ranks, each of which has a copy of the weights."""

    def work(transport: Any) -> Ran:
        own = copy.deepcopy(model)
        denoiser = ParallelDenoiser(own, Plan.parse(plan), transport)
        denoiser.attach()
        with torch.no_grad():
            outputs = [y for i, steps in enumerate(requests) for y in run_request(own, denoiser, steps, i)]
        links = anatomy_of(own).links(own)
        there = {site.name: not any(p.isnan().any() for p in site.module.parameters()) for site in links}
        weight_bytes, first = denoiser.weight_bytes, not next(own.parameters()).isnan().any()
        denoiser.detach()
        same = all(torch.equal(a, b) for a, b in zip(own.parameters(), model.parameters(), strict=True))
        return Ran(outputs, weight_bytes, there, bool(first), same)

    return VirtualWorld(Plan.parse(plan).num_ranks).run(work)


def bytes_of(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def error(model: Any, plan: str, requests: Sequence[Sequence[Inputs]]) -> float:
    """The largest relative error of any rank's call against one device; NaN if weights were used that were away."""
    with torch.no_grad():
        references = [model(**inputs).sample for steps in requests for inputs in steps]
    found = [
        relative_error(output, reference)
        for ran in run(model, plan, requests)
        for output, reference in zip(ran.outputs, references, strict=True)
    ]
    return torch.tensor(found).max().item()  # unlike Python's, this one does not lose a NaN


@pytest.mark.parametrize(("plan", "num_calls"), [("async3.sync", 2), ("async2.timed.w3", 4), ("cfg2.async2.sync", 2)])
def test_a_rank_of_a_unet_works_with_the_weights_of_its_component(
    sdxl: UNet2DConditionModel, plan: str, num_calls: int
) -> None:
    x = unet_inputs(sdxl, 2, 17, 9)
    assert error(sdxl, plan, [[x] + (num_calls - 1) * [moved(x)]]) <= EXACT
    ranks = run(sdxl, plan, [num_calls * [x]])
    chain = {site.name: bytes_of(site.module) for site in anatomy_of(sdxl).links(sdxl)}
    for ran in ranks:
        assert ran.came_back and ran.first_is_there
        away = sum(num_bytes for name, num_bytes in chain.items() if not ran.own[name])
        assert ran.weight_bytes == bytes_of(sdxl) - away < bytes_of(sdxl)
    # Every layer is somebody's; the first ones may be run again, and the very first stays with all.
    assert all(any(ran.own[name] for ran in ranks) for name in chain)
    cuts = Plan.parse(plan).components
    twice = (
        sum(ran.weight_bytes for ran in ranks[:cuts])
        - bytes_of(sdxl)
        - (cuts - 1) * (bytes_of(sdxl) - sum(chain.values()))
    )
    assert 0 < twice < 0.5 * sum(chain.values())


def test_a_rank_of_a_transformer_works_with_the_weights_of_its_component() -> None:
    model, x = FAMILIES["FLUX.1 dev"].make(), FAMILIES["FLUX.1 dev"].inputs(1, 7, 5)
    ranks = run(model, "async4.sync", [[x, x]])
    in_blocks = [bytes_of(site.module) for site in anatomy_of(model).links(model)]
    rest = bytes_of(model) - sum(in_blocks)
    assert sum(ran.weight_bytes for ran in ranks) == sum(in_blocks) + 4 * rest
    assert all(ran.came_back for ran in ranks)
    assert error(model, "async4.sync", [[x, moved(x)]]) <= EXACT


def several_shapes(model: UNet2DConditionModel) -> list[list[Inputs]]:
    """Requests of a shape, of another, of both by turns, and of the first again."""
    a, b = unet_inputs(model, 1, 17, 9), unet_inputs(model, 1, 24, 16)
    return [[a, a], [b, b, moved(b)], [a, b, moved(a)], [moved(a, seed=1)]]


@pytest.mark.parametrize("plan", ["async2.sync", "async3.w9", "async4.sync", "cfg2.async2.w9"])
def test_no_call_reads_the_weights_of_a_layer_that_another_rank_runs(
    sdxl: UNet2DConditionModel, plan: str, away: WeakTensorKeyDictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no numbers when the plan is put on, and no call fetches them; nor do those of another shape."""
    nothing_is_fetched(monkeypatch)
    assert error(sdxl, plan, several_shapes(sdxl)) <= EXACT
    assert not away


@pytest.mark.parametrize("family", ["SD3", "Hunyuan-DiT", "Wan 2.1"])
def test_no_call_of_a_transformer_reads_the_weights_of_a_block_that_another_rank_runs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_fetched(monkeypatch)
    x = FAMILIES[family].inputs(1, *FAMILIES[family].size)
    assert error(FAMILIES[family].make(), "async3.sync", [[x, moved(x)]]) <= EXACT


def test_calls_that_run_whole_fetch_the_weights_of_one_layer_at_a_time(
    sdxl: UNet2DConditionModel, away: WeakTensorKeyDictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_foreseen(monkeypatch)
    assert error(sdxl, "async2.sync", several_shapes(sdxl)) <= EXACT
    assert not away


def test_no_layer_comes_back_while_the_layers_are_put_on_again(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, own = unet_inputs(sdxl, 1, 17, 9), copy.deepcopy(sdxl)
    denoiser = ParallelDenoiser(own, Plan.parse("async2.sync"), SilentTransport(0, 2, {}))
    denoiser.attach()
    with torch.no_grad():
        own(**x)
    moves: list[torch.device] = []
    monkeypatch.setattr(weights, "_move", lambda module, device: moves.append(device))
    own.mid_block.extra = torch.nn.Linear(1, 1)
    denoiser.refresh()
    assert set(moves) == {weights.HOST}


def test_putting_the_layers_on_again_sets_the_same_ones_aside(sdxl: UNet2DConditionModel) -> None:
    x = unet_inputs(sdxl, 1, 17, 9)

    def work(transport: Any) -> None:
        own = copy.deepcopy(sdxl)
        denoiser = ParallelDenoiser(own, Plan.parse("async2.sync"), transport)
        denoiser.attach()
        with torch.no_grad():
            first = run_request(own, denoiser, [x, x])[-1]
            before = denoiser.weight_bytes
            for block in (*own.down_blocks, *own.up_blocks):  # as an adapter does
                block.resnets[0].extra = torch.nn.Linear(1, 1)
            denoiser.refresh()
            assert before <= denoiser.weight_bytes < before + 100
            assert torch.equal(run_request(own, denoiser, [x])[-1], first)
        denoiser.detach()
        assert not any(p.isnan().any() for p in own.parameters())

    VirtualWorld(2).run(work)


# Broken on purpose


def nothing_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComponentStrategy, "foresee", lambda *_: None)


def own_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ComponentStrategy, "_set_aside", lambda self: self._aside.hold([site.module for site in self._chain][-3:])
    )


def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Aside, "lent", lambda self, module: nullcontext())


def the_first_call_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_foreseen(monkeypatch)
    nothing_is_fetched(monkeypatch)


def nothing_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    intact = Aside.hold
    monkeypatch.setattr(Aside, "hold", lambda self, modules: intact(self, {*self.modules, *modules}))


@pytest.mark.parametrize("spoil", [own_layers_too, the_first_call_runs_whole])
def test_the_gate_sees_weights_that_are_missed(
    sdxl: UNet2DConditionModel, spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    assert not error(sdxl, "async2.sync", several_shapes(sdxl)) <= EXACT


def test_the_gate_sees_weights_that_do_not_come_back(
    sdxl: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_comes_back(monkeypatch)
    x = unet_inputs(sdxl, 1, 17, 9)
    assert not any(ran.came_back for ran in run(sdxl, "async2.sync", [[x, x]]))
