"""The rows of a benchmark: summed up, and written as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distrifusion.bench.cases import CEILING, PLAIN, Row
from distrifusion.bench.markdown import tables
from distrifusion.quality.summary import finite

COLUMNS = (
    "size", "devices", "case", "plan", "status", "per_step", "per_step_range", "per_picture", "per_picture_range",
    "speedup_per_step", "speedup", "of_ceiling", "psnr_db", "ssim", "sent_per_step", "kept", "memory_grown",
    "memory_grown_by_rank", "memory_grown_predicted", "memory_peak", "memory_predicted", "memory_missing",
    "predicted_per_step", "predicted_per_picture", "foreign_cores", "trace",
)  # fmt: skip


@dataclass(frozen=True)
class Circumstances:
    """What a reader must know to repeat it."""

    command: str
    commit: str
    device: str
    cores: int
    threads: int
    system: str
    versions: dict[str, str]

    @classmethod
    def here(cls, command: str, device: str, threads: int) -> Circumstances:
        """Those of this process."""
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "distrifusion")}
        system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
        return cls(command, _commit(), device, os.cpu_count() or 1, threads, system, versions)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"`{self.command}`\n\n{self.device}, {self.cores} cores, {self.threads} threads a rank; {self.system}; "
            f"{versions}; commit {self.commit}. Medians and ranges."
        )


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line a row: medians with their range, and ratios of medians to the plain pipeline's."""
    plain = {row.case.size: _median(row, "seconds") for row in rows if row.case.label == PLAIN}
    steps = {row.case.size: _median(row, "per_step") for row in rows if row.case.label == PLAIN}
    ceilings = {
        (row.case.size, row.case.devices): _ratio(steps.get(row.case.size), _median(row, "per_step"), row.case.devices)
        for row in rows
        if row.case.label == CEILING
    }
    return [_line(row, plain, steps, ceilings) for row in rows]


def _line(row: Row, plain: Any, steps: Any, ceilings: Any) -> dict[str, Any]:
    case, errors = row.case, [run.error for run in row.runs if run.error]
    faster = _ratio(steps.get(case.size), _median(row, "per_step"), case.pictures)
    ceiling = ceilings.get((case.size, case.plan.num_ranks if case.plan else 1))
    return {
        "size": f"{case.size[0]}x{case.size[1]}",
        "devices": case.devices,
        "case": case.label,
        "plan": str(case.plan) if case.plan else "",
        "status": errors[0] if errors else "ok",
        "per_step": _median(row, "per_step"),
        "per_step_range": _range(row, "per_step"),
        "per_picture": _median(row, "seconds"),
        "per_picture_range": _range(row, "seconds"),
        "speedup_per_step": faster,
        "speedup": _ratio(plain.get(case.size), _median(row, "seconds"), case.pictures),
        "of_ceiling": faster / ceiling if faster and ceiling else None,
        "psnr_db": row.psnr,
        "ssim": row.ssim,
        "sent_per_step": row.counted.get("sent_per_step"),
        "kept": row.counted.get("kept"),
        **_memory(row),
        "memory_grown_predicted": row.counted.get("grown"),
        "memory_predicted": row.counted.get("memory"),
        "predicted_per_step": row.counted.get("per_step"),
        "predicted_per_picture": row.counted.get("per_picture"),
        "foreign_cores": max((run.foreign for run in row.runs), default=0.0),
        "trace": row.trace,
    }


def _memory(row: Row) -> dict[str, Any]:
    """Bytes of the rank that takes most; of all of them, what they grew by in rank order."""
    grown = [use.grown for use in row.memory if use.grown is not None]
    return {
        "memory_grown": max(grown, default=None),
        "memory_grown_by_rank": " ".join(map(str, grown)),
        "memory_peak": max((use.peak for use in row.memory if use.peak is not None), default=None),
        "memory_missing": next((use.missing for use in row.memory if use.missing), ""),
    }


def write(out: Path, rows: Sequence[Row], circumstances: Circumstances) -> list[dict[str, Any]]:
    """Write bench.json (all runs), bench.csv and bench.md; gives the lines of the table."""
    out.mkdir(parents=True, exist_ok=True)
    lines = summary(rows)
    runs = [
        {
            "case": row.case.label,
            "devices": row.case.devices,
            "size": row.case.size,
            "runs": [asdict(r) for r in row.runs],
            "memory": [asdict(use) for use in row.memory],
        }
        for row in rows
    ]
    document = {"circumstances": asdict(circumstances), "rows": lines, "runs": runs}
    (out / "bench.json").write_text(json.dumps(finite(document), indent=1, allow_nan=False), encoding="utf-8")
    with (out / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    text = f"{circumstances}\n\n{tables(lines)}"
    (out / "bench.md").write_text(text, encoding="utf-8")
    return lines


def _values(row: Row, name: str) -> list[float]:
    return [value for run in row.runs if (value := getattr(run, name)) is not None]


def _median(row: Row, name: str) -> float | None:
    values = _values(row, name)
    return statistics.median(values) if values else None


def _range(row: Row, name: str) -> str:
    values = _values(row, name)
    return f"{min(values):.3g} to {max(values):.3g}" if values else ""


def _ratio(one: float | None, other: float | None, pictures: int) -> float | None:
    return pictures * one / other if one and other else None


def _commit() -> str:
    """Of the checkout that this code is in; empty where it is none."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except OSError:
        return ""
