"""Tensors in nested arguments and results, and the batch rows that are taken of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from distrifusion.layout.partition import Interval


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Apply `change` to every tensor in nested dicts, lists and tuples; diffusers' outputs are dicts."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = {key: map_tensors(item, change) for key, item in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def take_rows(rows: Interval, num_rows: int, value: torch.Tensor) -> torch.Tensor:
    """Some rows of the batch only; a tensor without that many rows is the same for all."""
    return value[rows.start : rows.stop] if value.dim() and value.shape[0] == num_rows else value
