"""What plans hold in memory on a random SDXL-shaped U-Net: the pool, predicted and measured, and each rank's peak.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Every row is run in new processes, each with its own weights: one device, a synchronous plan, a displaced one; batch 1,
one thread per rank, fp32. The peak is that of the resident set during the calls (VmHWM, Linux), so it counts libraries,
weights, and the shared memory through which ranks exchange. "At most" is the peak of one device plus the measured pool.

Then a pipeline with that U-Net is loaded onto two processes, once so that they can share its weights and once so that
they cannot, and the proportional set sizes (PSS: a page of n processes counts 1/n for each) of all its processes are
added up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from speed import inputs, join, run, run_plan, sdxl_shaped_unet

from distrifusion import Plan, demo, load
from distrifusion.in_place import SingleTransport
from distrifusion.memory.prediction import pool_bytes

ONE_DEVICE = "one device"


def memory_of(pid: int | str, table: str, name: str) -> int:
    """Bytes that Linux notes of a process under a name in `status` or `smaps_rollup`."""
    lines = Path(f"/proc/{pid}/{table}").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@torch.no_grad()
def weigh_rank(rank: int, text: str, latents: int, calls: int, port: int, path: Path) -> None:
    """Run calls of a plan as one rank, and write what this process held before, at its peak, and in its pool."""
    torch.set_num_threads(1)
    plan = None if text == ONE_DEVICE else Plan.parse(text)
    transport = join(rank, port, plan.num_ranks, sockets=False) if plan else SingleTransport()
    unet, arguments = sdxl_shaped_unet(), inputs(1, latents)
    row = {"rank": rank, "rest_bytes": memory_of("self", "status", "VmRSS"), "pool_bytes": 0, "predicted_bytes": 0}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if plan is None:
        run(unet, arguments, calls, lambda: None)
    else:
        row["pool_bytes"] = run_plan(unet, plan, transport, arguments, calls)["kept_bytes"]
        row["predicted_bytes"] = pool_bytes(unet, plan, rank, arguments["sample"].shape, torch.float32).total()
    row["peak_bytes"] = memory_of("self", "status", "VmHWM")
    path.with_suffix(f".{rank}").write_text(json.dumps(row))


def weigh(text: str, pixels: int, calls: int, folder: Path) -> dict[str, Any]:
    """The rank of a plan that held most at its peak."""
    num_ranks = 1 if text == ONE_DEVICE else Plan.parse(text).num_ranks
    store = dist.TCPStore("127.0.0.1", 0, num_ranks, is_master=True, wait_for_workers=False)
    mp.spawn(weigh_rank, args=(text, pixels // 8, calls, store.port, folder / "row"), nprocs=num_ranks)
    rows = [json.loads((folder / "row").with_suffix(f".{rank}").read_text()) for rank in range(num_ranks)]
    return {"pixels": pixels, "plan": text, "calls": calls, **max(rows, key=lambda row: row["peak_bytes"])}


def pipeline(alone: bool) -> Callable[[], Any]:
    """A factory of the embedded model's pipeline with a large random U-Net; `alone`: no process can share it."""

    def build() -> Any:
        if alone:
            threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
        return diffusers.StableDiffusionXLPipeline.from_pretrained(demo.path(), unet=sdxl_shaped_unet())

    return build


def weigh_weights(num_ranks: int) -> list[dict[str, Any]]:
    """Sums of proportional set sizes of all processes of a loaded pipeline, and seconds of loading."""
    rows = []
    for alone in (True, False):
        start = time.perf_counter()
        with load(pipeline(alone), devices=num_ranks, plan=f"patch{num_ranks}", threads=1) as pipe:
            seconds = time.perf_counter() - start
            parent = int(Path(f"/proc/{pipe.pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
            sizes = [memory_of(pid, "smaps_rollup", "Pss") for pid in (parent, *pipe.pids)]
        rows.append({"shared": not alone, "seconds": seconds, "pss_bytes": sizes})
    return rows


def report(rows: list[dict[str, Any]], weights: list[dict[str, Any]]) -> None:
    """Print Markdown tables."""
    print("| size | plan | pool, predicted | pool, measured | peak per rank | at most |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        one = next(r for r in rows if (r["pixels"], r["plan"]) == (row["pixels"], ONE_DEVICE))
        limit = one["peak_bytes"] + row["pool_bytes"]
        cells = [row["predicted_bytes"], row["pool_bytes"], row["peak_bytes"], limit]
        numbers = " | ".join(f"{cell / 1e6:.1f} MB" for cell in cells)
        print(f"| {row['pixels']} | {row['plan']} | {numbers} |")
    print("\n| weights | sum of PSS | seconds of loading |")
    print("|---|---|---|")
    for row in weights:
        name = "shared" if row["shared"] else "each rank its own"
        print(f"| {name} | {sum(row['pss_bytes']) / 1e6:.0f} MB | {row['seconds']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", default="512,1024,2048", help="pixels a side, joined by commas")
    parser.add_argument("--calls", type=int, default=2, help="denoiser calls of every run")
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    options = parser.parse_args()
    plans = (ONE_DEVICE, f"patch{options.ranks}", f"patch{options.ranks}.displaced.w0")
    sizes = [int(size) for size in options.sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        rows = [weigh(plan, pixels, options.calls, Path(folder)) for pixels in sizes for plan in plans]
    weights = weigh_weights(options.ranks)
    report(rows, weights)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    document = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "versions": {**versions, "machine": f"{platform.machine()}, {os.cpu_count()} cores"},
        "rows": rows,
        "weights": weights,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
