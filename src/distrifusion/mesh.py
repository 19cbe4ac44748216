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
    """The ranks as a grid, axes outer to inner: cfg, patch."""

    plan: Plan
    rank: int

    def layout(self, num_rows: int) -> CallLayout:
        """Divide a call of `num_rows` batch rows over the ranks.

        The cfg axis cuts the batch, which holds the guidance branches one after the other. A call with fewer rows than
        the cfg degree (one picture without guidance) leaves nothing to cut there, so those ranks take bands instead.
        """
        cfg = self.plan.cfg if num_rows >= self.plan.cfg else 1
        bands = self.plan.num_ranks // cfg
        rows = split_evenly(num_rows, cfg)
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
