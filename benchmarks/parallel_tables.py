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
        sampler = "step by step" if key[1] is None else f"{key[1]}, window {key[2]}"
        span = f"{min(seconds):.1f} to {max(seconds):.1f}"
        print(f"| `{key[0]}` | {sampler} | {own[0]['calls']} | {middle:.1f} ({span}) | {alone / middle:.2f}x |")


def report_displaced(rows: list[Row]) -> None:
    """Nearness, calls and memory of displaced bands, stepping and in a window."""
    print("| plan | sampler | calls | PSNR | distance | MB kept per rank |")
    print("|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["plan"], row.get("sampler", "step by step")) for row in rows):
        own = [row for row in rows if (row["plan"], row.get("sampler", "step by step")) == key]
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

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colours = dict(zip(Split, ("tab:green", "tab:blue", "tab:orange"), strict=True))
    for row in load("digits")["rows"]:
        if (row["scheduler"], row["steps"], row["window"], row["seed"]) == ("ddim", 100, None, 0):
            line = "-" if row["method"] == Method.TAA else ":"
            name = f"{row['split']}, {row['method']}"
            panels[0].semilogy(
                range(1, row["calls"] + 1), row["distances"], line, color=colours[row["split"]], label=name
            )
    panels[0].set_title("digits network, DDIM-100, whole trajectory")
    demo = load("demo")["rows"]
    most = max(row["steps"] for row in demo)
    for row in demo:
        if (row["steps"], row["seed"]) == (most, 0):
            line = "-" if row["method"] == Method.TAA else ":"
            colour = {10: "tab:red", 20: "tab:purple", 50: "tab:brown", 100: "tab:orange"}[row["window"]]
            name = f"window {row['window']}, {row['method']}"
            panels[1].semilogy(range(1, row["calls"] + 1), row["distances"], line, color=colour, label=name)
    panels[1].set_title(f"embedded model, 256 px, DDIM-{most}, data split")
    for panel in panels:
        panel.axhline(_NEAR, color="0.7", linewidth=0.8)
        panel.set_xlabel("denoiser calls")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("distance to the sequential sample")
    figure.savefig(_PLOT, pil_kwargs={"quality": 80})


def load(name: str) -> Row:
    """The document of one kind."""
    document: Row = json.loads((RESULTS / f"parallel_{name}.json").read_text())
    return document


REPORTS = {"digits": report_digits, "demo": report_demo, "displaced": report_displaced, "clock": report_clock}


def report(document: Row) -> None:
    """Print the tables of a document."""
    REPORTS[document["options"]["parallel_in_time"]](document["rows"])
