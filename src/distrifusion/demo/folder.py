"""Putting the trained parts together as pipeline folders."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distrifusion.demo.denoiser import build_scheduler, build_unet
from distrifusion.demo.training import load_average
from distrifusion.demo.transformer import TEXT_TOKENS, build_flow_scheduler, build_transformer, with_projection


def export_pipeline(parts: Path, target: Path, unet_checkpoint: Path | None = None) -> None:
    """Write the SDXL pipeline whose trained parts lie in ``parts`` to ``target`` in fp16.

    With ``unet_checkpoint`` the U-Net is the moving average in that training checkpoint.
    """
    if unet_checkpoint is None:
        unet = UNet2DConditionModel.from_pretrained(parts / "unet")
    else:
        unet = build_unet()
        load_average(unet, _average(unet_checkpoint))
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(parts / "tokenizer_2"),
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    _write(pipeline, target)


def export_flow_pipeline(parts: Path, transformer: Path, target: Path) -> None:
    """Write the SD3 pipeline to ``target`` in fp16.

    ``parts`` holds the autoencoder, the text encoders and the tokenizers, trained for the SDXL pipeline;
    ``transformer`` is the folder of the denoiser, or a training checkpoint, whose moving average is taken.
    """
    if transformer.is_dir():
        denoiser = SD3Transformer2DModel.from_pretrained(transformer)
    else:
        denoiser = build_transformer()
        load_average(denoiser, _average(transformer))
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    vae.register_to_config(shift_factor=0.0)  # which SD3 adds, none or not
    tokenizers = (CLIPTokenizer.from_pretrained(parts / name) for name in ("tokenizer", "tokenizer_2"))
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=with_projection(parts / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder_2"),
        text_encoder_3=None,
        tokenizer=_shortened(next(tokenizers)),
        tokenizer_2=_shortened(next(tokenizers)),
        tokenizer_3=None,
        transformer=denoiser,
        scheduler=build_flow_scheduler(),
    )
    _write(pipeline, target)


def _average(checkpoint: Path) -> list[torch.Tensor]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["average"]


def _shortened(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The tokenizer with as many positions as captions need; SD3 carries the padding through every layer."""
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


def _write(pipeline: DiffusionPipeline, target: Path) -> None:
    """Save a pipeline in fp16, beside ``target`` first and moved there at the end, so that nobody loads half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".pipeline-"))
    pipeline.to(dtype=torch.float16).save_pretrained(draft, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        _restore_prefix(draft / name / "model.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        _write_vocabulary(pipeline.tokenizer, draft / name)
    for config in draft.rglob("*config.json"):
        _forget_storage(config)
    for file in draft.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    draft.chmod(0o755)
    if target.exists():
        old = draft.with_suffix(".old")
        os.rename(target, old)
        os.rename(draft, target)
        shutil.rmtree(old)
    else:
        os.rename(draft, target)


def _restore_prefix(weights: Path) -> None:
    """Name text weights as SDXL's own files do, ``text_model.…``, which old and new transformers releases read."""
    tensors = load_file(weights)
    prefix = "text_model."
    bare = {name for name in tensors if not name.startswith((prefix, "text_projection"))}
    save_file({prefix * (name in bare) + name: t for name, t in tensors.items()}, weights, metadata={"format": "pt"})


def _write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Add ``vocab.json`` and ``merges.txt``, from which transformers releases before 5 build their tokenizer."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def _forget_storage(config: Path) -> None:
    """Drop from a configuration where its part was loaded from, and that its weights are stored in fp16.

    transformers 5 would otherwise load the text encoders in fp16 even where the pipeline is asked for in fp32.
    """
    fields = json.loads(config.read_text())
    fields.pop("_name_or_path", None)
    if "dtype" in fields:
        fields["dtype"] = "float32"
    config.write_text(json.dumps(fields, indent=2) + "\n")
