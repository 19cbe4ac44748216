"""The whole training, stage by stage; a stage whose result is there is passed over, one that was stopped goes on."""

from dataclasses import dataclass
from pathlib import Path

import torch

from distrifusion.demo.autoencoder import refine_decoder, train_autoencoder
from distrifusion.demo.classifier import train_classifier
from distrifusion.demo.dataset import render_pictures
from distrifusion.demo.denoiser import train_unet
from distrifusion.demo.evaluate import evaluate, save_grid
from distrifusion.demo.folder import export_flow_pipeline, export_pipeline
from distrifusion.demo.latents import encode_latents
from distrifusion.demo.processes import keep_freed_memory, run_in_processes
from distrifusion.demo.text_encoders import train_text_encoders
from distrifusion.demo.training import Schedule, TrainingLog
from distrifusion.demo.transformer import train_transformer


@dataclass(frozen=True)
class Lengths:
    """Steps of the stages that may be chosen.

    Attributes:
        unet_minutes: train the U-Net by the clock instead of by its steps.
    """

    vae: int
    unet: int
    unet_minutes: float | None
    decoder: int
    transformer: int


def train(out: Path, lengths: Lengths, processes: int, shared: Path | None = None) -> None:
    """Make everything from nothing: ``out/pipeline``, ``out/pipeline_dit`` and ``out/classifier.safetensors``.

    ``shared`` is a finished folder of the first pipeline: only the second one is made then, with its autoencoder and
    text encoders. At the end it draws 128 pictures; what the classifier reads in them is the log's last line. The log
    is ``out/training_log.jsonl``; renders, latents and checkpoints lie in ``out/cache``.
    """
    torch.set_num_threads(processes)
    keep_freed_memory()
    cache = out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    log = TrainingLog(out / "training_log.jsonl")
    if shared is None:
        _train_first(out, cache, lengths, processes, log)
        shared = out / "pipeline"
    run_in_processes(processes, encode_latents, shared / "vae", cache)
    if not (out / "transformer").exists():
        schedule = Schedule(2e-3, steps=lengths.transformer, ema=0.999, decay=0.4)
        run_in_processes(processes, train_transformer, shared, cache, out / "transformer", schedule, log)
    export_flow_pipeline(shared, out / "transformer", out / "pipeline_dit")
    report, images, _ = evaluate(out / "pipeline_dit", 128, (256, 256), sampler=None, steps=28, guidance=5.0)
    save_grid(images[:48], out / "grid_dit.webp")
    log.write(stage="transformer", **report.as_dict())


def _train_first(out: Path, cache: Path, lengths: Lengths, processes: int, log: TrainingLog) -> None:
    """The SDXL pipeline and the classifier."""
    render_pictures(cache)
    coder = out / "autoencoder"
    if not coder.exists():
        schedule = Schedule(5e-4, steps=lengths.vae)
        run_in_processes(processes, train_autoencoder, cache, coder, schedule, log)
    if not (out / "text_encoder_2").exists():
        train_text_encoders(out, cache, Schedule(1e-3, steps=600), log)
    if not (out / "classifier.safetensors").exists():
        train_classifier(out / "classifier.safetensors", cache, Schedule(2e-3, steps=1500), log)
    run_in_processes(processes, encode_latents, coder, cache)
    if not (out / "unet").exists():
        minutes = lengths.unet_minutes
        length = {"steps": lengths.unet} if minutes is None else {"seconds": 60 * minutes}
        schedule = Schedule(1e-3, **length, ema=0.999, decay=0.5)
        run_in_processes(processes, train_unet, out, cache, schedule, log)
    if not (out / "vae").exists():
        schedule = Schedule(5e-4, steps=lengths.decoder)
        run_in_processes(processes, refine_decoder, coder, cache, out / "vae", schedule, log)
    export_pipeline(out, out / "pipeline")
