"""What the layers of a chain read and what they cost, as calls of a whole model show it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from distrifusion.layout.depth import Layer
from distrifusion.nested import map_tensors, tensors_of


class Uses(Counter[str]):
    """How often each layer has run in a call."""

    def next(self, site: str) -> str:
        """The name of a layer's use that begins: the layer's, and the number of the use from the second on."""
        self[site] += 1
        return f"{site}, use {self[site]}" if self[site] > 1 else site


@dataclass(frozen=True)
class Seen:
    """One use of a layer.

    Attributes:
        name: of the use; no two in a call have the same.
        site: the name of the layer.
        layer: what it costs and reads.
        output: what it gave, with tensors that have no values.
    """

    name: str
    site: str
    layer: Layer
    output: Any


@dataclass
class Watch(TorchFunctionMode):
    """Follows tensors through what lies between the layers of one call, and counts what happens in the layers.

    Attributes:
        seen: uses of layers in their order.
    """

    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        # By tensor: the places of the layers whose outputs it was made of.
        self._made_of: Any = WeakTensorKeyDictionary()
        self._cost: int | None = None
        self._uses = Uses()

    def run(self, site: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A layer's output."""
        reads = self._sources((args, kwargs))
        self._cost = 0
        output = forward(*args, **kwargs)
        layer, self._cost = Layer(self._cost, reads), None
        for tensor in tensors_of(output):
            self._made_of[tensor] = frozenset((len(self.seen),))
        self.seen.append(Seen(self._uses.next(site), site, layer, map_tensors(output, _without_values)))
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._cost is not None:
            self._cost += operations(getattr(func, "__name__", ""), args, kwargs or {}, result)
        elif sources := self._sources((args, kwargs)):
            for tensor in tensors_of(result):
                self._made_of[tensor] = sources
        return result

    def _sources(self, value: Any) -> frozenset[int]:
        found: frozenset[int] = frozenset()
        for tensor in tensors_of(value):
            found |= self._made_of.get(tensor, frozenset())
        return found


@dataclass
class Stopwatch(AbstractContextManager["Stopwatch"]):
    """Takes the time of the layers of one call.

    Attributes:
        nanoseconds: of uses of layers in their order; on an accelerator from when it has nothing else to do.
    """

    nanoseconds: list[int] = field(default_factory=list)

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, site: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A layer's output."""
        device = next(tensors_of((args, kwargs))).device
        start = _now(device)
        output = forward(*args, **kwargs)
        self.nanoseconds.append(_now(device) - start)
        return output


def _now(device: torch.device) -> int:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter_ns()


def operations(name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Multiplications and additions of one call of a torch function, and one for each value that it gives."""
    if not isinstance(result, torch.Tensor):
        return 0
    inputs = list(tensors_of((args, kwargs)))
    size = result.numel()
    match name:
        case "linear":
            return 2 * size * inputs[1].shape[-1]
        case "conv1d" | "conv2d" | "conv3d":
            return 2 * size * prod(inputs[1].shape[1:])
        case "matmul" | "__matmul__" | "mm" | "bmm":
            return 2 * size * inputs[0].shape[-1]
        case "addmm" | "baddbmm":
            return 2 * size * inputs[1].shape[-1]
        case "scaled_dot_product_attention":
            query, key, value = inputs[:3]
            return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return size


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
