"""SDXL in components as AsyncDiff's authors cut it (their `pipe_config`), and what their devices compute and send.

Each component is a list of layers. Before every call after the warm-up the output of every layer of the lists is
broadcast to all, and after it the prediction; nobody computes meanwhile. What is in no list runs on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from distrifusion.planner.costs import Costs
from distrifusion.planner.operations import Counting, Operations
from distrifusion.planner.rehearsal import CallWork, Post, Rehearsed

_SHELL = "conv_in down_blocks.0 down_blocks.1 up_blocks.1 up_blocks.2 conv_norm_out conv_out"
CUTS: Mapping[int, Sequence[str]] = {
    2: (
        "down_blocks.2 mid_block up_blocks.0.resnets.0 up_blocks.0.attentions.0 up_blocks.0.resnets.1 "
        "up_blocks.0.attentions.1",
        f"{_SHELL} up_blocks.0.resnets.2 up_blocks.0.attentions.2 up_blocks.0.upsamplers.0",
    ),
    3: (
        "down_blocks.2 mid_block up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0 up_blocks.0.resnets.1 up_blocks.0.attentions.1 up_blocks.0.resnets.2 "
        "up_blocks.0.attentions.2 up_blocks.0.upsamplers.0",
        _SHELL,
    ),
    4: (
        "down_blocks.1.attentions.0 down_blocks.1.resnets.1 down_blocks.1.attentions.1 down_blocks.1.downsamplers.0 "
        "down_blocks.2",
        "mid_block up_blocks.0.resnets.0 up_blocks.0.attentions.0",
        "up_blocks.0.resnets.1 up_blocks.0.attentions.1 up_blocks.0.resnets.2 up_blocks.0.attentions.2 "
        "up_blocks.0.upsamplers.0",
        _SHELL.replace("down_blocks.1 ", "down_blocks.1.resnets.0 "),
    ),
}


class _Watching:
    """What every listed layer computes and how many bytes it gives, in one call."""

    def __init__(self, counting: Counting) -> None:
        self._counting = counting
        self._before: dict[str, Operations] = {}
        self._hooks: list[RemovableHandle] = []
        self.own: dict[str, Operations] = {}
        self.given: dict[str, int] = {}

    def watch(self, name: str, module: nn.Module) -> None:
        """Watch a layer from now on."""
        self._hooks.append(module.register_forward_pre_hook(partial(self._begin, name)))
        self._hooks.append(module.register_forward_hook(partial(self._end, name)))

    def end(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, name: str, _module: nn.Module, _args: Any) -> None:
        self._before[name] = _difference(self._counting.operations, Operations())

    def _end(self, name: str, _module: nn.Module, _args: Any, out: Any) -> None:
        self.own[name] = _difference(self._counting.operations, self._before[name])
        self.given[name] = sum(tensor.nbytes for tensor in _tensors(out))


def published_components(costs: Costs, num_components: int) -> Rehearsed:
    """The busiest device of AsyncDiff's own cut, in the warm-up, where every device runs all, and after it."""
    model, cut = costs.blueprint.denoiser, [part.split() for part in CUTS[num_components]]
    with torch.no_grad(), Counting() as counting:
        watching = _Watching(counting)
        for part in cut:
            for name in part:
                watching.watch(name, model.get_submodule(name))
        prediction = model(**costs.arguments)
    watching.end()
    everything = counting.operations
    listed = [_sum([watching.own[name] for name in part]) for part in cut]
    shared = _difference(everything, _sum(listed))
    rank = max(range(num_components), key=lambda r: (listed[r].total, r))
    broadcasts = [(source, watching.given[name]) for source, part in enumerate(cut) for name in part]
    broadcasts.append((num_components - 1, sum(tensor.nbytes for tensor in _tensors(prediction))))
    posts = [_broadcast(source, size, rank, num_components) for source, size in broadcasts]
    return Rehearsed(rank, 0, CallWork(everything), (CallWork(_sum([shared, listed[rank]]), posts=posts),))


def _broadcast(source: int, num_bytes: int, rank: int, num_ranks: int) -> Post:
    """One to all, along a ring: every device but the last hands on what it gets."""
    if source == rank:
        return Post({(rank + 1) % num_ranks: num_bytes}, {}, waited=True)
    return Post({}, {(rank - 1) % num_ranks: num_bytes}, waited=True)


def _sum(parts: Sequence[Operations]) -> Operations:
    found = Operations()
    for part in parts:
        found.flops += part.flops
        found.calls += part.calls
        found.moved += part.moved
        found.others += part.others
    return found


def _difference(whole: Operations, part: Operations) -> Operations:
    return Operations(
        whole.flops - part.flops, whole.calls - part.calls, whole.moved - part.moved, whole.others - part.others
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]
