"""Where a band loses against half of a full call: calls of both by turns, so that an uneven machine is uneven for both.

    python benchmarks/turns.py --plans patch2.displaced.all.w4 --calls 30

Two ranks of one thread, the model of speed.py. Each turn is a full call in both processes at once, then a call of every
plan, one of it replayed from a tape, and one over a transport that carries nothing; every rank waits for the other
before each of them. Printed is the time of a plan's call over half of the mean of the full calls before and after it,
by the clock and of the thread that computes: median and quartiles. What a plan lets travel has a full call's time on
top here; waits for it do not show.

A full call of 8x8 latents is timed too. Weights are read there, brought into the layout that kernels compute in, and
Python runs, as in any call: no band has less of it, so half of a full call leaves half of that out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from own_work import NowhereTransport
from speed import free_port, inputs, join, sdxl_shaped_unet

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.tape import TapeBackend

_SMALL = 8  # rows and columns of latents that cost next to nothing themselves
_BEFORE = 8  # turns that do not count: the warm-up, the first stale calls, one of which is captured
_CLOCKS = {"clock": time.perf_counter, "thread": time.thread_time}
Turn = dict[str, dict[str, float]]


@torch.no_grad()
def time_rank(rank: int, options: argparse.Namespace, port: int) -> None:
    """What one rank does; rank 0 prints."""
    transport = join(rank, port, 2, options)
    plain, arguments, small, turns = sdxl_shaped_unet(), inputs(1, options.size), inputs(1, _SMALL), []
    parts: dict[str, ParallelDenoiser] = {}
    for text in options.plans.split(","):
        for name in (text, f"{text}, replayed", f"{text}, nothing carried"):
            parts[name] = ParallelDenoiser(sdxl_shaped_unet(), Plan.parse(text), transport)
            if name.endswith("replayed"):
                parts[name].capture_by(TapeBackend())
            parts[name].attach()
            parts[name].open("benchmark")
    for turn in range(_BEFORE + options.calls):
        timestep = torch.tensor(500 - turn)  # a plain number that changes is never captured
        times: Turn = {"full": timed(plain, arguments, timestep), "small": timed(plain, small, timestep)}
        for name, denoiser in parts.items():
            if turn == _BEFORE and name.endswith("nothing carried"):
                denoiser.exchange.transport = NowhereTransport(rank)
            denoiser.slot = 0
            times[name] = timed(denoiser.model, arguments, timestep)
        turns.append(times)
    everybody: list[Any] = [None, None]
    dist.all_gather_object(everybody, turns[_BEFORE:])
    if rank == 0:
        report(everybody, list(parts))
    dist.destroy_process_group()


def timed(model: Any, arguments: dict[str, Any], timestep: torch.Tensor) -> dict[str, float]:
    """Seconds of one call by every clock, begun by both ranks together."""
    dist.barrier()
    before = {name: clock() for name, clock in _CLOCKS.items()}
    model(**arguments, timestep=timestep)
    return {name: clock() - before[name] for name, clock in _CLOCKS.items()}


def report(everybody: list[list[Turn]], names: list[str]) -> None:
    """Print a Markdown table, and what a band could reach."""
    every = [turn for turns in everybody for turn in turns]
    full, small = (statistics.median(turn[name]["thread"] for turn in every) for name in ("full", "small"))
    print(f"A full call takes {full:.3f} s; one of {_SMALL}x{_SMALL} latents {small:.3f} s. A band that has the latter")
    print(f"whole, half of the rest and no work of its own takes {1 + small / full:.3f} of half a full call.\n")
    print("| plan | rank | by the clock | of the thread |")
    print("|---|---|---|---|")
    for name in names:
        for rank, turns in enumerate(everybody):
            cells = [shares(turns, name, clock) for clock in _CLOCKS]
            print(f"| `{name}` | {rank} | {' | '.join(cells)} |")


def shares(turns: list[Turn], name: str, clock: str) -> str:
    """What a call took over half of a full one: median and quartiles."""
    found = []
    for turn, after in pairwise(turns):
        found.append(turn[name][clock] / ((turn["full"][clock] + after["full"][clock]) / 4))
    low, median, high = statistics.quantiles(found, n=4)
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", default="patch2.displaced.all.w4", help="plans for two ranks joined by commas")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the latents")
    options = parser.parse_args()
    if options.calls < 4:
        parser.error("--calls: quartiles need at least 4")
    options.link, options.transport = None, "best"
    mp.spawn(time_rank, args=(options, free_port()), nprocs=2)


if __name__ == "__main__":
    main()
