"""Words and types for what goes wrong on a rank."""

from __future__ import annotations

import errno

import torch

from distrifusion.errors import DistrifusionError, OutOfMemory

# What torch and the libraries below it say in a plain RuntimeError.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def where(step: int | None) -> str:
    """A place in a call, in words."""
    return "outside the denoising loop" if step is None else f"in step {step}"


def is_out_of_memory(error: BaseException) -> bool:
    """True if the error says that an accelerator's or this machine's memory ran out; ours say so by their type."""
    if isinstance(error, DistrifusionError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _NO_MEMORY)
    return isinstance(error, MemoryError)


def typed(error: Exception, rank: int | None, step: int | None) -> Exception:
    """The error itself, or `OutOfMemory` caused by it."""
    if not is_out_of_memory(error):
        return error
    short = out_of_memory(error, rank, step)
    short.__cause__ = error
    return short


def out_of_memory(error: BaseException, rank: int | None, step: int | None) -> OutOfMemory:
    """The error for the caller, with what can be done; `rank` None is the process that opens for all ranks."""
    who = "opening the pipeline" if rank is None else f"rank {rank}"
    return OutOfMemory(
        f"{who} ran out of memory {where(step)}: {str(error) or type(error).__name__}; a smaller picture, half "
        "precision (torch_dtype=torch.float16) or a plan of more ranks needs less on each",
        rank=rank,
        step=step,
    )
