"""What one run of some code computes: operations by kind of layer, bytes moved, kernels, and the most memory held.

Nothing needs to be computed for that: on the meta device tensors have shapes and no values.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class LayerKind(StrEnum):
    """Layers whose time goes with their operations, each at a rate of its own."""

    CONVOLUTION = "convolution"
    LINEAR = "linear"
    ATTENTION = "attention"


@dataclass
class Operations:
    """What is computed.

    Attributes:
        flops: additions and multiplications by kind of layer.
        calls: kernels by kind of layer.
        moved: bytes that all other kernels read and write.
        others: number of those.
        peak: most bytes of tensors made since the start that were held at once, the kernels' own room aside.
    """

    flops: Counter[LayerKind] = field(default_factory=Counter)
    calls: Counter[LayerKind] = field(default_factory=Counter)
    moved: int = 0
    others: int = 0
    peak: int = 0

    @property
    def total(self) -> int:
        """All additions and multiplications."""
        return self.flops.total()

    @property
    def kernels(self) -> int:
        """All kernels."""
        return self.calls.total() + self.others

    def share(self, num_parts: int) -> Operations:
        """One part of as many equal ones: each has all kernels, and its part of what they do."""
        flops = Counter({kind: n // num_parts for kind, n in self.flops.items()})
        return Operations(flops, self.calls, self.moved // num_parts, self.others, self.peak)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "flops": {str(kind): n for kind, n in self.flops.items()},
            "calls": {str(kind): n for kind, n in self.calls.items()},
            "moved": self.moved,
            "others": self.others,
            "peak": self.peak,
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """From JSON."""
        flops, calls = (Counter({LayerKind(kind): n for kind, n in row[name].items()}) for name in ("flops", "calls"))
        return cls(flops, calls, row["moved"], row["others"], row["peak"])


class Counting(TorchDispatchMode):
    """Counts what runs within it on this thread.

    Attention is counted where it is called, by the definition: a kernel that never holds the scores computes as many.

    Attributes:
        operations: everything so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = Operations()
        self._held = 0
        self._known: set[int] = set()
        self._within_attention = False
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(_AttentionByDefinition(self._attention))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        new = self._hold(out, args)
        if self._within_attention:
            return out
        if packet is _CPU_ATTENTION:
            self._add(LayerKind.ATTENTION, _attention_flops(*args[:3]))
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self._add(_KINDS.get(packet, LayerKind.ATTENTION), flops)
        elif new or func._schema.is_mutable:
            self.operations.others += 1
            self.operations.moved += _bytes_of(out) + _bytes_of(args)
        return out

    def _add(self, kind: LayerKind, flops: int) -> None:
        self.operations.flops[kind] += flops
        self.operations.calls[kind] += 1

    def _attention(
        self, run: Callable[[], torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention of [B, N, L_q, D] to [B, N, L_k, D]; without values its shape alone."""
        self._add(LayerKind.ATTENTION, _attention_flops(query, key, value))
        self._within_attention = True
        try:
            return query.new_empty((*query.shape[:-1], value.shape[-1])) if query.is_meta else run()
        finally:
            self._within_attention = False

    def _hold(self, out: Any, args: Any) -> bool:
        """Note new memory among results; False where all was there before: views, and what is written in place."""
        given = {id(tensor.untyped_storage()) for tensor in _tensors(args)}
        new = False
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key in self._known or key in given:
                continue
            new = True
            self._known.add(key)
            self._held += size
            self.operations.peak = max(self.operations.peak, self._held)
            weakref.finalize(storage, self._forget, key, size)
        return new

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size


class _AttentionByDefinition(TorchFunctionMode):
    """Lets `scaled_dot_product_attention` be counted where it is called."""

    def __init__(self, answer: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return run()
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return self._answer(run, named["query"], named["key"], named["value"])


# What ring attention calls, which torch's own table does not have.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KINDS = {
    **dict.fromkeys((torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._scaled_mm), LayerKind.LINEAR),
    **dict.fromkeys((torch.ops.aten.convolution, torch.ops.aten._convolution), LayerKind.CONVOLUTION),
    # Products by batch: attention that is written out.
    **dict.fromkeys((torch.ops.aten.bmm, torch.ops.aten.baddbmm), LayerKind.ATTENTION),
}


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Of the scores, and of their product with the values."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes_of(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
