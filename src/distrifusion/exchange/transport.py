"""Point-to-point messages between ranks: the one interface, and its form over a torch process group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from distrifusion.errors import StepTimeout


class Message(NamedTuple):
    """A contiguous tensor to send to, or to fill from, another rank; both sides name it by the same tag."""

    peer: int
    tensor: torch.Tensor
    tag: int


class Pending(Protocol):
    """Messages under way; their tensors belong to the transport until `wait` has returned."""

    def wait(self) -> None:
        """Return when all have arrived and left; raises StepTimeout past the transport's limit."""


class Transport(Protocol):
    """Carries messages between the ranks of one plan.

    Between two ranks, messages of one tag arrive in the order they were posted. Every post has a counterpart on the
    peer; no post waits.
    """

    rank: int
    world_size: int

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending: ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Every rank calls it."""


class ProcessGroupTransport:
    """Messages over a torch process group (gloo or NCCL).

    Args:
        group: the ranks of the plan; None is the default group, which must be initialised.
        timeout: limit of every wait in seconds.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 300.0) -> None:
        group = group if group is not None else dist.group.WORLD
        assert group is not None, "the caller has checked that a process group is initialised"
        self._group = group
        self._timeout = timeout
        self._batched = dist.get_backend(self._group) == "nccl"
        self.rank = dist.get_rank(self._group)
        self.world_size = dist.get_world_size(self._group)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        # Receives first: gloo's sends complete only against a posted receive.
        group = self._group
        if self._batched:
            ops = [dist.P2POp(dist.irecv, m.tensor, group=group, tag=m.tag, group_peer=m.peer) for m in receives]
            ops += [dist.P2POp(dist.isend, m.tensor, group=group, tag=m.tag, group_peer=m.peer) for m in sends]
            works: list[dist.Work | None] = [*dist.batch_isend_irecv(ops)] if ops else []
        else:
            works = [dist.irecv(m.tensor, group=group, tag=m.tag, group_src=m.peer) for m in receives]
            works += [dist.isend(m.tensor, group=group, tag=m.tag, group_dst=m.peer) for m in sends]
        return _Works([work for work in works if work is not None], self._timeout, self.rank)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]


class _Works:
    """Handles of posted messages. They are kept until waited for: a dropped gloo handle cancels its message."""

    def __init__(self, works: list[dist.Work], timeout: float, rank: int) -> None:
        self._works = works
        self._timeout = timeout
        self._rank = rank

    def wait(self) -> None:
        for work in self._works:
            try:
                work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as error:
                raise StepTimeout(f"rank {self._rank}: no answer from a peer: {error}", rank=self._rank) from error
        self._works = []
