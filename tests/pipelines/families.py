"""Tiny pipelines of diffusers' own classes for U-Nets, and one call of each at a size that does not divide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, DiffusionPipeline, MultiAdapter, T2IAdapter

from gloo.small_pipelines import SCHEDULERS, sd_pipeline, sdxl_pipeline
from models import image_prompt, perturb, sd2_unet, sd_unet, sdxl_unet

TWO_LEVELS: dict[str, Any] = {"block_out_channels": (16, 32)}
SDXL_BLOCKS: dict[str, Any] = {
    **TWO_LEVELS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
}
SD_BLOCKS: dict[str, Any] = {
    **TWO_LEVELS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
HEIGHT, WIDTH = 200, 136  # 25x17 latents


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """A picture of noise in 0..1: [1, 3, height, width]."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def mask(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """1 where to paint: a rectangle across the edges of bands."""
    painted = torch.zeros(1, 1, height, width)
    painted[..., height // 5 : height // 2 + 9, width // 3 :] = 1
    return painted


@cache
def base(kind: str) -> dict[str, Any]:
    """The components of a text-to-image pipeline: kind sdxl or sd."""
    return (sdxl_pipeline if kind == "sdxl" else sd_pipeline)("ddim").components


def build(cls: type[DiffusionPipeline], kind: str, **changes: Any) -> DiffusionPipeline:
    """A pipeline of a class from the components of its kind, those that the class does not take left out."""
    modules, options = cls._get_signature_keys(cls)
    parts: dict[str, Any] = {"image_encoder": None, "feature_extractor": None, **base(kind), **changes}
    quiet = {"add_watermarker": False, "requires_safety_checker": False, "requires_aesthetics_score": False}
    given = {name: part for name, part in {**quiet, **parts}.items() if name in modules or name in options}
    pipe = cls(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def control(kind: str, seed: int = 0, **changes: Any) -> ControlNetModel:
    """A ControlNet that fits the U-Net of a kind, no layer of it zero."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(
        base(kind)["unet"], conditioning_embedding_out_channels=(4, 6, 8, 8), load_weights_from_unet=False, **changes
    )
    with torch.no_grad():
        for name, parameter in net.controlnet_cond_embedding.named_parameters():
            parameter.mul_(4 if name.endswith("weight") else 1)  # or the image would be a whisper
    return perturb(net, seed)


