"""Draws one picture of a diffusion model on all your devices, exactly or with the loss measured and shown."""

from __future__ import annotations

from distrifusion.errors import (
    ConfigError,
    DistrifusionError,
    PlanError,
    RankFailed,
    StepTimeout,
    UnsupportedModel,
)
from distrifusion.parallelize import parallelize, unparallelize
from distrifusion.plan import Plan

__version__ = "0.1.0.dev0"
__all__ = [
    "ConfigError",
    "DistrifusionError",
    "Plan",
    "PlanError",
    "RankFailed",
    "StepTimeout",
    "UnsupportedModel",
    "parallelize",
    "unparallelize",
]
