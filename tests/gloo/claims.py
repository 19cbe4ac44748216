"""Lines of the support matrix that a run of a pipeline proves."""

from __future__ import annotations

import re

import pytest

_PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd": "StableDiffusionPipeline"}
_SCHEDULERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler ancestral",
    "dpmpp_2m": "DPM++ 2M Karras",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "heun": "Heun",
    "pndm": "PNDM",
    "pndm_prk": "PNDM with Runge-Kutta start",
    "lcm": "LCM",
    "unipc": "UniPC",
}


def claims(family: str, scheduler: str, plan: str) -> list[pytest.MarkDecorator]:
    """Markers for a run in fp32 that equals one device, or is near it where the plan is displaced."""
    form = re.sub(r"patch(?!1\b)\d+", "patch<N>", plan)
    lines = [
        ("pipeline", _PIPELINES[family]),
        ("scheduler", _SCHEDULERS[scheduler]),
        ("plan", form),
        ("dtype", "float32"),
    ]
    return [pytest.mark.supports(*line) for line in lines]
