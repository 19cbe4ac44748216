"""The random state of a call: it goes to every rank with the call and comes back from rank 0.

So `torch.manual_seed(0); pipe(...)` draws on many devices what it draws on one, a generator that was passed is
afterwards where one-device diffusers would have left it, and a callback may draw numbers of its own in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distrifusion.runtime.wire import Generators


@dataclass(frozen=True)
class Randomness:
    """States of torch's global streams and of generators.

    Attributes:
        cpu: of the CPU's global stream.
        cuda: of the global stream of one accelerator, None where it takes no part.
        generators: of the generators that were passed, by key.
    """

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    generators: Mapping[int, torch.Tensor]


def capture(device: torch.device, generators: Generators, with_cuda: bool = True) -> Randomness:
    """The states as they are; `with_cuda` False leaves an accelerator of this process untouched."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" and with_cuda else None
    return Randomness(torch.get_rng_state(), cuda, {key: g.get_state() for key, g in generators.items()})


def restore(states: Randomness, device: torch.device, generators: Generators, with_cuda: bool = True) -> None:
    """Set what `states` holds; `with_cuda` False leaves an accelerator of this process untouched."""
    torch.set_rng_state(states.cpu)
    if states.cuda is not None and device.type == "cuda" and with_cuda:
        torch.cuda.set_rng_state(states.cuda, device)
    for key, state in states.generators.items():
        generators[key].set_state(state)
