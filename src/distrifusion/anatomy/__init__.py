"""Facts about model families: what mixes positions, and where. No communication, no method names."""

from __future__ import annotations

from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from distrifusion.anatomy.base import Anatomy
from distrifusion.anatomy.controlnet import ControlNetAnatomy
from distrifusion.anatomy.unet import UNetAnatomy
from distrifusion.errors import UnsupportedModel

_FAMILIES: tuple[tuple[type[nn.Module], type[Anatomy]], ...] = (
    (UNet2DConditionModel, UNetAnatomy),
    (ControlNetModel, ControlNetAnatomy),
)


def anatomy_of(model: nn.Module) -> Anatomy:
    """The anatomy of a model's family.

    Raises:
        UnsupportedModel: if the family is not known.
    """
    for family, anatomy in _FAMILIES:
        if isinstance(model, family):
            return anatomy()
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise UnsupportedModel("the model is compiled, and exchanges cannot be; parallelize without torch.compile")
    known = ", ".join(family.__name__ for family, _ in _FAMILIES)
    raise UnsupportedModel(f"{type(model).__name__} has no anatomy here; the model families known are: {known}")
