"""The plots of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from published import Row

_POLICIES = {
    "exact": "patch, exact",
    ".displaced": "displaced",
    ".displaced.all": "displaced.all (published)",
    ".delta4": "delta4",
    "tp": "tensor parallel",
    "async": "async",
}
_PARTS = {"compute": "#4878a8", "launch": "#e0a040", "link": "#b04040", "warm-up": "#888888"}


def policy_of(plan: str) -> str | None:
    """The line that a plan of the projection is on."""
    words = [word for word in plan.split(".") if not (word[0] == "w" and word[1:].isdigit())]
    if words[0] not in ("cfg2", "patch1"):
        return None
    rest = words[1:] if words[0] == "cfg2" else []
    if "stride2" in rest or "forecast" in rest or rest[1:] == ["displaced", "delta4"]:
        return None
    if rest and rest[0].startswith(("tp", "async")):
        return "tp" if rest[0].startswith("tp") else "async"
    return "." + ".".join(rest[1:]) if rest[1:] else "exact"


def draw_all(
    rows: Sequence[dict[str, Any]], checks: Sequence[tuple[Row, float]], aim: Mapping[int, float], out: Path
) -> None:
    """Write every plot as webp."""
    out.mkdir(parents=True, exist_ok=True)
    _against_published(checks, out / "scaling-published.webp")
    _speedups(rows, aim, out / "scaling-speedup.webp")
    _parts(rows, out / "scaling-parts.webp")


def _against_published(checks: Sequence[tuple[Row, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    marks = {"sdxl": "o", "pixart": "s", "stages": "^", "components": "D"}
    seen = set()
    for row, predicted in checks:
        label = f"{row.kind}, {'fitted' if row.fitted else 'held out'}"
        axes.plot(
            row.seconds, predicted, marks[row.kind], color="#b0b0b0" if row.fitted else "#b04040",
            label=None if label in seen else label, markersize=7,
        )  # fmt: skip
        seen.add(label)
    ends = (0.6, 130)
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="black", alpha=0.08, label="15 %")
    axes.set(
        xscale="log", yscale="log", xlabel="published, seconds of a picture", ylabel="predicted, seconds of a picture"
    )
    axes.set_title("Published against predicted")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _speedups(rows: Sequence[dict[str, Any]], aim: Mapping[int, float], path: Path) -> None:
    sizes, links = (1024, 2048, 3840), ("nvlink-a100", "pcie4")
    figure, grid = plt.subplots(len(links), len(sizes), figsize=(12, 7.4), sharex=True, layout="constrained")
    for line, profile in zip(grid, links, strict=True):
        for axes, size in zip(line, sizes, strict=True):
            own = [r for r in rows if (r["model"], r["links"], r["size"]) == ("sdxl", profile, size)]
            for number, (policy, label) in enumerate(_POLICIES.items()):
                points = sorted((r["devices"], r["speedup"]) for r in own if policy_of(r["plan"]) == policy)
                # All begin at two devices, which take a branch of the guidance each.
                start = [(1, 1.0), *((2, r["speedup"]) for r in own if r["plan"] == "cfg2")]
                points = points if policy == "exact" else sorted({*start, *points} - {p for p in points if p[0] <= 2})
                points = sorted(set(points) | set(start))
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=f"C{number}")
            counts = sorted({r["devices"] for r in own})
            axes.plot(counts, counts, color="black", linewidth=0.6, linestyle=":")
            if size in aim:
                axes.plot(
                    8, aim[size], marker="*", color="black", markersize=11, linestyle="none", label="aim, 8 devices"
                )
            axes.axhline(1, color="black", linewidth=0.6)
            axes.axvspan(8, 64, color="black", alpha=0.04)
            axes.set(xscale="log", yscale="log", title=f"{size} x {size}, {profile}")
            axes.set_xticks(counts, [str(c) for c in counts])
            top = max(r["speedup"] for r in own)
            ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if t <= 1.6 * max(top, 8)]
            axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
            axes.minorticks_off()
    for axes in grid[-1]:
        axes.set_xlabel("devices (shaded: more than one machine)")
    for axes in grid[:, 0]:
        axes.set_ylabel("predicted speed-up of a picture")
    _legend(figure, grid)
    figure.suptitle("SDXL, 50 steps, A100: predicted")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _parts(rows: Sequence[dict[str, Any]], path: Path) -> None:
    sizes, links = (1024, 2048, 3840), ("nvlink-a100", "pcie4")
    figure, grid = plt.subplots(len(links), len(sizes), figsize=(13, 8), layout="constrained")
    for line, profile in zip(grid, links, strict=True):
        for axes, size in zip(line, sizes, strict=True):
            own = [r for r in rows if (r["model"], r["links"], r["size"], r["devices"]) == ("sdxl", profile, size, 8)]
            own.sort(key=lambda r: r["seconds_per_picture"], reverse=True)
            left = [0.0] * len(own)
            for part, color in _PARTS.items():
                widths = [max(0.0, r["parts"][part]) for r in own]
                axes.barh([r["plan"] for r in own], widths, left=left, color=color, label=part)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for place, row in enumerate(own):
                axes.text(left[place], place, f" {row['speedup']:.1f}x", va="center", fontsize=7)
            axes.set_title(f"{size} x {size}, {profile}", fontsize=9)
            axes.tick_params(axis="y", labelsize=7)
            axes.set_xlim(0, 1.12 * max(left))
    for axes in grid[-1]:
        axes.set_xlabel("predicted seconds of a picture")
    _legend(figure, grid)
    figure.suptitle("SDXL on 8 A100, 50 steps: what a picture's seconds are spent on, predicted")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _legend(figure: Any, grid: Any) -> None:
    """One for all panels, below them."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=7, frameon=False, fontsize=9)
