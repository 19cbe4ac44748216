"""Data-parallel training on a few processes of one machine.

On a CPU two processes of one thread each train faster than one of two threads: they meet once per step instead of once
per operation, which counts most when other programs compete for the cores.
"""

import ctypes
import platform
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks of any size instead of giving them back to the system.

    Otherwise each large tensor of a step on the CPU is mapped anew, and the page faults can take half of the time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)


def run_in_processes(count: int, function: Callable[..., None], *arguments: object) -> None:
    """Call ``function(*arguments)`` on ``count`` ranks that share a gloo group, one thread each; 1: just call it."""
    if count == 1:
        function(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, args=(count, f"file://{folder}/store", function, arguments), nprocs=count)


def _rank_main(rank: int, count: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()


def rank() -> int:
    """Rank of this process; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Ranks that train together; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace tensors by their mean over ranks, in place, in one message; all ranks must call it."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
