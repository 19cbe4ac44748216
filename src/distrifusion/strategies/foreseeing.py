"""What a call of a whole model would show, seen without values: no weight is read, and nothing is computed.

The model's own code runs on torch's "meta" device, on a copy of its modules as they are at the time, adapters and
switches included. What a model keeps of its own calls (tables of positions) is kept by the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from distrifusion.nested import map_tensors, tensors_of
from distrifusion.strategies.watching import Watch

Forward = Callable[..., Any]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # others' functions, which expect tensors with values


Layers = Mapping[str, tuple[nn.Module, Forward]]


def foresee(
    model: nn.Module, forward: Forward, layers: Layers, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Watch, Any]:
    """Watch a call of a whole model before it is made.

    Args:
        model: on any device; the forwards of it and of its layers may be replaced.
        forward: its own.
        layers: of its chain, by name, each with its own forward.
        args, kwargs: of the call; of tensors only shapes and types count.

    Returns:
        What was seen, and what the model gives, with tensors that have no values.

    Raises:
        Exception: whatever the model's code raises where it wants values, or has something that cannot be copied.
    """
    device = next(tensors_of((args, kwargs))).device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        raise RuntimeError(f"autocast chooses types where there are values, on '{device}'")
    copies = _without_values(model.modules())
    replaced = [model, *(layer for layer, _ in layers.values())]
    # Not to be copied: what was put in their place knows the ranks.
    copies |= {id(vars(module)["forward"]): _replaced for module in replaced if "forward" in vars(module)}
    copy.deepcopy(model, copies)
    watch = Watch()
    for name, (layer, own) in layers.items():
        vars(copies[id(layer)])["forward"] = partial(_watched, watch, name, copy.deepcopy(own, copies))
    with torch.no_grad(), _ByShape(), watch:
        result = copy.deepcopy(forward, copies)(*map_tensors(args, _empty), **map_tensors(dict(kwargs), _empty))
    return watch, result


class _ByShape(TorchFunctionMode):
    """Answers what torch would take to pieces without values, in Python: a few functions, most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            return torch.empty_like(args[0])
        if func is F.scaled_dot_product_attention and len(args) == 3 and (kwargs or {}).get("attn_mask") is None:
            query, _, value = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _without_values(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """What stands for the tensors and hooks of some modules when they are copied, by the ids of these."""
    found: dict[int, Any] = {}
    for module in modules:
        found |= {id(tensor): _empty(tensor) for tensor in tensors_of(vars(module))}
        found |= {id(hooks): type(hooks)() for hooks in (vars(module)[name] for name in _HOOKS)}
    return found


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _watched(watch: Watch, name: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    return watch.run(name, forward, args, kwargs)


def _replaced(*_: Any, **__: Any) -> Any:
    raise AssertionError("the copy of a model ran a forward that was replaced")
