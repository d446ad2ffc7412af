"""Retention: ended batches go, in chunks, once their callbacks are done."""

from __future__ import annotations

import sqlalchemy as sa

from celery_batchtrack.vocabulary.states import OPEN, BatchStatus, Kind

from .clock import later
from .engine import Connected
from .schema import batch, child, quarantine, worker

_CHUNK = 100


class Pruning(Connected):
    """Deletes what is over. Children, tallies, incidents and nested batches go with their batch (ON DELETE CASCADE)."""

    def prune(self, *, completed: float, other: float) -> int:
        """Delete batches that ended more than so many seconds ago; returns how many."""
        return self._prune(BatchStatus.COMPLETED, completed) + self._prune(None, other)

    def _prune(self, status: BatchStatus | None, seconds: float) -> int:
        open_callback = sa.exists().where(
            child.c.batch_id == batch.c.id, child.c.kind != Kind.CHILD.value,
            child.c.status.in_([each.value for each in OPEN]),
        )  # fmt: skip
        which = (
            batch.c.status == BatchStatus.COMPLETED.value if status else batch.c.status != BatchStatus.COMPLETED.value
        )
        old = (
            sa.select(batch.c.id)
            .where(which, batch.c.finished_at < later(-seconds), batch.c.parent_batch.is_(None), ~open_callback)
            .order_by(batch.c.finished_at)
            .limit(_CHUNK)
        )
        deleted = 0
        while True:
            with self.write() as connection:
                gone = connection.execute(sa.delete(batch).where(batch.c.id.in_(old))).rowcount
            deleted += gone
            if gone < _CHUNK:
                return deleted

    def prune_quarantine(self, seconds: float) -> int:
        """Forget items that have not killed for that long and are not in quarantine (one that is, stays)."""
        old = sa.and_(quarantine.c.quarantined_at.is_(None), quarantine.c.last_at < later(-seconds))
        with self.single() as connection:
            return connection.execute(sa.delete(quarantine).where(old)).rowcount

    def prune_workers(self, seconds: float) -> int:
        """Delete workers that ended that long ago and are named by no child any more."""
        over = sa.func.coalesce(worker.c.stopped_at, worker.c.lost_at) < later(-seconds)
        named = sa.exists().where(child.c.worker_id == worker.c.id, child.c.status == "running")
        opener = sa.exists().where(batch.c.opened_by == worker.c.id)  # until a sweep has cancelled what it left open
        with self.write() as connection:
            return connection.execute(sa.delete(worker).where(over, ~named, ~opener)).rowcount
