"""What one rank computes, without waiting for anybody: half of the model, and how much on top of it.

    python benchmarks/own_work.py --repeat 4

Rank 0 of two bands runs alone in one process of one thread, over a transport that carries nothing, so that neither the
other rank nor the memory that both share can slow it. The model is that of speed.py. Every repetition times one device
and all plans by turns; printed is the CPU time of a call against half of one device's, and the range over repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from speed import inputs, sdxl_shaped_unet

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.transport import Message

PLANS = (
    "patch2", "patch2.displaced.w0", "patch2.displaced.all.w0", "patch2.displaced.forecast.w0", "patch2.delta8",
    "patch2.delta4", "patch2.displaced.delta4.w0", "tp2",
)  # fmt: skip
_NUM_CALLS = 4  # the first is synchronous and allocates; the last two count


class Arrived:
    """Messages of which nothing is known."""

    def wait(self) -> None:
        """Nothing to wait for."""


class NowhereTransport:
    """Takes what one rank of two sends, and leaves zeros where something should arrive."""

    world_size = 2

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Arrived:
        for message in receives:
            message.tensor.zero_()
        return Arrived()

    def broadcast(self, value: Any) -> Any:
        return value


def seconds(call: Callable[[], object]) -> float:
    """CPU time of the one thread, which other programs on the machine disturb least."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the latents")
    options = parser.parse_args()
    torch.set_num_threads(1)
    unet, arguments = sdxl_shaped_unet(), inputs(1, options.size)

    def call() -> object:
        return unet(**arguments, timestep=500)

    shares: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeat):
        half = min(seconds(call) for _ in range(2)) / 2
        for text in PLANS:
            denoiser = ParallelDenoiser(unet, Plan.parse(text), NowhereTransport())
            denoiser.attach()
            denoiser.open("benchmark")
            own = []
            for _ in range(_NUM_CALLS):
                denoiser.slot = 0
                own.append(seconds(call))
            denoiser.close()
            denoiser.detach()
            shares[text].append(min(own[2:]) / half)
    print("| plan | of half a call of one device |\n|---|---|")
    for text, found in shares.items():
        print(f"| `{text}` | {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) |")


if __name__ == "__main__":
    main()
