"""Plots of a benchmark: speed-up against devices, nearness against latency, predicted against measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    cases = [case for case in dict.fromkeys(line["case"] for line in good) if case != CEILING]
    colors = {case: f"C{number}" for number, case in enumerate(cases)}  # in all plots
    drawn = (
        _speedup(good, colors, out / "speedup.webp"),
        _quality(good, colors, out / "quality.webp"),
        _predicted(good, colors, out / "predicted.webp"),
    )
    return [path for path in drawn if path is not None]


def _speedup(lines: Sequence[dict[str, Any]], colors: dict[str, str], path: Path) -> Path | None:
    def draw_size(axes: Any, own: list[dict[str, Any]]) -> None:
        ceiling = sorted((line["devices"], line["speedup_per_step"]) for line in own if line["case"] == CEILING)
        if ceiling:
            axes.plot(*zip((1, 1.0), *ceiling, strict=True), color="black", linewidth=0.8, linestyle=":", label=CEILING)
        for line in own:
            if line["case"] != CEILING and line["speedup_per_step"]:
                axes.plot(
                    line["devices"], line["speedup_per_step"], "o", color=colors[line["case"]], label=line["case"]
                )
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set(xlabel="devices", ylabel="speed-up of a step over plain diffusers", ylim=(0, None))
        axes.set_xticks(sorted({line["devices"] for line in own}))

    return _by_size(lines, draw_size, path)


def _quality(lines: Sequence[dict[str, Any]], colors: dict[str, str], path: Path) -> Path | None:
    def draw_size(axes: Any, own: list[dict[str, Any]]) -> None:
        for line in own:
            if line["case"] == PLAIN:
                axes.axvline(line["per_picture"], color=colors[PLAIN], linewidth=0.8, label=PLAIN)
                continue
            height = min(line["psnr_db"], _MOST_DB)
            axes.plot(line["per_picture"], height, "o", color=colors[line["case"]], label=line["case"])
        axes.set(
            xlabel="seconds of a picture",
            ylabel=f"PSNR to plain diffusers, dB ({_MOST_DB:.0f}: equal)",
            ylim=(0, _MOST_DB + 5),
        )
        axes.set_xlim(0, 1.05 * max(line["per_picture"] for line in own))

    compared = [line for line in lines if line["psnr_db"] is not None and line["case"] != CEILING]
    sizes = {line["size"] for line in compared}
    plain = [line for line in lines if line["case"] == PLAIN and line["size"] in sizes]
    return _by_size(plain + compared, draw_size, path)


def _by_size(lines: Sequence[dict[str, Any]], draw_size: Callable[..., None], path: Path) -> Path | None:
    """One panel for each size; a case has one line in the legend."""
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(line["size"] for line in lines))
    if not sizes:
        return None
    figure, grid = plt.subplots(1, len(sizes), figsize=(3.6 * len(sizes) + 2, 4), layout="constrained", squeeze=False)
    found: dict[str, Any] = {}
    for axes, size in zip(grid[0], sizes, strict=True):
        draw_size(axes, [line for line in lines if line["size"] == size])
        axes.set_title(size)
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _predicted(lines: Sequence[dict[str, Any]], colors: dict[str, str], path: Path) -> Path | None:
    import matplotlib.pyplot as plt

    own = [line for line in lines if line["predicted_per_step"] and line["case"] != CEILING]
    if not own:
        return None
    figure, axes = plt.subplots(figsize=(6, 5.4), layout="constrained")
    for case in dict.fromkeys(line["case"] for line in own):
        points = [(line["per_step"], line["predicted_per_step"]) for line in own if line["case"] == case]
        axes.plot(*zip(*points, strict=True), "o", color=colors[case], label=case)
    values = [line[name] for line in own for name in ("per_step", "predicted_per_step")]
    ends = (0.8 * min(values), 1.25 * max(values))
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="black", alpha=0.08, label="15 %")
    axes.set(xscale="log", yscale="log", xlabel="measured, seconds of a step", ylabel="predicted, seconds of a step")
    ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5) if ends[0] <= m * 10.0**e <= ends[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
