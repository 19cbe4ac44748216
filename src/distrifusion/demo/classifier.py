"""The attribute classifier: reads a landscape's attributes, and gives the features of a Frechet distance.

Legend: B pictures, H W rows and columns (any, also not square). Pictures are RGB tensors (B, 3, H, W) in [0, 1].
"""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distrifusion.demo.dataset import Size, load_pictures, picture_scenes
from distrifusion.demo.scenes import ATTRIBUTES
from distrifusion.demo.training import Schedule, TrainingLog, device, fit

INPUT_PIXELS = 128
NUM_FEATURES = 64
WEIGHTS = Path(__file__).resolve().parent / "classifier.safetensors"


class AttributeClassifier(nn.Module):
    """Five strided convolutions, means and maxima over the picture, 64 features, one linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128, 128)
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU())
            for i, o in pairwise(widths)
        ]
        self.trunk = nn.Sequential(*blocks)
        self.neck = nn.Linear(2 * widths[-1], NUM_FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(NUM_FEATURES, len(c)) for name, c in ATTRIBUTES.items()})

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 64) of pictures, which are brought to 128 x 128 first whatever their size."""
        small = F.interpolate(images, size=(INPUT_PIXELS, INPUT_PIXELS), mode="bilinear", antialias=True)
        x = self.trunk(small * 2 - 1)
        return torch.tanh(self.neck(torch.cat((x.mean(dim=(2, 3)), x.amax(dim=(2, 3))), dim=-1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, classes) of each attribute."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


@cache
def load() -> AttributeClassifier:
    """The shipped classifier in fp32 on the CPU, ready to read; loaded once per process."""
    model = AttributeClassifier()
    model.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)


def read_attributes(images: Tensor) -> list[dict[str, str]]:
    """What each picture shows: one ``{attribute: class}`` per picture, names as in ``scenes.ATTRIBUTES``.

    ``images``: (B, 3, H, W) in [0, 1], on any device.
    """
    logits = load()(_checked(images))
    choices = {name: answer.argmax(-1).tolist() for name, answer in logits.items()}
    return [{name: ATTRIBUTES[name][choices[name][i]] for name in ATTRIBUTES} for i in range(len(images))]


def features(images: Tensor) -> Tensor:
    """Features (B, 64) in [-1, 1], fp32 on the CPU; ``images``: (B, 3, H, W) in [0, 1]."""
    return load().features(_checked(images))


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features (N, D) and (M, D).

    Heusel et al. 2017, equation 6: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). It is 0 for equal statistics; sets of a
    few hundred pictures carry a positive bias, so compare only sets of equal sizes.
    """
    one, two = one.double(), two.double()
    cov_one, cov_two = torch.cov(one.T), torch.cov(two.T)
    root = torch.linalg.eigvals(cov_one @ cov_two).real.clamp(min=0).sqrt().sum()
    return float((one.mean(0) - two.mean(0)).square().sum() + cov_one.trace() + cov_two.trace() - 2 * root)


def to_images(pictures: np.ndarray) -> Tensor:
    """Byte pictures (B, H, W, 3) as images (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def train_classifier(weights: Path, cache_dir: Path, schedule: Schedule, log: TrainingLog) -> None:
    """Stage ``classifier``: train on the cached renders and save fp16 weights."""
    torch.manual_seed(2)
    model = AttributeClassifier().to(device())
    pictures = load_pictures(cache_dir)
    labels = {size: np.array([scene.labels() for scene in picture_scenes(size)]) for size in pictures}

    def loss_of_step(_step: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        images, target = _training_batch(pictures, labels, rng)
        answers = model(images).values()
        losses = [F.cross_entropy(answer, target[:, i], label_smoothing=0.02) for i, answer in enumerate(answers)]
        return torch.stack(losses).mean(), len(images)

    fit("classifier", model, loss_of_step, schedule, cache_dir / "classifier.pt", log)
    save_file({name: weight.half().cpu().contiguous() for name, weight in model.state_dict().items()}, weights)


def _training_batch(
    pictures: Mapping[Size, np.ndarray], labels: Mapping[Size, np.ndarray], rng: np.random.Generator, batch: int = 32
) -> tuple[Tensor, Tensor]:
    """Pictures of one size (B, 3, H, W), mirrored, tinted, blurred and noisy at random, and their labels (B, A)."""
    sizes = list(pictures)
    size = sizes[0] if rng.random() < 0.7 else sizes[rng.integers(1, len(sizes))]
    chosen = np.sort(rng.choice(len(pictures[size]), batch, replace=False))
    images = to_images(pictures[size][chosen]).to(device())
    images = images.flip(-1) if rng.random() < 0.5 else images
    images = F.interpolate(images, size=(INPUT_PIXELS, INPUT_PIXELS), mode="bilinear", antialias=True)
    if rng.random() < 0.4:
        scale = float(rng.uniform(0.4, 0.9))
        images = F.interpolate(F.interpolate(images, scale_factor=scale, mode="bilinear"), images.shape[-2:])
    tint = torch.from_numpy(rng.uniform(0.93, 1.07, (batch, 3, 1, 1)).astype(np.float32)).to(device())
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32)).to(device())
    images = (images * tint + float(rng.uniform(0, 0.04)) * noise).clamp(0, 1)
    return images, torch.from_numpy(labels[size][chosen]).to(device())


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures must be (B, 3, H, W) in [0, 1], not {tuple(images.shape)}")
    return images.detach().float().cpu()
