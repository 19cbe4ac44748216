"""The embedded model: a small, real SDXL pipeline that draws captioned landscapes.

Everything here was made from nothing by ``python -m distrifusion.demo train``: a procedural renderer of captioned
scenes, and on its pictures a tokenizer, two text encoders, an autoencoder, a U-Net and an attribute classifier.
This module imports nothing heavy, so that asking where the folder is costs nothing.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Folder of the shipped ``StableDiffusionXLPipeline``, ready for ``from_pretrained``."""
    return Path(__file__).resolve().parent / "pipeline"
