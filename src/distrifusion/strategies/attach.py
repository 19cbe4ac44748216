"""Replacing methods of live objects from outside, and putting them back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Attachment:
    """Methods that are replaced on single objects; `detach` restores every object exactly as it was."""

    def __init__(self) -> None:
        self._restores: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `make(original method)` in the place of a method; the object's class, parameters and their names stay."""
        original = getattr(owner, name)
        had_own = name in vars(owner)
        setattr(owner, name, functools.wraps(original)(make(original)))

        def restore() -> None:
            if had_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        self._restores.append(restore)

    def detach(self) -> None:
        """Restore everything, last first."""
        while self._restores:
            self._restores.pop()()