@dataclass(frozen=True)
class Case:
    """One pipeline and one call of it.

    Attributes:
        make: builds the plain pipeline.
        arguments: of the call, besides prompt, steps, generator and output.
        plans: synchronous plans that must equal one device.
    """

    make: Callable[[], DiffusionPipeline]
    arguments: dict[str, Any]
    plans: tuple[str, ...] = ("patch2", "patch3", "cfg2.patch2")

    def __call__(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """The latents, or the picture where the pipeline gives no latents."""
        generator = torch.Generator().manual_seed(5)
        common = {"prompt": "a lake", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
        return pipe(**{**common, "generator": generator, **self.arguments, **changes}).images


SIZE = {"height": HEIGHT, "width": WIDTH}
IMAGE = {"image": picture(), "strength": 0.9}
PAINT = {**IMAGE, "mask_image": mask(), **SIZE}
CONTROL = {"control_image": picture(seed=1), "controlnet_conditioning_scale": 0.7}


def _class_case(name: str, kind: str, arguments: dict[str, Any], **changes: Callable[[], Any]) -> Case:
    def make() -> DiffusionPipeline:
        parts = {part: produce() for part, produce in changes.items()}
        return build(getattr(diffusers, name), kind, **parts)

    return Case(make, arguments)


def _nine_channels(kind: str) -> Callable[[], Any]:
    make = sdxl_unet if kind == "sdxl" else sd_unet
    return lambda: make(in_channels=9, **(SDXL_BLOCKS if kind == "sdxl" else SD_BLOCKS))


def _text_to_image() -> dict[str, Case]:
    return {
        "StableDiffusionXLPipeline": _class_case("StableDiffusionXLPipeline", "sdxl", SIZE),
        "StableDiffusionPipeline": _class_case("StableDiffusionPipeline", "sd", SIZE),
        "LatentConsistencyModelPipeline": _class_case(
            "LatentConsistencyModelPipeline",
            "sd",
            SIZE,
            unet=lambda: sd_unet(time_cond_proj_dim=8, **SD_BLOCKS),
            scheduler=SCHEDULERS["lcm"],
        ),
    }


def _from_an_image() -> dict[str, Case]:
    edit = {"image": picture(), "image_guidance_scale": 1.4}
    return {
        "StableDiffusionXLImg2ImgPipeline": _class_case("StableDiffusionXLImg2ImgPipeline", "sdxl", IMAGE),
        "StableDiffusionImg2ImgPipeline": _class_case("StableDiffusionImg2ImgPipeline", "sd", IMAGE),
        "StableDiffusionXLInpaintPipeline": _class_case("StableDiffusionXLInpaintPipeline", "sdxl", PAINT),
        "StableDiffusionInpaintPipeline": _class_case("StableDiffusionInpaintPipeline", "sd", PAINT),
        "StableDiffusionXLInpaintPipeline, 9 channels": _class_case(
            "StableDiffusionXLInpaintPipeline", "sdxl", PAINT, unet=_nine_channels("sdxl")
        ),
        "StableDiffusionInpaintPipeline, 9 channels": _class_case(
            "StableDiffusionInpaintPipeline", "sd", PAINT, unet=_nine_channels("sd")
        ),
        "StableDiffusionInstructPix2PixPipeline": _class_case(
            "StableDiffusionInstructPix2PixPipeline", "sd", edit, unet=lambda: sd_unet(in_channels=8, **SD_BLOCKS)
        ),
        "StableDiffusionXLInstructPix2PixPipeline": _class_case(
            "StableDiffusionXLInstructPix2PixPipeline",
            "sdxl",
            {**edit, **SIZE},
            unet=lambda: sdxl_unet(in_channels=8, **SDXL_BLOCKS),
        ),
        "StableDiffusionUpscalePipeline": _class_case(
            "StableDiffusionUpscalePipeline",
            "sd",
            {"image": picture(40, 24), "noise_level": 20},
            unet=lambda: sd_unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False), **SD_BLOCKS),
            low_res_scheduler=lambda: diffusers.DDPMScheduler(),
        ),
    }


def _latent_upscaler() -> dict[str, Case]:
    """Its U-Net has K-diffusion's blocks: fixed filters between resolutions, norms that read the timestep."""
    unet = {
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        "block_out_channels": (32, 64, 64),
        "in_channels": 8,
        "out_channels": 5,
        "mid_block_type": None,
        "act_fn": "gelu",
        "attention_head_dim": 8,
        "norm_num_groups": None,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "time_cond_proj_dim": 128 + 24,
    }
    name = "StableDiffusionLatentUpscalePipeline"
    arguments = {"image": noise(1, 4, 10, 6, seed=4)}
    case = _class_case(name, "sd", arguments, unet=lambda: sd_unet(**unet), scheduler=SCHEDULERS["euler"])
    return {name: replace(case, plans=("patch2", "patch3.columns", "cfg2.patch4", "patch8"))}


