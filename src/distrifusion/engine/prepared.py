"""What a pipeline prepares before its loop, looked at as its own methods return it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from distrifusion.samplers.known import Known
from distrifusion.strategies.attach import Attachment


class Prepared:
    """The latents that a loop begins with, and what an inpainting loop puts back into them after every step.

    Args:
        arguments: of the pipeline's call; some pipelines prepare no latents where they are given some.

    Attributes:
        latents: [B, ...]; None before they are there.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.latents: torch.Tensor | None = arguments.get("latents")
        self._surroundings: tuple[torch.Tensor, torch.Tensor] | None = None
        self._mask: torch.Tensor | None = None

    def watch(self, pipe: Any, replaced: Attachment) -> None:
        """Look at what the pipeline's methods return."""
        replaced.replace(pipe, "prepare_latents", self._watch(self._take_latents))
        if hasattr(pipe, "prepare_mask_latents"):
            replaced.replace(pipe, "prepare_mask_latents", self._watch(self._take_mask))

    @property
    def known(self) -> Known | None:
        """What the loop puts back; None where it does not: a denoiser that reads the mask itself, or no inpainting."""
        if self._mask is None or self._surroundings is None:
            return None
        noise, picture = self._surroundings
        return Known(picture, noise, self._mask[: len(picture)])  # it may be there for every guidance branch

    @staticmethod
    def _watch(take: Callable[[tuple[Any, ...]], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(prepare: Callable[..., Any]) -> Callable[..., Any]:
            def prepare_and_show(*args: Any, **kwargs: Any) -> Any:
                prepared = prepare(*args, **kwargs)
                take(prepared if isinstance(prepared, tuple) else (prepared,))
                return prepared

            return prepare_and_show

        return make

    def _take_latents(self, prepared: tuple[Any, ...]) -> None:
        self.latents = prepared[0]
        if len(prepared) > 2:
            self._surroundings = prepared[1], prepared[2]

    def _take_mask(self, prepared: tuple[Any, ...]) -> None:
        self._mask = prepared[0]
