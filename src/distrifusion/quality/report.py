"""The report of a comparison: one page that needs nothing else, and the raw rows beside it."""

from __future__ import annotations

import base64
import datetime
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from distrifusion.doctor.machine import cpu_model, devices_in_words
from distrifusion.doctor.versions import versions
from distrifusion.plan import Split
from distrifusion.quality import summary
from distrifusion.quality.comparison import Result
from distrifusion.quality.drift import StepDrift
from distrifusion.quality.measures import MEASURES
from distrifusion.quality.panel import error_map
from distrifusion.quality.plots import Line, Mark, chart
from distrifusion.quality.recording import Shelf
from distrifusion.quality.seams import Cut
from distrifusion.quality.strips import strip, typical_call
from distrifusion.quality.summary import Verdict
from distrifusion.quality.verify import PLAN, REFERENCE, Outcome
from distrifusion.timeline import COMPUTE, POST, WAIT, Call, Share, Timeline, longest_waits, shares

PAGE, DATA = "index.html", "report.json"
# More would make the page heavy; the table has them all.
_MAX_SHOWN = 12
# Longest side of a picture on the page, in pixels.
_MAX_PIXELS = 640
_LEVELS = 255
_NUM_WAITS = 5
_KINDS = {
    "kv": "keys and values (kv)",
    "halo": "border rows (halo)",
    "norm": "norm statistics (norm)",
    "parcel": "border rows and norm statistics of up to 16 layers in one message (parcel)",
    "hidden": "hidden states between components (hidden)",
    "sum": "partial sums of layers whose weights are divided (sum)",
    "part": "channels of outputs that each rank makes a part of (part)",
    "flow": "what one part of the network gives to the next (flow)",
    "exit": "the prediction, and levels that are too coarse to cut (exit)",
}


