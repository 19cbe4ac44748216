"""The part of SDXL's weights that each rank of components works with, at 1024x1024: from shapes, nothing is computed.

python benchmarks/component_weights.py
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from published import SDXL

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.planner.rehearsal import SilentTransport

PLANS = ("async2", "async3", "async4", "async2.stride2")


@torch.no_grad()
def main() -> None:
    """Print a Markdown table."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
        arguments = {
            "sample": torch.empty(2, 4, 128, 128),
            "timestep": torch.empty(()),
            "encoder_hidden_states": torch.empty(2, 77, 2048),
            "added_cond_kwargs": {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)},
        }
    print("| plan | weights by rank |")
    print("|---|---|")
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


if __name__ == "__main__":
    main()
