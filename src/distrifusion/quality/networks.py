"""Figures that need trained networks: LPIPS, FID and CLIP score, for those who have the weights here.

Nothing is ever downloaded: a network whose package or weights are missing is skipped, and the reason says what to get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Protocol, Self

import torch
from PIL import Image
from torch.nn import functional as F

from distrifusion.quality.metrics import pixels

CLIP_MODEL = "openai/clip-vit-base-patch32"
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_ALEXNET = "alexnet-owt-7be5be79.pth"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Missing(Exception):
    """A package or a file of weights is not here; the message says which."""


class Network(Protocol):
    """One trained network that judges pictures."""

    def add(self, prompt: str, picture: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        """Figures of one pair of pictures, each [1, 3, H, W] in [0, 1]."""

    def together(self) -> dict[str, float]:
        """Figures of all pairs added so far."""


class Lpips:
    """Zhang et al. 2018, with AlexNet."""

    def __init__(self) -> None:
        _need_package("torchvision")
        _need_weights(_ALEXNET, "AlexNet's weights of torchvision")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self._net = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def add(self, prompt: str, picture: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        return {"lpips": float(self._net(picture, reference))}

    def together(self) -> dict[str, float]:
        return {}


class Fid:
    """Heusel et al. 2017, with Inception v3."""

    def __init__(self) -> None:
        _need_package("torch_fidelity")
        weights = _need_weights(_INCEPTION, "Inception's weights of torch-fidelity")
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._net = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=str(weights))
        self._pairs = 0

    def add(self, prompt: str, picture: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        self._net.update(picture, real=False)
        self._net.update(reference, real=True)
        self._pairs += 1
        return {}

    def together(self) -> dict[str, float]:
        return {"fid": max(0.0, float(self._net.compute()))} if self._pairs > 1 else {}


class Clip:
    """Hessel et al. 2021: 100 times the cosine of picture and prompt.

    Args:
        model: a hub id that is in the local cache, or a folder.
    """

    def __init__(self, model: str = CLIP_MODEL) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        try:
            self._model = CLIPModel.from_pretrained(model, local_files_only=True).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise Missing(f"the model '{model}' is not in the local cache of transformers") from error

    def add(self, prompt: str, picture: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        words = self._tokenizer([prompt], truncation=True, return_tensors="pt")
        images = torch.cat([self._prepared(reference), self._prepared(picture)])
        with torch.no_grad():
            output = self._model(**words, pixel_values=images)
        scores = 100 * F.cosine_similarity(output.image_embeds, output.text_embeds)
        return {"clip_loss": float(scores[0] - scores[1])}

    def together(self) -> dict[str, float]:
        return {}

    def _prepared(self, picture: torch.Tensor) -> torch.Tensor:
        """Shorter side to the model's size, the middle cut out, normalised as in training."""
        size = self._model.config.vision_config.image_size
        height, width = picture.shape[-2:]
        scale = size / min(height, width)
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        scaled = F.interpolate(picture, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        mean, std = (torch.tensor(values)[:, None, None] for values in (_CLIP_MEAN, _CLIP_STD))
        return (scaled[..., top : top + size, left : left + size] - mean) / std


@dataclass
class Networks:
    """The networks that are here.

    Attributes:
        skipped: why a figure is not measured, by its key.
    """

    found_here: list[Network] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def found(cls, clip: str = CLIP_MODEL) -> Self:
        """Load every network whose package and weights are here; `clip` as for `Clip`."""
        networks = cls()
        kinds: dict[str, Callable[[], Network]] = {"lpips": Lpips, "fid": Fid, "clip_loss": partial(Clip, clip)}
        for key, load in kinds.items():
            try:
                networks.found_here.append(load())
            except Missing as missing:
                networks.skipped[key] = str(missing)
        return networks

    def add(self, prompt: str, picture: Image.Image, reference: Image.Image) -> dict[str, float]:
        """Figures of one pair of pictures."""
        ours, theirs = (_tensor(image) for image in (picture, reference))
        figures: dict[str, float] = {}
        for network in self.found_here:
            figures.update(network.add(prompt, ours, theirs))
        return figures

    def together(self) -> Mapping[str, float]:
        """Figures of all pairs added so far."""
        figures: dict[str, float] = {}
        for network in self.found_here:
            figures.update(network.together())
        return figures


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(pixels(picture)).float().permute(2, 0, 1)[None]


def _need_package(name: str) -> None:
    what = f"the package {name.replace('_', '-')}"
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"{what} is not installed: pip install 'distrifusion[metrics]'") from error
    # A torchvision for another torch fails with whatever the loader meets first.
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing(f"{what} is broken, reinstall it for this torch: {error}") from error


def _need_weights(file: str, what: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise Missing(f"{what} are not here: {file} belongs into {path.parent}")
    return path
