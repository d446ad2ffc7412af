"""Retention: ended batches go, in chunks, once their callbacks are done."""

from __future__ import annotations

import uuid

import sqlalchemy as sa

from celery_batchtrack.vocabulary.states import OPEN, BatchStatus, Status

from .callbacks import is_callback
from .clock import later
from .engine import Connected
from .schema import batch, child, quarantine, worker
from .trees import tree_of

_CHUNK = 100


class Pruning(Connected):
    """Deletes what is over. Children, tallies, incidents and nested batches go with their batch (ON DELETE CASCADE)."""

    def prune(self, *, completed: float, other: float) -> int:
        """Delete batches that ended more than so many seconds ago; returns how many."""
        return self._prune(BatchStatus.COMPLETED, completed) + self._prune(None, other)

    def _prune(self, status: BatchStatus | None, seconds: float) -> int:
        completed = batch.c.status == BatchStatus.COMPLETED.value
        old = sa.and_(
            completed if status else ~completed, batch.c.finished_at < later(-seconds), batch.c.parent_batch.is_(None)
        )
        deleted, kept = 0, 0
        while True:
            oldest = sa.select(batch.c.id).where(old).order_by(batch.c.finished_at, batch.c.id)
            with self.write() as connection:
                found = list(connection.execute(oldest.offset(kept).limit(_CHUNK)).scalars())
                busy = self._busy(connection, found)
                gone = [each for each in found if each not in busy]
                if gone:
                    deleted += connection.execute(sa.delete(batch).where(batch.c.id.in_(gone), old)).rowcount
            kept += len(busy)
            if len(found) < _CHUNK:
                return deleted

    def _busy(self, connection: sa.Connection, ids: list[uuid.UUID]) -> set[uuid.UUID]:
        """Batches with something open: a callback of theirs, or of one nested in them, that runs or may still run."""
        if not ids:
            return set()
        tree = tree_of(ids)
        query = (
            sa.select(tree.c.root)
            .join(batch, batch.c.id == tree.c.id)
            .join(child, child.c.batch_id == tree.c.id)
            .where(
                is_callback(child), child.c.status.in_([each.value for each in OPEN]),
                sa.or_(child.c.round == batch.c.round, child.c.status == Status.RUNNING.value),
            )
            .distinct()
        )  # fmt: skip
        return set(connection.execute(query).scalars())

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
