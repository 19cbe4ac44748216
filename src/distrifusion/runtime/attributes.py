"""Attributes by dotted path, with an error that names the nearest."""

from __future__ import annotations

import difflib
from functools import reduce
from typing import Any


def resolve(root: Any, path: str) -> Any:
    """The attribute at `path` below `root`; an empty path is `root` itself.

    Raises:
        AttributeError: if a name of the path is missing; the nearest is named.
    """
    return reduce(_step, path.split(".") if path else (), root)


def replace(root: Any, path: str, value: Any) -> None:
    """Set the attribute at `path` below `root`, which must exist: a typing error must not pass as a new attribute.

    Raises:
        AttributeError: if a name of the path is missing; the nearest is named.
    """
    owner, _, name = path.rpartition(".")
    target = resolve(root, owner)
    _step(target, name)
    setattr(target, name, value)


def _step(target: Any, name: str) -> Any:
    if hasattr(target, name):
        return getattr(target, name)
    near = difflib.get_close_matches(name, dir(target), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise AttributeError(f"'{type(target).__name__}' has no attribute '{name}'{hint}")
