"""Which rank does what: the plan's degrees laid over the ranks, as plain integers."""

from __future__ import annotations

from dataclasses import dataclass

from distrifusion.partition import Interval, split_evenly
from distrifusion.plan import Plan


@dataclass(frozen=True)
class CallLayout:
    """One rank's place in one denoiser call.

    Attributes:
        batch: rows of the batch that each rank evaluates, by rank.
        band: index of the band that each rank owns within its team, by rank.
        team: ranks that evaluate the same rows of the batch as this rank, in band order.
        index: this rank's place in `team`.
    """

    batch: tuple[Interval, ...]
    band: tuple[int, ...]
    team: tuple[int, ...]
    index: int


@dataclass(frozen=True)
class RankGrid:
    """The ranks as a grid, axes outer to inner: batch (pictures and guidance branches), patch."""

    plan: Plan
    rank: int

    def layout(self, num_rows: int) -> CallLayout:
        """Divide a call of `num_rows` batch rows over the ranks.

        The batch holds the guidance branches one after the other, each with all pictures. A call with fewer rows than
        the plan has parts (one picture without guidance) is cut into fewer, and the ranks left over take bands instead.
        """
        parts = max(n for n in range(1, min(self.plan.batch, num_rows) + 1) if self.plan.batch % n == 0)
        bands = self.plan.num_ranks // parts
        rows = split_evenly(num_rows, parts)
        ranks = range(self.plan.num_ranks)
        branch = self.rank // bands
        return CallLayout(
            batch=tuple(rows[r // bands] for r in ranks),
            band=tuple(r % bands for r in ranks),
            team=tuple(range(branch * bands, (branch + 1) * bands)),
            index=self.rank % bands,
        )

    def num_bands(self, num_rows: int) -> int:
        """Bands per branch in a call of `num_rows` batch rows."""
        return len(self.layout(num_rows).team)
