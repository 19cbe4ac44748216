"""The figures of a comparison in short, as data and as a table of text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distrifusion.quality.comparison import Result
from distrifusion.quality.measures import MEASURES, PICTURE_MEASURES, SET_MEASURES, Measure, Miss
from distrifusion.quality.verify import Outcome


@dataclass(frozen=True)
class Row:
    """One measure over all seeds.

    Attributes:
        median, worst: of all seeds; equal for a figure of all pictures together.
        worst_seed: None for a figure of all pictures together.
        floor: worst value of the first noise floor, None if it was not measured there.
        limit: that was asked for, None without.
    """

    measure: Measure
    median: float
    worst: float
    worst_seed: int | None
    floor: float | None
    limit: float | None


@dataclass(frozen=True)
class Verdict:
    """Limits and what missed them."""

    limits: Mapping[str, float]
    misses: tuple[Miss, ...]

    @property
    def passed(self) -> bool | None:
        """None where there was no limit to judge by."""
        return not self.misses if self.limits else None


def rows(outcome: Outcome, limits: Mapping[str, float]) -> list[Row]:
    """Every measure that was taken, in the order of `measures`."""
    found = []
    for measure in PICTURE_MEASURES:
        by_seed = {r.seed: r.values[measure.key] for r in outcome.results if measure.key in r.values}
        if by_seed:
            worst = measure.worst(list(by_seed.values()))
            seed = next(seed for seed, value in by_seed.items() if value == worst)
            floor = _floor(outcome, measure)
            median = statistics.median(by_seed.values())
            found.append(Row(measure, median, worst, seed, floor, limits.get(measure.key)))
    for measure in SET_MEASURES:
        if measure.key in outcome.together:
            value = outcome.together[measure.key]
            found.append(Row(measure, value, value, None, None, limits.get(measure.key)))
    return found


def speed(outcome: Outcome) -> dict[str, float]:
    """Median seconds per step and in all, of the plan and of one device, and their ratios."""
    step, alone_step = _medians([r.seconds_per_step for r in outcome.results])
    whole, alone_whole = _medians([r.seconds for r in outcome.results])
    return {
        "plan_seconds_per_step": step,
        "one_device_seconds_per_step": alone_step,
        "plan_seconds": whole,
        "one_device_seconds": alone_whole,
        "speedup_per_step": alone_step / step,
        "speedup": alone_whole / whole,
    }


def text(outcome: Outcome, verdict: Verdict) -> str:
    """The summary for a terminal."""
    table = [("", "median", "worst", "noise floor", "limit")]
    for row in rows(outcome, verdict.limits):
        show = row.measure.text
        worst = "(all pictures)" if row.worst_seed is None else f"{show(row.worst)} (seed {row.worst_seed})"
        floor = "" if row.floor is None else show(row.floor)
        limit = "" if row.limit is None else show(row.limit)
        table.append((row.measure.title, show(row.median), worst, floor, limit))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    times = speed(outcome)
    lines.append(
        f"{times['plan_seconds_per_step']:.3g} s per step against {times['one_device_seconds_per_step']:.3g} s: "
        f"{times['speedup_per_step']:.2f}x per step, {times['speedup']:.2f}x in all"
    )
    lines += [f"skipped: {MEASURES[key].title}: {reason}" for key, reason in outcome.skipped.items()]
    lines += [f"missed: {miss}" for miss in verdict.misses]
    return "\n".join(lines)


def as_data(outcome: Outcome, verdict: Verdict) -> dict[str, Any]:
    """Everything for JSON; null stands for what is no number, such as the infinite PSNR of equal pictures."""
    found = {
        "passed": verdict.passed,
        "limits": dict(verdict.limits),
        "missed": [asdict(miss) for miss in verdict.misses],
        "summary": {row.measure.key: _summary(row) for row in rows(outcome, verdict.limits)},
        "speed": speed(outcome),
        "accuracy": outcome.accuracy,
        "frechet": outcome.frechet,
        "skipped": outcome.skipped,
        "timeline": outcome.timeline.as_dict() if outcome.timeline else None,
        "borders": {str(cut.split): cut.borders for cut in outcome.cuts},
        "pictures": [_picture(result) for result in outcome.results],
        "noise_floors": [{"title": f.title, "pictures": [_picture(r) for r in f.results]} for f in outcome.floors],
    }
    return finite(found)


def _floor(outcome: Outcome, measure: Measure) -> float | None:
    values = [r.values[measure.key] for r in outcome.floors[0].results if measure.key in r.values]
    return measure.worst(values) if values else None


def _medians(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    ours, theirs = zip(*pairs, strict=True)
    return statistics.median(ours), statistics.median(theirs)


def _summary(row: Row) -> dict[str, Any]:
    return {"median": row.median, "worst": row.worst, "worst_seed": row.worst_seed, "noise_floor": row.floor}


def _picture(result: Result) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "prompt": result.prompt,
        **result.values,
        "relative_latent_error_by_step": [step.relative_error for step in result.drift],
        "latent_psnr_by_step": [step.psnr for step in result.drift],
        "seam_by_border": {str(seams.cut.split): seams.scores for seams in result.seams},
        "seam_score_in_band_middles": {str(seams.cut.split): seams.control for seams in result.seams},
        "seconds_per_step": result.seconds_per_step[0],
        "one_device_seconds_per_step": result.seconds_per_step[1],
        "seconds": result.seconds[0],
        "one_device_seconds": result.seconds[1],
    }


def finite(value: Any) -> Any:
    """The same value, with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
