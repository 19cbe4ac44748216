"""What every rank computes and sends in the plans of docs/scaling.md, rehearsed once and kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from published import MEMORY, ROWS, blueprint

from distrifusion import Plan
from distrifusion.planner.costs import Costs
from distrifusion.planner.rehearsal import Rehearsed

COUNTS = (1, 2, 4, 8, 16, 32, 64)
SIZES = {"sdxl": (1024, 2048, 3840), "pixart": (1024, 2048)}
_UNET = ("", ".displaced", ".displaced.all", ".delta4")


def plans_of(model: str, num_devices: int) -> list[str]:
    """The plans that are projected on some devices."""
    if num_devices == 1:
        return ["patch1"]
    if model == "sdxl":
        return ["cfg2", "tp2", "async2"] if num_devices == 2 else _of_unet(num_devices)
    return [*_of_transformer("", num_devices), *(_of_transformer("cfg2.", num_devices // 2) if num_devices > 2 else [])]


def _of_unet(num_devices: int) -> list[str]:
    half = num_devices // 2
    bands = [f"cfg2.patch{half}{policy}" for policy in _UNET]
    if num_devices == 8:
        bands += ["cfg2.patch4.displaced.forecast", "cfg2.patch4.displaced.delta4", "patch8", "patch8.delta4"]
    depth = [f"cfg2.async{half}", f"cfg2.tp{half}"] if num_devices <= 16 else []
    return [*bands, *depth, *([f"cfg2.async{half}.stride2"] if num_devices == 8 else [])]


def _of_transformer(batch: str, team: int) -> list[str]:
    if team > 16:
        return [f"{batch}patch{team}.displaced", f"{batch}patch{team}.delta4", f"{batch}ring{team}"]
    words = ("patch{}", "patch{}.displaced", "patch{}.delta4", "ulysses{}", "ring{}", "pipe{}.m{}", "tp{}")
    return [batch + word.format(team, team) for word in words]


class Shelf:
    """Costs by model and size, of which what was rehearsed before is read from a folder.

    Args:
        folder: where it is kept; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._costs: dict[tuple[str, int], Costs] = {}
        self._filled: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def costs(self, model: str, size: int, *plans: str) -> Costs:
        """The costs of a model and size, with those of some plans known."""
        key = model, size
        if key not in self._costs:
            mine = next((c.blueprint for (name, _), c in self._costs.items() if name == model), None) or blueprint(
                model
            )
            self._costs[key] = Costs(mine, mine.arguments(size, size))
        for plan in map(Plan.parse, plans):
            file = self._folder / f"{model}-{size}-{plan}.json"
            if file not in self._filled:
                self._filled.add(file)
                self._fill(self._costs[key], plan, file)
        return self._costs[key]

    @staticmethod
    def _fill(costs: Costs, plan: Plan, file: Path) -> None:
        if file.is_file():
            costs.put(plan, Rehearsed.from_dict(json.loads(file.read_text())))
            return
        file.write_text(json.dumps(costs.of(plan).as_dict()))
        print(f"rehearsed {file.stem}", flush=True)


def wanted() -> Iterator[tuple[str, int, str]]:
    """All models, sizes and plans of the page, the published ones first."""
    for row in ROWS:
        yield row.model, row.size, "patch1"
        if row.kind != "components":
            yield from ((row.model, row.size, plan) for plan in row.plans)
    for size in MEMORY:
        yield "pixart", size, "patch8.displaced"
    for model, sizes in SIZES.items():
        for count in COUNTS:
            for size in sizes:
                for plan in plans_of(model, count):
                    yield model, size, plan


if __name__ == "__main__":
    import sys

    shelf = Shelf(Path(sys.argv[1]))
    for model, size, plan in wanted():
        shelf.costs(model, size, plan)
