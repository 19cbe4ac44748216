"""What rank 0 does for all: the prompts of a run are encoded once, and the other ranks get the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from distrifusion.errors import RankFailed
from distrifusion.exchange.transport import Transport
from distrifusion.runtime import randomness
from distrifusion.runtime.faults import is_out_of_memory
from distrifusion.runtime.wire import Failure, pack, unpack

T = TypeVar("T")

# Methods of diffusers' pipelines that run a text or image encoder on arguments that all ranks have alike.
ENCODERS = ("encode_prompt", "_encode_prompt", "encode_image")


def encode_once(transport: Transport, device: torch.device, work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank, with its tensors on `device`. Every rank calls it.

    Random numbers that were drawn for it are taken as drawn by all.

    Raises:
        RankFailed: on the other ranks, if rank 0 ran out of memory.
        Whatever `work` raises on rank 0, on every rank.
    """
    if transport.rank == 0:
        try:
            result = work()
            payload = pack((result, randomness.capture(device, {})))[0]
        except Exception as error:
            transport.broadcast(Failure.of(_for_others(error), None, b""))
            raise
        transport.broadcast(payload)
        return result
    answer = transport.broadcast(None)
    if isinstance(answer, Failure):
        raise answer.error() from answer.cause()
    received, states = unpack(answer, device)[0]
    randomness.restore(states, device, {})
    return received


def _for_others(error: Exception) -> Exception:
    """What a rank raises when rank 0 has raised: the same, unless it is about rank 0's own memory."""
    if is_out_of_memory(error):
        return RankFailed(f"rank 0 ran out of memory while it encoded the prompt for all: {error}", rank=0)
    return error
