"""What plans that divide weights divide: work, weights, and the bytes that their sums cost, counted in one process.

    python benchmarks/shares.py

The models are those of speed.py and transformer_speed.py; one call each, by each place of a plan, over a transport that
carries nothing. Work: floating-point operations of convolutions, products and attention, of one device's. Nothing is
timed, so the figures are the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformer_speed
from own_work import NowhereTransport
from speed import inputs, sdxl_shaped_unet
from torch.utils.flop_counter import FlopCounterMode

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.memory.weights import weights_of
from distrifusion.strategies.tensor import Share


class Elsewhere(NowhereTransport):
    """One of several ranks, the others of which are not there."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


def work_of(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the U-Net's latents")
    parser.add_argument("--tokens", type=int, default=64, help="rows and columns of the transformer's tokens")
    options = parser.parse_args()
    flux, words = transformer_speed.flux_shaped_transformer(), 512
    models = {
        "SDXL-shaped U-Net": (sdxl_shaped_unet(), {**inputs(1, options.size), "timestep": 500}),
        "FLUX-shaped transformer": (flux, transformer_speed.inputs(options.tokens, words)),
    }
    print("| model | plan | work of each rank | MB of weights | MB sent by each rank |\n|---|---|---|---|---|")
    for name, (model, arguments) in models.items():
        whole = work_of(lambda m=model, a=arguments: m(**a))
        for size in (2, 3, 4):
            works, weights, sent = [], [], []
            for rank in range(size):
                denoiser = ParallelDenoiser(model, Plan(tp=size), Elsewhere(rank, size))
                denoiser.attach()
                works.append(work_of(lambda m=model, a=arguments: m(**a)) / whole)
                sent.append(sum(denoiser.exchange.bytes_sent.values()) / 1e6)
                denoiser.detach()
                weights.append(weights_of(model, Share(rank, size)))
            shares = ", ".join(f"{work:.2f}" for work in works)
            own = ", ".join(f"{weight.own / 1e6:.0f}" for weight in weights)
            traffic = ", ".join(f"{n:.0f}" for n in sent)
            print(f"| {name} | `tp{size}` | {shares} | {own} of {weights[0].whole / 1e6:.0f} | {traffic} |", flush=True)


if __name__ == "__main__":
    main()
