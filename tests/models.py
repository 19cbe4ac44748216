"""Tiny models of the true classes, with weights perturbed so that no zero-initialised layer hides an error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection

from distrifusion.anatomy.unet import UNetAnatomy
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.layout.partition import partition_levels
from distrifusion.plan import Plan, Split


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Replace every parameter that is constant by noise, so that each layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_((0.1 * noise).to(parameter.dtype))
    return model.eval()


def sdxl_unet(**overrides: object) -> UNet2DConditionModel:
    """SDXL's block types in small: three levels, text_time embedding, linear projections."""
    torch.manual_seed(0)
    config: dict[str, object] = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    return perturb(UNet2DConditionModel(**{**config, **overrides}))


def sd_unet(**overrides: object) -> UNet2DConditionModel:
    """SD 1.x's block types in small: four levels, convolutional projections."""
    torch.manual_seed(1)
    config: dict[str, object] = {
        "sample_size": 32,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
    }
    return perturb(UNet2DConditionModel(**{**config, **overrides}))


def sd2_unet(**overrides: object) -> UNet2DConditionModel:
    """SD 2.x's block types in small: linear projections, heads of one size, attention in fp32."""
    heads = {"attention_head_dim": (4, 4, 8, 8), "use_linear_projection": True, "upcast_attention": True}
    return sd_unet(**{**heads, **overrides})


UNETS = {make.__name__: make for make in (sdxl_unet, sd_unet, sd2_unet)}


def unet_inputs(unet: UNet2DConditionModel, batch: int, height: int, width: int, seed: int = 3) -> dict[str, object]:
    """Random arguments for one call: latents [batch, 4, height, width]."""
    g = torch.Generator().manual_seed(seed)
    dtype = unet.dtype
    inputs: dict[str, object] = {
        "sample": torch.randn(batch, 4, height, width, generator=g).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, 24, generator=g).to(dtype),
    }
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(batch, 16, generator=g).to(dtype), "time_ids": torch.ones(batch, 6)}
        inputs["added_cond_kwargs"] = added
    return inputs


def with_residuals(x: dict[str, Any]) -> dict[str, Any]:
    """Inputs of `sdxl_unet` for one picture of 17x9 latents, with what a ControlNet would add."""
    shapes = [(16, 17, 9), (16, 17, 9), (16, 9, 5), (32, 9, 5), (32, 5, 3), (32, 5, 3)]
    noise = torch.Generator().manual_seed(2)
    return {
        **x,
        "down_block_additional_residuals": [0.3 * torch.randn(1, *shape, generator=noise) for shape in shapes],
        "mid_block_additional_residual": 0.3 * torch.randn(1, 32, 5, 3, generator=noise),
    }


def image_prompt(unet: UNet2DConditionModel, plus: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an IP-Adapter for images embedded in 10 channels; `plus` reads several tokens of an image."""
    generator = torch.Generator().manual_seed(6)
    channels = unet.config.cross_attention_dim

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if plus:
        reader = perturb(IPAdapterPlusImageProjection(10, channels, hidden_dims=64, heads=1, num_queries=3), seed=6)
        projection = {name.replace("to_out.0", "to_out"): tensor for name, tensor in reader.state_dict().items()}
    else:
        projection = {"proj.weight": noise(4 * channels, 10), "proj.bias": noise(4 * channels)}
        projection |= {"norm.weight": noise(channels), "norm.bias": noise(channels)}
    attentions = {}
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(crossing):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        for piece in ("k", "v"):
            attentions[f"{2 * i + 1}.to_{piece}_ip.weight"] = noise(layer.inner_dim, channels)
    return {"image_proj": projection, "ip_adapter": attentions}


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules that holds the same parameter tensors."""
    return copy_modules(model, lambda tensor: tensor)


def copy_modules(
    model: torch.nn.Module, of_tensor: Callable[[torch.Tensor], torch.Tensor], known: dict[int, Any] | None = None
) -> Any:
    """A copy of modules and of what they list, with tensors by `of_tensor`; deepcopy takes many times as long.

    What a module has beside modules, tensors and containers of such is the same object in both.
    """
    known = {} if known is None else known
    if id(model) in known:
        return known[id(model)]
    known[id(model)] = twin = object.__new__(type(model))
    for name, value in vars(model).items():
        vars(twin)[name] = value.copy() if type(value) in (dict, OrderedDict, list, set) else value
    for tensors in (twin._parameters, twin._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and id(tensor) not in known:
                known[id(tensor)] = of_tensor(tensor)
            tensors[name] = None if tensor is None else known[id(tensor)]
    for name, module in twin._modules.items():
        twin._modules[name] = None if module is None else copy_modules(module, of_tensor, known)
    return twin


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 distance, in double precision."""
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm()).item()


def moved(inputs: dict[str, object], amount: float = 0.1, seed: int = 9) -> dict[str, object]:
    """The same arguments with noise of the given size added to the latents."""
    name = "sample" if "sample" in inputs else "hidden_states"
    sample = inputs[name]
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed))
    return {**inputs, name: sample + (amount * noise).to(sample.dtype)}


def to_dtype(inputs: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """The arguments in another floating type; integers and nested dicts are kept."""

    def change(value: object) -> object:
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {key: change(value) for key, value in inputs.items()}


def band_by_band(unet: UNet2DConditionModel, inputs: dict[str, object], plan: Plan) -> torch.Tensor:
    """What the bands give without any exchange: each is a small picture of its own."""
    sample = inputs["sample"]
    levels = partition_levels(*sample.shape[2:], UNetAnatomy().num_levels(unet), plan.patch, plan.split)
    dim = 2 if plan.split is Split.ROWS else 3
    bands = levels[0].bands
    assert bands is not None, "the picture is too small to be cut"
    parts = [{**inputs, "sample": sample.narrow(dim, band.start, len(band))} for band in bands]
    return torch.cat([unet(**part).sample for part in parts], dim)


def run_request(
    model: UNet2DConditionModel,
    denoiser: ParallelDenoiser,
    steps: Sequence[dict[str, object]],
    request: object = "request",
) -> list[torch.Tensor]:
    """The predictions of one request with one call per step."""
    denoiser.open(request)
    outputs = []
    for inputs in steps:
        denoiser.slot = 0
        outputs.append(model(**inputs).sample)
    denoiser.close()
    return outputs
