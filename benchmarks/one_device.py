"""What a plan of one rank costs: the plain model and the same with `patch1`, called by turns.

    python benchmarks/one_device.py --pairs 16

Prints the speed of the second over that of the first, pair by pair, so that a drifting machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from speed import inputs, sdxl_shaped_unet

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.in_place import SingleTransport


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain, planned = sdxl_shaped_unet(), sdxl_shaped_unet()
    ParallelDenoiser(planned, Plan(), SingleTransport()).attach()
    arguments = {**inputs(1, 128), "timestep": torch.tensor(500)}
    plain(**arguments)
    planned(**arguments)
    ratios = []
    for i in range(options.pairs):
        seconds = {}
        for model in (plain, planned) if i % 2 else (planned, plain):
            start = time.perf_counter()
            model(**arguments)
            seconds[model is plain] = time.perf_counter() - start
        ratios.append(seconds[True] / seconds[False])
    print(f"speed of patch1 over plain: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
