"""Makes the tables and plots of docs/scaling.md: predicted seconds of plans on hardware that is not here.

    python benchmarks/scaling.py --work DIR

What ranks compute and send is rehearsed on the meta device once (some minutes) and kept in DIR. Rows go to
benchmarks/results/scaling.json, tables between the marks of docs/scaling.md, plots to docs/images.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from published import MEMORY, ROWS
from scaling_fit import OUTSIDE, RESULT, Constants, prediction_of, spread, table
from scaling_plots import draw_all
from scaling_work import COUNTS, SIZES, Shelf, plans_of

from distrifusion import Plan
from distrifusion.planner.links import PROFILES
from distrifusion.planner.prediction import Prediction, predict
from distrifusion.planner.speeds import DEVICES, Speed

_ROOT = Path(__file__).parents[1]
_PAGE = _ROOT / "docs" / "scaling.md"
_MARK = re.compile(r"(<!-- scaling: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_STEPS = {"sdxl": 50, "pixart": 20}
# Published seconds of one A100, and the plan here that is nearest to the published method.
_ALONE = {("sdxl", 1024): 5.02, ("sdxl", 2048): 23.7, ("sdxl", 3840): 140.0, ("pixart", 1024): 2.085}
_LINKS = ("nvlink-a100", "pcie4", "ethernet-25g")
_AIM = {1024: 4.0, 3840: 7.0}


def speed_of(model: str, size: int, shelf: Shelf) -> Speed:
    """An A100 that takes the published seconds; where none were published, those of the smallest size's rates."""
    known = size if (model, size) in _ALONE else SIZES[model][0]
    outside = OUTSIDE if model == "pixart" else 0.0
    alone = shelf.costs(model, known, "patch1").of(Plan()).steady.operations
    return DEVICES["a100"].made_to_take((_ALONE[model, known] - outside) / _STEPS[model], alone)


def projected(model: str, size: int, plan: str, links: str, shelf: Shelf) -> Prediction:
    """One plan on A100 with some links."""
    outside = OUTSIDE if model == "pixart" else 0.0
    costs = shelf.costs(model, size, "patch1", plan)
    return predict(costs, Plan.parse(plan), speed_of(model, size, shelf), PROFILES[links], _STEPS[model], outside)


def all_rows(shelf: Shelf) -> list[dict[str, Any]]:
    """Every projection."""
    rows = []
    for model, sizes in SIZES.items():
        for size in sizes:
            for links in _LINKS:
                alone = projected(model, size, "patch1", links, shelf).per_picture
                for count in COUNTS:
                    for plan in plans_of(model, count):
                        found = projected(model, size, plan, links, shelf)
                        place = {"model": model, "size": size, "links": links}
                        rows.append({**place, **found.as_dict(), "speedup": alone / found.per_picture})
    return rows


def best_table(rows: list[dict[str, Any]], model: str) -> list[str]:
    """The fastest plan of each class on every number of devices."""
    lines = [
        "| links | pixels | devices | exact | x | limit | kept KV old or coded | x | limit | any | x | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for links in _LINKS:
        for size in SIZES[model]:
            for count in COUNTS[1:]:
                own = [
                    r for r in rows if (r["model"], r["links"], r["size"], r["devices"]) == (model, links, size, count)
                ]
                cells = []
                for keep in (_exact, _close, lambda _: True):
                    best = max((r for r in own if keep(r)), key=lambda r: r["speedup"], default=None)
                    cells += [f"`{best['plan']}`", f"{best['speedup']:.2f}", best["limit"]] if best else ["", "", ""]
                lines.append(f"| {links} | {size} | {count} | {' | '.join(cells)} |")
    return lines


def _exact(row: dict[str, Any]) -> bool:
    return bool(row["exact"])


def _close(row: dict[str, Any]) -> bool:
    return row["exact"] or (".all" not in row["plan"] and "async" not in row["plan"] and "pipe" not in row["plan"])


def eight_table(rows: list[dict[str, Any]]) -> list[str]:
    """SDXL on eight devices: every plan, and where its seconds go."""
    lines = [
        "| links | pixels | plan | speed-up | per step, ms | compute | layers and launch | link | warm-up | sent, MB "
        "| kept, GB | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    own = [r for r in rows if r["model"] == "sdxl" and r["devices"] == 8 and r["links"] != "ethernet-25g"]
    for row in sorted(own, key=lambda r: (r["links"], r["size"], -r["speedup"])):
        parts = [
            f"{row['parts'][name] / row['seconds_per_picture']:.0%}"
            for name in ("compute", "launch", "link", "warm-up")
        ]
        lines.append(
            f"| {row['links']} | {row['size']} | `{row['plan']}` | {row['speedup']:.2f}x | "
            f"{1000 * row['seconds_per_step']:.1f} | {' | '.join(parts)} | {row['sent_per_step'] / 1e6:.0f} | "
            f"{row['memory']['kept'] / 1e9:.2f} | {row['limit']} |"
        )
    return lines


def memory_table(shelf: Shelf) -> list[str]:
    """What displaced PixArt keeps, beside what the published implementation needed more than one device."""
    lines = ["| pixels | published, more than one device | kept here, `patch8.displaced` |", "|---|---|---|"]
    for size, (theirs, alone) in MEMORY.items():
        costs = shelf.costs("pixart", size, "patch8.displaced")
        kept = costs.of(Plan.parse("patch8.displaced")).steady.kept
        lines.append(f"| {size} | {theirs - alone:.1f} GB | {kept / 1e9:.1f} GB |")
    return lines


def constants_table(shelf: Shelf) -> list[str]:
    """The constants, and how far the rows are off."""
    now, held = Constants(**json.loads(RESULT.read_text())), Constants.held()
    lines = ["| constant | fitted | held by the package |", "|---|---|---|"]
    for name, value in asdict(now).items():
        lines.append(f"| {name} | {value:.4g} | {asdict(held)[name]:.4g} |")
    for words, kind in (
        ("SDXL", "sdxl"), ("PixArt in bands", "pixart"), ("PixArt in stages", "stages"),
        ("SDXL in components", "components"),
    ):  # fmt: skip
        for fitted, use in ((True, "fitted"), (False, "held out")):
            if rows := [row for row in ROWS if row.kind == kind and row.fitted == fitted]:
                worst, middle = spread(rows, held, shelf)
                off = f"{worst:.0%}, median {middle:.0%}"
                lines.append(f"| {use}, {words}: {len(rows)} rows, off by at most | | {off} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what was rehearsed")
    shelf = Shelf(parser.parse_args().work)
    rows = all_rows(shelf)
    held = Constants.held()
    checks = [(row, prediction_of(row, held, shelf).per_picture) for row in ROWS]
    tables = {
        "published": partial(table, held, shelf),
        "constants": partial(constants_table, shelf),
        "memory": partial(memory_table, shelf),
        "sdxl": partial(best_table, rows, "sdxl"),
        "pixart": partial(best_table, rows, "pixart"),
        "eight": partial(eight_table, rows),
    }
    page = _PAGE.read_text(encoding="utf-8")
    _PAGE.write_text(
        _MARK.sub(lambda found: found[1] + "\n".join(tables[found[2]]()) + "\n" + found[3], page), encoding="utf-8"
    )
    document = {"command": "python benchmarks/scaling.py --work DIR", "predicted": True, "constants": asdict(held)}
    results = _ROOT / "benchmarks" / "results" / "scaling.json"
    results.write_text(json.dumps({**document, "rows": rows}, indent=None, separators=(",", ":")))
    draw_all(rows, checks, _AIM, _ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
