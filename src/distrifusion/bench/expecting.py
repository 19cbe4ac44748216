"""What is known of cases before they run: bytes and memory by rehearsal, predicted seconds, and what `auto` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distrifusion.bench.cases import AUTO, PLAIN, Case
from distrifusion.bench.measuring import Order
from distrifusion.errors import DistrifusionError
from distrifusion.plan import Plan
from distrifusion.planner import auto
from distrifusion.planner.blueprint import open_blueprint
from distrifusion.planner.calibration import calibrated
from distrifusion.planner.candidates import Fidelity
from distrifusion.planner.choice import rank
from distrifusion.planner.costs import Costs
from distrifusion.planner.prediction import predict


class Expectations:
    """Predictions for the cases of one model on this machine.

    Args:
        order: what is drawn.
        wish: how near `auto` is to be.

    Raises:
        ConfigError, UnsupportedModel: if the model cannot be rehearsed.
    """

    def __init__(self, order: Order, wish: Fidelity) -> None:
        dtype = order.keywords.get("dtype", order.keywords.get("torch_dtype"))
        guidance = order.call.get("guidance_scale")
        self._blueprint = open_blueprint(order.model, dtype or auto.FLOAT32, guidance is None or guidance > 1)
        self._machine = calibrated(self._blueprint, order.where[0], order.threads, len(order.where))
        self._steps = order.call["num_inference_steps"]
        self._wish = wish
        self._costs: dict[tuple[int, int], Costs] = {}

    def chosen(self, case: Case) -> Case:
        """The case with the plan that draws: for `auto` the predicted best."""
        if case.label != AUTO:
            return case
        found = self._machine
        ranking = rank(
            self._of(case.size), auto.counts_of(case.devices), self._wish, found.speed, found.links, self._steps,
        )  # fmt: skip
        return replace(case, plan=ranking.chosen.plan)

    def of(self, case: Case) -> dict[str, Any]:
        """What is expected of a case; empty where a call of several pictures, or a plan, cannot be rehearsed."""
        if case.pictures > 1:
            return {}
        plan = case.plan or Plan()
        try:
            found = predict(self._of(case.size), plan, self._machine.speed, self._machine.links, self._steps)
        except DistrifusionError:
            return {}
        memory = found.memory
        counted: dict[str, Any] = {"kept": memory.kept, "grown": memory.grown, "memory": memory.total}
        if case.label != PLAIN:
            counted["sent_per_step"] = found.sent
        return {**counted, "per_step": found.per_step, "per_picture": found.per_picture}

    def _of(self, size: tuple[int, int]) -> Costs:
        if size not in self._costs:
            self._costs[size] = Costs.of_size(self._blueprint, *size)
        return self._costs[size]