@dataclass(frozen=True)
class Circumstances:
    """What a stranger needs to judge and repeat a result, by name for a reader."""

    command: str
    facts: Mapping[str, str]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, outcome: Outcome, command: str) -> Circumstances:
        """Of what was drawn on this machine just now."""
        task = outcome.task
        given = task.arguments
        facts = {
            "model": task.source,
            "plan": str(task.plan),
            "devices": devices_in_words(task.devices, task.threads),
            "reference": devices_in_words(task.devices[:1], task.threads),
            "processor": cpu_model(),
            "size": "{} x {} pixels".format(*outcome.size),
            "steps": str(given.get("num_inference_steps", "the model's own")),
            "guidance": str(given.get("guidance_scale", "the model's own")),
            "scheduler": task.scheduler or "the model's own",
            "type of numbers": str(next(iter(task.keywords.values()), "float32")).removeprefix("torch."),
            "seeds": " ".join(map(str, task.seeds)),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        return cls(command, facts, versions())


def write(folder: Path, outcome: Outcome, verdict: Verdict, circumstances: Circumstances, shelf: Shelf) -> Path:
    """Write page and data into `folder`, which is made if it is not there; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATA).write_text(json.dumps(data(outcome, verdict, circumstances), indent=1) + "\n", encoding="utf-8")
    page = folder / PAGE
    page.write_text(_page(outcome, verdict, circumstances, shelf), encoding="utf-8")
    return page


def data(outcome: Outcome, verdict: Verdict, circumstances: Circumstances) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    setting = {"command": circumstances.command, **circumstances.facts, "versions": dict(circumstances.versions)}
    return {"setting": setting, **summary.as_data(outcome, verdict)}


def _page(outcome: Outcome, verdict: Verdict, circumstances: Circumstances, shelf: Shelf) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files("distrifusion.quality").joinpath("report.html.j2").read_text(encoding="utf-8")
    shown = _chosen(outcome.results)
    return environment.from_string(source).render(
        outcome=outcome,
        verdict=verdict,
        circumstances=circumstances,
        rows=summary.rows(outcome, verdict.limits),
        measures=MEASURES,
        speed=summary.speed(outcome),
        pictures=[_picture(outcome, result, shelf) for result in shown],
        drift=_drift_chart(outcome, "relative error of the latents", lambda step: step.relative_error, log=True),
        drift_psnr=_drift_chart(outcome, "PSNR of the latents, dB", lambda step: step.psnr, log=False),
        seam_charts=[_seam_chart(outcome, index) for index in range(len(outcome.cuts))],
        kinds=_KINDS,
        traced=_traced_modes(outcome.timeline) if outcome.timeline else [],
        control=statistics.median([s for r in outcome.results for seams in r.seams for s in seams.control] or [1.0]),
    )


def _chosen(results: Sequence[Result]) -> list[Result]:
    """All, or the worst by PSNR, in their own order."""
    worst = sorted(results, key=lambda result: result.values["psnr"])[:_MAX_SHOWN]
    return [result for result in results if result in worst]


def _picture(outcome: Outcome, result: Result, shelf: Shelf) -> dict[str, Any]:
    """One row of pictures."""
    reference, picture = (shelf.picture(run, result.seed) for run in (REFERENCE, PLAN))
    error, gain = error_map(picture, reference)
    return {
        "result": result,
        "images": [_inline(image) for image in (reference, picture, error)],
        "gain": gain,
        "borders": [border for cut in outcome.cuts for border in _places(cut, picture.size)],
    }


def _places(cut: Cut, size: tuple[int, int]) -> list[tuple[str, float]]:
    """Side of the page's picture and distance from it in percent, for every border."""
    rows = cut.split is Split.ROWS
    return [("top" if rows else "left", 100 * border / size[1 if rows else 0]) for border in cut.borders]


def _inline(picture: Image.Image) -> str:
    """A picture as the text of a `src` attribute, at most `_MAX_PIXELS` on its longer side."""
    small = picture.copy()
    small.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
    stream = io.BytesIO()
    small.save(stream, "webp", quality=92)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _drift_chart(outcome: Outcome, y_title: str, value: Callable[[StepDrift], float], log: bool) -> str:
    """A figure of the latents after every step: one line per seed, their median, and the noise floors."""
    curves = {r.seed: [value(step) for step in r.drift] for r in outcome.results if r.drift}
    if not curves:
        return ""
    lines = [Line(curve, "thin", f"seed {seed}") for seed, curve in curves.items()]
    lines.append(Line(_median(list(curves.values())), "bold", "median of all seeds"))
    for floor in outcome.floors:
        again = [[value(step) for step in result.drift] for result in floor.results]
        title = f"noise floor: one device, {floor.title}"
        lines.append(Line(_median(again), "dashed", title, label=floor.title))
    plan, num_steps = outcome.task.plan, len(lines[0].values)
    fresh = 0 if plan.exact else plan.num_synchronous
    marks = [Mark(fresh, "synchronous until here")] if 0 < fresh < num_steps else []
    return chart(lines, "denoising step", y_title, log=log, marks=marks)


def _seam_chart(outcome: Outcome, index: int) -> str:
    """Mean jump of the error across every line of the picture, with the borders of one of the cuts."""
    cut = outcome.cuts[index]
    mean = np.mean([result.seams[index].profile for result in outcome.results], axis=0) * _LEVELS
    word = "row" if cut.split is Split.ROWS else "column"
    marks = [Mark(border, "border") for border in cut.borders]
    lines = [Line(mean.tolist(), "bold", "mean of all seeds")]
    return chart(lines, f"pixel {word}", "jump of the error, grey levels", marks=marks)


def _traced_modes(timeline: Timeline) -> list[dict[str, Any]]:
    """What the page says of the calls of each mode: a typical one drawn, the shares, the longest waits."""
    found = []
    for mode in timeline.modes():
        calls, typical = timeline.calls(mode), typical_call(timeline, mode)
        waits = longest_waits(calls, _NUM_WAITS)
        found.append({"mode": mode, "call": typical[0], "strip": strip(typical), "waits": waits, **_share_rows(calls)})
    return found


def _share_rows(calls: Sequence[Call]) -> dict[str, Any]:
    """Rows of a table: for every kind of value its wait and its post, in order of what both take."""
    found = shares(calls)
    by_kind: dict[str, dict[str, Share]] = {}
    for share in found[1:]:
        by_kind.setdefault(share.kind, {})[share.what] = share
    kinds = sorted(by_kind.items(), key=lambda item: -sum(share.share for share in item[1].values()))
    totals = {what: sum(share.share for share in found if share.what == what) for what in (COMPUTE, WAIT, POST)}
    return {"kinds": kinds, "totals": totals, "seconds": sum(share.seconds for share in found)}


def _median(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*curves, strict=True)]
