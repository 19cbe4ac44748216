"""The part of a U-Net's weights that each rank of components works with, and what it takes to foresee where it is cut.

SDXL's at 1024x1024, and the embedded one, from shapes: nothing is computed.

python benchmarks/component_weights.py
"""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from published import SDXL

from distrifusion import Plan
from distrifusion.anatomy import anatomy_of
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.planner.blueprint import open_blueprint
from distrifusion.planner.rehearsal import SilentTransport
from distrifusion.strategies.foreseeing import foresee

PLANS = ("async2", "async3", "async4", "async2.stride2")


def main() -> None:
    """Print Markdown tables."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
        arguments = {
            "sample": torch.empty(2, 4, 128, 128),
            "timestep": torch.empty(()),
            "encoder_hidden_states": torch.empty(2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)},
        }
    print_weights(unet, arguments)
    demo = open_blueprint("demo", torch.float32)
    print("\n| model | foreseen in, s |\n|---|---|")
    for name, model, given in (("SDXL", unet, arguments), ("demo, 256x256", demo.denoiser, demo.arguments(256, 256))):
        took = [seconds(model, given) for _ in range(5)]
        print(f"| {name} | {min(took):.3f} to {max(took):.3f} |")


@torch.no_grad()
def print_weights(unet: UNet2DConditionModel, arguments: dict[str, Any]) -> None:
    """The table of weights by rank."""
    print("| plan | weights by rank |\n|---|---|")
    for text in PLANS:
        plan, parts = Plan.parse(f"{text}.w0"), []
        for rank in range(plan.num_ranks):
            denoiser = ParallelDenoiser(unet, plan, SilentTransport(rank, plan.num_ranks, {}))
            denoiser.attach()
            whole = denoiser.weight_bytes
            unet(**arguments)
            parts.append(denoiser.weight_bytes / whole)
            denoiser.detach()
        print(f"| `{text}` | {', '.join(f'{part:.2f}' for part in parts)} |", flush=True)


def seconds(model: Any, arguments: dict[str, Any]) -> float:
    """What it takes to foresee a call."""
    layers = {site.name: (site.module, site.module.forward) for site in anatomy_of(model).links(model)}
    start = time.perf_counter()
    foresee(model, model.forward, layers, (), arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
