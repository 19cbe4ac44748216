"""The picture so far, in a file that a viewer can watch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preview:
    """A callback that decodes the latents every few steps and replaces a file; only rank 0 writes.

    Attributes:
        every: steps between two previews.
    """

    file: Path
    every: int
    rank: int

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) % self.every == 0:
            self._write(pipe, tensors["latents"][:1])
        return tensors

    def _write(self, pipe: Any, latents: Any) -> None:
        from PIL import Image

        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0][0]
        if self.rank != 0:
            return
        levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        # A whole file takes the old one's place: nobody sees half of a picture.
        draft = self.file.with_name(f".{self.file.stem}.part{self.file.suffix}")
        Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()).save(draft)
        os.replace(draft, self.file)
