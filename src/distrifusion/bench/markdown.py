"""The lines of a benchmark as Markdown: a table of times, and one of nearness, bytes and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_TIMES = (
    "s per step",
    "s per picture",
    "speed-up of a step",
    "speed-up of a picture",
    "of the ceiling, a step",
    "foreign cores",
)
_TIMES_READ = (
    "Speed-up is over `diffusers`, a plain pipeline on one device; `ceiling` is as many devices that draw a picture "
    "each. *Foreign cores* were taken by other processes."
)
_COSTS = (
    "PSNR, dB",
    "SSIM",
    "sent a step, MB",
    "kept, MB",
    "memory grew by, MB",
    "predicted to, MB",
    "memory at most, MB",
)
_COSTS_READ = (
    "PSNR (inf: equal) and SSIM are of the picture to that of `diffusers`. What the busiest rank sends and keeps is "
    "counted in a rehearsal. *Grew by*, of every rank, is measured in the run that warms up: on CPU memory of its own "
    "beyond what it had, without pages of files and those of others that it only reads; on CUDA tensors. *At most*, of "
    "the rank with the most, is all that it held: on CPU the resident set, in which shared pages (weights, libraries) "
    "count in full for each rank; on CUDA tensors, weights among them."
)


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """The lines for a reader, and how to read them."""
    text = [*_table(lines, _TIMES, _times), "", _TIMES_READ, "", *_table(lines, _COSTS, _costs), "", _COSTS_READ]
    return "\n".join(text) + "\n"


def _table(
    lines: Sequence[dict[str, Any]], headings: Sequence[str], cells_of: Callable[[dict[str, Any]], list[str]]
) -> list[str]:
    """A row for each case; of one that failed, the reason."""
    table = [f"| size | devices | plan | {' | '.join(headings)} |", "|---" * (3 + len(headings)) + "|"]
    for line in lines:
        name = f"`{line['case']}`" + (f" = `{line['plan']}`" if line["case"] == "auto" and line["plan"] else "")
        failed = [line["status"].replace("|", "/"), *[""] * (len(headings) - 1)]
        cells = cells_of(line) if line["status"] == "ok" else failed
        table.append(f"| {line['size']} | {line['devices']} | {name} | {' | '.join(cells)} |")
    return table


def _times(line: dict[str, Any]) -> list[str]:
    return [
        f"{line['per_step']:.3g} ({line['per_step_range']})",
        f"{line['per_picture']:.3g} ({line['per_picture_range']})",
        *("" if line[name] is None else f"{line[name]:.2f}x" for name in ("speedup_per_step", "speedup")),
        "" if line["of_ceiling"] is None else f"{line['of_ceiling']:.2f}",
        f"{line['foreign_cores']:.2f}",
    ]


def _costs(line: dict[str, Any]) -> list[str]:
    return [
        "" if line["psnr_db"] is None else f"{line['psnr_db']:.1f}",
        "" if line["ssim"] is None else f"{line['ssim']:.4f}",
        *(_megabytes(line[name]) for name in ("sent_per_step", "kept")),
        line["memory_missing"] or ", ".join(_megabytes(int(grown)) for grown in line["memory_grown_by_rank"].split()),
        *(_megabytes(line[name]) for name in ("memory_grown_predicted", "memory_peak")),
    ]


def _megabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e6:.4g}"
