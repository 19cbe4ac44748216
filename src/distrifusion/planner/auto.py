"""`plan="auto"`: the fastest plan on the devices at hand that keeps a wish."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distrifusion.errors import ConfigError
from distrifusion.planner.blueprint import Blueprint, open_blueprint
from distrifusion.planner.calibration import calibrated
from distrifusion.planner.candidates import Fidelity
from distrifusion.planner.choice import Ranking, rank
from distrifusion.planner.costs import Costs
from distrifusion.runtime.devices import threads_per_rank

AUTO = "auto"
FLOAT32 = torch.float32  # what diffusers takes where no dtype is said
_STEPS = 30  # where nobody says how many


def counts_of(num_devices: int) -> list[int]:
    """Numbers of devices that are weighed: all, their divisors, and the largest power of two among them.

    Of three devices two can be faster: branches of guidance, or two bands of a picture that three do not divide.
    """
    power = 1 << max(num_devices, 1).bit_length() - 1
    return [n for n in range(1, num_devices + 1) if num_devices % n == 0 or n == power]


def fidelity(word: str | Fidelity) -> Fidelity:
    """The wish by its word; raises ConfigError on an unknown one."""
    if word not in tuple(Fidelity):
        raise ConfigError(f"fidelity '{word}' is unknown; it is one of {', '.join(Fidelity)}")
    return Fidelity(word)


def model_size(blueprint: Blueprint) -> tuple[int, int]:
    """Width and height in pixels that the denoiser was made for."""
    config: Any = blueprint.denoiser.config
    size = getattr(config, "sample_size", None) or 128
    rows, columns = size if isinstance(size, Sequence) else (size, size)
    rows, columns = getattr(config, "sample_height", rows), getattr(config, "sample_width", columns)
    return int(columns) * blueprint.factor, int(rows) * blueprint.factor


def choose(
    source: object,
    where: Sequence[torch.device],
    *,
    wish: str | Fidelity = Fidelity.EXACT,
    size: tuple[int, int] | None = None,
    steps: int = _STEPS,
    guided: bool = True,
    threads: int | None = None,
    keywords: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Ranking:
    """Weigh the plans for some devices of this machine.

    Args:
        source: "demo", a folder or a hub id.
        where: the devices that may be used.
        wish: "exact", "close" or "any".
        size: width and height in pixels; None: those the model was made for.
        steps: denoising steps of a picture.
        guided: whether the pictures are drawn with guidance.
        threads: CPU threads of every rank.
        keywords: those of `from_pretrained`, of which the dtype matters here.
        say: is told when the machine is measured anew.

    Raises:
        ConfigError, UnsupportedModel: if nothing can be known of the model before it is opened.
    """
    wanted = fidelity(wish)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError("plan='auto' reads configurations before weights, and a function has none; name a plan")
    given = keywords or {}
    dtype = given.get("dtype", given.get("torch_dtype", FLOAT32))
    blueprint = open_blueprint(os.fspath(source), dtype, guided)
    costs = Costs.of_size(blueprint, *(size or model_size(blueprint)))
    found = calibrated(blueprint, where[0], threads or threads_per_rank(where), len(where))
    for name, before in found.stale.items():
        say(f"the calibration was made with {name} {before}; measured again")
    return rank(costs, counts_of(len(where)), wanted, found.speed, found.links, steps)
