"""Facts about model families: what mixes positions, and where. No communication, no method names."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import nn

from distrifusion.anatomy.base import Anatomy
from distrifusion.anatomy.unet import UNetAnatomy
from distrifusion.errors import UnsupportedModel

_FAMILIES: tuple[tuple[type[nn.Module], type[Anatomy]], ...] = ((UNet2DConditionModel, UNetAnatomy),)


def anatomy_of(model: nn.Module) -> Anatomy:
    """The anatomy of a model's family.

    Raises:
        UnsupportedModel: if the family is not known.
    """
    for family, anatomy in _FAMILIES:
        if isinstance(model, family):
            return anatomy()
    known = ", ".join(family.__name__ for family, _ in _FAMILIES)
    raise UnsupportedModel(f"{type(model).__name__} has no anatomy here; the model families known are: {known}")
