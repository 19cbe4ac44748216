"""Does again what a tape has noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch._ops import OpOverload

from distrifusion.tape.shortening import shorten
from distrifusion.tape.steps import Record, Step

# A function, what takes its arguments out of all values, where its result goes, and what nobody reads afterwards.
Stop = tuple[Callable[..., Any], Callable[[list[Any]], Any], int | tuple[int | None, ...] | None, tuple[int, ...]]


def replayed(record: Record, results: Sequence[tuple[int, torch.Tensor]]) -> Callable[[], None]:
    """What does everything of a record again, and copies what is then in some places into tensors."""
    outputs = {place for place, _ in results}
    stops = with_last_uses(shorten(record, outputs), record.made, outputs)
    kept = [None if place in record.made else value for place, value in enumerate(record.values)]

    def replay() -> None:
        values: list[Any] = kept.copy()
        for function, read, write, spent in stops:
            made = function(*read(values))
            if isinstance(write, int):
                values[write] = made
            elif write is not None:
                for place, one in zip(write, made, strict=True):
                    if place is not None:
                        values[place] = one
            made = None  # or it would outlive its last use by one operation
            for place in spent:
                values[place] = None
        for place, output in results:
            if values[place] is not output:
                output.copy_(values[place])

    return replay


def with_last_uses(steps: Sequence[Step], made: set[int], outputs: set[int]) -> list[Stop]:
    """The steps as they are done, each with the places that nobody reads after it."""
    seen, stops = set(outputs), []
    for step in reversed(steps):
        touched = {place for place in (*step.places, *step.written) if place in made}
        stops.append((_directly(step), _reader(step.places), step.write, tuple(touched - seen)))
        seen |= touched
    return stops[::-1]


def _reader(places: tuple[int, ...]) -> Callable[[list[Any]], Any]:
    """What takes the arguments of a step: one place alone is taken as a list of one, as arguments come in lists."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _directly(step: Step) -> Callable[..., Any]:
    """A step's operation by torch's own binding, where there is one: the same kernel, with less in between."""
    binding = _BINDINGS.get(step.op) if step.op is not None else None
    if binding is None:
        return step.function
    return partial(binding, **step.keywords) if step.keywords else binding


aten = torch.ops.aten
_BINDINGS: dict[OpOverload, Callable[..., Any]] = {
    getattr(aten, name).default: getattr(torch, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu", "addcmul", "addmm", "cat", "clone", "convolution",
        "index_select", "mm", "native_batch_norm", "native_group_norm", "native_layer_norm", "stack",
    )
    if hasattr(torch, name)
}  # fmt: skip
_BINDINGS |= {
    aten.add.Tensor: torch.add,
    aten.copy_.default: torch.Tensor.copy_,
    aten.div.Tensor: torch.div,
    aten.empty.memory_format: torch.empty,
    aten.lt.Scalar: torch.lt,
    aten.mul.Tensor: torch.mul,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.unbind.int: torch.unbind,
    aten.where.self: torch.where,
    aten.zero_.default: torch.Tensor.zero_,
}
