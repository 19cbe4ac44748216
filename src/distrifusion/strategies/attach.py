"""Replacing the forward of layers from outside, and putting it back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class Attachment:
    """The replaced forwards of a model; `detach` restores every module exactly as it was."""

    def __init__(self) -> None:
        self._restores: list[Callable[[], None]] = []

    def replace(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `make(original forward)` in the place of a module's forward; parameters and their names stay."""
        original = module.forward
        had_own = "forward" in vars(module)
        module.forward = functools.wraps(original)(make(original))

        def restore() -> None:
            if had_own:
                module.forward = original
            else:
                del module.forward

        self._restores.append(restore)

    def detach(self) -> None:
        """Restore everything, last first."""
        while self._restores:
            self._restores.pop()()