def _with_controlnets() -> dict[str, Case]:
    from_text = {"image": picture(seed=1), "controlnet_conditioning_scale": 0.7}
    two = {
        "image": [picture(seed=1), picture(seed=2)],
        "controlnet_conditioning_scale": [0.7, 0.4],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.7, 1.0],
    }
    xl, sd = (lambda: control("sdxl")), (lambda: control("sd"))
    pair = lambda: [control("sdxl"), control("sdxl", seed=1)]  # noqa: E731
    name, plain = "StableDiffusionXLControlNetPipeline", "StableDiffusionControlNetPipeline"
    return {
        name: _class_case(name, "sdxl", from_text, controlnet=xl),
        f"{name}, two nets": _class_case(name, "sdxl", two, controlnet=pair),
        f"{name}, guess mode": _class_case(name, "sdxl", {**from_text, "guess_mode": True}, controlnet=xl),
        plain: _class_case(plain, "sd", from_text, controlnet=sd),
        f"{plain}, global pooling": _class_case(
            plain, "sd", from_text, controlnet=lambda: _set(control("sd"), global_pool_conditions=True)
        ),
        "StableDiffusionXLControlNetImg2ImgPipeline": _class_case(
            "StableDiffusionXLControlNetImg2ImgPipeline", "sdxl", {**IMAGE, **CONTROL}, controlnet=xl
        ),
        "StableDiffusionXLControlNetInpaintPipeline": _class_case(
            "StableDiffusionXLControlNetInpaintPipeline", "sdxl", {**PAINT, **CONTROL}, controlnet=xl
        ),
        "StableDiffusionControlNetImg2ImgPipeline": _class_case(
            "StableDiffusionControlNetImg2ImgPipeline", "sd", {**IMAGE, **CONTROL}, controlnet=sd
        ),
        "StableDiffusionControlNetInpaintPipeline": _class_case(
            "StableDiffusionControlNetInpaintPipeline", "sd", {**PAINT, **CONTROL}, controlnet=sd
        ),
        "StableDiffusionXLControlNetUnionPipeline": _class_case(
            "StableDiffusionXLControlNetUnionPipeline",
            "sdxl",
            {"control_image": [picture(seed=1)], "control_mode": [1], "controlnet_conditioning_scale": 0.7},
            controlnet=union,
        ),
    }


def _set(model: Any, **config: Any) -> Any:
    model.register_to_config(**config)
    return model


def union() -> ControlNetUnionModel:
    """A ControlNet for several kinds of image, which a transformer of its own reads."""
    torch.manual_seed(0)
    taken = ("cross_attention_dim", "addition_embed_type", "addition_time_embed_dim", "use_linear_projection",
             "projection_class_embeddings_input_dim", "norm_num_groups", "layers_per_block")  # fmt: skip
    unet = base("sdxl")["unet"]
    net = ControlNetUnionModel(
        **{name: unet.config[name] for name in taken},
        **{name: value for name, value in SDXL_BLOCKS.items() if name != "up_block_types"},
        conditioning_embedding_out_channels=(4, 6, 8, 8),
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
    )
    return perturb(net)


def _with_adapters() -> dict[str, Case]:
    xl = {"image": picture(208, 144), "height": 208, "width": 144, "adapter_conditioning_scale": 0.8}
    return {
        "StableDiffusionXLAdapterPipeline": _class_case(
            "StableDiffusionXLAdapterPipeline",
            "sdxl",
            xl,
            adapter=lambda: adapter("full_adapter_xl", 16, 4),
            unet=sdxl_unet,
        ),
        "StableDiffusionXLAdapterPipeline, two adapters": _class_case(
            "StableDiffusionXLAdapterPipeline",
            "sdxl",
            {**xl, "image": [picture(208, 144), picture(208, 144, seed=2)], "adapter_conditioning_scale": [0.8, 0.3]},
            adapter=lambda: MultiAdapter([adapter("full_adapter_xl", 16, 4) for _ in range(2)]),
            unet=sdxl_unet,
        ),
        "StableDiffusionAdapterPipeline": _class_case(
            "StableDiffusionAdapterPipeline", "sd", xl, adapter=lambda: adapter("full_adapter", 8, 2)
        ),
    }


def adapter(kind: str, factor: int, num_features: int) -> T2IAdapter:
    """A T2I-Adapter whose features fit the two levels of the U-Nets here."""
    torch.manual_seed(0)
    channels = [16, 32, 32, 32][:num_features]
    net = T2IAdapter(channels=channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind)
    return perturb(net)


