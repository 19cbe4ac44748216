"""A pipeline that is not divided, called with a sampler as a loaded one is."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from distrifusion.engine.run import sampled


class OneDevice:
    """Takes the keywords of samplers besides the pipeline's own."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe

    def __call__(self, **arguments: Any) -> Any:
        with sampled(self.pipe, (), arguments) as own:
            return self.pipe(**own)
