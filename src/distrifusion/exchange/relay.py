"""What one rank computes and others use a call later: kept where it arrives, and carried on by a forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distrifusion.exchange.forecast import Weight, carry_on
from distrifusion.exchange.posted import Posted
from distrifusion.exchange.transport import Message


@dataclass(frozen=True)
class Parties:
    """Who has to do with a value.

    Attributes:
        gives: this rank computes it.
        peers: the ranks that take it; on a rank that takes it, the one that gives it.
    """

    gives: bool
    peers: tuple[int, ...]


class Relay(Posted):
    """The tensors that a layer gives, on the rank that runs it or on one that takes them.

    Args:
        name: of the layer and its use within a call, the same on all ranks.
        like: tensors of their shapes and types, on any device.
        parties: who gives and takes them.
        num_kept: values that a rank that takes them holds: the latest; for forecasts the one before; one more if the
            latest is still used while the next arrives.
        device: where they are.
    """

    def __init__(
        self, name: str, like: Sequence[torch.Tensor], parties: Parties, num_kept: int, device: torch.device
    ) -> None:
        super().__init__(name)
        self.num_received = 0
        self._parties = parties
        # Oldest first. What arrives replaces the oldest, and becomes the latest once it is there.
        self._values = [
            [torch.zeros(tensor.shape, dtype=tensor.dtype, device=device) for tensor in like]
            for _ in range(1 if parties.gives else num_kept)
        ]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for value in self._values for tensor in value)

    def messages(self) -> tuple[list[Message], list[Message]]:
        own = [Message(peer, tensor, self.tag) for peer in self._parties.peers for tensor in self._values[0]]
        return (own, []) if self._parties.gives else ([], own)

    def settle(self) -> None:
        arrives = self._pending is not None and not self._parties.gives
        super().settle()
        if arrives:
            self._advance()

    def put(self, value: Sequence[torch.Tensor]) -> None:
        """Put in a value: one to be sent, or one that this rank has without a message."""
        self.settle()
        for kept, tensor in zip(self._values[0], value, strict=True):
            kept.copy_(tensor.detach())
        self._advance()

    def read(self, weight: Weight) -> list[torch.Tensor]:
        """New tensors: the latest value, carried on by `weight` times its change since the one before."""
        latest = self._values[-1]
        if self.num_received < 2 or len(self._values) < 2 or (not isinstance(weight, torch.Tensor) and weight == 0):
            return [tensor.clone() for tensor in latest]
        before = self._values[-2]
        return [carry_on(old, new, weight, rows=0) for old, new in zip(before, latest, strict=True)]

    def _advance(self) -> None:
        self.num_received += 1
        self._values.append(self._values.pop(0))
