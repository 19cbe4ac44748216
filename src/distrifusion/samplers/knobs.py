"""What can be chosen of a solver of the whole trajectory, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from distrifusion.errors import ConfigError
from distrifusion.samplers.tableau import Split


class Method(StrEnum):
    """How states move to where the steps are solved."""

    PICARD = "picard"  # ParaDiGMS: to what the unrolled steps say
    TAA = "taa"  # ParaTAA: there, corrected by what earlier moves did


# A residual is not an error: these leave about 1e-3 of the sample's size.
TOLERANCES = {Split.DATA: 3e-5, Split.NOISE: 1e-4, Split.DELTA: 3e-5}
DEFAULT_MEMORY = 3
DEFAULT_REGULARISATION = 1e-3


@dataclass(frozen=True)
class Knobs:
    """Choices for `solve`.

    Attributes:
        window: steps whose states move at the same time; None: all.
        order: steps that are unrolled into one equation; None: the window.
        memory: iterates that Anderson acceleration looks at, the present one included; 1 is Picard's iteration.
        split: what is unrolled.
        tolerance: a step is solved when its residual is below this, as root mean square against the state's size;
            0 moves on by exactly one step a call unless a residual is exactly zero. None: by split, see `TOLERANCES`.
        noise_tolerance: a step is solved, too, when its residual is below this share of the noise that DDPM would add
            there (ParaDiGMS); 0 leaves that out.
        regularisation: of the acceleration's least squares, relative to their matrix.
        safeguard: the first unsolved step and those before it are not accelerated, so that each call makes at least
            one step exact. Off only to show what it is for.
        max_calls: ends with the best estimate after so many denoiser calls; None never does.
        hits: successive small residuals after which a step is solved. 2 where evaluations use values that are one call
            old: a small residual may then be an old one, no call makes a step exact, and a run ends after as many calls
            as there are steps.
        fixed: a step's row has the same place in every call, so that what is kept for a place is that of the same step,
            one call ago, but for rows that enter. Every call then has all rows of the window, solved ones too.

    Raises:
        ConfigError: on a value out of range.
    """

    window: int | None = None
    order: int | None = None
    memory: int = DEFAULT_MEMORY
    split: Split = Split.DATA
    tolerance: float | None = None
    noise_tolerance: float = 0.0
    regularisation: float = DEFAULT_REGULARISATION
    safeguard: bool = True
    max_calls: int | None = None
    hits: int = 1
    fixed: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "order", "max_calls", "memory", "hits"):
            value = getattr(self, name)
            if (value is not None or name in ("memory", "hits")) and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        for name in ("tolerance", "noise_tolerance", "regularisation"):
            value = getattr(self, name)
            if (value is not None or name != "tolerance") and not _is_size(value):
                raise ConfigError(f"{name}={value!r} must be a finite number of at least 0")
        if self.split not in tuple(Split):
            raise ConfigError(f"split={self.split!r} is unknown; it is one of {', '.join(Split)}")
        object.__setattr__(self, "split", Split(self.split))

    @property
    def bound(self) -> float:
        """The tolerance."""
        return TOLERANCES[self.split] if self.tolerance is None else self.tolerance

    def for_steps(self, num_steps: int) -> Knobs:
        """The same with the window, order and most calls that None stands for.

        Raises:
            ConfigError: if the window is larger than the number of steps, or the order than the window.
        """
        if self.window is not None and self.window > num_steps:
            raise ConfigError(f"window={self.window} is more than the {num_steps} steps; use at most {num_steps}")
        window = self.window or num_steps
        if self.order is not None and self.order > window:
            raise ConfigError(f"order={self.order} unrolls more steps than the window of {window} has; use at most it")
        most = self.max_calls or (num_steps if self.hits > 1 else None)
        return replace(self, window=window, order=self.order or window, max_calls=most)


def knobs_of(method: Method, **given: Any) -> Knobs:
    """The knobs of a method.

    Raises:
        ConfigError: on a value out of range, or a memory for Picard's iteration, which has none.
    """
    if method is Method.PICARD:
        if given.get("memory", 1) != 1:
            raise ConfigError(f"memory={given['memory']!r} is of sampler='taa'; Picard's iteration has none")
        given = {**given, "memory": 1}
    return Knobs(**given)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
