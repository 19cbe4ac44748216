"""Stage ``unet``: the denoiser, trained on cached latents with v-prediction.

Legend: B samples, L text tokens, H W rows and columns of the latents.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distrifusion.demo.latents import Portion, Samples
from distrifusion.demo.processes import rank
from distrifusion.demo.scenes import Scene, sample_caption
from distrifusion.demo.text_encoders import WIDTH, encode_tokens, tokenize
from distrifusion.demo.training import Schedule, TrainingLog, autocast, device, fit

SNR_LIMIT = 5.0
"""Gamma of min-SNR weighting (Hang et al. 2023)."""
DROP_CAPTION = 0.10
PORTIONS = (
    Portion((256, 256), 8, 0.70),
    Portion((384, 256), 5, 0.07),
    Portion((256, 384), 5, 0.07),
    Portion((384, 384), 4, 0.05),
    Portion((512, 384), 3, 0.03),
    Portion((384, 512), 3, 0.03),
    Portion((512, 512), 2, 0.05),
)
TIME_EMBED = 32


def build_unet() -> UNet2DConditionModel:
    """SDXL's block types on three levels, coarsest latent / 4: 6.0M parameters."""
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED,
        projection_class_embeddings_input_dim=WIDTH + 6 * TIME_EMBED,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """SDXL's scaled-linear schedule, carried on until almost nothing of the picture is left (sigma 63).

    SDXL itself stops at sigma 15, where the mean colour still shows through the noise; a dark night could then not be
    drawn from pure noise.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


@dataclass(frozen=True)
class CaptionEncoder:
    """The frozen text side of the pipeline."""

    tokenizer: CLIPTokenizer
    one: CLIPTextModel
    two: CLIPTextModelWithProjection

    @classmethod
    def from_folder(cls, folder: Path) -> "CaptionEncoder":
        """Load from a pipeline's text folders."""
        one = CLIPTextModel.from_pretrained(folder / "text_encoder").to(device()).eval()
        two = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").to(device()).eval()
        return cls(CLIPTokenizer.from_pretrained(folder / "tokenizer"), one, two)

    @torch.no_grad()
    def __call__(self, captions: list[str | None]) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, C) and pooled embeddings (B, D); both are zero for None, as the pipeline does without
        a negative prompt."""
        tokens, pooled = encode_tokens(self.one, self.two, tokenize(self.tokenizer, [c or "" for c in captions]))
        keep = torch.tensor([c is not None for c in captions], device=tokens.device)
        return tokens * keep[:, None, None], pooled * keep[:, None]


def train_unet(folder: Path, cache: Path, schedule: Schedule, log: TrainingLog) -> None:
    """Train on the cached latents with the text encoders of ``folder``; save the averaged weights there."""
    torch.manual_seed(3)
    model = build_unet().to(device(), memory_format=torch.channels_last)
    encoder = CaptionEncoder.from_folder(folder)
    alphas = build_scheduler().alphas_cumprod.to(device())
    samples = Samples(cache, PORTIONS)

    def loss_of_step(_step: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        x, scenes = samples.draw(rng)
        captions = [_caption_or_none(scene, rng) for scene in scenes]
        return velocity_loss(model, x, encoder(captions), alphas, rng), len(x)

    fit("unet", model, loss_of_step, schedule, cache / "unet.pt", log)
    if rank() == 0:
        model.save_pretrained(folder / "unet")


def _caption_or_none(scene: Scene, rng: np.random.Generator) -> str | None:
    draw = rng.random()
    if draw < 0.8 * DROP_CAPTION:
        return None
    return "" if draw < DROP_CAPTION else sample_caption(scene, rng)[0]


def velocity_loss(
    model: UNet2DConditionModel, x: Tensor, text: tuple[Tensor, Tensor], alphas: Tensor, rng: np.random.Generator
) -> Tensor:
    """Squared error of v = a e - s x at uniform timesteps, each weighted by min(SNR, gamma) / (SNR + 1).

    ``x``: clean latents (B, 4, H, W); ``alphas``: cumulative products (T); a and s are the usual sqrt(alpha-bar) and
    sqrt(1 - alpha-bar) (Salimans & Ho 2022, appendix D).
    """
    noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.device)
    t = torch.from_numpy(rng.integers(len(alphas), size=len(x))).to(x.device)
    a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
    noisy = (a * x + s * noise).contiguous(memory_format=torch.channels_last)
    height, width = x.shape[-2] * 8, x.shape[-1] * 8
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device, dtype=torch.float32)
    conditions = {"text_embeds": text[1], "time_ids": sizes.expand(len(x), -1)}
    with autocast():
        v = model(noisy, t, text[0], added_cond_kwargs=conditions, return_dict=False)[0]
    error = (v.float() - (a * noise - s * x)).square().mean(dim=(1, 2, 3))
    snr = alphas[t] / (1 - alphas[t])
    return (error * snr.clamp(max=SNR_LIMIT) / (snr + 1)).mean()
