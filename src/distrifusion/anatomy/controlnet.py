"""The anatomy of diffusers' ControlNetModel: a U-Net's down and middle half, and a stack that reads an image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import nn

from distrifusion.anatomy.base import BoundCall, LinkSite
from distrifusion.anatomy.unet import UNetAnatomy, block_levels


class ControlNetAnatomy(UNetAnatomy):
    """Facts about ControlNetModel: a residual for every skip connection of the U-Net, and one for its middle block."""

    def links(self, model: nn.Module) -> list[LinkSite]:
        # What it gives is read all along the chain of another model.
        return []

    def exits(self, model: Any) -> tuple[int, ...]:
        levels = dict(block_levels(model))
        exits = [0]
        for i, block in enumerate(model.down_blocks):
            level, after = levels[f"down_blocks.{i}"]
            exits += [level] * len(block.resnets) + [after] * (block.downsamplers is not None)
        return (*exits, levels["mid_block"][0])

    def tensors(self, result: Any) -> list[torch.Tensor]:
        down, middle = result
        return [*down, middle]

    def stays_cut(self, call: BoundCall) -> bool:
        # In guess mode the pipeline gives half of the U-Net's batch, and puts zeros in the place of the other half.
        return not call.rest.get("guess_mode", False)

    def output(self, tensors: list[torch.Tensor], call: BoundCall) -> Any:
        *down, middle = tensors
        if not call.rest.get("return_dict", True):
            return down, middle
        return ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=middle)  # type: ignore[arg-type]
