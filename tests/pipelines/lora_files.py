"""LoRA files of random weights, written as diffusers writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "convolutions": ["conv1", "conv2", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"],
}


def write_lora(cls: Any, unet: UNet2DConditionModel, kind: str, seed: int, folder: Path) -> Path:
    """A LoRA for the layers of a kind, saved by a pipeline class; the file."""
    adapted = copy.deepcopy(unet)
    torch.manual_seed(seed)
    adapted.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[kind], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted))
    cls.save_lora_weights(folder, unet_lora_layers={name: 2 * tensor for name, tensor in layers.items()})
    return folder / "pytorch_lora_weights.safetensors"