def _relatives() -> dict[str, Case]:
    """Pipelines that come free with those above, each with a plan that has guidance branches and bands."""
    depth = {**IMAGE, "depth_map": torch.rand(1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))}
    control_mode = {**IMAGE, "control_image": [picture(seed=1)], "control_mode": [1]}
    cases = {
        "StableDiffusionPipeline, SD 2.x": _class_case(
            "StableDiffusionPipeline", "sd", SIZE, unet=lambda: sd2_unet(**SD_BLOCKS, attention_head_dim=(4, 8))
        ),
        "LatentConsistencyModelImg2ImgPipeline": _class_case(
            "LatentConsistencyModelImg2ImgPipeline",
            "sd",
            IMAGE,
            unet=lambda: sd_unet(time_cond_proj_dim=8, **SD_BLOCKS),
            scheduler=SCHEDULERS["lcm"],
        ),
        "StableDiffusionDepth2ImgPipeline": _class_case(
            "StableDiffusionDepth2ImgPipeline",
            "sd",
            depth,
            unet=lambda: sd_unet(in_channels=5, **SD_BLOCKS),
            depth_estimator=lambda: None,
        ),
        "StableDiffusionPanoramaPipeline": _class_case(
            "StableDiffusionPanoramaPipeline", "sd", {"height": 136, "width": 648, "view_batch_size": 2}
        ),
        "StableDiffusionXLControlNetUnionImg2ImgPipeline": _class_case(
            "StableDiffusionXLControlNetUnionImg2ImgPipeline", "sdxl", control_mode, controlnet=union
        ),
    }
    return {name: replace(case, plans=("cfg2.patch3",)) for name, case in cases.items()}


def _perturbed_attention() -> dict[str, Case]:
    plans = ("patch2", "patch3.columns")
    name, with_net = "StableDiffusionXLPAGPipeline", "StableDiffusionXLControlNetPAGPipeline"
    controlled = {"image": picture(seed=1), "controlnet_conditioning_scale": 0.7}
    from_image = [("StableDiffusionPAGPipeline", "sd", SIZE), ("StableDiffusionXLPAGImg2ImgPipeline", "sdxl", IMAGE)]
    return {
        **{cls: replace(_class_case(cls, kind, arguments), plans=("patch3",)) for cls, kind, arguments in from_image},
        name: replace(_class_case(name, "sdxl", SIZE), plans=plans),
        with_net: replace(_class_case(with_net, "sdxl", controlled, controlnet=lambda: control("sdxl")), plans=plans),
    }


def _with_image_prompts() -> dict[str, Case]:
    embeds = noise(2, 1, 10, seed=7)
    tokens = noise(2, 1, 5, 10, seed=7)

    def make(cls: str, kind: str, plus: bool) -> Callable[[], DiffusionPipeline]:
        def produce() -> DiffusionPipeline:
            unet = (sdxl_unet if kind == "sdxl" else sd_unet)(**(SDXL_BLOCKS if kind == "sdxl" else SD_BLOCKS))
            unet._load_ip_adapter_weights([image_prompt(unet, plus=plus)], low_cpu_mem_usage=False)
            pipe = build(getattr(diffusers, cls), kind, unet=unet)
            pipe.set_ip_adapter_scale(0.7)
            return pipe

        return produce

    return {
        "IP-Adapter on SDXL": Case(
            make("StableDiffusionXLPipeline", "sdxl", False), {**SIZE, "ip_adapter_image_embeds": [embeds]}
        ),
        "IP-Adapter on SD 1.x": Case(
            make("StableDiffusionPipeline", "sd", False), {**SIZE, "ip_adapter_image_embeds": [embeds]}
        ),
        "IP-Adapter Plus on SDXL": Case(
            make("StableDiffusionXLPipeline", "sdxl", True), {**SIZE, "ip_adapter_image_embeds": [tokens]}
        ),
    }


PIPELINES = {
    **_text_to_image(),
    **_from_an_image(),
    **_latent_upscaler(),
    **_with_controlnets(),
    **_with_adapters(),
    **_perturbed_attention(),
    **_relatives(),
}
IMAGE_PROMPTS = _with_image_prompts()
