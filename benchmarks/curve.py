"""Draws fidelity against time: what each policy of two bands costs, and what it changes, on three kinds of link.

    python benchmarks/curve.py

Times are of the random SDXL-shaped U-Net (rows of speed.py), PSNR of the embedded model (rows of fidelity.py): two
models, so the picture shows the order of the policies and no pair of figures of one run. A plan that resynchronises
takes the time of its synchronous calls, counted in the fidelity rows, at the speed of `patch2`, and of its other calls.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from distrifusion import Plan

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
_LINKS = {"speed.json": "shared memory", "link_1gbit.json": "1 Gbit/s", "link_100mbit.json": "100 Mbit/s"}
_EXACT = "patch2"
_LINE = 1.4  # decibels that a line of text is high


def load(name: str) -> dict[str, Any]:
    """A benchmark's document."""
    document: dict[str, Any] = json.loads((_RESULTS / name).read_text())
    return document


def policy_of(text: str) -> str:
    """A plan's text without its warm-up."""
    return ".".join(word for word in text.split(".") if not (word[0] == "w" and word[1:].isdigit()))


def milliseconds(document: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step after the warm-up, by policy, median over repetitions."""
    found: dict[str, list[float]] = {}
    for row in document["rows"]:
        if row["batch"] == 1 and row["plan"].startswith(_EXACT):
            plan = Plan.parse(row["plan"])
            past = row["seconds"] if plan.exact else row["seconds"][plan.num_synchronous :]
            found.setdefault(policy_of(row["plan"]), []).append(1000 * statistics.median(past))
    return {policy: statistics.median(times) for policy, times in found.items()}


def fidelity(document: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Median PSNR, and share of synchronous calls, by policy of two bands."""
    rows = [row for row in document["rows"] if row["plan"].startswith(_EXACT + ".")]
    found = {}
    for policy in dict.fromkeys(policy_of(row["plan"]) for row in rows):
        own = [row for row in rows if policy_of(row["plan"]) == policy]
        share = statistics.median(row["synchronous"] for row in own) / document["options"]["steps"]
        found[policy] = (statistics.median(row["psnr"] for row in own), share)
    return found


def points(times: dict[str, float], decibels: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Milliseconds and decibels of every policy of which both are known."""
    found = {}
    for policy, (psnr, share) in decibels.items():
        plain = ".".join(word for word in policy.split(".") if not word.startswith("resync"))
        if plain in times:
            exact = 0.0 if plain == policy else share
            found[policy] = (exact * times[_EXACT] + (1 - exact) * times[plain], psnr)
    return found


def draw(out: Path, document: dict[str, Any]) -> None:
    """One panel a link; exact bands are a line, because their PSNR is that of rounding."""
    decibels = fidelity(document)
    figure, panels = plt.subplots(1, len(_LINKS), figsize=(12, 4.2), sharey=True, layout="constrained")
    for panel, (name, title) in zip(panels, _LINKS.items(), strict=True):
        times = milliseconds(load(name))
        rows = [row for row in load(name)["rows"] if (row["batch"], row["plan"]) == (1, "alone")]
        alone = statistics.median(t for row in rows for t in row["seconds"])
        panel.axvline(1000 * alone, color="0.6", linestyle=":", label="one device")
        panel.axvline(times[_EXACT], color="0.2", linestyle="--", label="exact bands")
        height = -math.inf
        for policy, (x, y) in sorted(points(times, decibels).items(), key=lambda item: item[1][1]):
            panel.plot(x, y, "o", color="tab:orange" if "delta" in policy else "tab:blue")
            height = max(y + 0.4, height + _LINE)  # names of points that lie close stand above each other
            panel.annotate(policy.removeprefix(_EXACT + "."), (x, y), (1.02 * x, height), fontsize=8)
        panel.set(title=title, xlabel="milliseconds a step", xlim=(0, 1.25 * max(alone * 1000, times[_EXACT])))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"PSNR against one device, dB ({document['options']['steps']} steps)")
    panels[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fidelity", default="policies_50.json", help="rows of fidelity.py in benchmarks/results")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "images" / "fidelity-against-time.webp")
    options = parser.parse_args()
    draw(options.out, load(options.fidelity))


if __name__ == "__main__":
    main()
