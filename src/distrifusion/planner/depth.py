"""What plans cost that divide the network in depth or by weights, from an undivided call: by formula, not rehearsed.

PipeFusion (arXiv 2405.14430), AsyncDiff (arXiv 2406.06911), Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.errors import PlanError
from distrifusion.plan import Plan
from distrifusion.planner.calls import Arguments
from distrifusion.planner.operations import Counting, Operations
from distrifusion.planner.rehearsal import CallWork, Post, Rehearsed


@dataclass(frozen=True)
class Undivided:
    """One whole call.

    Attributes:
        operations: all that is computed.
        blocks: operations and bytes of output of each block, in order.
        reduced: bytes of what layers give whose weights can be divided: one sum over ranks each.
        kv: bytes of the keys and values of all self-attention.
    """

    operations: Operations
    blocks: tuple[tuple[str, int, int], ...]
    reduced: tuple[int, ...]
    kv: int


def undivided(model: nn.Module, arguments: Arguments) -> Undivided:
    """Run a call on the meta device and note what the formulas want."""
    reduced: list[int] = []
    keys: list[int] = []
    hooks = [m.register_forward_hook(_note(reduced)) for m in model.modules() if _is_summed(m)]
    projections = [m.get_submodule("to_k") for m in model.modules() if _is_self_attention(m)]
    hooks += [projection.register_forward_hook(_note(keys)) for projection in projections]
    try:
        with torch.no_grad(), Counting(model) as counting:
            model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    blocks = tuple((name, n, counting.outputs.get(name, 0)) for name, n in counting.by_block.items())
    return Undivided(counting.operations, blocks, tuple(reduced), 2 * sum(keys))


def by_formula(model: nn.Module, plan: Plan, whole: Undivided) -> Rehearsed:
    """The calls of a plan's busiest rank.

    Args:
        model: the denoiser.
        plan: with stages, components or divided weights.
        whole: an undivided call of one part of the batch.

    Raises:
        PlanError: if the model has no blocks enough.
    """
    if plan.tp > 1:
        return _tensor_parallel(plan.tp, whole)
    if plan.stages > 1:
        if not isinstance(anatomy_of(model), TokenAnatomy):
            raise PlanError(f"plan '{plan}': stages are for transformers; skip connections of a U-Net cross them")
        return _pipeline(plan, whole)
    return _asynchronous(plan, whole)


def _pipeline(plan: Plan, whole: Undivided) -> Rehearsed:
    """Pieces flow through stages; activations cross each border, and nobody waits while pieces are at hand."""
    num_pieces = plan.pieces or plan.stages
    _, share = _cut([n for _, n, _ in whole.blocks], plan.stages, plan)
    passed = max(n for name, _, n in whole.blocks if "blocks." in name)
    pieces = [Post({1: passed // num_pieces}, {plan.stages - 1: passed // num_pieces}) for _ in range(num_pieces)]
    # The warm-up sends the whole picture through the stages one after the other.
    first = CallWork(whole.operations, posts=[Post({1: passed}, {}, waited=True) for _ in range(plan.stages)])
    kept = round(whole.kv * share) * (2 if plan.forecast else 1)
    steady = CallWork(whole.operations.part(share, num_pieces * share), posts=pieces, kept=kept)
    return Rehearsed(0, first, steady)


def _asynchronous(plan: Plan, whole: Undivided) -> Rehearsed:
    """Components run at once on the last call's inputs; what each gives reaches everybody.

    With a stride all but the last have several calls' time, and may be as many times as long.
    """
    borders, share = _cut([n for _, n, _ in whole.blocks], plan.stride * (plan.components - 1) + 1, plan)
    given = max(whole.blocks[border - 1][2] for border in borders[1:])
    skips = sum(n for name, _, n in whole.blocks if name.startswith("down_blocks"))
    num_bytes = round((given + skips / plan.components) / plan.stride)
    peers = dict.fromkeys(range(1, plan.components), num_bytes)
    steady = CallWork(whole.operations.part(share, share), posts=[Post(peers, peers)])
    return Rehearsed(0, CallWork(whole.operations), steady)


def _tensor_parallel(degree: int, whole: Undivided) -> Rehearsed:
    """Every layer's weights are divided; each sum over ranks moves a tensor there and back, less the own part."""
    posts = []
    for num_bytes in whole.reduced:
        part = 2 * num_bytes // degree
        peers = dict.fromkeys(range(1, degree), part)
        posts.append(Post(peers, peers, waited=True))
    divided = whole.operations.part(1 / degree)
    divided.moved = whole.operations.moved  # norms and sums see all channels
    call = CallWork(divided, posts=posts)
    return Rehearsed(0, call, call)


def _cut(costs: Sequence[int], num_parts: int, plan: Plan) -> tuple[list[int], float]:
    """Borders of contiguous parts whose largest is as small as can be, and the largest's share of all."""
    if len(costs) < num_parts:
        raise PlanError(
            f"plan '{plan}': the network has {len(costs)} blocks, which is fewer than its {num_parts} parts"
        )
    sums = [0, *accumulate(costs)]

    @cache
    def best(end: int, parts: int) -> tuple[int, int]:
        """The least largest part of the first blocks, and where the last part begins."""
        if parts == 1:
            return sums[end], 0
        return min((max(best(cut, parts - 1)[0], sums[end] - sums[cut]), cut) for cut in range(parts - 1, end))

    borders, end = [len(costs)], len(costs)
    for parts in range(num_parts, 0, -1):
        end = best(end, parts)[1]
        borders.insert(0, end)
    return borders, best(len(costs), num_parts)[0] / sums[-1]


def _note(sizes: list[int]) -> Any:
    def note(_module: Any, _args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        sizes.append(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)))

    return note


def _is_summed(module: nn.Module) -> bool:
    name = type(module).__name__
    return hasattr(module, "to_out") or "FeedForward" in name or name == "ResnetBlock2D"


def _is_self_attention(module: Any) -> bool:
    return isinstance(getattr(module, "to_k", None), nn.Module) and not getattr(module, "is_cross_attention", False)
