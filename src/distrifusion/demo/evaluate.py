"""Does a model draw what the prompt says? Attribute accuracy, Frechet distance, and a grid to look at."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from PIL import Image
from torch import Tensor

from distrifusion.demo import classifier
from distrifusion.demo.autoencoder import reconstruction_psnr
from distrifusion.demo.dataset import Size, sample_scenes
from distrifusion.demo.painting import render
from distrifusion.demo.scenes import ATTRIBUTES, Scene, compose_caption
from distrifusion.demo.training import device
from distrifusion.runtime import source

SAMPLERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": FlowMatchEulerDiscreteScheduler}
FLOW = ("euler",)
"""Those for a model of flow matching; the first one is taken unless another is asked for."""
DIFFUSION = ("dpm++", "ddim")


@dataclass(frozen=True)
class Report:
    """Measured figures of one evaluation; accuracies are shares in [0, 1], per attribute."""

    pictures: int
    size: Size
    sampler: str
    steps: int
    guidance: float
    accuracy: dict[str, float]
    accuracy_on_renders: dict[str, float]
    """What the classifier reads right in renders of the same scenes: the ceiling of ``accuracy``."""
    frechet_distance: float
    """Between the generated pictures and as many renders of other scenes."""
    frechet_distance_of_renders: float
    """Between renders of the prompted scenes and the same others: what a perfect model would get."""
    reconstruction_db: float
    """Mean PSNR of renders of the first prompted scenes (32 at most) after the autoencoder."""

    def as_dict(self) -> dict[str, object]:
        """The report for JSON."""
        return asdict(self)


def evaluate(
    folder: Path,
    count: int,
    size: Size,
    sampler: str | None,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch: int = 8,
) -> tuple[Report, Tensor, list[str]]:
    """Draw ``count`` scenes from prompts that name every attribute, and measure the pictures.

    Returns the report, the pictures (count, 3, H, W) in [0, 1], and the prompts.

    Raises:
        ValueError: if the model cannot be drawn with ``sampler``.
    """
    sampler = _fitting(sampler, folder)
    scenes = sample_scenes(count, seed=3_000_000 + seed)
    rng = np.random.default_rng(seed)
    prompts = [compose_caption(scene.attributes(), rng) for scene in scenes]
    images = generate(folder, prompts, size, sampler, steps, guidance, seed, batch)
    renders = _renders(scenes, size)
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").to(device())
    others = classifier.features(_renders(sample_scenes(count, seed=4_000_000 + seed), size))
    report = Report(
        pictures=count,
        size=size,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        accuracy=accuracy(images, scenes),
        accuracy_on_renders=accuracy(renders, scenes),
        frechet_distance=classifier.frechet_distance(classifier.features(images), others),
        frechet_distance_of_renders=classifier.frechet_distance(classifier.features(renders), others),
        reconstruction_db=reconstruction_psnr(autoencoder, renders[:32]),
    )
    return report, images, prompts


@torch.no_grad()
def generate(
    folder: Path, prompts: list[str], size: Size, sampler: str, steps: int, guidance: float, seed: int, batch: int
) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] from prompts, in fp32; picture ``i`` starts from the noise of ``seed + i``."""
    pipe = source.find(folder, {"torch_dtype": torch.float32}).open(device())
    pipe.scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch]
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(some))]
        keywords = {"width": size[0], "height": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
        pictures.append(pipe(some, generator=generators, output_type="pt", **keywords).images.float().cpu())
    return torch.cat(pictures)


def _fitting(sampler: str | None, folder: Path) -> str:
    own = source.find(folder, {}).facts
    known = FLOW if own is not None and own.cls is StableDiffusion3Pipeline else DIFFUSION
    if sampler is not None and sampler not in known:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(known)}, which fit '{folder}'")
    return sampler or known[0]


def accuracy(images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share of pictures in which the classifier reads the scene's class, per attribute."""
    read = classifier.read_attributes(images)
    pairs = list(zip(read, scenes, strict=True))
    return {name: float(np.mean([got[name] == getattr(scene, name) for got, scene in pairs])) for name in ATTRIBUTES}


def save_grid(images: Tensor, file: Path, columns: int = 8) -> None:
    """Write pictures (N, 3, H, W) in [0, 1] side by side, row by row; the file's ending decides the format."""
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns) if len(row) == columns]
    grid = torch.cat(rows, dim=-2).permute(1, 2, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid.clamp(0, 1) * 255).round().byte().numpy()).save(file, quality=88)


def _renders(scenes: list[Scene], size: Size) -> Tensor:
    return classifier.to_images(np.stack([render(scene, *size) for scene in scenes]))
