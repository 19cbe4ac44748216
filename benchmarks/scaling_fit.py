"""Fits the constants of the cost model to half of the published rows, and predicts the other half.

    python benchmarks/scaling_fit.py --work DIR     # prints every row, writes benchmarks/results/scaling_fit.json

The published seconds of one device are inputs: a device's rates are such that an undivided call takes them. Fitted are
what a kernel of a layer costs beside its operations (`layer`), by how much a divided call is slower than its share of
the work (`divided`), bandwidths of NVLink and PCIe, the latency of a wait, the share of overlap that is gained, and the
seconds of a PixArt picture outside the denoiser (`outside`), which are no smaller on more devices.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from published import ROWS, Row
from scaling_work import Shelf

from distrifusion import Plan
from distrifusion.planner.links import PROFILES, Link, Links
from distrifusion.planner.prediction import Prediction, predict
from distrifusion.planner.speeds import DEVICES, Speed

# Rounded results of this script; links.py and speeds.py hold those that a user's predictions take.
OUTSIDE = 0.28
RESULT = Path(__file__).parent / "results" / "scaling_fit.json"
_BOUNDS = {
    "layer": (1e-6, 6e-5),
    "divided": (1.0, 1.3),
    "nvlink": (3e10, 3e11),
    "pcie": (2e9, 2.5e10),
    "latency": (5e-6, 1e-4),
    "overlap": (0.0, 1.0),
    "outside": (0.0, 0.5),
}
_SMALLEST_STEP = 1e-3


@dataclass(frozen=True)
class Constants:
    """What is fitted; seconds, bytes per second, shares."""

    layer: float
    divided: float
    nvlink: float
    pcie: float
    latency: float
    overlap: float
    outside: float

    @classmethod
    def held(cls) -> Constants:
        """Those that the package holds."""
        a100, nvlink, pcie = DEVICES["a100"], PROFILES["nvlink-a100"], PROFILES["pcie4"]
        return cls(
            a100.layer, a100.divided, nvlink.within.bandwidth, pcie.within.bandwidth, nvlink.within.latency,
            nvlink.overlap, OUTSIDE,
        )  # fmt: skip

    def links(self, profile: str) -> Links:
        """A profile with these constants."""
        bandwidth = self.nvlink if profile.startswith("nvlink") else self.pcie
        return replace(PROFILES[profile], within=Link(self.latency, bandwidth), overlap=self.overlap)

    def speed(self, device: str) -> Speed:
        """A device with these constants."""
        return replace(DEVICES[device], layer=self.layer, divided=self.divided)

    def outside_of(self, row: Row) -> float:
        """Seconds outside the denoiser: with the pixels, and slower on a slower device."""
        if row.model != "pixart":
            return 0.0
        rates = [next(iter(DEVICES[name].rates.values())) for name in ("a100", row.device)]
        return self.outside * (row.size / 1024) ** 2 * rates[0] / rates[1]


def prediction_of(row: Row, constants: Constants, shelf: Shelf) -> Prediction:
    """What the model says of a published row."""
    plan = Plan.parse(row.plan)
    costs = shelf.costs(row.model, row.size, "patch1", row.plan)
    outside = constants.outside_of(row)
    alone = costs.of(Plan()).steady.operations
    speed = constants.speed(row.device).made_to_take((row.alone - outside) / row.steps, alone)
    return predict(costs, plan, speed, constants.links(row.profile), row.steps, outside)


def loss(constants: Constants, shelf: Shelf) -> float:
    """Sum of squared logarithms of predicted to published, over the rows that are fitted on."""
    ratios = (prediction_of(row, constants, shelf).per_picture / row.seconds for row in ROWS if row.fitted)
    return sum(math.log(ratio) ** 2 for ratio in ratios)


def fit(shelf: Shelf) -> Constants:
    """Change one constant at a time for as long as that helps, by smaller and smaller steps."""
    best = Constants(20e-6, 1.08, 100e9, 7e9, 20e-6, 0.5, 0.15)
    least, steps = loss(best, shelf), dict.fromkeys(_BOUNDS, 0.3)
    while max(steps.values()) > _SMALLEST_STEP:
        for name, (low, high) in _BOUNDS.items():
            for factor in (1 + steps[name], 1 / (1 + steps[name])):
                value = min(max(getattr(best, name) * factor, low), high)
                changed = replace(best, **{name: value})
                if (now := loss(changed, shelf)) < least:
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
        said = prediction_of(row, constants, shelf).per_picture
        devices = f"{Plan.parse(row.plan).num_ranks} {row.device.upper()}"
        use = "fitted" if row.fitted else "**held out**"
        lines.append(
            f"| {row.model} | {row.size} | `{row.plan}` | {devices} | {row.profile} | {row.alone} | "
            f"{row.seconds} | {said:.3g} | {said / row.seconds - 1:+.0%} | {use} |"
        )
    return lines


def worst(rows: Sequence[Row], constants: Constants, shelf: Shelf) -> float:
    """The largest relative error of some rows."""
    return max(abs(prediction_of(row, constants, shelf).per_picture / row.seconds - 1) for row in rows)


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
