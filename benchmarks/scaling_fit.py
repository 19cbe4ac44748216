"""Fits the constants of the cost model to half of the published rows, and predicts the other half.

    python benchmarks/scaling_fit.py --work DIR     # prints every row, writes benchmarks/results/scaling_fit.json

The published seconds of one device are inputs: a device's rates are such that an undivided call takes them. Fitted
are what a kernel of a layer costs beside its operations (`layer`), by how much a divided call of SDXL is slower than
its share of the work (`convolved`), bandwidths of NVLink and PCIe, the latency of a wait, the share of overlap that is
gained, the seconds of a PixArt picture outside the denoiser on an A100 (`outside`: the prompt, as its authors' script
stops at latents if nothing else is said), and the seconds that the host takes to start a kernel where nothing is
captured (`host`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

from published import ROWS, Row, blueprint
from published_cuts import published_components
from scaling_work import Shelf

from distrifusion import Plan
from distrifusion.planner.costs import Costs
from distrifusion.planner.links import PROFILES, Link, Links
from distrifusion.planner.prediction import Prediction, predict
from distrifusion.planner.speeds import DEVICES, Speed

# Rounded results of this script; links.py and speeds.py hold those that a user's predictions take.
OUTSIDE = 0.11
HOST = 24e-6
_BRIDGE = 56.25 / 300  # nominal rate each way of the NVLink bridge between two A5000 to that of an A100's links
RESULT = Path(__file__).parent / "results" / "scaling_fit.json"
_BOUNDS = {
    "layer": (1e-6, 6e-5),
    "convolved": (1.0, 1.3),
    "nvlink": (3e10, 3e11),
    "pcie": (2e9, 2.5e10),
    "latency": (5e-6, 1e-4),
    "overlap": (0.0, 1.0),
    "outside": (0.0, 0.5),
    "host": (1e-6, 1e-4),
}
_SMALLEST_STEP = 1e-3
_LEAST_GAIN = 1e-3  # of the loss, by a step: without it the search creeps along constants that do nearly the same


@dataclass(frozen=True)
class Constants:
    """What is fitted; seconds, bytes per second, shares."""

    layer: float
    convolved: float
    nvlink: float
    pcie: float
    latency: float
    overlap: float
    outside: float
    host: float

    @classmethod
    def held(cls) -> Constants:
        """Those that the package holds, and of this script what belongs to the published implementations alone."""
        a100, nvlink, pcie = DEVICES["a100"], PROFILES["nvlink-a100"], PROFILES["pcie4"]
        return cls(
            a100.layer, a100.convolved, nvlink.within.bandwidth, pcie.within.bandwidth, nvlink.within.latency,
            nvlink.overlap, OUTSIDE, HOST,
        )  # fmt: skip

    def links(self, profile: str) -> Links:
        """A profile with these constants."""
        bandwidth = {"pcie4": self.pcie, "nvlink-a100": self.nvlink, "nvlink-a5000": self.nvlink * _BRIDGE}[profile]
        return replace(
            PROFILES["nvlink-a100"], name=profile, within=Link(self.latency, bandwidth), overlap=self.overlap
        )

    def speed(self, row: Row) -> Speed:
        """The row's device with these constants; DistriFusion's calls of SDXL are captured, the others' are not."""
        host = 0.0 if row.kind == "sdxl" else self.host
        return replace(DEVICES[row.device], layer=self.layer, convolved=self.convolved, host=host)

    def outside_of(self, row: Row) -> float:
        """Seconds outside the denoiser: of a prompt, whatever the pixels, and slower on a slower device."""
        if row.model != "pixart":
            return 0.0
        rates = [next(iter(DEVICES[name].rates.values())) for name in ("a100", row.device)]
        return self.outside * rates[0] / rates[1]


def prediction_of(row: Row, constants: Constants, shelf: Shelf) -> Prediction:
    """What the model says of a published row; of plans that were searched through, the fastest."""
    outside = constants.outside_of(row)
    costs = _cut(row) if row.kind == "components" else shelf.costs(row.model, row.size, "patch1", *row.plans)
    alone = costs.of(Plan()).steady.operations
    speed = constants.speed(row).made_to_take((row.alone - outside) / row.steps, alone)
    links = constants.links(row.profile)
    found = [predict(costs, Plan.parse(plan), speed, links, row.steps, outside) for plan in row.plans]
    best = min(found, key=lambda prediction: prediction.per_picture)
    if row.kind != "components":
        return best
    # In the warm-up every device runs all of it.
    return replace(best, fresh=predict(costs, Plan(), speed, links, row.steps, outside).fresh)


@cache
def _cut(row: Row) -> Costs:
    """The costs of a row in components by the published cut."""
    plan, model = Plan.parse(row.plans[0]), blueprint(row.model)
    costs = Costs(model, model.arguments(row.size, row.size))
    costs.put(plan, published_components(costs, plan.components))
    return costs


def loss(constants: Constants, shelf: Shelf) -> float:
    """Sum of squared logarithms of predicted to published, over the rows that are fitted on."""
    ratios = (prediction_of(row, constants, shelf).per_picture / row.seconds for row in ROWS if row.fitted)
    return sum(math.log(ratio) ** 2 for ratio in ratios)


def fit(shelf: Shelf) -> Constants:
    """Change one constant at a time for as long as that helps noticeably, by smaller and smaller steps.

    Eight constants and 17 rows: a search that goes on to the least loss fits what is particular to these rows.
    """
    best = Constants(20e-6, 1.08, 100e9, 7e9, 20e-6, 0.5, 0.15, 10e-6)
    least, steps = loss(best, shelf), dict.fromkeys(_BOUNDS, 0.3)
    while max(steps.values()) > _SMALLEST_STEP:
        for name, (low, high) in _BOUNDS.items():
            for factor in (1 + steps[name], 1 / (1 + steps[name])):
                value = min(max(getattr(best, name) * factor, low), high)
                changed = replace(best, **{name: value})
                if (now := loss(changed, shelf)) < least * (1 - _LEAST_GAIN):
                    best, least = changed, now
                    break
            else:
                steps[name] /= 2
    return best


def table(constants: Constants, shelf: Shelf) -> list[str]:
    """Published against predicted, as Markdown."""
    lines = [
        "| model | pixels | nearest plan | devices | links | alone, s | published | predicted | off by | row |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        best = prediction_of(row, constants, shelf)
        said, plan = best.per_picture, f"`{best.plan}`"
        if row.kind == "components":
            plan = f"AsyncDiff's own {best.plan.components} components"
        use = "fitted" if row.fitted else "**held out**"
        lines.append(
            f"| {row.model} | {row.size} | {plan} | {best.plan.num_ranks} {row.device.upper()} | {row.profile} | "
            f"{row.alone} | {row.seconds} | {said:.3g} | {said / row.seconds - 1:+.0%} | {use} |"
        )
    return lines


def spread(rows: Sequence[Row], constants: Constants, shelf: Shelf) -> tuple[float, float]:
    """The largest relative error of some rows, and the median."""
    errors = [abs(prediction_of(row, constants, shelf).per_picture / row.seconds - 1) for row in rows]
    return max(errors), median(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what was rehearsed")
    shelf = Shelf(parser.parse_args().work)
    now = fit(shelf)
    RESULT.write_text(json.dumps({key: float(f"{value:.4g}") for key, value in asdict(now).items()}, indent=1))
    for name, constants in (("fitted now", now), ("held by the package", Constants.held())):
        print(name, asdict(constants))
        print("\n".join(table(constants, shelf)))


if __name__ == "__main__":
    main()
