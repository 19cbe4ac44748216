"""Draws one picture of a diffusion model on all your devices, exactly or with the loss measured and shown."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distrifusion.errors import (
    Cancelled,
    ConfigError,
    DistrifusionError,
    OutOfMemory,
    PlanError,
    PoolTooLarge,
    RankFailed,
    StepTimeout,
    UnsupportedModel,
)
from distrifusion.plan import Plan

if TYPE_CHECKING:
    from distrifusion.in_place import parallelize as parallelize
    from distrifusion.in_place import unparallelize as unparallelize
    from distrifusion.loading import load as load
    from distrifusion.tracing import trace as trace

__version__ = "0.1.0.dev0"
__all__ = [
    "Cancelled",
    "ConfigError",
    "DistrifusionError",
    "OutOfMemory",
    "Plan",
    "PlanError",
    "PoolTooLarge",
    "RankFailed",
    "StepTimeout",
    "UnsupportedModel",
    "load",
    "parallelize",
    "trace",
    "unparallelize",
]

# Torch and diffusers take seconds to import; what needs neither (`--help`, a wrong plan) does not wait for them.
_HEAVY = {
    "load": "distrifusion.loading",
    "parallelize": "distrifusion.in_place",
    "trace": "distrifusion.tracing",
    "unparallelize": "distrifusion.in_place",
}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module 'distrifusion' has no attribute '{name}'")
    value = getattr(import_module(_HEAVY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HEAVY})
