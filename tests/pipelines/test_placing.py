"""A pipeline is moved to a rank's device without the layers that other ranks run: "meta" is that device here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import PIPELINES as UNETS
from ranks import own_copy
from torch import nn
from transformer_families import PIPELINES as TRANSFORMERS

from distrifusion import ConfigError, Plan, parallelize, unparallelize
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.in_place import denoiser_of, denoisers_of
from distrifusion.planner.calls import arguments
from distrifusion.planner.rehearsal import SilentTransport
from distrifusion.strategies import weights

CASES = {**UNETS, **TRANSFORMERS}
DEVICE = torch.device("meta")


@pytest.fixture(autouse=True)
def device_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that has values cannot become one that has none, as it can become one of a GPU."""

    def move(module: nn.Module, device: torch.device) -> None:
        if device == DEVICE:
            module.to(DEVICE)
        assert device == DEVICE or not there(module)

    monkeypatch.setattr(weights, "_move", move)


def place(name: str, plan: str, rank: int, device: torch.device | None = DEVICE) -> Any:
    transport = SilentTransport(rank, Plan.parse(plan).num_ranks, {})
    return parallelize(own_copy(CASES[name].make()), plan, transport, device=device)


def there(module: nn.Module) -> int:
    """Bytes that are on the device."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()) if t.device == DEVICE)


def all_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def parts_of(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_blocks_of_other_stages_are_never_moved(rank: int) -> None:
    pipe = place("StableDiffusion3Pipeline", "pipe3.m3", rank)
    denoiser = denoiser_of(pipe)
    assert there(pipe.transformer) == denoiser.weight_bytes < all_bytes(pipe.transformer)
    assert denoiser.aside and not any(map(there, denoiser.aside))
    assert all(there(part) == all_bytes(part) for part in parts_of(pipe) if part is not pipe.transformer)
    assert pipe.device == DEVICE
    unparallelize(pipe)
    assert all(there(part) == all_bytes(part) for part in parts_of(pipe))
    assert not any("_apply" in vars(module) for module in pipe.transformer.modules())


@pytest.mark.parametrize(
    ("name", "plan"),
    [("StableDiffusionXLPipeline", "async3"), ("FluxPipeline, dev", "async2"), ("FluxPipeline, dev", "cfg2.async2")],
)
def test_layers_of_other_components_are_never_moved(name: str, plan: str) -> None:
    """Before the first call it is not known which: none of the chain is there. That call brings the own ones."""
    placed = []
    for rank in range(Plan.parse(plan).components):
        pipe = place(name, plan, rank)
        denoiser = denoiser_of(pipe)
        before = there(denoiser.model)
        with torch.no_grad():
            call_once(denoiser)
        assert before < there(denoiser.model) == denoiser.weight_bytes < all_bytes(denoiser.model)
        assert not any(map(there, denoiser.aside))
        placed.append(there(denoiser.model) - before)
        unparallelize(pipe)
        assert there(denoiser.model) == all_bytes(denoiser.model)
    assert sum(placed) < 1.5 * (all_bytes(denoiser.model) - before)


def call_once(denoiser: ParallelDenoiser) -> None:
    denoiser.open("request")
    denoiser.model(**arguments(denoiser.model, 2, 16, 16, torch.float32))
    denoiser.close()


def test_a_controlnet_and_a_plan_of_bands_are_moved_whole() -> None:
    pipe = place("StableDiffusionControlNetPipeline", "async2", 0)
    assert there(pipe.controlnet) == all_bytes(pipe.controlnet) and not denoisers_of(pipe)[1].aside
    pipe = place("StableDiffusionXLPipeline", "patch2", 0)
    assert all(there(part) == all_bytes(part) for part in parts_of(pipe))


def test_a_pipeline_stays_where_it_is_if_no_device_is_named() -> None:
    pipe = place("StableDiffusion3Pipeline", "pipe3.m3", 0, device=None)
    assert not any(map(there, parts_of(pipe)))


def test_a_pipeline_that_is_refused_is_not_moved() -> None:
    pipe = place("StableDiffusion3Pipeline", "pipe2", 0, device=None)
    with pytest.raises(ConfigError, match="parallelized already"):
        parallelize(pipe, "pipe2", SilentTransport(0, 2, {}), device=DEVICE)
    assert not any(map(there, parts_of(pipe)))
