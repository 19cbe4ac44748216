"""Point-to-point messages between ranks: the one interface, and its form over a torch process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from distrifusion.errors import RankFailed, StepTimeout


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


class SingleTransport:
    """One rank alone: there is nobody to send to."""

    rank = 0
    world_size = 1
    can_be_captured = True

    def post(self, sends: Any, receives: Any) -> Any:
        raise AssertionError("one rank has no peers")

    def broadcast(self, value: Any) -> Any:
        return value


class ProcessGroupTransport:
    """Messages over a torch process group (gloo or NCCL).

    Args:
        group: the ranks of the plan; None is the default group, which must be initialised.
            Its timeout is the limit of every wait.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        group = group if group is not None else dist.group.WORLD
        assert group is not None, "the caller has checked that a process group is initialised"
        self._group = group
        self.rank = dist.get_rank(self._group)
        self.world_size = dist.get_world_size(self._group)

    @property
    def can_be_captured(self) -> bool:
        """Whether messages of CUDA tensors are work of the device alone, as those of NCCL are."""
        try:
            return self._group._get_backend(torch.device("cuda")).name() == "nccl"
        except RuntimeError:  # the group has no backend for CUDA
            return False

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        # Receives first: gloo's sends complete only against a posted receive.
        ops: list[tuple[Callable[..., Any], str, Message]]
        ops = [(dist.irecv, "group_src", message) for message in receives]
        ops += [(dist.isend, "group_dst", message) for message in sends]
        works: list[tuple[dist.Work | None, int | None]]
        with _typed_errors(self.rank, None):
            # NCCL runs messages one after the other unless they are one batch, and two waiting sends would not end.
            if any(message.tensor.is_cuda for _, _, message in ops):
                p2p = [dist.P2POp(op, m.tensor, group=self._group, tag=m.tag, group_peer=m.peer) for op, _, m in ops]
                works = [(work, None) for work in dist.batch_isend_irecv(p2p)]
            else:
                works = [(op(m.tensor, group=self._group, tag=m.tag, **{side: m.peer}), m.peer) for op, side, m in ops]
        return _Works(works, self.rank)

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with _typed_errors(self.rank, 0 if self.rank else None):
            dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]


class _Works:
    """Handles of posted messages. They are kept until waited for: a dropped gloo handle cancels its message."""

    def __init__(self, works: list[tuple[dist.Work | None, int | None]], rank: int) -> None:
        self._works = works
        self._rank = rank

    def wait(self) -> None:
        for work, peer in self._works:
            assert work is not None, "this rank is in its own group"
            with _typed_errors(self._rank, peer):
                work.wait()
        self._works = []


@contextmanager
def _typed_errors(rank: int, peer: int | None) -> Iterator[None]:
    """Say who waited for whom: a timeout is a StepTimeout, a lost connection a RankFailed."""
    try:
        yield
    except RuntimeError as error:
        whom = "a peer" if peer is None else f"rank {peer}"
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            raise StepTimeout(f"rank {rank} had no answer from {whom} in time: {error}", rank=rank) from error
        raise RankFailed(f"rank {rank} lost its connection to {whom}: {error}", rank=peer) from error
