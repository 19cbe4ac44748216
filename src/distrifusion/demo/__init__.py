"""The embedded models: small, real pipelines that draw captioned landscapes.

Everything here was made from nothing by ``python -m distrifusion.demo train``: a procedural renderer of captioned
scenes, and on its pictures a tokenizer, two text encoders, an autoencoder, a U-Net, a transformer and an attribute
classifier. This module imports nothing heavy, so that asking where a folder is costs nothing.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MODELS", "EmbeddedModel", "find", "near", "path"]


@dataclass(frozen=True)
class EmbeddedModel:
    """A pipeline that is part of this package, and knows the landscapes that the classifier reads.

    Attributes:
        name: what `load` and the command line call it.
        folder: of the pipeline, ready for `from_pretrained`.
        size: width and height in pixels that the command line draws where none is asked for.
    """

    name: str
    folder: Path
    size: tuple[int, int]


_HERE = Path(__file__).resolve().parent
MODELS = {
    model.name: model
    for model in (
        EmbeddedModel("demo", _HERE / "pipeline", (512, 512)),
        EmbeddedModel("demo-dit", _HERE / "pipeline_dit", (256, 256)),
    )
}
"""The embedded models by name: `demo` is a ``StableDiffusionXLPipeline``, `demo-dit` a ``StableDiffusion3Pipeline``."""


def path(name: str = "demo") -> Path:
    """Folder of an embedded model, ready for ``from_pretrained``.

    Raises:
        KeyError: if there is no model of that name.
    """
    return MODELS[name].folder


def find(source: str | os.PathLike[str]) -> EmbeddedModel | None:
    """The embedded model that has this name or this folder; None if it is something else."""
    text = os.fspath(source)
    return next((model for model in MODELS.values() if text in (model.name, str(model.folder))), None)


def near(word: str) -> str | None:
    """The name of an embedded model that was perhaps meant; None if no one is like it."""
    alike = difflib.get_close_matches(word.lower().replace("_", "-"), MODELS, n=1, cutoff=0.7)
    return alike[0] if alike else None
