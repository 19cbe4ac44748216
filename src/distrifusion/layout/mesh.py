"""Which rank does what: the plan's degrees laid over the ranks, as plain integers."""

from __future__ import annotations

from dataclasses import dataclass

from distrifusion.layout.partition import Interval, split_evenly
from distrifusion.plan import Plan


@dataclass(frozen=True)
class CallLayout:
    """One rank's place in one denoiser call.

    Attributes:
        batch: rows of the batch that each rank evaluates, by rank.
        band: index of the band, or part of the tokens, that each rank owns within its team, by rank.
        replica: which of several teams that evaluate the same rows of the batch each rank is in, by rank.
        team: ranks that evaluate a part of the batch together with this rank, in band order.
        index: this rank's place in `team`.
    """

    batch: tuple[Interval, ...]
    band: tuple[int, ...]
    replica: tuple[int, ...]
    team: tuple[int, ...]
    index: int

    @property
    def rows(self) -> Interval:
        """Rows of the batch that this rank evaluates."""
        return self.batch[self.team[self.index]]

    @property
    def others_with_my_band(self) -> tuple[int, ...]:
        """Ranks that have the same part of other rows of the batch, one for each part of the batch."""
        own = self.team[self.index]
        places = enumerate(zip(self.band, self.replica, strict=True))
        return tuple(r for r, place in places if place == (self.index, self.replica[own]) and r != own)

    @property
    def twins(self) -> tuple[int, ...]:
        """Ranks that have the same part of the same rows, in teams that were left over."""
        own = self.team[self.index]
        places = enumerate(zip(self.batch, self.band, strict=True))
        return tuple(r for r, place in places if place == (self.rows, self.index) and r != own)


@dataclass(frozen=True)
class AttentionAxes:
    """A team as a grid, axes outer to inner: ring, ulysses.

    Attributes:
        ulysses: places in the team that attend to the same keys at a time, each with heads of its own.
        ring: places that have the same heads, each with keys of its own.
        index: this rank's place in both, in the order of the two above.
    """

    ulysses: tuple[int, ...]
    ring: tuple[int, ...]
    index: tuple[int, int]

    @classmethod
    def of(cls, plan: Plan, size: int, place: int) -> AttentionAxes:
        """The axes of a rank's place in a team of some size, which a call without branches can make larger."""
        degree = size if plan.ring == 1 else size // plan.ring if plan.ulysses > 1 else 1
        block, head = divmod(place, degree)
        return cls(
            ulysses=tuple(range(block * degree, (block + 1) * degree)),
            ring=tuple(range(head, size, degree)),
            index=(head, block),
        )


@dataclass(frozen=True)
class StagePlace:
    """One rank's place in a team that divides the network in depth, axes outer to inner: stages, ulysses.

    Attributes:
        stage: 0 to num_stages - 1, in the order in which the network runs.
        num_stages: stages of the team.
        group: ranks of this stage, which share its tokens.
        index: this rank's place in the group.
        before, after: ranks at the same place in the stages before and after; None at the ends.
        sources: for every part of the batch, the rank at the same place in the last stage, in the order of the batch.
        takers: ranks that get what this one predicts; none unless it is in the last stage.
    """

    stage: int
    num_stages: int
    group: tuple[int, ...]
    index: int
    before: int | None
    after: int | None
    sources: tuple[int, ...]
    takers: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, layout: CallLayout) -> StagePlace:
        """The place of a rank in a call."""
        size = len(layout.team) // plan.stages
        stage, index = divmod(layout.index, size)
        own = layout.team[layout.index]
        column = layout.team[index::size]
        alike = [r for r, replica in enumerate(layout.replica) if replica == layout.replica[own]]
        alike = [r for r in alike if layout.band[r] % size == index]
        last = stage == plan.stages - 1
        return cls(
            stage=stage,
            num_stages=plan.stages,
            group=layout.team[stage * size : (stage + 1) * size],
            index=index,
            before=column[stage - 1] if stage else None,
            after=None if last else column[stage + 1],
            sources=tuple(r for r in alike if layout.band[r] // size == plan.stages - 1),
            takers=tuple(r for r in alike if r != own) if last else (),
        )

    @property
    def last(self) -> bool:
        """Whether this rank is in the stage that predicts."""
        return self.after is None


@dataclass(frozen=True)
class RankGrid:
    """The ranks as a grid, axes outer to inner: batch (pictures and guidance branches), then what divides a picture.

    The latter is patch, ring and ulysses, stages, components, or shares of the weights.
    """

    plan: Plan
    rank: int

    def layout(self, num_rows: int) -> CallLayout:
        """Divide a call of `num_rows` batch rows over the ranks.

        The batch holds the guidance branches one after the other, each with all pictures. A call with fewer rows than
        the plan has parts (one picture without guidance) is cut into fewer, and the ranks left over take bands instead;
        where every rank of a team has weights of its own, teams left over evaluate what others do.
        """
        parts = max(n for n in range(1, min(self.plan.batch, num_rows) + 1) if self.plan.batch % n == 0)
        size = self.plan.team if self.plan.owns_weights else self.plan.num_ranks // parts
        rows = split_evenly(num_rows, parts)
        replicas = self.plan.num_ranks // (parts * size)
        ranks = range(self.plan.num_ranks)
        first = self.rank - self.rank % size
        return CallLayout(
            batch=tuple(rows[r // size // replicas] for r in ranks),
            band=tuple(r % size for r in ranks),
            replica=tuple(r // size % replicas for r in ranks),
            team=tuple(range(first, first + size)),
            index=self.rank - first,
        )

    def num_bands(self, num_rows: int) -> int:
        """Bands per branch in a call of `num_rows` batch rows."""
        return 1 if self.plan.owns_weights else len(self.layout(num_rows).team)
