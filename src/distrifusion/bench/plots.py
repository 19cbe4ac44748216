"""Plots of a benchmark: speed-up against devices, nearness against latency, predicted against measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrifusion.bench.cases import CEILING, PLAIN

_MOST_DB = 100.0  # where equal pictures, of endless PSNR, are drawn


def draw(lines: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write what can be drawn of the lines; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    good = [line for line in lines if line["status"] == "ok"]
    drawn = (
        _speedup(good, out / "speedup.webp"),
        _quality(good, out / "quality.webp"),
        _predicted(good, out / "predicted.webp"),
    )
    return [path for path in drawn if path is not None]


def _speedup(lines: Sequence[dict[str, Any]], path: Path) -> Path | None:
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(line["size"] for line in lines))
    if not sizes:
        return None
    figure, grid = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4.2), layout="constrained", squeeze=False)
    for axes, size in zip(grid[0], sizes, strict=True):
        own = [line for line in lines if line["size"] == size and line["speedup_per_step"]]
        ceiling = sorted((line["devices"], line["speedup_per_step"]) for line in own if line["case"] == CEILING)
        if ceiling:
            axes.plot(
                *zip((1, 1.0), *ceiling, strict=True), color="black", linewidth=0.8, linestyle=":", label="ceiling"
            )
        for line in own:
            if line["case"] != CEILING:
                axes.plot(line["devices"], line["speedup_per_step"], "o", label=line["case"])
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set(title=size, xlabel="devices", ylabel="speed-up of a step over plain diffusers", ylim=(0, None))
        axes.set_xticks(sorted({line["devices"] for line in own}))
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _quality(lines: Sequence[dict[str, Any]], path: Path) -> Path | None:
    import matplotlib.pyplot as plt

    own = [line for line in lines if line["psnr_db"] is not None and line["case"] not in (PLAIN, CEILING)]
    if not own:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for line in own:
        height = min(line["psnr_db"], _MOST_DB)
        axes.plot(line["per_picture"], height, "o")
        axes.annotate(f"{line['case']}, {line['devices']}, {line['size']}", (line["per_picture"], height), fontsize=7)
    axes.set(xlabel="seconds of a picture", ylabel="PSNR to plain diffusers, dB", ylim=(None, _MOST_DB + 5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _predicted(lines: Sequence[dict[str, Any]], path: Path) -> Path | None:
    import matplotlib.pyplot as plt

    own = [line for line in lines if line["predicted_per_step"] and line["case"] != CEILING]
    if not own:
        return None
    figure, axes = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
    for line in own:
        axes.plot(line["per_step"], line["predicted_per_step"], "o", color="C0")
    values = [line[name] for line in own for name in ("per_step", "predicted_per_step")]
    ends = (0.8 * min(values), 1.25 * max(values))
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="black", alpha=0.08)
    axes.set(xscale="log", yscale="log", xlabel="measured, seconds of a step", ylabel="predicted, seconds of a step")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
