"""The tables and the plot of parallel_in_time.py, from its rows."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from distrifusion.samplers.knobs import Method
from distrifusion.samplers.tableau import Split

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
_PLOT = _ROOT / "docs" / "images" / "parallel-in-time.webp"
_NEAR = 1e-3
Row = dict[str, Any]


def calls_within(distances: list[float], bound: float) -> int | None:
    """The first call from which on all estimates are within a bound; None if there is none."""
    far = [i for i, distance in enumerate(distances) if not distance <= bound]
    first = far[-1] + 1 if far else 0
    return first + 1 if first < len(distances) else None


def report_digits(rows: list[Row]) -> None:
    """Calls, rows evaluated and the worst distance of every split and method; then windows."""
    print("| steps | split | calls, Picard | TAA | rows, Picard | TAA | calls to 1e-3, Picard | TAA | worst distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    whole = [row for row in rows if row["window"] is None]
    for key in dict.fromkeys((row["scheduler"], row["steps"], row["split"]) for row in whole):
        own = [row for row in whole if (row["scheduler"], row["steps"], row["split"]) == key]
        print(f"| {key[0].upper()}-{key[1]} | {key[2]} | {_cells(own)} | {max(r['distances'][-1] for r in own):.0e} |")
    print()
    print("| DDIM-100, window | calls, Picard | TAA | rows, Picard | TAA | calls to 1e-3, Picard | TAA |")
    print("|---|---|---|---|---|---|---|")
    wide = [row for row in rows if (row["scheduler"], row["steps"], row["split"]) == ("ddim", 100, "data")]
    for window in (10, 20, 50, None):
        print(f"| {window or 'all'} | {_cells([row for row in wide if row['window'] == window])} |")


def _cells(rows: list[Row]) -> str:
    """Medians over seeds of Picard and TAA side by side: calls, rows, calls until near."""
    measures = (
        lambda row: row["calls"],
        lambda row: row["rows"],
        lambda row: calls_within(row["distances"], _NEAR) or row["calls"],
    )
    cells = [
        f"{statistics.median(measure(row) for row in rows if row['method'] == method):g}"
        for measure in measures
        for method in Method
    ]
    return " | ".join(cells)


def report_demo(rows: list[Row]) -> None:
    """Calls until the picture is near, for every window."""
    print("| steps | window | method | calls | rows | calls to 30 dB | 40 dB | distance 1e-3 | worst distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["steps"], row["window"], row["method"]) for row in rows):
        own = [row for row in rows if (row["steps"], row["window"], row["method"]) == key]
        counts = [statistics.median(row[name] for row in own) for name in ("calls", "rows")]
        for bound in (30, 40):
            counts.append(statistics.median(calls_within([-d for d in row["psnr"]], -bound) or 999 for row in own))
        counts.append(statistics.median(calls_within(row["distances"], _NEAR) or 999 for row in own))
        window = "all" if key[0] == key[1] else key[1]
        cells = " | ".join("-" if count >= 999 else f"{count:g}" for count in counts)
        print(f"| {key[0]} | {window} | {key[2]} | {cells} | {max(row['distances'][-1] for row in own):.0e} |")


def report_clock(rows: list[Row]) -> None:
    """Seconds beside the sequential sampler's on one rank."""
    alone = statistics.median(row["seconds"] for row in rows if row["devices"] == 1 and "sampler" not in row)
    print("| plan | sampler | calls | seconds, median (range) | of one rank, step by step |")
    print("|---|---|---|---|---|")
    for key in dict.fromkeys((row["plan"], row.get("sampler"), row.get("window")) for row in rows):
        own = [row for row in rows if (row["plan"], row.get("sampler"), row.get("window")) == key]
        seconds = [row["seconds"] for row in own]
        middle = statistics.median(seconds)
        sampler = _way(own[0])
        span = f"{min(seconds):.1f} to {max(seconds):.1f}"
        print(f"| `{key[0]}` | {sampler} | {own[0]['calls']} | {middle:.1f} ({span}) | {alone / middle:.2f}x |")


def _way(row: Row) -> str:
    """How the steps of a row were taken, in words."""
    return f"{row['sampler']}, window {row.get('window') or 'all'}" if "sampler" in row else "step by step"


def report_displaced(rows: list[Row]) -> None:
    """Nearness, calls and memory of displaced bands, stepping and in a window."""
    print("| plan | sampler | calls | PSNR | distance | MB kept per rank |")
    print("|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["plan"], _way(row)) for row in rows):
        own = [row for row in rows if (row["plan"], _way(row)) == key]
        calls, decibels, kept = (
            statistics.median(row[name] for row in own) for name in ("calls", "psnr", "bytes_kept")
        )
        away = max(row["distance"] for row in own)
        print(f"| `{key[0]}` | {key[1]} | {calls:g} | {decibels:.1f} | {away:.0e} | {kept / 1e6:.0f} |")


def plot() -> None:
    """Distance to the sequential sample after every call: digits by split and method, demo by window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    digits = [
        row for row in load("digits")["rows"] if (row["scheduler"], row["steps"], row["seed"]) == ("ddim", 100, 0)
    ]
    demo = [row for row in load("demo")["rows"] if row["seed"] == 0]
    most = max(row["steps"] for row in demo)
    _lines(panels[0], [row for row in digits if row["window"] is None], "split", list(Split), "{} split")
    _lines(panels[1], [row for row in demo if row["steps"] == most], "window", [10, 20, 50, 100], "window {}")
    panels[0].set_title("digits network, DDIM-100, all steps at once", fontsize=11)
    panels[1].set_title(f"embedded model at 256x256, DDIM-{most}, data split", fontsize=11)
    panels[0].set_ylabel("distance to the sequential sample")
    figure.savefig(_PLOT, dpi=110, pil_kwargs={"quality": 85})


def _lines(axes: Any, rows: list[Row], name: str, values: list[Any], label: str) -> None:
    """A colour for each value; Picard's iteration is dotted, Anderson acceleration is not."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    colours = dict(zip(values, ("#4878a8", "#e0a040", "#b04040", "#4f8f5f"), strict=False))
    styles = {Method.PICARD: ":", Method.TAA: "-"}
    for row in rows:
        calls = range(1, row["calls"] + 1)
        axes.semilogy(calls, row["distances"], styles[row["method"]], color=colours[row[name]], linewidth=1.6)
        axes.plot(calls[-1], row["distances"][-1], "o", color=colours[row[name]], markersize=3.5)
    axes.axhline(_NEAR, color="0.75", linewidth=0.8, zorder=0)
    axes.set_xlabel("denoiser calls (100 step by step)" if rows[0]["steps"] == 100 else "denoiser calls")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    there = [value for value in values if any(row[name] == value for row in rows)]
    entries = [Line2D([], [], color=colours[value], linewidth=2, label=label.format(value)) for value in there]
    entries += [Line2D([], [], color="0.3", linestyle=styles[method], label=method) for method in Method]
    axes.legend(handles=entries, fontsize=8.5, frameon=False, loc="upper right")


def load(name: str) -> Row:
    """The document of one kind."""
    document: Row = json.loads((RESULTS / f"parallel_{name}.json").read_text())
    return document


REPORTS = {"digits": report_digits, "demo": report_demo, "displaced": report_displaced, "clock": report_clock}


def report(document: Row) -> None:
    """Print the tables of a document."""
    REPORTS[document["options"]["parallel_in_time"]](document["rows"])
