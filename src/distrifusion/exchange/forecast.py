"""Old values carried on in the direction in which they moved last."""

from __future__ import annotations

import torch

Weight = torch.Tensor | float


def carry_on(
    before: torch.Tensor, latest: torch.Tensor, weight: Weight, rows: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Where values come to that go on by a part of their last change; 0 gives the bits of the latest.

    Args:
        before, latest: of the same shape.
        weight: part of the change from `before` to `latest`; a number, or a tensor [] or, for rows of the batch, [B].
        rows: the dimension of the batch.
        out: where they are written, `before` itself perhaps; None: a new tensor.
    """
    if not isinstance(weight, torch.Tensor):
        return torch.lerp(before, latest, 1 + weight, out=out)
    reach = (1 + weight).to(latest.dtype)
    if reach.dim():
        reach = reach.reshape([-1 if dim == rows else 1 for dim in range(latest.dim())])
    return torch.lerp(before, latest, reach, out=out)
