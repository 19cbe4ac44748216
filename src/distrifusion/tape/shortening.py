"""What a replay can leave out, or do in less memory, to the same bits.

A tape holds what the model's code happens to ask for: chains of views, copies of what could have been written in its
place, products with one, and a new tensor for every sum. All of it is small; between large kernels it is not free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch._ops import OpOverload

from distrifusion.tape.steps import Geometry, Record, Root, Step, listed

aten = torch.ops.aten

_BY_ONE = {aten.div.Tensor, aten.mul.Tensor}
_IN_PLACE: dict[OpOverload, Callable[..., object]] = {
    aten.add.Tensor: torch.Tensor.add_,
    aten.mul.Tensor: torch.Tensor.mul_,
    aten.gelu.default: aten.gelu_.default,
    aten.silu.default: aten.silu_.default,
}
_INTO_A_PLACE: dict[OpOverload, Callable[..., object]] = {aten.mm.default: torch.mm, aten.addmm.default: torch.addmm}
# Operations whose arguments and results must be known by how they lie in memory; views are, besides.
NEEDS_GEOMETRY = {*_BY_ONE, *_IN_PLACE, *_INTO_A_PLACE, aten.copy_.default}


def shorten(record: Record, outputs: set[int]) -> list[Step]:
    """The steps of a record without what can be left out.

    Args:
        record: gets places for what new steps read.
        outputs: places that are read after all steps.
    """
    steps = _Views(record, outputs).fold(record.steps)
    steps = _written_in_place(_products_put_in_place(steps, record, outputs), record, outputs)
    return _without_unread(steps, outputs)


class _Views:
    """Has a view taken once, and straight from what it is a view of; what is divided by one is left as it is."""

    def __init__(self, record: Record, outputs: set[int]) -> None:
        self._record = record
        self._outputs = outputs
        self._instead: dict[int, int] = {}
        self._origin: dict[Root, int] = {}
        self._known: dict[tuple[Root, Geometry], int] = {}
        self._changed = record.pinned.union(*(record.roots_of(step.mutates) for step in record.steps if step.mutates))

    def fold(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that are left."""
        folded = []
        for step in steps:
            if not self._instead.keys().isdisjoint(step.places):
                places, mutates = (
                    tuple([self._instead.get(p, p) for p in some]) for some in (step.places, step.mutates)
                )
                step = step._replace(places=places, mutates=mutates)
            if self._leaves_as_it_is(step):
                continue
            if step.is_view:
                kept = self._view(step)
                if kept is not None:
                    folded.append(kept)
                continue
            for place in step.written:
                for root in self._record.roots_of((place,)):
                    self._origin.setdefault(root, place)
            folded.append(step)
        return folded

    def _leaves_as_it_is(self, step: Step) -> bool:
        """Whether a step's result may be its first argument, because neither is written later."""
        record = self._record
        if step.op not in _BY_ONE or step.keywords or not isinstance(step.write, int):
            return False
        (source, by), made = step.places, step.write
        factor = record.values[by]
        if isinstance(factor, torch.Tensor) or factor != 1:
            return False
        if made in self._outputs or record.geometry.get(source) != record.geometry[made]:
            return False
        if not record.roots_of((source, made)).isdisjoint(self._changed):
            return False
        self._instead[made] = source
        record.unite(record.root_of(source), record.root_of(made))
        return True

    def _view(self, step: Step) -> Step | None:
        """A view of one tensor, taken from the tensor that its storage was made for; None if it is there already."""
        record, made = self._record, step.write
        if not isinstance(made, int):
            return step
        geometry, root = record.geometry[made], record.root_of(made)
        origin = self._origin.get(root)
        whole = None if origin is None else record.geometry.get(origin)
        if origin is None or whole is None or whole.dtype != geometry.dtype or root in record.pinned:
            return step
        self._known.setdefault((root, whole), origin)
        known = self._known.setdefault((root, geometry), made)
        if known != made and made not in self._outputs:
            self._instead[made] = known
            return None
        lies = tuple(record.add(value) for value in (geometry.size, geometry.stride, geometry.offset))
        return Step(torch.as_strided, (origin, *lies), made, aten.as_strided.default)


