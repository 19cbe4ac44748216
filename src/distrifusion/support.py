"""What is supported: one line for everything that a passing test proves, written by the test suite."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

# Area -> its heading, in the order in which a user asks.
AREAS = {
    "pipeline": "Pipelines",
    "transformer": "Diffusion transformers",
    "adapter": "Adapters",
    "feature": "Features of diffusers",
    "server": "The server",
    "sampler": "Pipelines that solve many steps together",
    "scheduler": "Schedulers",
    "plan": "Plans",
    "dtype": "Types of numbers",
}


@dataclass(frozen=True)
class Line:
    """One line of the support matrix.

    Attributes:
        area: a key of `AREAS`.
        name: what is supported, as a user would say it.
        proofs: number of passing tests that show it, at least 1.
    """

    area: str
    name: str
    proofs: int


def matrix() -> tuple[Line, ...]:
    """All lines, by area and name."""
    text = resources.files("distrifusion").joinpath("support.json").read_text(encoding="utf-8")
    return tuple(Line(**row) for row in json.loads(text))
