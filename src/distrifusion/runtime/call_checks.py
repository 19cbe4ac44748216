"""Checks of a call's arguments in the caller's process, before any rank begins."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from distrifusion.engine import words
from distrifusion.errors import ConfigError
from distrifusion.plan import Plan
from distrifusion.runtime.source import PipelineFacts, takes_step_callback

# diffusers' check_inputs asks for it whatever the VAE.
_PIXELS = 8
_OLD_CALLBACK = ("callback", "callback_steps")
_COUNTS = ("num_inference_steps", "num_images_per_prompt", "num_frames")


def bind(facts: PipelineFacts, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name.

    Raises:
        ConfigError: on an unknown keyword (the nearest is named), or one argument given twice or too many.
    """
    parameters = [name for name in inspect.signature(facts.cls.__call__).parameters if name not in ("self", "kwargs")]
    for name in kwargs:
        if name in _OLD_CALLBACK:
            new = (
                "use callback_on_step_end="
                if takes_step_callback(facts.cls)
                else f"{facts.cls.__name__} has no other; leave it out"
            )
            raise ConfigError(f"{name}= is deprecated in diffusers and not served here; {new}")
        if name not in parameters and name not in words.WORDS:
            near = difflib.get_close_matches(name, (*parameters, *words.WORDS), n=1)
            hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(parameters)}"
            raise ConfigError(f"{facts.cls.__name__} takes no argument {name}=; {hint}")
    if len(args) > len(parameters):
        raise ConfigError(f"{facts.cls.__name__} takes {len(parameters)} arguments and {len(args)} are given")
    named = dict(zip(parameters, args, strict=False))
    for name in named.keys() & kwargs.keys():
        raise ConfigError(f"{name} is given twice, by position and by name")
    return {**named, **kwargs}


def check(facts: PipelineFacts, arguments: Mapping[str, Any], plan: Plan | None = None) -> None:
    """Check values that would fail only after minutes of text encoding and weights, or fail unclearly.

    Args:
        facts: of the pipeline.
        arguments: of its call, by name.
        plan: by which it is divided; None where that is not known yet.

    Raises:
        PlanError: if the call names a sampler that the plan cannot serve.
        ConfigError: on a count below 1, a guidance that is no number, or a size that the pipeline cannot draw (the
            nearest that it can is named).
    """
    for name in _COUNTS:
        value = arguments.get(name)
        if name in arguments and value is not None and (not _is_int(value) or value < 1):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
    words.check(facts.cls, plan, None, arguments)
    words.warn_of_few_steps(facts.cls, arguments)
    guidance = arguments.get("guidance_scale")
    if isinstance(guidance, float) and not math.isfinite(guidance):
        raise ConfigError(f"guidance_scale={guidance!r} must be a finite number")
    for name in ("height", "width"):
        if arguments.get(name) is not None:
            _check_size(name, arguments[name], math.lcm(_PIXELS, facts.vae_factor or 1))


def check_generators(generators: Mapping[int, torch.Generator], device: torch.device) -> None:
    """Check that the passed generators can serve this kind of device.

    Raises:
        ConfigError: if a generator lives on an accelerator and the ranks do not.
    """
    for generator in generators.values():
        if generator.device.type not in ("cpu", device.type):
            raise ConfigError(
                f"a generator on '{generator.device}' cannot serve ranks on '{device.type}'; use torch.Generator('cpu')"
            )


def _check_size(name: str, value: Any, multiple: int) -> None:
    if not _is_int(value):
        raise ConfigError(f"{name}={value!r} must be a whole number of pixels")
    if value < 1 or value % multiple:
        below, above = value // multiple * multiple, -(-value // multiple) * multiple
        legal = f"{below} or {above}" if below > 0 else f"at least {multiple}"
        raise ConfigError(f"{name}={value} must be a multiple of {multiple}; the nearest is {legal}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
