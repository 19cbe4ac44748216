"""Published figures that the cost model is checked with, and the networks they were measured on, without weights.

Sources: DistriFusion (arXiv 2402.19481): SDXL, 50 DDIM steps, A100 with NVLink. An independent measurement of it on
four A100. PipeFusion (arXiv 2405.14430, and the data of its plots in legacy/scripts/plots of xdit-project/xDiT):
PixArt-alpha, 20 steps. AsyncDiff (arXiv 2406.06911): SDXL, 50 steps, A5000.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from distrifusion.planner.blueprint import Blueprint, of_config

SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": True,
}
# Text encoders and VAE in fp16: CLIP-L and bigG with SDXL, T5 XXL with PixArt.
_OTHERS = {"sdxl": 1_800_000_000, "pixart": 9_700_000_000}


def blueprint(model: str) -> Blueprint:
    """SDXL or PixArt-alpha in fp16."""
    cls, config = (UNet2DConditionModel, SDXL) if model == "sdxl" else (PixArtTransformer2DModel, PIXART)
    return of_config(model, cls, config, torch.float16, _OTHERS[model])


@dataclass(frozen=True)
class Row:
    """One published figure.

    Attributes:
        model: sdxl or pixart.
        size: pixels each way.
        plans: what comes nearest to the published method in our words; of several the fastest, as they searched it.
        profile: links.
        device: the GPU.
        steps: denoising steps.
        alone: published seconds of one device; an input.
        seconds: published seconds of the plan.
        fitted: the row is one that constants are fitted on; the others check them.
        kind: what it is counted with: `sdxl` and `pixart` bands, `stages` or `components`.
    """

    model: str
    size: int
    plans: tuple[str, ...]
    profile: str
    device: str
    steps: int
    alone: float
    seconds: float
    fitted: bool
    kind: str


_PIXART_ALONE = {1024: 2.085, 2048: 16.22, 4096: 183.6}
# Numbers of pieces, of which PipeFusion's authors publish the fastest; they tried 16 and 32 too. With fewer than stages
# some of these are idle.
_SEARCHED = (2, 4, 8)


def _sdxl(size: int, plan: str, alone: float, seconds: float, fitted: bool) -> Row:
    return Row("sdxl", size, (plan,), "nvlink-a100", "a100", 50, alone, seconds, fitted, "sdxl")


def _pixart(size: int, plan: str, profile: str, seconds: float, fitted: bool) -> Row:
    return Row("pixart", size, (plan,), profile, "a100", 20, _PIXART_ALONE[size], seconds, fitted, "pixart")


def _stages(
    size: int, num: int, profile: str, seconds: float, fitted: bool, device: str = "a100", alone: float | None = None
) -> Row:
    plans = tuple(f"pipe{num}.m{pieces}.w1" for pieces in _SEARCHED if pieces >= num)
    alone = alone or _PIXART_ALONE[size]
    return Row("pixart", size, plans, profile, device, 20, alone, seconds, fitted, "stages")


def _async(num: int, profile: str, seconds: float) -> Row:
    return Row("sdxl", 1024, (f"async{num}.w2",), profile, "a5000", 50, 13.81, seconds, False, "components")


# First the rows of the page from its beginning: every second one of the two tables of SDXL was fitted on, and two of
# PixArt in bands. Then two plots of PipeFusion's authors in their order, every second row of what was not there yet.
# Nothing in components is fitted on. What is published of them with stride 2 is another method than ours, and left out.
ROWS = (
    _sdxl(1024, "cfg2", 5.02, 3.35, True),
    _sdxl(1024, "cfg2.patch2.displaced.all", 5.02, 2.26, False),
    _sdxl(1024, "cfg2.patch4.displaced.all", 5.02, 1.77, True),
    _sdxl(2048, "cfg2", 23.7, 13.3, False),
    _sdxl(2048, "cfg2.patch2.displaced.all", 23.7, 7.60, True),
    _sdxl(2048, "cfg2.patch4.displaced.all", 23.7, 4.81, False),
    _sdxl(3840, "cfg2", 140.0, 76.6, True),
    _sdxl(3840, "cfg2.patch2.displaced.all", 140.0, 41.3, False),
    _sdxl(3840, "cfg2.patch4.displaced.all", 140.0, 22.9, True),
    _sdxl(2048, "cfg2.patch2.displaced.all", 25.25, 8.27, False),
    _sdxl(2048, "cfg2.patch2", 25.25, 8.64, True),
    _pixart(1024, "patch4.displaced.w1", "pcie4", 2.33, False),
    _pixart(1024, "ulysses4", "pcie4", 1.74, True),
    _stages(1024, 4, "pcie4", 0.866, False),
    _pixart(1024, "patch8.displaced.w1", "nvlink-a100", 0.765, True),
    _stages(1024, 8, "nvlink-a100", 0.969, False),
    _stages(4096, 8, "pcie4", 71.1, False, "l20", 306.6),
    _async(2, "nvlink-a5000", 8.00),
    _async(3, "pcie4", 5.84),
    _async(4, "pcie4", 5.12),
    _stages(1024, 2, "pcie4", 1.235, True),
    _stages(1024, 2, "nvlink-a100", 1.358, False),
    _stages(1024, 4, "nvlink-a100", 0.9633, True),
    _pixart(1024, "patch2.displaced.w1", "pcie4", 1.946, False),
    _pixart(1024, "patch2.displaced.w1", "nvlink-a100", 1.187, True),
    _pixart(1024, "patch4.displaced.w1", "nvlink-a100", 0.795, False),
    _stages(4096, 2, "pcie4", 101.7, True),
    _stages(4096, 4, "pcie4", 60.15, False),
    _stages(4096, 2, "nvlink-a100", 101.0, True),
    _stages(4096, 4, "nvlink-a100", 60.10, False),
    _stages(4096, 8, "nvlink-a100", 42.79, True),
    _pixart(4096, "patch2.displaced.w1", "pcie4", 98.29, False),
    _pixart(4096, "patch4.displaced.w1", "pcie4", 68.35, True),
    _pixart(4096, "patch2.displaced.w1", "nvlink-a100", 92.72, False),
    _pixart(4096, "patch4.displaced.w1", "nvlink-a100", 48.49, True),
    _pixart(4096, "patch8.displaced.w1", "nvlink-a100", 25.24, False),
    _stages(2048, 8, "nvlink-a100", 4.061, True),
)
# PixArt at 1024, 2048, 4096 pixels on 8 devices: published GB of DistriFusion's implementation, and of one device.
MEMORY = {1024: (14.3, 12.3), 2048: (20.4, 12.9), 4096: (45.1, 15.5)}
