"""The pipelines whose loop can serve a sampler, and what must be known of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distrifusion.errors import ConfigError


@dataclass(frozen=True)
class LoopFacts:
    """How a pipeline's loop calls its denoiser.

    Attributes:
        denoiser: name of the component.
        sample: name of the argument that is denoised.
        timestep_divisor: what a timestep is divided by before the denoiser gets it.
        shared: arguments that are the same for all rows, whatever their first dimension.
    """

    denoiser: str
    sample: str
    timestep_divisor: int = 1
    shared: tuple[str, ...] = ()


_UNET = LoopFacts("unet", "sample")
_TRANSFORMER = LoopFacts("transformer", "hidden_states")
FACTS: Mapping[str, LoopFacts] = {
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusion3Pipeline": _TRANSFORMER,
    "FluxPipeline": LoopFacts("transformer", "hidden_states", 1000, ("txt_ids", "img_ids")),
    "PixArtAlphaPipeline": _TRANSFORMER,
    "PixArtSigmaPipeline": _TRANSFORMER,
}
# Arguments under which a loop does not go through all its steps, or a step depends on its number.
_REFUSED = ("denoising_end", "skip_guidance_layers")


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


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Check the other arguments of a call with a sampler.

    Raises:
        ConfigError: on one that changes what a step is.
    """
    for name in _REFUSED:
        if arguments.get(name) is not None:
            raise ConfigError(f"{name}= is not served together with sampler=; leave one of the two out")
