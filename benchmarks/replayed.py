"""What a picture of the embedded model takes with its denoiser calls as they are, and replayed.

    python benchmarks/replayed.py --sizes 256,512 --plans patch2,patch2.displaced.w4,cfg2,tp2

Ranks of one thread; every plan is loaded twice and both draw by turns, latents only. Printed are medians of seconds
after a first turn that does not count, and whether the latents have the same bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import distrifusion


def draw(pipe: Any, size: int, steps: int) -> tuple[float, torch.Tensor]:
    """Seconds of a picture, and its latents."""
    generator = torch.Generator().manual_seed(1)
    words = {"height": size, "width": size, "num_inference_steps": steps, "output_type": "latent"}
    start = time.perf_counter()
    latents = pipe("a small red sun over a teal field", generator=generator, **words).images
    return time.perf_counter() - start, latents


def compare(size: int, plans: list[str], steps: int, repeat: int) -> None:
    """Draw with all plans by turns, and print a row of each."""
    keys = [(plan, graphs) for plan in plans for graphs in (False, True)]
    pipes = {
        (plan, graphs): distrifusion.load("demo", devices=distrifusion.Plan.parse(plan).num_ranks, plan=plan, threads=1,
                                          graphs=graphs)
        for plan, graphs in keys
    }  # fmt: skip
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    drawn = [{key: draw(pipes[key], size, steps) for key in keys} for _ in range(1 + repeat)]
    for plan in plans:
        plain, replayed = (
            statistics.median(turn[plan, graphs][0] for turn in drawn[1:]) for graphs in (False, True)
        )  # fmt: skip
        same = torch.equal(drawn[-1][plan, False][1], drawn[-1][plan, True][1])
        print(f"| {size} | `{plan}` | {plain:.3f} | {replayed:.3f} | {plain / replayed:.2f}x | {same} |", flush=True)
    for pipe in pipes.values():
        pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512", help="pixels, joined by commas")
    parser.add_argument("--plans", default="patch2,patch2.displaced.w4,cfg2,tp2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print("| pixels | plan | s plain | s replayed | | same bits |\n|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        compare(size, options.plans.split(","), options.steps, options.repeat)


if __name__ == "__main__":
    main()
