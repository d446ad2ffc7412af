"""Create, add, seal, finish, cancel: every write to a batch."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.policies import Tolerance, outcome
from celery_batchtrack.vocabulary.records import BatchRow, CancelledRun, Finished, NewBatch, NewChild
from celery_batchtrack.vocabulary.states import (
    CANCEL,
    CANCEL_BATCH,
    FINISH,
    SEAL,
    BatchStatus,
    Cause,
    EndReason,
    Kind,
    Status,
)

from . import callbacks
from .callbacks import DueCallbacks
from .clock import moment, now
from .owners import Owning
from .rows import BATCH_COLUMNS, batch_row
from .schema import DUE, batch, child, open_in, tally, worker
from .transitions import MOVED, change, change_batch, lock_in_order, move

_DUE_KINDS = {
    BatchStatus.COMPLETED: (Kind.ON_PROGRESS, Kind.ON_SUCCESS, Kind.ON_FINISH),
    BatchStatus.PARTIAL: (Kind.ON_PROGRESS, Kind.ON_SUCCESS, Kind.ON_FINISH),
    BatchStatus.FAILED: (Kind.ON_PROGRESS, Kind.ON_FAILURE, Kind.ON_FINISH),
    BatchStatus.CANCELLED: (Kind.ON_FINISH,),
}
#: Columns that `create` makes of other fields than their own.
_MADE = ("deadline_in", "deadline", "owner")


class BatchWrites(Owning):
    """Guarded writes to batches. Locks: batch, then children by position, then tally by shard."""

    def create(self, new: NewBatch, children: Sequence[NewChild] = (), *, seal: bool = False) -> None:
        """Insert a batch, its tally shards and its first children; sealed at once if asked to be."""
        with self.write() as connection:
            self.create_in(connection, new, children, seal=seal)

    def create_in(
        self, connection: sa.Connection, new: NewBatch, children: Sequence[NewChild] = (), *, seal: bool = False
    ) -> None:
        """As `create`, within a transaction that has begun."""
        values = {name: getattr(new, name) for name in NewBatch.__slots__ if name not in _MADE}
        connection.execute(
            sa.insert(batch).values(
                **values, status=BatchStatus.OPEN.value, created_at=now(), next_position=0,
                deadline_at=moment(new.deadline_in, new.deadline),
                watch_failure=f'"{Kind.ON_FIRST_FAILURE.value}"' in new.callbacks,
                watch_progress=f'"{Kind.ON_PROGRESS.value}"' in new.callbacks,
                watch_crashes=new.options.get("crash_rate") is not None,
            )
        )  # fmt: skip
        if new.owner is not None:
            self._own(connection, new.id, new.owner)
        connection.execute(sa.insert(tally), [{"batch_id": new.id, "shard": shard} for shard in range(new.shards)])
        if children:
            self._insert(connection, new.id, new.shards, 0, children)
        if seal:
            self._seal(connection, new.id)

    def add(self, batch_id: uuid.UUID, children: Sequence[NewChild]) -> int | None:
        """Add children to an open batch; returns the first's position, None if it is open no more."""
        with self.write() as connection:
            found = connection.execute(
                sa.select(batch.c.next_position, batch.c.shards)
                .where(batch.c.id == batch_id, batch.c.status == BatchStatus.OPEN.value)
                .with_for_update(key_share=True)
            ).one_or_none()
            if found is None:
                return None
            self._insert(connection, batch_id, found.shards, found.next_position, children)
            return int(found.next_position)

    def _insert(
        self, connection: sa.Connection, batch_id: uuid.UUID, shards: int, first: int, children: Sequence[NewChild]
    ) -> None:
        sums: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for position, each in enumerate(children, first):
            shard = position % shards
            sums[shard][0] += 1
            sums[shard][1] += each.item_count
            sums[shard][2] += each.item_count if each.weight is None else each.weight
            timing = (each.countdown, each.eta, each.expires_in, each.expires_at)
            groups[timing].append(_child_values(batch_id, position, shard, each))
        for (countdown, eta, expires_in, expires_at), rows in groups.items():
            statement = sa.insert(child).values(
                created_at=now(), not_before=moment(countdown, eta), expires_at=moment(expires_in, expires_at)
            )
            connection.execute(statement, rows)
        for shard, (count, items, weight) in sorted(sums.items()):
            connection.execute(
                sa.update(tally)
                .where(tally.c.batch_id == batch_id, tally.c.shard == shard)
                .values(
                    total=tally.c.total + count, items_total=tally.c.items_total + items,
                    weight_total=tally.c.weight_total + weight,
                )
            )  # fmt: skip
        connection.execute(sa.update(batch).where(batch.c.id == batch_id).values(next_position=first + len(children)))

    def seal(self, batch_id: uuid.UUID) -> bool:
        """``open → running``: no more children, and dispatch may start. False if it is open no more."""
        with self.write() as connection:
            return self._seal(connection, batch_id)

    def _seal(self, connection: sa.Connection, batch_id: uuid.UUID) -> bool:
        done = connection.execute(
            change_batch(
                SEAL, BatchStatus.RUNNING, batch.c.id == batch_id, sealed_at=now(), started_at=now(), opened_by=None
            )
        )
        return done.rowcount == 1

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, batch_id: uuid.UUID) -> Finished | None:
        """End the batch if nothing of it is open: outcome and callback rows in one transaction.

        Two statements on purpose: the lock first, and only then the look at the children. A single
        guarded UPDATE would wait for the lock and not look again.
        """
        with self.write() as connection:
            row = self._locked(connection, batch_id, BatchStatus.RUNNING)
            if row is None or self._has_open(connection, batch_id):
                return None
            completed, total, failed, items = self._counts(connection, batch_id)
            status = outcome(Tolerance.parse(row.options.get("tolerance", 0)), completed, total, items)
            kinds = _DUE_KINDS[status]
            if failed:
                kinds = self._with_first_failure(connection, row, kinds)
            return self._end(connection, FINISH, row, status, kinds)

    def _locked(self, connection: sa.Connection, batch_id: uuid.UUID, *statuses: BatchStatus) -> BatchRow | None:
        found = connection.execute(
            sa.select(*BATCH_COLUMNS)
            .where(batch.c.id == batch_id, batch.c.status.in_([each.value for each in statuses]))
            .with_for_update(key_share=True)
        ).one_or_none()
        return None if found is None else batch_row(found)

    def _has_open(self, connection: sa.Connection, batch_id: uuid.UUID) -> bool:
        return connection.execute(
            sa.select(
                sa.exists().where(open_in(batch_id), child.c.kind == Kind.CHILD.value)
            )
        ).scalar_one()  # type: ignore[no-any-return, unused-ignore]

    def _counts(self, connection: sa.Connection, batch_id: uuid.UUID) -> tuple[int, int, int, int]:
        """(completed, total, failed or crashed), in header positions: the parts of a split one count once; and how
        many items are not completed."""
        row = connection.execute(
            sa.select(
                sa.func.sum(tally.c.completed), sa.func.sum(tally.c.total),
                sa.func.sum(tally.c.failed + tally.c.crashed),
                sa.func.sum(tally.c.items_total - tally.c.items_completed),
            ).where(tally.c.batch_id == batch_id)
        ).one()  # fmt: skip
        completed, total, failed, items = (int(each or 0) for each in row)
        bad = child.c.status.in_([Status.FAILED.value, Status.CRASHED.value, Status.CANCELLED.value])
        parts = connection.execute(
            sa.select(
                sa.func.count(sa.case((child.c.status != Status.SPLIT.value, 1))),
                sa.func.count(child.c.origin.distinct()),
                sa.func.count(sa.case((bad, 1))),
                sa.func.count(sa.case((bad, child.c.origin)).distinct()),
            ).where(child.c.batch_id == batch_id, child.c.origin.is_not(None))
        ).one()  # fmt: skip
        positions = total - parts[0] + parts[1]
        incomplete = total - completed - parts[2] + parts[3]
        return positions - incomplete, positions, failed, items

    def _with_first_failure(
        self, connection: sa.Connection, row: BatchRow, kinds: tuple[Kind, ...]
    ) -> tuple[Kind, ...]:
        """A failure known by its lease alone is announced here, when nothing can overturn it any more."""
        there = connection.execute(
            sa.select(sa.func.count()).where(
                child.c.batch_id == row.id, child.c.round == row.round,
                child.c.kind == Kind.ON_FIRST_FAILURE.value,
            )
        ).scalar_one()  # fmt: skip
        return kinds if there else (Kind.ON_FIRST_FAILURE, *kinds)

    def _end(
        self, connection: sa.Connection, transition: Any, row: BatchRow, status: BatchStatus,
        kinds: tuple[Kind, ...], reason: EndReason | None = None,
    ) -> Finished:  # fmt: skip
        # Where the body will never run, whoever waits for it in Celery's result backend is to be told.
        untold = bool(row.options.get("tell")) and status in (BatchStatus.FAILED, BatchStatus.CANCELLED)
        connection.execute(
            change_batch(transition, status, batch.c.id == row.id, reason=reason, opened_by=None, untold=untold)
        )
        due = DueCallbacks(row.id, row.round, row.callbacks, row.next_position)
        inserted = callbacks.insert(connection, due, kinds)
        return Finished(row.id, row.name, status, reason, inserted, parent_batch=row.parent_batch, untold=untold)

    def cancel(
        self, batch_id: uuid.UUID, reason: EndReason = EndReason.USER, *, terminate: bool = True
    ) -> Finished | None:
        """End the batch now. Pending children never start; what runs loses its row.

        `terminate` is remembered: without it no worker ends the processes of the running ones.

        Returns None if it had ended already. The running children's processes are named in the answer.
        """
        with self.write() as connection:
            row = self._locked(connection, batch_id, BatchStatus.OPEN, BatchStatus.RUNNING)
            if row is None:
                return None
            if not terminate:
                options = {**row.options, "terminate": False}
                connection.execute(sa.update(batch).where(batch.c.id == batch_id).values(options=options))
            ended = self._end(
                connection, CANCEL_BATCH, row, BatchStatus.CANCELLED, _DUE_KINDS[BatchStatus.CANCELLED], reason
            )
            runs = self._cancel_children(connection, batch_id)
            return replace(ended, cancelled_runs=tuple(runs))

    def _cancel_children(self, connection: sa.Connection, batch_id: uuid.UUID) -> list[CancelledRun]:
        """One UPDATE over pending and running: two would lose the child whose claim is in flight.

        The locks come first, by position, so that it never waits crosswise with another writer of several.
        """
        children = sa.and_(child.c.batch_id == batch_id, child.c.kind == Kind.CHILD.value)
        lock_in_order(connection, children, child.c.status.in_([Status.PENDING.value, Status.RUNNING.value]))
        rows = connection.execute(
            change(CANCEL, children, cause=Cause.CANCELLED.value).returning(
                *MOVED, child.c.position, child.c.worker_id, child.c.slot, child.c.run_token, child.c.task_id
            )
        ).all()  # fmt: skip
        move(connection, batch_id, rows, None, Status.CANCELLED)
        return [_cancelled_run(batch_id, row) for row in rows if row.worker_id is not None]

    def abandoned(self) -> list[uuid.UUID]:
        """Open batches whose opener is gone."""
        query = (
            sa.select(batch.c.id)
            .join(worker, worker.c.id == batch.c.opened_by)
            .where(
                batch.c.status == BatchStatus.OPEN.value,
                sa.or_(worker.c.lost_at.is_not(None), worker.c.stopped_at.is_not(None)),
            )
        )
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def overdue_batches(self) -> list[uuid.UUID]:
        """Batches whose deadline has passed."""
        query = sa.select(batch.c.id).where(sa.text(f"({DUE})"), batch.c.deadline_at <= now())
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def untold(self) -> list[uuid.UUID]:
        """Batches whose end is still to be told to Celery's result backend."""
        with self.read() as connection:
            return list(connection.execute(sa.select(batch.c.id).where(batch.c.untold)).scalars())

    def told(self, batch_id: uuid.UUID, round: int, *, done: bool = True) -> None:
        """What there was to tell of that round's end was told; or, not `done`, is still to be."""
        here = sa.and_(batch.c.id == batch_id, batch.c.round == round)
        with self.single() as connection:
            connection.execute(sa.update(batch).where(here, batch.c.untold == done).values(untold=not done))

    # -- milestones ------------------------------------------------------------------------------

    def watched_for_progress(self) -> list[uuid.UUID]:
        """Running batches with `on_progress` callbacks."""
        query = sa.select(batch.c.id).where(batch.c.status == BatchStatus.RUNNING.value, batch.c.watch_progress)
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def reach_milestones(self, batch_id: uuid.UUID) -> int:
        """Insert the `on_progress` callbacks that are due, each once. Returns how many."""
        with self.read() as connection:
            if not callbacks.milestones_due(connection, batch_id):
                return 0
        with self.write() as connection:
            row = self._locked(connection, batch_id, BatchStatus.RUNNING)
            if row is None:
                return 0
            reached = callbacks.milestones_due(connection, batch_id)  # again, under the lock
            due = DueCallbacks(row.id, row.round, row.callbacks, row.next_position)
            return callbacks.insert(connection, due, (Kind.ON_PROGRESS,), only=reached) if reached else 0

    def unfinished(self) -> list[uuid.UUID]:
        """Sealed batches that run although nothing of them is open: their finish check was lost."""
        open_child = sa.exists().where(open_in(batch.c.id), child.c.kind == Kind.CHILD.value)
        query = sa.select(batch.c.id).where(batch.c.status == BatchStatus.RUNNING.value, ~open_child)
        with self.read() as connection:
            return list(connection.execute(query).scalars())


def _cancelled_run(batch_id: uuid.UUID, row: Any) -> CancelledRun:
    return CancelledRun(ChildKey(batch_id, row.position), row.worker_id, row.slot, row.run_token, row.task_id)


def _child_values(batch_id: uuid.UUID, position: int, shard: int, new: NewChild) -> dict[str, Any]:
    return {
        "batch_id": batch_id,
        "position": position,
        "kind": Kind.CHILD.value,
        "shard": shard,
        "task": new.task,
        "task_id": new.task_id,
        "status": Status.PENDING.value,
        "signature": new.signature,
        "items": list(new.items) or None,
        "item_count": new.item_count,
        "weight": new.item_count if new.weight is None else new.weight,
        "result_id": new.result_id,
        "queue": new.queue,
    }
