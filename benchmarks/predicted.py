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

_MARKERS = "osD^"


@dataclass(frozen=True)
class Point:
    """One row.

    Attributes:
        measured, predicted: seconds of a step.
        picture: the same of a whole picture, measured and predicted.
        runs: measured seconds of a step, run by run.
    """

    model: str
    size: str
    case: str
    plan: str
    measured: float
    predicted: float
    picture: tuple[float, float]
    runs: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative, of a step."""
        return self.predicted / self.measured - 1


def read(file: Path) -> list[Point]:
    """Rows that were measured and predicted."""
    document = json.loads(file.read_text(encoding="utf-8"))
    model = document["circumstances"]["command"].split()[2]
    pairs = zip(document["rows"], document["runs"], strict=True)
    return [
        Point(
            model, row["size"], row["case"], row["plan"], row["per_step"], row["predicted_per_step"],
            (row["per_picture"], row["predicted_per_picture"]), tuple(run["per_step"] for run in runs["runs"]),
        )
        for row, runs in pairs
        if row["status"] == "ok" and row["predicted_per_step"]
    ]  # fmt: skip


def choices(points: Sequence[Point]) -> list[tuple[str, str, float, str, float]]:
    """For each model and size: the plan predicted to be fastest, and the one measured to be faster than it by most.

    With both: by how much the chosen plan is slower, by the medians of all runs, and by the median over turns of the
    ratio within a turn, which a machine that changes from turn to turn leaves as it is. Runs of rows of one plan are
    put together: they differ by chance alone.
    """
    found = []
    for model, size in dict.fromkeys((p.model, p.size) for p in points):
        own = [p for p in points if (p.model, p.size) == (model, size) and p.plan]
        # By plan: the mean of its rows in every turn, and all runs.
        rows = {plan: [p.runs for p in own if p.plan == plan] for plan in {p.plan for p in own}}
        turns = {plan: [statistics.mean(turn) for turn in zip(*runs, strict=True)] for plan, runs in rows.items()}
        medians = {plan: statistics.median(run for row in runs for run in row) for plan, runs in rows.items()}
        chosen, best = min(own, key=lambda p: p.predicted).plan, min(medians, key=lambda plan: medians[plan])
        ratios = (zip(turns[chosen], turns[plan], strict=True) for plan in turns)
        by_turns = max(statistics.median(ours / theirs for ours, theirs in pairs) for pairs in ratios)
        found.append((f"{model} {size}", chosen, medians[chosen] / medians[best] - 1, best, by_turns - 1))
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
    handles += [
        axes.plot([], [], _MARKERS[i], color="black", markerfacecolor="none", label=m, **blank)[0]
        for i, m in enumerate(models)
    ]
    handles.append(axes.fill_between([], [], [], color="black", alpha=0.08, label="within 15 %"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _report(what: str, errors: Sequence[float]) -> None:
    within = sum(error <= 0.15 for error in errors)
    worst = f"largest {max(errors):.0%}, {within} within 15 %"
    print(f"{len(errors)} rows, {what}: median error {statistics.median(errors):.1%}, {worst}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="bench.json of one or several runs")
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    points = [point for file in words.files for point in read(file)]
    for p in points:
        told = f"{1e3 * p.measured:.1f} ms, predicted {1e3 * p.predicted:.1f} ({p.error:+.0%})"
        print(f"{p.model} {p.size} {p.case}: {told}")
    _report("steps", [abs(p.error) for p in points])
    _report("pictures", [abs(p.picture[1] / p.picture[0] - 1) for p in points])
    for where, chosen, slower, best, by_turns in choices(points):
        print(f"{where}: predicted best {chosen}, {slower:.1%} slower than {best}; turn by turn {by_turns:.1%}")
    draw(points, words.out)


if __name__ == "__main__":
    main()
