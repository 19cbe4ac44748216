"""LoRA by the pipeline's own methods, before and after parallelizing: divided, it equals one device that has it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from families import PIPELINES, Case
from lora_files import write_lora
from ranks import EXACT, Ranks, own_copy

from models import relative_error

CASES = {"sdxl": PIPELINES["StableDiffusionXLPipeline"], "sd": PIPELINES["StableDiffusionPipeline"]}
CLASSES = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}
KINDS = ("attention", "convolutions")
Files = dict[tuple[str, str, int], Path]
Change = Callable[[Any, Path, Path], None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """LoRA files by family, what they change, and number: two of each, of the same form."""
    folder = tmp_path_factory.mktemp("lora")
    keys = [(family, kind, number) for family in CASES for kind in KINDS for number in (1, 2)]
    return {
        key: write_lora(CLASSES[key[0]], CASES[key[0]].make().unet, key[1], key[2], folder / "-".join(map(str, key)))
        for key in keys
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[DiffusionPipeline, torch.Tensor]]:
    """The pipelines without an adapter, and what they give."""
    pipes = {family: case.make() for family, case in CASES.items()}
    return {family: (pipe, CASES[family](own_copy(pipe))) for family, pipe in pipes.items()}


def load(pipe: Any, file: Path, name: str = "first", **options: Any) -> None:
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, **options)


def loaded(pipe: Any, first: Path, second: Path) -> None:
    load(pipe, first)


def scaled(pipe: Any, first: Path, second: Path) -> None:
    load(pipe, first)
    pipe.set_adapters(["first"], [0.4])


def two_at_once(pipe: Any, first: Path, second: Path) -> None:
    load(pipe, first)
    load(pipe, second, "second")
    pipe.set_adapters(["first", "second"], [0.5, -0.8])


def fused(pipe: Any, first: Path, second: Path) -> None:
    load(pipe, first)
    pipe.fuse_lora(lora_scale=0.7)


def fused_and_unloaded(pipe: Any, first: Path, second: Path) -> None:
    fused(pipe, first, second)
    pipe.unload_lora_weights()


def hot_swapped(pipe: Any, first: Path, second: Path) -> None:
    load(pipe, first)
    load(pipe, second, hotswap=True)


def unfused(pipe: Any, first: Path, second: Path) -> None:
    fused(pipe, first, second)
    pipe.unfuse_lora()
    pipe.disable_lora()


def unloaded(pipe: Any, first: Path, second: Path) -> None:
    load(pipe, first)
    pipe.unload_lora_weights()


SHOWN: dict[str, Change] = {
    "loaded": loaded,
    "scaled by set_adapters": scaled,
    "two at once": two_at_once,
    "fused": fused,
    "fused and unloaded": fused_and_unloaded,
    "hot-swapped": hot_swapped,
}
HIDDEN: dict[str, Change] = {"unfused and disabled": unfused, "unloaded": unloaded}


def lines(order: str, changes: dict[str, Change], families: tuple[str, str]) -> list[Any]:
    """Family, kind and change, with the line of the support matrix that each proves."""
    return [
        pytest.param(family, kind, name, marks=pytest.mark.supports("adapter", f"LoRA on {kind}, {name}, {order}"))
        for family, kind in zip(families, KINDS, strict=True)
        for name in changes
    ]


@pytest.mark.parametrize(("family", "kind", "name"), lines("before", SHOWN, ("sd", "sdxl")))
def test_lora_before_parallelizing(plain: dict[str, Any], files: Files, family: str, kind: str, name: str) -> None:
    pipe, without = plain[family]
    adapted = own_copy(pipe)
    SHOWN[name](adapted, files[family, kind, 1], files[family, kind, 2])
    ranks = Ranks(adapted, "cfg2.patch2")
    reference = CASES[family](adapted)
    assert relative_error(reference, without) > 1e-2
    assert ranks.error(CASES[family], reference) <= EXACT


@pytest.mark.parametrize(("family", "kind", "name"), lines("after", {**SHOWN, **HIDDEN}, ("sdxl", "sd")))
def test_lora_between_the_calls_of_a_parallelized_pipeline(
    plain: dict[str, Any], files: Files, family: str, kind: str, name: str
) -> None:
    pipe, without = plain[family]
    case: Case = CASES[family]
    change, pair = {**SHOWN, **HIDDEN}[name], (files[family, kind, 1], files[family, kind, 2])
    one = own_copy(pipe)
    change(one, *pair)
    reference = case(one)
    ranks = Ranks(pipe, "patch3")
    if name == "hot-swapped":  # between two calls that both have an adapter
        ranks.each(lambda own: load(own, pair[0]))
        ranks.draw(case)
        ranks.each(lambda own: load(own, pair[1], hotswap=True))
    else:
        ranks.each(lambda own: change(own, *pair))
    assert (relative_error(reference, without) > 1e-2) == (name in SHOWN)
    assert ranks.error(case, reference) <= EXACT


def test_a_displaced_plan_with_an_adapter_comes_close(plain: dict[str, Any], files: Files) -> None:
    adapted = own_copy(plain["sdxl"][0])
    loaded(adapted, files["sdxl", "convolutions", 1], files["sdxl", "convolutions", 2])
    ranks = Ranks(adapted, "patch2.displaced.w0")
    assert 1e-9 < ranks.error(CASES["sdxl"], CASES["sdxl"](adapted)) < 0.3


@pytest.mark.supports("adapter", "LoRA scaled by cross_attention_kwargs")
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_scale_of_a_call(plain: dict[str, Any], files: Files, scale: float) -> None:
    pipe, _ = plain["sdxl"]
    one = own_copy(pipe)
    loaded(one, files["sdxl", "attention", 1], files["sdxl", "attention", 2])

    def call(own: Any) -> torch.Tensor:
        return CASES["sdxl"](own, cross_attention_kwargs={"scale": scale})

    reference = call(one)
    assert relative_error(reference, CASES["sdxl"](one)) > 1e-2
    ranks = Ranks(pipe, "patch2")
    ranks.each(lambda own: load(own, files["sdxl", "attention", 1]))
    assert ranks.error(call, reference) <= EXACT
