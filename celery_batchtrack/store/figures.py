"""How much there is of everything now: gauges, in a few aggregates that read no child that is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from celery_batchtrack.vocabulary.states import BATCH_ALIVE, SETTLED, BatchStatus, Kind, Status

from .clock import age
from .engine import Connected
from .schema import batch, child, meta, open_in, tally

_ALIVE = [each.value for each in BATCH_ALIVE]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of live batches, unless it says otherwise. Ages are seconds by the database's clock."""

    #: By status; `pending` and `running` are open.
    children: Mapping[str, int]
    paused: int
    #: Of the batch that began first; None: there is none.
    oldest_age: float | None
    #: Since the last sweep; None: there never was one.
    sweep_age: float | None


class Figuring(Connected):
    """Sums over many batches."""

    def figures(self) -> Figures:
        """Sums the tallies of batches that are open or running, and counts what runs."""
        counts = [sa.func.sum(tally.c[name]) for name in ("total", *SETTLED)]
        sums = sa.select(*counts).join(batch, batch.c.id == tally.c.batch_id).where(batch.c.status.in_(_ALIVE))
        running = (
            sa.select(sa.func.count())
            .select_from(batch.join(child, open_in(batch.c.id, Status.RUNNING)))
            .where(batch.c.status.in_(_ALIVE), child.c.kind == Kind.CHILD.value)
        )
        alive = sa.select(
            sa.func.count(batch.c.paused_at), age(sa.func.min(sa.func.coalesce(batch.c.started_at, batch.c.created_at)))
        ).where(batch.c.status.in_(_ALIVE))
        with self.read() as connection:
            runs = connection.execute(running).scalar_one()
            total, *done = (int(each or 0) for each in connection.execute(sums).one())
            paused, oldest = connection.execute(alive).one()
            swept = connection.execute(sa.select(age(meta.c.swept_at))).scalar_one()
        children = {Status.PENDING.value: max(0, total - sum(done) - runs), Status.RUNNING.value: runs}
        children.update((status.value, count) for status, count in zip(SETTLED, done, strict=True))
        return Figures(children, paused, oldest, swept)

    def batch_counts(self) -> dict[str, int]:
        """How many batches there are, by status: those that were not pruned. Reads every batch's status."""
        query = sa.select(batch.c.status, sa.func.count()).group_by(batch.c.status)
        with self.read() as connection:
            found = {row[0]: row[1] for row in connection.execute(query)}
        return {each.value: found.get(each.value, 0) for each in BatchStatus}


__all__ = ["Figures", "Figuring"]
