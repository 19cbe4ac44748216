"""A pipeline without its weights: the denoiser on the meta device, and how much the rest weighs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from distrifusion.errors import ConfigError, UnsupportedModel
from distrifusion.planner.calls import Arguments, arguments, branches, calls_per_step
from distrifusion.runtime import source

_DENOISERS = ("unet", "transformer")
_NOTHING = (None, None)  # a component that a pipeline has not


@dataclass(frozen=True)
class Blueprint:
    """What is known of a pipeline without reading a weight.

    Attributes:
        name: the model's, as it was given.
        denoiser: on the meta device.
        dtype: of the weights.
        factor: pixels per row of the latents.
        others: bytes of the weights of all other components.
        guided: whether a picture takes two rows of the batch.
        vae: the autoencoder on the meta device; None if it is not known.
        encoders: of the prompt, on the meta device, by name, as far as they are known.
        unknown: encoders that are not, and why.
    """

    name: str
    denoiser: nn.Module
    dtype: torch.dtype
    factor: int
    others: int
    guided: bool
    vae: nn.Module | None = None
    encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Bytes of the denoiser's weights."""
        held = (*self.denoiser.parameters(), *self.denoiser.buffers())
        return sum(t.numel() * (self.dtype.itemsize if t.is_floating_point() else t.element_size()) for t in held)

    @property
    def calls_per_step(self) -> int:
        """Denoiser calls of a step."""
        return calls_per_step(self.denoiser) if self.guided else 1

    def latents(self, width: int, height: int, pictures: int = 1) -> torch.Tensor | None:
        """What the VAE decodes [B, C, H, W], on the meta device; None for one that says no number of channels."""
        channels = getattr(getattr(self.vae, "config", None), "latent_channels", None)
        if channels is None:
            return None
        shape = (pictures, channels, height // self.factor, width // self.factor)
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def arguments(self, width: int, height: int, pictures: int = 1) -> Arguments:
        """Of one denoiser call for pictures of a size in pixels.

        Raises:
            ConfigError: if the size has no whole number of latent rows and columns.
            UnsupportedModel: if nothing is known of the calls of such a model.
        """
        for side, pixels in (("width", width), ("height", height)):
            if pixels < self.factor or pixels % self.factor:
                near = max(self.factor, round(pixels / self.factor) * self.factor)
                raise ConfigError(
                    f"{side} {pixels} is not a multiple of {self.factor} of at least {self.factor}; "
                    f"the nearest is {near}"
                )
        if pictures < 1:
            raise ConfigError(f"{pictures} pictures: at least one is drawn")
        rows = pictures * (branches(self.denoiser) if self.guided else 1)
        return arguments(self.denoiser, rows, height // self.factor, width // self.factor, self.dtype)


def open_blueprint(model: str, dtype: torch.dtype, guided: bool = True) -> Blueprint:
    """The blueprint of a pipeline: 'demo', a folder, or a hub id, of which configurations alone are read.

    Raises:
        ConfigError: if it is none of these, or a configuration cannot be read.
        UnsupportedModel: if it has no denoiser of diffusers.
    """
    found = source.find(model, {})
    assert isinstance(found.origin, str)
    folder = Path(found.origin)
    index = _index(folder) if folder.is_dir() else DiffusionPipeline.load_config(found.origin)
    name = next((name for name in _DENOISERS if index.get(name, _NOTHING)[0] is not None), None)
    if name is None:
        raise UnsupportedModel(f"'{model}' has neither a unet nor a transformer, so no plan divides it")
    denoiser = _on_meta(found.origin, name, index[name][1], dtype)
    others = sum(_weight(folder, part, dtype) for part in index if part != name) if folder.is_dir() else 0
    factor = (found.facts.vae_factor if found.facts else None) or 8
    vae = _on_meta(found.origin, "vae", index["vae"][1], dtype) if index.get("vae", _NOTHING)[1] else None
    parts = [part for part in index if part.startswith("text_encoder") and index[part][1] is not None]
    made = {part: _encoder(found.origin, part, *index[part]) for part in parts}
    encoders = {part: encoder for part, encoder in made.items() if not isinstance(encoder, str)}
    unknown = {part: reason for part, reason in made.items() if isinstance(reason, str)}
    return Blueprint(model, denoiser, dtype, factor, others, guided, vae, encoders, unknown)


def of_config(name: str, cls: type, config: Mapping[str, Any], dtype: torch.dtype, others: int = 0) -> Blueprint:
    """A blueprint from a denoiser's class and configuration."""
    return Blueprint(name, _empty(cls, config, dtype), dtype, 8, others, guided=True)


def _on_meta(origin: str, part: str, class_name: str, dtype: torch.dtype) -> nn.Module:
    cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UnsupportedModel(f"the {part} of '{origin}' is a {class_name}, which diffusers does not have")
    return _empty(cls, cls.load_config(origin, subfolder=part), dtype)  # type: ignore[attr-defined]


def _encoder(origin: str, part: str, library: str, name: str) -> nn.Module | str:
    """A text encoder of the transformers library on the meta device, or why it cannot be made."""
    cls = getattr(transformers, name, None) if library == "transformers" else None
    if cls is None:
        return f"a {name} of {library}, which transformers does not have"
    try:
        config = cls.config_class.from_pretrained(origin, subfolder=part)
        with torch.device("meta"):
            return cls(config).eval()
    except (OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"a {name} that cannot be made: {type(error).__name__}: {error}".splitlines()[0]


def _empty(cls: type, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = cls.from_config(config)  # type: ignore[attr-defined]
    # Not diffusers' own `to`, which warns of casts that only values could mind.
    return nn.Module.to(model, "meta", dtype).eval()


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))


def _weight(folder: Path, part: str, dtype: torch.dtype) -> int:
    """Bytes of a component's weights, from the heads of their files."""
    from safetensors import safe_open

    total = 0
    for file in sorted((folder / part).glob("*.safetensors")):
        with safe_open(str(file), "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - it is no mapping
                shape = weights.get_slice(key).get_shape()
                total += torch.Size(shape).numel() * dtype.itemsize
    return total
