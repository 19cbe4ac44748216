"""What a tape notes: steps, and where in memory their values lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

# One storage: of a tensor that was there before, or of one that a step makes.
Root = int


class Geometry(NamedTuple):
    """Where the elements of a tensor lie in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        """As a tensor lies."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


class Step(NamedTuple):
    """One thing to do.

    Attributes:
        function: an operation, or what is no operation on tensors (a message).
        places: where its arguments are.
        write: where the result goes, one place for each of several results; None where nothing new comes.
        op: the operation, None for what is none and for one with tensors among its keywords.
        keywords: plain values that the operation is called with by name; they are part of `function`.
        mutates: places of arguments whose values it changes.
    """

    function: Callable[..., Any]
    places: tuple[int, ...]
    write: int | tuple[int | None, ...] | None
    op: torch._ops.OpOverload | None = None
    keywords: Mapping[str, Any] = {}
    mutates: tuple[int, ...] = ()

    @property
    def written(self) -> tuple[int, ...]:
        """Places that get something new."""
        if isinstance(self.write, tuple):
            return tuple([place for place in self.write if place is not None])
        return () if self.write is None else (self.write,)

    @property
    def is_view(self) -> bool:
        """Whether it makes nothing but views of its first argument."""
        return self.op is not None and (self.op.is_view or self.op is torch.ops.aten._unsafe_view.default)


@dataclass
class Record:
    """All that is known of a captured call.

    Attributes:
        steps: in order.
        values: by place: tensors that were there before, and plain values; None for what a step makes.
        made: places that steps write.
        roots: by place, the storages that a tensor, or the tensors of a list, lie in.
        geometry: by place, of some tensors; of all that a view is taken of, and of all views.
        pinned: storages that something else than operations reads or writes, at times that no step tells; and those
            of tensors that get another shape where they are.
    """

    steps: list[Step] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    made: set[int] = field(default_factory=set)
    roots: dict[int, frozenset[Root]] = field(default_factory=dict)
    geometry: dict[int, Geometry] = field(default_factory=dict)
    pinned: set[Root] = field(default_factory=set)
    _same: dict[Root, Root] = field(default_factory=dict)

    def roots_of(self, places: Iterable[int]) -> set[Root]:
        """The storages that values lie in, each by one number also where two have become the same."""
        roots, found = self.roots, set[Root]()
        for place in places:
            if place in roots:
                found |= roots[place]
        return {self._first(root) for root in found} if self._same else found

    def root_of(self, place: int) -> Root:
        """The storage that a tensor lies in."""
        (root,) = self.roots[place]
        return self._first(root)

    def unite(self, root: Root, made: Root) -> None:
        """From here on, what a step made lies in a storage that was there."""
        self._same[made] = root

    def _first(self, root: Root) -> Root:
        while root in self._same:
            root = self._same[root]
        return root

    def add(self, value: Any) -> int:
        """A place for a value."""
        self.values.append(value)
        return len(self.values) - 1


@cache
def mutated_by(op: torch._ops.OpOverload) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which arguments an operation changes: positions, and names."""
    changed = [
        (i, argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(i for i, _ in changed), tuple(name for _, name in changed)


def listed(*values: Any) -> list[Any]:
    """A list, which an operation takes as one argument."""
    return list(values)
