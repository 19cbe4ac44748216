"""Facts about model families: what mixes positions, and where. No communication, no method names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from distrifusion.anatomy.base import Anatomy
from distrifusion.anatomy.controlnet import ControlNetAnatomy
from distrifusion.anatomy.tokens import TokenAnatomy, from_context_plan
from distrifusion.anatomy.unet import UNetAnatomy
from distrifusion.errors import UnsupportedModel

# Entry points of other packages: name of the model's class = function that gives its anatomy.
ENTRY_POINTS = "distrifusion.anatomies"

_CONVOLUTIONAL: tuple[tuple[type[nn.Module], type[Anatomy]], ...] = (
    (UNet2DConditionModel, UNetAnatomy),
    (ControlNetModel, ControlNetAnatomy),
)
# Transformers: the module here that tells of them.
_TRANSFORMERS = {
    "CogVideoXTransformer3DModel": "distrifusion.anatomy.cogvideox",
    "HunyuanDiT2DModel": "distrifusion.anatomy.hunyuan",
    "PixArtTransformer2DModel": "distrifusion.anatomy.pixart",
    "SD3Transformer2DModel": "distrifusion.anatomy.sd3",
}


def anatomy_of(model: nn.Module) -> Anatomy | TokenAnatomy:
    """The anatomy of a model's family: another package's, this one's, or what diffusers says for context parallelism.

    Raises:
        UnsupportedModel: if the family is not known, or another package's anatomy cannot be read.
    """
    for name in _names(type(model)):
        if name in _outside():
            return _read(_outside()[name])(model)
        if name in _TRANSFORMERS:
            return import_module(_TRANSFORMERS[name]).anatomy(model)
    for family, anatomy in _CONVOLUTIONAL:
        if isinstance(model, family):
            return anatomy()
    if (found := from_context_plan(model)) is not None:
        return found
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise UnsupportedModel("the model is compiled, and exchanges cannot be; parallelize without torch.compile")
    raise UnsupportedModel(_unknown(type(model)))


def check_family(cls: type) -> None:
    """Check that models of a class have an anatomy, before one is open; raises UnsupportedModel."""
    known = {*_TRANSFORMERS, *_outside()}.intersection(_names(cls))
    convolutional = any(issubclass(cls, family) for family, _ in _CONVOLUTIONAL)
    if not known and not convolutional and getattr(cls, "_cp_plan", None) is None:
        raise UnsupportedModel(_unknown(cls))


def _unknown(cls: type) -> str:
    families = sorted({family.__name__ for family, _ in _CONVOLUTIONAL} | set(_TRANSFORMERS) | set(_outside()))
    return (
        f"{cls.__name__} has no anatomy here; the model families known are: {', '.join(families)}, and transformers "
        "with a _cp_plan of diffusers; docs/adding-a-model.md says how to add one"
    )


def _names(cls: type) -> list[str]:
    return [base.__name__ for base in cls.__mro__]


@cache
def _outside() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _read(entry: EntryPoint) -> Callable[[Any], Anatomy | TokenAnatomy]:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise UnsupportedModel(
            f"the anatomy of {entry.name} is said to be '{entry.value}', which cannot be imported: {error}"
        ) from error
