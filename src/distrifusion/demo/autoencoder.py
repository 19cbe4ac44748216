"""Stages ``vae`` and ``decoder``: an AutoencoderKL of factor 8, trained on crops of renders of several sizes."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distrifusion.demo.dataset import Size, load_pictures
from distrifusion.demo.processes import rank
from distrifusion.demo.training import Schedule, TrainingLog, autocast, device, fit

CROPS = ((64, 8), (64, 8), (64, 8), (128, 2), (256, 1))
"""(pixels, batch) to choose from: mostly small crops, at times a whole picture for the attention in the middle."""
KL_WEIGHT = 1e-4
LATENT_ERROR = 0.15
"""Largest standard deviation of the noise on (scaled) latents that the refined decoder has to cope with."""
ANCHOR_STEPS = 600
"""For so many steps, ever more weakly, three latent channels are drawn to the picture's colours at 1/8 of its size.

From a random start the model otherwise spends its first thousand steps without colour.
"""


def build_autoencoder() -> AutoencoderKL:
    """Four levels with SDXL's block types and 4 latent channels, 3.4M parameters.

    The posterior starts narrow (log variance -5): at the usual start its noise is as strong as the latents, and hides
    them from the decoder for the first thousand steps.
    """
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
    )
    with torch.no_grad():
        model.quant_conv.weight[4:].zero_()
        model.quant_conv.bias[4:].fill_(-5.0)
    return model


def train_autoencoder(cache: Path, out: Path, schedule: Schedule, log: TrainingLog) -> None:
    """Train on the cached pictures, measure the latents' scale, and save the model to ``out``."""
    torch.manual_seed(0)
    model = build_autoencoder().to(device(), memory_format=torch.channels_last)
    pictures = load_pictures(cache)

    def loss_of_step(step: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        x = to_input(random_crops(pictures, rng))
        with autocast():
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.sample()).sample
        loss = reconstruction_loss(y.float(), x) + KL_WEIGHT * posterior.kl().float().mean() / posterior.mean[0].numel()
        anchor = max(0.0, 1 - step / ANCHOR_STEPS)
        loss = loss + anchor * (posterior.mean[:, :3].float() - 2 * F.avg_pool2d(x, 8)).square().mean()
        return loss, len(x)

    fit("vae", model, loss_of_step, schedule, cache / "vae.pt", log)
    if rank() > 0:
        return
    model.register_to_config(scaling_factor=1 / _latent_std(model, pictures[256, 256][:64]))
    log.write(stage="vae", psnr_db=reconstruction_psnr(model, to_input(pictures[256, 256][-64:]) / 2 + 0.5))
    model.save_pretrained(out)


def refine_decoder(folder: Path, cache: Path, out: Path, schedule: Schedule, log: TrainingLog) -> None:
    """Stage ``decoder``: train the decoder of ``folder`` on, the encoder fixed, with latents as imperfect as a U-Net's.

    The refined model is saved to ``out``.
    """
    torch.manual_seed(4)
    model = AutoencoderKL.from_pretrained(folder).to(device(), memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    pictures = load_pictures(cache)

    def loss_of_step(_step: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        x = to_input(random_crops(pictures, rng))
        with autocast():
            with torch.no_grad():
                z = model.encode(x).latent_dist.mode()
            noise = torch.from_numpy(rng.standard_normal(z.shape, np.float32)).to(z.device)
            z = z + noise * float(rng.uniform(0, LATENT_ERROR)) / model.config.scaling_factor
            y = model.decode(z).sample
        return reconstruction_loss(y.float(), x), len(x)

    fit("decoder", model, loss_of_step, schedule, cache / "decoder.pt", log)
    if rank() == 0:
        log.write(stage="decoder", psnr_db=reconstruction_psnr(model, to_input(pictures[256, 256][-64:]) / 2 + 0.5))
        model.save_pretrained(out)


def random_crops(pictures: dict[Size, NDArray[np.uint8]], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A batch of square crops (B, P, P, 3) out of pictures of all sizes, flipped half of the time."""
    pixels, batch = CROPS[rng.integers(len(CROPS))]
    sizes = list(pictures)
    crops = []
    for _ in range(batch):
        width, height = size = sizes[rng.integers(len(sizes))]
        top, left = rng.integers(height - pixels + 1), rng.integers(width - pixels + 1)
        crop = pictures[size][rng.integers(len(pictures[size])), top : top + pixels, left : left + pixels]
        crops.append(crop[:, :: rng.choice((-1, 1))])
    return np.stack(crops)


def to_input(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures (B, H, W, 3) of bytes as a model input (B, 3, H, W) in [-1, 1]."""
    x = torch.from_numpy(np.array(pictures)).to(device()).permute(0, 3, 1, 2)
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 and squared error of pixels, L1 of their differences along both axes, at full, half and quarter size."""
    loss = torch.zeros((), device=x.device)
    for _ in range(3):
        error = y - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + error.abs().mean() + 4 * error.square().mean() + 0.5 * edges
        y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
    return loss / 3


@torch.no_grad()
def _latent_std(model: AutoencoderKL, pictures: NDArray[np.uint8]) -> float:
    return float(model.encode(to_input(pictures)).latent_dist.mean.std())


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Mean PSNR in dB of encoded and decoded images (N, 3, H, W) in [0, 1]."""
    values = []
    for x in (images.to(device()) * 2 - 1).split(8):
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * ((y - x) / 2).square().mean(dim=(1, 2, 3)).log10())
    return float(torch.cat(values).mean())
