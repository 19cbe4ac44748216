"""The random state of a call: it goes to every rank with the call and comes back from rank 0.

So `torch.manual_seed(0); pipe(...)` draws on many devices what it draws on one, and a generator that was passed is
afterwards where one-device diffusers would have left it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distrifusion.runtime.wire import Generators


@dataclass(frozen=True)
class Streams:
    """States of torch's global streams: the CPU's, and the accelerator's of one device where it takes part."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None = None


def capture(device: torch.device, with_cuda: bool = True) -> Streams:
    """The global streams as they are; `with_cuda` False leaves an accelerator of this process untouched."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" and with_cuda else None
    return Streams(torch.get_rng_state(), cuda)


def restore(streams: Streams, device: torch.device) -> None:
    """Set the global streams."""
    torch.set_rng_state(streams.cpu)
    if streams.cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(streams.cuda, device)


def capture_generators(generators: Generators) -> dict[int, torch.Tensor]:
    """States of the generators by key."""
    return {key: generator.get_state() for key, generator in generators.items()}


def restore_generators(generators: Generators, states: dict[int, torch.Tensor]) -> None:
    """Set the generators that `states` names."""
    for key, state in states.items():
        generators[key].set_state(state)
