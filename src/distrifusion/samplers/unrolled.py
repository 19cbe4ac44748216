"""The steps of a window unrolled: the order-k system of ParaTAA (arXiv 2402.09970, equation 8), as two matrices."""

from __future__ import annotations

import torch


def unrolled(linear: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices P and M of the order-k equations x_j = P x + M d of W steps x_{j+1} = l_j x_j + d_j.

    Row j - 1 of both says x_j, from the state k steps before it, or the window's first, and the drives since.

    Args:
        linear: l: [W].
        order: k, at least 1.

    Returns:
        P and M, each [W, W], in double precision.
    """
    num = len(linear)
    start = torch.zeros(num, num, dtype=torch.float64)
    drives = torch.zeros(num, num, dtype=torch.float64)
    for j in range(num):
        factor = 1.0
        for r in range(j, max(j - order, -1), -1):
            drives[j, r] = factor
            factor *= float(linear[r])
        start[j, max(j + 1 - order, 0)] = factor
    return start, drives


def combined(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A matrix [W, W] on rows [W, ...]."""
    return (matrix.to(rows) @ rows.flatten(1)).view_as(rows)
