"""Triangular Anderson acceleration (ParaTAA, arXiv 2402.09970, section 3)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Iterate:
    """The rows of one iteration. Legend: W rows, of the states `first` to `first + W - 1`; B pictures.

    Attributes:
        first: number of the first row's state.
        x: states [W, B, ...].
        residual: where the unrolled steps would put them, less where they are: [W, B, ...].
    """

    first: int
    x: torch.Tensor
    residual: torch.Tensor

    def rows(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States and residuals of the states from `first` to before `stop`."""
        own = slice(first - self.first, stop - self.first)
        return self.x[own], self.residual[own]

    @property
    def stop(self) -> int:
        """Number of the state after the last row's."""
        return self.first + len(self.x)


class Acceleration:
    """Corrections of Picard's move, each row's from itself and the rows before it alone.

    A single mixture for all rows would let late rows, which are wrong still, spoil early ones.

    Args:
        memory: iterates that are looked at; 1 corrects nothing.
        regularisation: of the least squares, relative to the mean of their matrix's diagonal.
    """

    def __init__(self, memory: int, regularisation: float) -> None:
        self._past: deque[Iterate] = deque(maxlen=memory)
        self._regularisation = regularisation

    def correction(self, now: Iterate, scale: torch.Tensor, num_plain: torch.Tensor) -> torch.Tensor | None:
        """What to take off Picard's move of every row: [W, B, ...]; None where there is nothing to learn from yet.

        Args:
            now: the present iterate, which is remembered.
            scale: size of each row's state: [W].
            num_plain: rows at the beginning that are not corrected, for each picture: [B].
        """
        self._past.append(now)
        pairs = [(a, b) for a, b in pairwise(self._past) if min(a.stop, now.stop) > now.first]
        if not pairs:
            return None
        moved = [_difference(older, newer, now) for older, newer in pairs]
        dx, dr = (torch.stack(parts) for parts in zip(*moved, strict=True))
        mixture = self._mixture(dr, now.residual, scale)
        plain = torch.arange(len(scale), device=num_plain.device)[:, None] < num_plain
        mixture = mixture.masked_fill(plain[..., None], 0).to(dx)
        return torch.einsum("nwbd,wbn->wbd", (dx + dr).flatten(3), mixture).view_as(now.x)

    def _mixture(self, dr: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """g of every row, the least squares of the residuals up to it: [W, B, n] for n differences [n, W, B, ...]."""
        weight = 1 / scale.to(dr).view(-1, 1, 1)
        changes, wanted = dr.flatten(3) * weight, residual.flatten(2) * weight
        matrix = torch.einsum("nwbd,mwbd->wbnm", changes, changes).double().cumsum(0)
        right = torch.einsum("nwbd,wbd->wbn", changes, wanted).double().cumsum(0)
        num = matrix.shape[-1]
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).mean(-1) * self._regularisation
        # Where nothing has moved the matrix is zero, and so is the answer.
        diagonal = diagonal + torch.finfo(torch.float64).tiny
        eye = torch.eye(num, dtype=torch.float64, device=matrix.device)
        return torch.linalg.solve(matrix + diagonal[..., None, None] * eye, right)


def _difference(older: Iterate, newer: Iterate, now: Iterate) -> tuple[torch.Tensor, torch.Tensor]:
    """How the present rows and their residuals moved between two iterates; a row that was not in both did not."""
    first, stop = now.first, min(older.stop, newer.stop, now.stop)
    dx, dr = torch.zeros_like(now.x), torch.zeros_like(now.residual)
    (x0, r0), (x1, r1) = older.rows(first, stop), newer.rows(first, stop)
    dx[: stop - first], dr[: stop - first] = x1 - x0, r1 - r0
    return dx, dr
