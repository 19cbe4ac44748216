"""What travels between the caller and its workers, and how tensors, generators and errors are packed.

A payload is pickled with cloudpickle (functions of a script or notebook travel by value). Three kinds of object get
their own form: a CUDA tensor travels through host memory and arrives on the receiver's device, a view travels without
the storage around it, and a `torch.Generator` travels as its state.
"""

from __future__ import annotations

import io
import pickle
import traceback
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch

from distrifusion.errors import ConfigError, DistrifusionError, OutOfMemory

Generators = dict[int, torch.Generator]


@dataclass(frozen=True)
class Request:
    """Something for a worker to do; `payload` is a packed operation, so that a bad one can still be answered."""

    id: int
    payload: bytes


@dataclass(frozen=True)
class Reply:
    """The end of a request: a packed value, or what went wrong."""

    id: int
    value: bytes = b""
    failure: Failure | None = None


@dataclass(frozen=True)
class BarOpened:
    """Rank 0 opened a progress bar of `total` steps."""

    total: int | None


@dataclass(frozen=True)
class BarMoved:
    """Rank 0's progress bar moved on by `steps`."""

    steps: float


@dataclass(frozen=True)
class BarClosed:
    """Rank 0's progress bar came to its end."""


@dataclass(frozen=True)
class StepEnded:
    """Rank 0 waits for the caller's `callback_on_step_end`; `payload` packs (timestep, tensors, randomness)."""

    step: int
    payload: bytes


@dataclass(frozen=True)
class StepAnswer:
    """What the caller's callback changed and returned, for every rank; `payload` is None if the callback raised."""

    call: int
    payload: bytes | None


class Close:
    """The worker is to end."""


class CallbackRaised(DistrifusionError):
    """Ends a call on every rank alike after the caller's own callback raised."""


class WorkerTraceback(Exception):
    """The traceback of an error as the worker printed it; the cause of the error that the caller gets."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failure:
    """An error in a form that always travels.

    Attributes:
        kind: full name of the error's type.
        message: its text.
        trace: its traceback as text.
        packed: the error itself, if it can be packed and unpacked, else None.
        step: the denoising step it was raised in, None outside the loop.
        exchange: what the rank waited for, where the error says so.
        randomness: packed states of the generators and the global streams when it was raised.
    """

    kind: str
    message: str
    trace: str
    packed: bytes | None
    step: int | None
    exchange: str | None
    randomness: bytes

    @classmethod
    def of(cls, error: BaseException, step: int | None, randomness: bytes) -> Failure:
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        exchange = getattr(error, "exchange", None)
        return cls(kind, str(error), trace, _pack_error(error), step, exchange, randomness)

    def like(self, other: Failure) -> bool:
        """True if both ranks raised the same thing."""
        return (self.kind, self.message) == (other.kind, other.message)

    @property
    def is_out_of_memory(self) -> bool:
        """True if the rank's memory ran out."""
        return self.kind == f"{OutOfMemory.__module__}.{OutOfMemory.__qualname__}"

    def error(self) -> BaseException:
        """The error to raise in the caller."""
        error = DistrifusionError(f"{self.kind}: {self.message}") if self.packed is None else pickle.loads(self.packed)
        error.__cause__ = self.cause()
        return error

    def cause(self) -> WorkerTraceback:
        """The worker's traceback, to raise the error from."""
        return WorkerTraceback(self.trace)


def _pack_error(error: BaseException) -> bytes | None:
    # Some errors pickle and do not unpickle (an __init__ of other arguments); anything may be raised by foreign code.
    try:
        packed = cloudpickle.dumps(error)
        same = pickle.loads(packed)
    except Exception:
        return None
    return packed if str(same) == str(error) else None


class _Packer(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, modules: bool) -> None:
        super().__init__(file)
        self.modules = modules
        self.generators: Generators = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.Generator):
            self.generators[id(obj)] = obj
            return ("generator", id(obj), obj.device.type, obj.get_state())
        if isinstance(obj, torch.Tensor):
            return _tensor_id(obj)
        if isinstance(obj, torch.nn.Module) and not self.modules:
            raise ConfigError(
                f"a {type(obj).__name__} with its weights cannot pass between the caller and the workers; "
                "give modules to load(...), or use a factory that builds them"
            )
        return None


def _tensor_id(tensor: torch.Tensor) -> Any:
    if tensor.device.type not in ("cpu", "meta"):
        parameter = isinstance(tensor, torch.nn.Parameter)
        return ("tensor", tensor.detach().cpu(), parameter, tensor.requires_grad and parameter)
    if type(tensor) is not torch.Tensor or tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return None
    if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
        return ("view", tensor.detach().clone(memory_format=torch.contiguous_format))
    return None


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self.device = device
        self.generators: Generators = {}

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("generator", key, kind, state):
                if key not in self.generators:
                    self.generators[key] = torch.Generator(self.device if kind == self.device.type else kind)
                    self.generators[key].set_state(state)
                return self.generators[key]
            case ("tensor", tensor, parameter, requires_grad):
                moved = tensor.to(self.device)
                return torch.nn.Parameter(moved, requires_grad) if parameter else moved
            case ("view", tensor):
                return tensor
        raise pickle.UnpicklingError(f"unknown kind of object {pid!r}")


def pack(value: Any, modules: bool = False) -> tuple[bytes, Generators]:
    """Pack a value; also returns the generators in it by key.

    Raises:
        ConfigError: if the value cannot travel (a lock, an open file, a module unless `modules`); its type is named.
    """
    file = io.BytesIO()
    packer = _Packer(file, modules)
    try:
        packer.dump(value)
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise ConfigError(f"this cannot be sent between processes: {error}") from error
    return file.getvalue(), packer.generators


def unpack(data: bytes, device: torch.device) -> tuple[Any, Generators]:
    """Unpack a value; tensors that were on an accelerator arrive on `device`. Also returns its generators by key."""
    unpacker = _Unpacker(io.BytesIO(data), device)
    return unpacker.load(), unpacker.generators
