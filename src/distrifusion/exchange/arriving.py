"""A tensor whose bands are still on their way, on which a sampler can go on band by band.

A pipeline of diffusers calls its scheduler, then its denoiser again, on what looks to it like any tensor. Functions
that treat each position by itself (guidance, the steps of Euler, DDIM, DPM++ 2M) give another such tensor, of which a
band is computed when it is asked for; any other function waits for all of it first. Numbers are the same either way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from distrifusion.errors import ConfigError
from distrifusion.layout.partition import Interval
from distrifusion.nested import map_tensors

# Functions of torch by name that treat each position by itself, and those that do so beside one dimension: where their
# argument `dim` stands.
_POINTWISE = {
    "__rdiv__", "__rpow__", "__rsub__", "__rtruediv__", "abs", "add", "bfloat16", "clamp", "clone", "contiguous",
    "detach", "div", "double", "exp", "float", "half", "lerp", "mul", "neg", "pow", "reciprocal", "rsub", "sqrt", "sub",
    "to", "true_divide", "type", "type_as", "where",
}  # fmt: skip
_ALONG = {"cat": 1, "chunk": 2}
# What is known before anything has come.
_GETTERS = ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
_METHODS = ("__len__", "dim", "element_size", "is_complex", "is_floating_point", "numel", "size")
_FACTS = {
    *(getattr(torch.Tensor, name).__get__ for name in _GETTERS),
    *(getattr(torch.Tensor, name) for name in _METHODS),
}


class Bands(NamedTuple):
    """Contiguous parts of a tensor along a dimension, which cover it."""

    dim: int
    parts: tuple[Interval, ...]

    @property
    def length(self) -> int:
        """Of the dimension."""
        return self.parts[-1].stop


class Arriving(torch.Tensor):
    """A tensor of which bands arrive one by one; a plain tensor as soon as all are there."""

    bands: Bands
    _room: torch.Tensor
    _fetch: Callable[[int], None]
    _missing: set[int]
    _derived: list[weakref.ref[Arriving]]

    @classmethod
    def of(cls, room: torch.Tensor, bands: Bands, fetch: Callable[[int], None]) -> Arriving:
        """A tensor over the memory of `room`, of which `fetch` fills a band, given its number, when it is called."""
        # Filling is not a change: the tensor has a version counter of its own.
        made: Arriving = torch.Tensor._make_subclass(cls, room.data)
        made.bands, made._fetch, made._room = bands, fetch, room
        made._missing, made._derived = set(range(len(bands.parts))), []
        return made

    def so_far(self) -> torch.Tensor:
        """The same memory as a plain tensor; bands that have not arrived hold anything."""
        return self._room

    def _become_plain(self) -> None:
        vars(self).clear()  # and let go of what it was computed from
        self.__class__ = torch.Tensor  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        sources = list(_arriving((args, kwargs)))
        if sources and _goes_by_bands(func, sources, args, kwargs):
            made = _by_bands(func, sources, args, kwargs)
            if made is not None:
                return made
        for source in sources:
            complete(source)
        return func(*args, **kwargs)


def arrive(x: torch.Tensor, band: int) -> None:
    """Wait for a band of a tensor that may still be arriving."""
    if isinstance(x, Arriving) and band in x._missing:
        x._fetch(band)
        x._missing.remove(band)
        if not x._missing:
            x._become_plain()


def complete(x: torch.Tensor | None) -> None:
    """Wait for all bands, and for those of what was computed from them: whoever asks may write to the tensor."""
    if isinstance(x, Arriving):
        derived = [made for ref in x._derived if (made := ref()) is not None]
        for band in sorted(x._missing):
            arrive(x, band)
        for made in derived:
            complete(made)


def _arriving(value: Any) -> Iterator[Arriving]:
    if isinstance(value, Arriving):
        yield value
    elif isinstance(value, dict):
        yield from _arriving(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arriving(item)


def _goes_by_bands(func: Any, sources: list[Arriving], args: Any, kwargs: Any) -> bool:
    """Whether a function of tensors can be computed for one band after the other."""
    name = getattr(func, "__name__", "")
    bands = sources[0].bands
    if any(source.bands != bands for source in sources) or "out" in kwargs or name not in _POINTWISE | set(_ALONG):
        return False
    if name in _POINTWISE:
        return True
    place = _ALONG[name]
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    return isinstance(dim, int) and dim % sources[0].dim() != bands.dim


class _Uneven(Exception):
    """An argument is cut otherwise than the bands."""


class _Captured:
    """The arguments of a function, of which a part is taken when it is computed."""

    def __init__(self, arguments: Any, bands: Bands, num_dims: int) -> None:
        self._bands = bands
        self._num_dims = num_dims
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._arguments = map_tensors(arguments, self._capture)

    def _capture(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            if x.is_inference():  # it does not tell when it is changed
                raise _Uneven
            self._versions.append((x, x._version))
        return x._room if isinstance(x, Arriving) else x

    def part(self, part: Interval) -> Any:
        """The arguments for one band; raises ConfigError if one has been changed since."""
        with torch._C.DisableTorchFunctionSubclass():
            changed = any(x._version != version for x, version in self._versions)
        if changed:
            raise ConfigError(
                "a tensor was changed in place while what was computed from it was still on its way from another rank; "
                "change a copy of it, or add 'sync' to the plan"
            )
        return map_tensors(self._arguments, lambda x: self._narrow(x, part))

    def _narrow(self, x: torch.Tensor, part: Interval) -> torch.Tensor:
        after = self._num_dims - self._bands.dim  # dimensions from the cut one on
        if x.dim() < after or x.shape[-after] == 1:
            return x
        if x.dim() == self._num_dims and x.shape[-after] == self._bands.length:
            return x.narrow(self._bands.dim, part.start, len(part))
        raise _Uneven


def _by_bands(func: Any, sources: list[Arriving], args: Any, kwargs: Any) -> Any:
    """What a function gives, to be computed band by band; None if it has to be computed at once."""
    bands, num_dims = sources[0].bands, sources[0].dim()
    try:
        captured = _Captured((args, kwargs), bands, num_dims)
        empty_args, empty_kwargs = captured.part(Interval(0, 0))
    except _Uneven:
        return None
    empty = func(*empty_args, **empty_kwargs)
    if empty is (empty_args[0] if empty_args else None):
        return args[0]  # a change of type to the type it has
    results = (empty,) if isinstance(empty, torch.Tensor) else tuple(empty)
    if any(x.dim() != num_dims or x.shape[bands.dim] for x in results):
        return None
    rooms = [x.new_empty([bands.length if d == bands.dim else n for d, n in enumerate(x.shape)]) for x in results]
    there: set[int] = set()

    def fetch(band: int) -> None:
        if band in there:
            return
        for source in sources:
            arrive(source, band)
        part = bands.parts[band]
        part_args, part_kwargs = captured.part(part)
        given = func(*part_args, **part_kwargs)
        for room, x in zip(rooms, (given,) if isinstance(given, torch.Tensor) else given, strict=True):
            room.narrow(bands.dim, part.start, len(part)).copy_(x)
        there.add(band)

    made = tuple(Arriving.of(room, bands, fetch) for room in rooms)
    for source in sources:
        source._derived += [weakref.ref(x) for x in made]
    return made[0] if isinstance(empty, torch.Tensor) else type(empty)(made)
