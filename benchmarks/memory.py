"""What plans hold in memory: weights, the pool as predicted and as measured, and the peak of each rank.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Every row is a run of the embedded pipeline with a random SDXL-shaped U-Net (see speed.py) in new processes: batch 1,
fp32, one thread per rank, latents out. What is counted (Linux):

- weights of its own: pages of the U-Net's weights that only this rank has in memory (/proc/PID/pagemap, bit 56);
- pool: what the rank keeps between denoiser calls, after the last one;
- before the run, peak per rank: the resident set and its largest value during the run (VmRSS, VmHWM) of the rank with
  the highest peak; shared weights and the memory of the exchange count in full for every rank, pages of libraries only
  where this process has touched them, which one that was forked has done less;
- all processes: the largest sum of proportional sets (PSS: a page of n processes counts 1/n for each) of the ranks and
  the process that they were forked from, ten samples a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from speed import inputs, sdxl_shaped_unet, write_rows

from distrifusion import Plan, demo, load
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.memory.prediction import pool_bytes

ONE_DEVICE = "one device"
PLANS = (
    ONE_DEVICE,
    "patch{n}",
    "patch{n}.displaced.w1",
    "patch{n}.displaced.all.w1",
    "patch{n}.displaced.forecast.w1",
    "patch{n}.delta4",
)
_PIXELS = 8  # rows of the picture for each of the latents
_PAGE = os.sysconf("SC_PAGE_SIZE")


def noted(pid: int, table: str, name: str) -> int:
    """Bytes that Linux notes of a process under a name in `status` or `smaps_rollup`."""
    lines = Path(f"/proc/{pid}/{table}").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def own_bytes(pid: int, places: Sequence[tuple[int, int]]) -> int:
    """Bytes of the pages at some addresses of a process, given with their lengths, that nobody else has in memory."""
    pages = {p for address, length in places for p in range(address // _PAGE, (address + length - 1) // _PAGE + 1)}
    with Path(f"/proc/{pid}/pagemap").open("rb") as table:
        entries = [os.pread(table.fileno(), 8, page * 8) for page in pages]
    return _PAGE * sum(entry[7] & 1 for entry in entries)  # bit 56: nobody else


def pipeline(folder: Path, alone: bool) -> Any:
    """The pipeline, which notes where its weights are and what its pool holds; `alone`: no process can share it."""
    if alone:
        threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
    unet = sdxl_shaped_unet()
    (folder / f"{os.getpid()}.weights").write_text(json.dumps([(p.data_ptr(), p.nbytes) for p in unet.parameters()]))
    unet.register_forward_hook(partial(note_pool, folder))
    return diffusers.StableDiffusionXLPipeline.from_pretrained(
        demo.path(), unet=unet, text_encoder=None, text_encoder_2=None
    )


def note_pool(folder: Path, unet: Any, *_: object) -> None:
    """After a denoiser call: what this rank's pool holds."""
    denoiser = ParallelDenoiser.dividing(unet)
    (folder / f"{os.getpid()}.pool").write_text(str(denoiser.pool.num_bytes if denoiser else 0))


@contextmanager
def watched(pids: Sequence[int]) -> Iterator[list[int]]:
    """What is yielded holds the largest sum of the processes' proportional sets so far."""
    largest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            largest[0] = max(largest[0], sum(noted(pid, "smaps_rollup", "Pss") for pid in pids))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield largest
    finally:
        stop.set()
        watching.join()


def measure(text: str, latents: int, steps: int, alone: bool, folder: Path) -> None:
    """Run a plan and write its row; for a new process, which is the rank itself on one device."""
    num_ranks = 1 if text == ONE_DEVICE else Plan.parse(text).num_ranks
    plan = None if text == ONE_DEVICE else text
    with load(partial(pipeline, folder, alone), devices=num_ranks, plan=plan, threads=1) as pipe:
        pids = pipe.pids if plan else (os.getpid(),)
        forked_from = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
        pipe.set_progress_bar_config(disable=True)
        arguments = inputs(1, latents)
        texts = {
            "prompt_embeds": arguments["encoder_hidden_states"],
            "pooled_prompt_embeds": arguments["added_cond_kwargs"]["text_embeds"],
        }
        options = {"guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": steps}
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from here
        before = [noted(pid, "status", "VmRSS") for pid in pids]
        with watched((*pids, *forked_from) if plan else pids) as largest:
            pipe(**texts, **options, height=_PIXELS * latents, width=_PIXELS * latents)
        ranks = [{**rank_row(pid, folder), "rest_bytes": rest} for pid, rest in zip(pids, before, strict=True)]
        row = {"ranks": ranks, "all_bytes": largest[0]}
    (folder / "row").write_text(json.dumps(row))


def rank_row(pid: int, folder: Path) -> dict[str, int]:
    """What was measured of one rank."""
    own = folder / f"{pid}.weights"
    places = json.loads((own if own.exists() else next(folder.glob("*.weights"))).read_text())
    return {
        "weight_bytes": sum(length for _, length in places),
        "own_weight_bytes": own_bytes(pid, places),
        "pool_bytes": int((folder / f"{pid}.pool").read_text()),
        "peak_bytes": noted(pid, "status", "VmHWM"),
    }


def weigh(text: str, latents: int, steps: int, alone: bool = False) -> dict[str, Any]:
    """The row of a plan: of the rank with the highest peak, and of all processes together."""
    with tempfile.TemporaryDirectory() as folder:
        process = mp.get_context("spawn").Process(target=measure, args=(text, latents, steps, alone, Path(folder)))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"the run of {text} failed; see above")
        measured = json.loads((Path(folder) / "row").read_text())
    ranks = measured.pop("ranks")
    rank = max(range(len(ranks)), key=lambda rank: ranks[rank]["peak_bytes"])
    predicted = 0
    if text != ONE_DEVICE:
        with torch.device("meta"):
            unet = sdxl_shaped_unet()
        predicted = pool_bytes(unet, Plan.parse(text), rank, (1, 4, latents, latents), torch.float32).total()
    facts = {"latents": latents, "plan": text, "alone": alone, "rank": rank, "predicted_bytes": predicted}
    return {**facts, **ranks[rank], **measured}


def report(rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table, in MB."""
    print(
        "| picture | plan | weights of its own | pool, predicted | pool, measured | before the run | peak per rank "
        "| one device + pool | all processes |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    peaks = {row["latents"]: row["peak_bytes"] for row in rows if row["plan"] == ONE_DEVICE}
    for row in rows:
        limit = peaks[row["latents"]] + row["pool_bytes"]
        sizes = [row[f"{name}_bytes"] for name in ("own_weight", "predicted", "pool", "rest", "peak")]
        name = row["plan"] if row["plan"] == ONE_DEVICE else f"`{row['plan']}`"
        name += ", weights not shared" if row["alone"] else ""
        cells = [f"{num_bytes / 1e6:.1f}" for num_bytes in (*sizes, limit, row["all_bytes"])]
        print(f"| {_PIXELS * row['latents']} | {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--latents", default="64,128,256", help="rows and columns of the latents, joined by commas")
    parser.add_argument("--steps", type=int, default=3, help="of a run")
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sizes = [int(size) for size in options.latents.split(",")]
    plans = [text.format(n=options.ranks) for text in PLANS]
    rows = [weigh(text, latents, options.steps) for latents in sizes for text in plans]
    rows.append(weigh(plans[1], sizes[0], options.steps, alone=True))
    report(rows)
    write_rows(options, rows, [])


if __name__ == "__main__":
    import memory  # by a name that ranks can import too

    memory.main()
