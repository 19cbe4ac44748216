"""The fastest plan that keeps a wish, and why; never one that is slower than one device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distrifusion.errors import ConfigError, DistrifusionError
from distrifusion.memory.free import size_in_words
from distrifusion.plan import Plan
from distrifusion.planner.candidates import Fidelity, fidelity_of, plans
from distrifusion.planner.costs import Costs
from distrifusion.planner.links import Links
from distrifusion.planner.outside import LeftOut
from distrifusion.planner.prediction import Prediction, predict
from distrifusion.planner.speeds import Speed

# A plan must be predicted to be faster by this much than a simpler one to be taken in its place.
_MARGIN = 1.02


@dataclass(frozen=True)
class Refused:
    """A plan that is out of the question, and why."""

    plan: str
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Plans by predicted seconds of a picture.

    Attributes:
        predictions: the fastest first.
        refused: plans that cannot be taken.
        alone: one device.
        chosen: what is taken.
        left_out: parts of the pipeline whose seconds are in no prediction.
    """

    predictions: tuple[Prediction, ...]
    refused: tuple[Refused, ...]
    alone: Prediction
    chosen: Prediction
    left_out: tuple[LeftOut, ...] = ()

    def speedup(self, prediction: Prediction) -> float:
        """Over one device, whole pictures."""
        return self.alone.per_picture / prediction.per_picture

    @property
    def reason(self) -> str:
        """Why the chosen plan was taken."""
        if self.chosen.plan.num_ranks == 1:
            tried = next((p for p in self.predictions if p.plan.num_ranks > 1), None)
            if tried is None:
                return "one device: no plan divides the model over more of them"
            word = "fastest" if self.speedup(tried) <= 1 else f"as fast to {_MARGIN - 1:.0%}, and simpler"
            return (
                f"one device is {word}: the best plan of several, '{tried.plan}', is predicted at "
                f"{self.speedup(tried):.2f}x, limited by {tried.limit}"
            )
        exactly = "exact" if self.chosen.plan.exact else f"not exact ({fidelity_of(self.chosen.plan)})"
        return (
            f"'{self.chosen.plan}' is predicted at {self.speedup(self.chosen):.2f}x one device, {exactly}, "
            f"limited by {self.chosen.limit}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {**p.as_dict(), "speedup": self.speedup(p), "fidelity": str(fidelity_of(p.plan))} for p in self.predictions
        ]
        return {
            "chosen": str(self.chosen.plan),
            "reason": self.reason,
            "predicted": True,
            "plans": rows,
            "refused": [{"plan": r.plan, "reason": r.reason} for r in self.refused],
            "left_out": [{"part": left.part, "reason": left.reason} for left in self.left_out],
        }


def rank(
    costs: Costs,
    counts: Iterable[int],
    wish: Fidelity,
    speed: Speed,
    links: Links,
    steps: int,
    *,
    pictures: int = 1,
    outside: float | None = None,
) -> Ranking:
    """Predict all plans for some numbers of devices and take one.

    Args:
        costs: of the model and size.
        counts: numbers of devices that may be used.
        wish: how near the pictures are to be.
        speed, links: of the devices.
        steps: of a picture, at least 1.
        pictures: of one call.
        outside: seconds of a picture outside the denoiser; None: as far as they are known.

    Raises:
        ConfigError: if a number cannot work, or even one device has not enough memory.
    """
    if steps < 1:
        raise ConfigError(f"{steps} steps: at least one is taken")
    alone = predict(costs, Plan(), speed, links, steps, outside)
    predictions, refused = [], []
    for plan in _all_plans(costs, {1, *counts}, wish, pictures):
        try:
            prediction = alone if plan == Plan() else predict(costs, plan, speed, links, steps, outside)
        except DistrifusionError as error:
            refused.append(Refused(str(plan), str(error)))
            continue
        if speed.memory and prediction.memory.total > speed.memory:
            needs, has = (size_in_words(n) for n in (prediction.memory.total, speed.memory))
            refused.append(Refused(str(plan), f"needs {needs} a device and {speed.name} has {has}"))
        else:
            predictions.append(prediction)
    if not predictions:
        raise ConfigError(f"no plan fits: {refused[0].reason}; draw a smaller picture, or in half precision")
    predictions.sort(key=lambda p: p.per_picture)
    left_out = costs.left_out() if outside is None else ()
    return Ranking(tuple(predictions), tuple(refused), alone, _choose(predictions), left_out)


def _all_plans(costs: Costs, counts: set[int], wish: Fidelity, pictures: int) -> list[Plan]:
    model = costs.blueprint.denoiser
    return [plan for n in sorted(counts) for plan in plans(model, n, costs.num_rows, wish, pictures)]


def _choose(predictions: Sequence[Prediction]) -> Prediction:
    """The fastest; of those as fast within the margin, one device before several, then an exact one before others."""
    near = [p for p in predictions if p.per_picture <= _MARGIN * predictions[0].per_picture]
    return min(near, key=lambda p: (p.plan.num_ranks > 1, not p.plan.exact, p.per_picture))
