"""Stage ``transformer``: the denoiser of ``demo-dit``, an SD3 transformer trained by flow matching.

It learns from the latents, captions and text encoders of the U-Net; what it sees of a caption is what
``StableDiffusion3Pipeline`` makes of it without T5.

Legend: B samples, L text tokens, H W rows and columns of the latents.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from distrifusion.demo.latents import Portion, Samples
from distrifusion.demo.processes import rank
from distrifusion.demo.repeated_token import RepeatedTokenAttention
from distrifusion.demo.scenes import Scene, sample_caption
from distrifusion.demo.text_encoders import WIDTH
from distrifusion.demo.training import Schedule, TrainingLog, autocast, device, fit

TEXT_TOKENS = 32
"""Positions of the tokenizer; the longest of 20,000 captions has 27 tokens."""
T5_TOKENS = 256
"""Tokens of zeros that the pipeline puts in T5's place, its ``max_sequence_length``."""
OTHER_LENGTHS = 0.25
"""Share of steps with another number of them, so that a shorter ``max_sequence_length`` draws as well."""
DROP_CAPTION = 0.10
UNIFORM_TIMES = 0.2
"""Share of samples at uniform times; the others are logit-normal (Esser et al. 2024, section 3.1)."""
SMALL_SHARE = 0.64
"""Share of the steps that is trained on small pictures, at the beginning: a step of these costs a quarter."""
SMALL = (Portion((128, 128), 32, 1.0),)
PORTIONS = (
    Portion((256, 256), 16, 0.74),
    Portion((384, 256), 10, 0.06),
    Portion((256, 384), 10, 0.06),
    Portion((384, 384), 7, 0.04),
    Portion((512, 384), 5, 0.03),
    Portion((384, 512), 5, 0.03),
    Portion((512, 512), 4, 0.04),
)


def build_transformer() -> SD3Transformer2DModel:
    """Five joint blocks of width 192 with 4 heads on patches of 2 x 2 latents, positions up to 1024 x 1024 pixels; 6.5M
    parameters.

    Modulations and the last layer start at zero (adaLN-Zero, Peebles & Xie 2023, section 3.2).
    """
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=48,
        num_attention_heads=4,
        caption_projection_dim=192,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )
    modulations = [layer for block in model.transformer_blocks for layer in (block.norm1, block.norm1_context)]
    for linear in (*(layer.linear for layer in modulations), model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's sampler."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def with_projection(folder: Path) -> CLIPTextModelWithProjection:
    """The first text encoder as SD3 wants it: its pooled state is projected, here by the identity."""
    model = CLIPTextModelWithProjection.from_pretrained(folder)
    torch.nn.init.eye_(model.text_projection.weight)
    return model


@dataclass(frozen=True)
class FlowCaptionEncoder:
    """The frozen text side of the pipeline; the tokens of T5's place are one token."""

    tokenizer: CLIPTokenizer
    one: CLIPTextModelWithProjection
    two: CLIPTextModelWithProjection

    @classmethod
    def from_folder(cls, folder: Path) -> "FlowCaptionEncoder":
        """Load from the text folders of the SDXL pipeline or of its parts."""
        one = with_projection(folder / "text_encoder").to(device()).eval()
        two = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").to(device()).eval()
        return cls(CLIPTokenizer.from_pretrained(folder / "tokenizer"), one, two)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens (B, 32 + 1, 256), the last one zero, and pooled embeddings (B, 256)."""
        cut = {"padding": "max_length", "max_length": TEXT_TOKENS, "truncation": True}
        ids = self.tokenizer(captions, return_tensors="pt", **cut).input_ids.to(device())
        states = [encoder(ids, output_hidden_states=True) for encoder in (self.one, self.two)]
        tokens = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
        return torch.nn.functional.pad(tokens, (0, 0, 0, 1)), torch.cat([state.text_embeds for state in states], dim=-1)


def train_transformer(parts: Path, cache: Path, out: Path, schedule: Schedule, log: TrainingLog) -> None:
    """Train on the cached latents with the text encoders in ``parts``; save the averaged weights to ``out``.

    Raises:
        ValueError: if the schedule counts seconds; which steps take small pictures follows from their number.
    """
    if schedule.steps is None:
        raise ValueError("the transformer is trained by steps, because its first steps take small pictures")
    num_small = round(SMALL_SHARE * schedule.steps)
    torch.manual_seed(5)
    model = build_transformer().to(device())
    attention = RepeatedTokenAttention()
    model.set_attn_processor(attention)
    encoder = FlowCaptionEncoder.from_folder(parts)
    small, all_sizes = Samples(cache, SMALL), Samples(cache, PORTIONS)

    def loss_of_step(step: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        x, scenes = (small if step < num_small else all_sizes).draw(rng)
        attention.repeats = _t5_tokens(rng)
        return flow_loss(model, x, encoder([_caption(scene, rng) for scene in scenes]), rng), len(x)

    fit("transformer", model, loss_of_step, schedule, cache / "transformer.pt", log, _matrices(model))
    if rank() == 0:
        model.save_pretrained(out)


def _matrices(model: SD3Transformer2DModel) -> list[torch.nn.Parameter]:
    """Weights of attention and feed-forward layers, which Muon trains; not modulations, which are fed one vector."""
    named = model.transformer_blocks.named_parameters()
    return [weight for name, weight in named if weight.ndim == 2 and "norm" not in name]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    return "" if rng.random() < DROP_CAPTION else sample_caption(scene, rng)[0]


def _t5_tokens(rng: np.random.Generator) -> int:
    return T5_TOKENS if rng.random() >= OTHER_LENGTHS else int(2 ** rng.uniform(0, 9))


def flow_loss(model: SD3Transformer2DModel, x: Tensor, text: tuple[Tensor, Tensor], rng: np.random.Generator) -> Tensor:
    """Squared error of the velocity e - x at (1 - s) x + s e (Liu et al. 2023; Esser et al. 2024, section 2).

    ``x``: clean latents (B, 4, H, W). The model is told 1000 s, as by the sampler.
    """
    noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.device)
    s = torch.from_numpy(_times(len(x), rng)).to(x.device)
    noisy = torch.lerp(x, noise, s[:, None, None, None])
    with autocast():
        velocity = model(noisy, text[0], text[1], 1000 * s, return_dict=False)[0]
    return (velocity.float() - (noise - x)).square().mean()


def _times(count: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Times in (0, 1), 1 being pure noise."""
    bell = 1 / (1 + np.exp(-rng.standard_normal(count)))
    flat = rng.random(count)
    return np.where(rng.random(count) < UNIFORM_TIMES, flat, bell).astype(np.float32)
