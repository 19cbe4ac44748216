"""The whole training, stage by stage; a stage whose result is there is passed over, one that was stopped goes on."""

from pathlib import Path

import torch

from distrifusion.demo.autoencoder import refine_decoder, train_autoencoder
from distrifusion.demo.classifier import train_classifier
from distrifusion.demo.dataset import render_pictures
from distrifusion.demo.denoiser import train_unet
from distrifusion.demo.folder import export_pipeline
from distrifusion.demo.latents import encode_latents
from distrifusion.demo.processes import keep_freed_memory, run_in_processes
from distrifusion.demo.text_encoders import train_text_encoders
from distrifusion.demo.training import Schedule, TrainingLog


def train(
    out: Path, steps: int | None, minutes: float | None, vae_steps: int, decoder_steps: int, processes: int
) -> None:
    """Make the pipeline folder ``out/pipeline`` and ``out/classifier.safetensors`` from nothing.

    The U-Net trains for ``steps`` steps or ``minutes`` minutes, one of which is None. The log is
    ``out/training_log.jsonl``; renders, latents and checkpoints lie in ``out/cache``.
    """
    torch.set_num_threads(processes)
    keep_freed_memory()
    cache = out / "cache"
    log = TrainingLog(out / "training_log.jsonl")
    render_pictures(cache)
    coder = out / "autoencoder"
    if not coder.exists():
        schedule = Schedule(5e-4, steps=vae_steps)
        run_in_processes(processes, train_autoencoder, cache, coder, schedule, log)
    if not (out / "text_encoder_2").exists():
        train_text_encoders(out, cache, Schedule(1e-3, steps=600), log)
    if not (out / "classifier.safetensors").exists():
        train_classifier(out / "classifier.safetensors", cache, Schedule(2e-3, steps=1500), log)
    run_in_processes(processes, encode_latents, coder, cache)
    if not (out / "unet").exists():
        seconds = None if minutes is None else 60 * minutes
        schedule = Schedule(1e-3, steps=steps, seconds=seconds, ema=0.999, decay=0.5)
        run_in_processes(processes, train_unet, out, cache, schedule, log)
    if not (out / "vae").exists():
        schedule = Schedule(5e-4, steps=decoder_steps)
        run_in_processes(processes, refine_decoder, coder, cache, out / "vae", schedule, log)
    export_pipeline(out, out / "pipeline")
