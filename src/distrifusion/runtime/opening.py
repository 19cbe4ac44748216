"""Opening the pipeline of a rank: on its own device, or once for all ranks that share this machine's memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import torch
import transformers
from tqdm.std import tqdm

from distrifusion.runtime.faults import typed
from distrifusion.runtime.operations import Open
from distrifusion.runtime.wire import Failure, pack, unpack

_CPU = torch.device("cpu")


def prepare(op: Open) -> None:
    """Set what a source may read while it is opened: the command line, and whether bars are drawn."""
    sys.argv[:] = op.argv
    if not op.bars:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def open_once(payload: bytes) -> tuple[diffusers.DiffusionPipeline | None, Failure | None]:
    """Open a pipeline on the CPU of a process that is forked afterwards; returns it, or what went wrong.

    Args:
        payload: rank 0's `Open`, packed.
    """
    try:
        op: Open = unpack(payload, _CPU)[0]
        prepare(op)
        # Threads that compute would be left behind by a fork; a rank starts its own.
        torch.set_num_threads(1)
        with _without_monitor():
            return op.source.open(_CPU), None
    except Exception as error:
        return None, Failure.of(typed(error, None, None), None, pack(None)[0])


@contextmanager
def _without_monitor() -> Iterator[None]:
    """Bars of loading start no thread that watches them."""
    interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
    try:
        yield
    finally:
        tqdm.monitor_interval = interval