def _products_put_in_place(steps: Sequence[Step], record: Record, outputs: set[int]) -> list[Step]:
    """Has a product of matrices that is copied into a kept tensor, and read by nobody else, made there."""
    maker = {
        root: i for i, step in enumerate(steps) if step.op in _INTO_A_PLACE for root in record.roots_of(step.written)
    }
    readers, changes = defaultdict(list), defaultdict(list)
    for i, step in enumerate(steps):
        for root in () if step.is_view else record.roots_of(step.places):
            readers[root].append(i)
        for root in record.roots_of(step.mutates):
            changes[root].append(i)
    done: dict[int, Step] = dict(enumerate(steps))
    read_after = record.pinned | record.roots_of(outputs)
    for i, step in enumerate(steps):
        if step.op is not aten.copy_.default or len(step.places) != 2 or step.write is not None:
            continue
        root = record.root_of(step.places[1])
        start = maker.get(root)
        if start is None or root in read_after or readers[root] != [i]:
            continue
        product = steps[start]
        room = _room_for(product, step, record)
        factors, between = record.roots_of(product.places), range(start + 1, i)
        if room is None or any(at in between for factor in factors for at in changes[factor]):
            continue
        if not factors.isdisjoint(record.pinned | record.roots_of(step.places[:1])):
            continue
        assert product.op is not None
        function = partial(_into, partial(_INTO_A_PLACE[product.op], **product.keywords))
        place = record.add(room)
        record.roots[place] = record.roots[step.places[0]]
        done[i] = Step(function, (place, *product.places), None, mutates=(place,))
        del done[start]
    return list(done.values())


def _into(function: Callable[..., object], room: torch.Tensor, *factors: torch.Tensor) -> None:
    function(*factors, out=room)


def _room_for(product: Step, copy: Step, record: Record) -> torch.Tensor | None:
    """The kept tensor that a product is copied into, as a matrix; None if it is none, or cannot be written as one."""
    target, source = (record.values[copy.places[0]], record.geometry.get(copy.places[1]))
    assert isinstance(product.write, int)
    made = record.geometry.get(product.write)
    if copy.places[0] in record.made or source is None or made is None:
        return None
    if target.shape != source.size or target.dtype != made.dtype or (made.offset, source.offset) != (0, 0):
        return None
    lies = [one for one in zip(source.size, source.stride, target.stride(), strict=True) if one[0] > 1]
    if tuple((n, step) for n, step, _ in lies) != tuple(zip(made.size, made.stride, strict=True)):
        return None
    strides = tuple(there for *_, there in lies)
    if strides[1] != 1:  # which a product cannot be written into
        return None
    return target.as_strided(made.size, strides, target.storage_offset())


def _written_in_place(steps: Sequence[Step], record: Record, outputs: set[int]) -> list[Step]:
    """Has sums, products and activations written over an argument that nobody reads afterwards."""
    busy = record.pinned | record.roots_of(place for place in record.roots if place not in record.made)
    busy |= record.roots_of(outputs)
    last: dict[Root, int] = {}
    for i, step in enumerate(steps):
        last.update(dict.fromkeys(record.roots_of((*step.places, *step.written)), i))
    done = []
    for i, step in enumerate(steps):
        for at in _like_its_result(step, record):
            place, others = step.places[at], step.places[:at] + step.places[at + 1 :]
            root = record.root_of(place)
            if root in busy or last[root] != i or root in record.roots_of(others):
                continue
            assert step.op is not None and isinstance(step.write, int)
            function = partial(_IN_PLACE[step.op], **step.keywords) if step.keywords else _IN_PLACE[step.op]
            made = record.root_of(step.write)
            last[root] = last[made]
            busy |= {root} if made in busy else set()
            record.unite(root, made)
            step = Step(function, (place, *others), step.write, mutates=(place,))
            break
        done.append(step)
    return done


def _like_its_result(step: Step, record: Record) -> Sequence[int]:
    """Which arguments a step may be written over, by position, if nobody else needs them."""
    if step.op not in _IN_PLACE or not isinstance(step.write, int):
        return ()
    made = record.geometry[step.write]
    exchangeable = len(step.places) == 2 and not step.keywords
    found = []
    for i, place in enumerate(step.places if exchangeable else step.places[:1]):
        lies = record.geometry.get(place)
        if lies is not None and (lies.size, lies.stride, lies.dtype) == (made.size, made.stride, made.dtype):
            found.append(i)
    return found


def _without_unread(steps: Sequence[Step], outputs: set[int]) -> list[Step]:
    """The steps but views and lists that nobody reads."""
    read, left = set(outputs), []
    for step in reversed(steps):
        if (step.is_view or step.function is listed) and read.isdisjoint(step.written):
            continue
        read.update(step.places)
        left.append(step)
    return left[::-1]
