"""How far predictions were off: a plot of predicted against measured, and what was lost by choosing by prediction.

    python benchmarks/predicted.py benchmarks/results/bench_demo.json benchmarks/results/bench_demo_dit.json \\
        --out docs/images/predicted-against-measured.webp

Reads what `distrifusion bench` wrote. No row was used to make a prediction: a calibration measures kernels, messages
and single calls before the rows run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARKERS = "osD^"


@dataclass(frozen=True)
class Point:
    """One row: seconds of a step."""

    model: str
    size: str
    devices: int
    case: str
    plan: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


def read(file: Path) -> list[Point]:
    """Rows that were measured and predicted."""
    document = json.loads(file.read_text(encoding="utf-8"))
    model = document["circumstances"]["command"].split()[2]
    rows = [row for row in document["rows"] if row["status"] == "ok" and row["predicted_per_step"]]
    return [_point(model, row) for row in rows]


def _point(model: str, row: dict[str, Any]) -> Point:
    found = (row["size"], row["devices"], row["case"], row["plan"], row["per_step"], row["predicted_per_step"])
    return Point(model, *found)


def choices(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """For each model and size: the measured row of the plan that is predicted to be fastest, and the fastest row."""
    found = []
    for key in dict.fromkeys((p.model, p.size) for p in points):
        own = [p for p in points if (p.model, p.size) == key and p.case != "auto"]
        found.append((min(own, key=lambda p: p.predicted), min(own, key=lambda p: p.measured)))
    return found


def draw(points: Sequence[Point], out: Path) -> None:
    """Colours are plans, markers are models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, cases = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("model", "case"))
    figure, axes = plt.subplots(figsize=(7.4, 5.6), layout="constrained")
    for point in points:
        marker, color = _MARKERS[models.index(point.model)], f"C{cases.index(point.case)}"
        axes.plot(point.measured, point.predicted, marker, color=color, markersize=6, alpha=0.8)
    values = [v for p in points for v in (p.measured, p.predicted)]
    ends = (0.8 * min(values), 1.25 * max(values))
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="black", alpha=0.08)
    axes.set(xscale="log", yscale="log", xlabel="measured, seconds of a step", ylabel="predicted, seconds of a step")
    ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5) if ends[0] <= m * 10.0**e <= ends[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    blank = {"linestyle": "", "markersize": 6}
    handles = [axes.plot([], [], "o", color=f"C{i}", label=case, **blank)[0] for i, case in enumerate(cases)]
    handles += [axes.plot([], [], _MARKERS[i], color="gray", label=m, **blank)[0] for i, m in enumerate(models)]
    handles.append(axes.fill_between([], [], [], color="black", alpha=0.08, label="within 15 %"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="bench.json of one or several runs")
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    points = [point for file in words.files for point in read(file)]
    for p in points:
        told = f"{1e3 * p.measured:.1f} ms, predicted {1e3 * p.predicted:.1f} ({p.error:+.0%})"
        print(f"{p.model} {p.size} {p.case}: {told}")
    errors = [abs(p.error) for p in points]
    within = sum(error <= 0.15 for error in errors)
    print(
        f"{len(points)} rows: median error {statistics.median(errors):.1%}, largest {max(errors):.0%}, {within} in 15 %"
    )
    for chosen, best in choices(points):
        loss = chosen.measured / best.measured - 1
        print(f"{chosen.model} {chosen.size}: predicted best {chosen.case}, {loss:.1%} slower than {best.case}")
    draw(points, words.out)


if __name__ == "__main__":
    main()
