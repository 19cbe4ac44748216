"""What the ranks of a plan send in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from division import Inputs

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.transport import Message, Pending
from distrifusion.exchange.virtual import VirtualTransport, VirtualWorld
from models import share_weights


class Listening:
    """A virtual rank's transport that notes to whom how many bytes go."""

    def __init__(self, transport: VirtualTransport) -> None:
        self.rank, self.world_size = transport.rank, transport.world_size
        self.messages: list[Message] = []
        self._transport = transport

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self.messages += sends
        return self._transport.post(sends, receives)

    def broadcast(self, value: Any) -> Any:
        return self._transport.broadcast(value)


@dataclass(frozen=True)
class Traffic:
    """What one rank sent in one call."""

    by_kind: dict[str, int]
    num_posts: int
    messages: tuple[Message, ...]


def traffic(model: torch.nn.Module, plan: Plan, steps: Sequence[Inputs]) -> list[Traffic]:
    """The traffic of the last of a request's steps, by rank."""

    def work(transport: VirtualTransport) -> Traffic:
        listening = Listening(transport)
        own = share_weights(model)
        denoiser = ParallelDenoiser(own, plan, listening)
        denoiser.attach()
        with torch.no_grad():
            denoiser.open("request")
            for inputs in steps:
                denoiser.slot = 0
                denoiser.exchange.bytes_sent.clear()
                denoiser.exchange.num_posts = 0
                listening.messages.clear()
                own(**inputs)
            denoiser.close()
        exchange = denoiser.exchange
        return Traffic(dict(exchange.bytes_sent), exchange.num_posts, tuple(listening.messages))

    return VirtualWorld(plan.num_ranks).run(work)
