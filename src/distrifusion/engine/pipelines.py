"""The pipelines whose loop can serve a sampler, and what must be known of each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distrifusion.errors import ConfigError


@dataclass(frozen=True)
class LoopFacts:
    """How a pipeline's loop calls its denoiser.

    Attributes:
        denoisers: names of the components that the loop calls with its latents.
        sample: name of the argument that is denoised.
        timestep_divisor: what a timestep is divided by before the denoiser gets it.
        shared: arguments that are left as they are: the same for all rows, or the output of a component that had all.
    """

    denoisers: tuple[str, ...]
    sample: str
    timestep_divisor: int = 1
    shared: tuple[str, ...] = ()


_UNET = LoopFacts(("unet",), "sample")
_WITH_CONTROL = LoopFacts(
    ("controlnet", "unet"), "sample", shared=("down_block_additional_residuals", "mid_block_additional_residual")
)
_TRANSFORMER = LoopFacts(("transformer",), "hidden_states")
_FLUX = LoopFacts(("transformer",), "hidden_states", 1000, ("txt_ids", "img_ids"))
FACTS: Mapping[str, LoopFacts] = {
    **dict.fromkeys(
        (
            f"{family}{task}Pipeline"
            for family in ("StableDiffusion", "StableDiffusionXL")
            for task in ("", "Img2Img", "Inpaint")
        ),
        _UNET,
    ),
    **dict.fromkeys(
        (
            f"{family}ControlNet{task}Pipeline"
            for family in ("StableDiffusion", "StableDiffusionXL")
            for task in ("", "Img2Img", "Inpaint")
        ),
        _WITH_CONTROL,
    ),
    "StableDiffusion3Pipeline": _TRANSFORMER,
    "StableDiffusion3Img2ImgPipeline": _TRANSFORMER,
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxInpaintPipeline": _FLUX,
    "PixArtAlphaPipeline": _TRANSFORMER,
    "PixArtSigmaPipeline": _TRANSFORMER,
}
# Arguments under which a loop does not go through all its steps, or a step depends on its number, and what they are
# where they change nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "denoising_start": (),
    "denoising_end": (),
    "skip_guidance_layers": (),
    "control_guidance_start": (0,),
    "control_guidance_end": (1,),
}


def facts_of(cls: type) -> LoopFacts:
    """What is known of a pipeline class.

    Raises:
        ConfigError: if its loop cannot serve a sampler; those that can are named.
    """
    for base in cls.__mro__:
        if base.__name__ in FACTS:
            return FACTS[base.__name__]
    raise ConfigError(
        f"{cls.__name__} has no known loop that could serve sampler=; leave it out, or use one of {', '.join(FACTS)}"
    )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the other arguments of a call with a sampler.

    Raises:
        ConfigError: on one that changes what a step is.
    """
    for name, harmless in _REFUSED.items():
        value = arguments.get(name)
        given = value if isinstance(value, list | tuple) else [value]
        if value is not None and any(one not in harmless for one in given):
            raise ConfigError(f"{name}= is not served together with sampler=; leave one of the two out")


def most_steps(cls: type, arguments: Mapping[str, Any]) -> int | None:
    """How many steps a call takes at most, as far as its arguments say: pipelines round what `strength` leaves."""
    steps = arguments.get("num_inference_steps")
    if not isinstance(steps, int):
        return None
    parameter = inspect.signature(cls.__call__).parameters.get("strength")
    strength = arguments.get("strength", 1.0 if parameter is None else parameter.default)
    return min(math.ceil(steps * strength), steps) if isinstance(strength, int | float) else None
