"""Pipelines without weights, small enough to be rehearsed in no time."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from distrifusion.planner.blueprint import Blueprint, of_config
from distrifusion.planner.costs import Costs
from distrifusion.planner.links import Link, Links
from distrifusion.planner.operations import LayerKind
from distrifusion.planner.speeds import Speed
from models import sdxl_unet
from transformers_tiny import FAMILIES

SPEED = Speed(
    "tiny", dict.fromkeys(LayerKind, 1e9), 1e9, layer=1e-6, launch=1e-6, post=0.0, hand=0.0, divided=1.0, convolved=1.0,
    host=0.0, places=0, memory=0, source="made up",
)  # fmt: skip
FAST = Links("fast", Link(0.0, 1e15), Link(0.0, 1e15), 8, 1.0, "made up")
SLOW = Links("slow", Link(1e-3, 1e6), Link(1e-3, 1e6), 8, 0.0, "made up")


def unet(others: int = 0) -> Blueprint:
    return of_config("tiny", UNet2DConditionModel, dict(sdxl_unet().config), torch.float32, others)


def flux() -> Blueprint:
    model = FAMILIES["FLUX.1 dev"].make()
    return of_config("tiny flux", type(model), dict(model.config), torch.float32)


def costs(size: int = 160) -> Costs:
    blueprint = unet()
    return Costs(blueprint, blueprint.arguments(size, size))


COSTS = costs()
