"""Rounds of a batch: children that did not complete run again, more are added to it, callbacks are called anew."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, NewChild, Retried
from celery_batchtrack.vocabulary.states import (
    BATCH_ALIVE,
    BATCH_ENDED,
    CANCEL,
    NOT_COMPLETED,
    REOPEN,
    RETRY,
    RETRY_BATCH,
    BatchStatus,
    Cause,
    Kind,
    Status,
)

from .batches import BatchWrites
from .callbacks import is_callback
from .clock import fresh_id, now
from .rows import CHILD_COLUMNS, child_row
from .schema import batch, child
from .transitions import MOVED, change, change_batch, lock_in_order, move

#: Changes the stored signature (JSON) of a child that is retried.
Rewrite = Callable[[str], str]


class Rounds(BatchWrites):
    """Guarded writes that take an ended batch back. Locks: a batch, its children by position, then so its nested ones;
    tallies last of each."""

    def retry(
        self, batch_id: uuid.UUID, statuses: Sequence[Status], *, queue: str | None = None,
        rewrite: Rewrite | None = None,
    ) -> Retried | BatchRow | None:  # fmt: skip
        """``ended → running`` in the next round, and the children that ended so back to pending.

        None: there is no such batch. The row as it is: it has not ended, was never sealed, or has no such child.
        """
        with self.write() as connection:
            row = self._locked(connection, batch_id, *BatchStatus)
            if row is None:
                return None
            if not row.ended or row.sealed_at is None:
                return row
            retried = self._retry_children(connection, row, statuses, queue, rewrite)
            return row if retried is None else retried

    def _retry_children(
        self, connection: sa.Connection, row: BatchRow, statuses: Sequence[Status], queue: str | None,
        rewrite: Rewrite | None,
    ) -> Retried | None:  # fmt: skip
        header = sa.and_(
            child.c.batch_id == row.id, child.c.kind == Kind.CHILD.value, child.c.signature.is_not(None)
        )
        found = self._found(connection, header, statuses)
        if not found:
            return None
        connection.execute(
            change_batch(RETRY_BATCH, BatchStatus.RUNNING, batch.c.id == row.id, **_next_round(row))
        )
        self._drop_callbacks(connection, row)
        batches = [row.id]
        for each in found:
            self._take_along(connection, each, queue, rewrite, batches)
        if rewrite is not None:
            self._rewrite(connection, found, rewrite)
        self._to_pending(connection, row.id, statuses, queue)
        return Retried(row.id, row.round + 1, len(found), tuple(batches))

    def _take_along(
        self, connection: sa.Connection, waiting: ChildRow, queue: str | None, rewrite: Rewrite | None,
        batches: list[uuid.UUID],
    ) -> None:  # fmt: skip
        """Of a row that waited for a nested batch: that one goes on with what did not complete in it, in the same
        transaction, since its old end must not be taken for the new one. Where it is gone, another takes its place."""
        if waiting.waits_on_batch is None:
            return
        row = self._locked(connection, waiting.waits_on_batch, *BatchStatus)
        if row is None:
            self._start_anew(connection, waiting)
            return
        batches.append(row.id)
        if not row.ended or row.sealed_at is None:
            return  # it was not reached by what ended who waited for it; or nobody knows all that belongs to it
        retried = self._retry_children(connection, row, NOT_COMPLETED, queue, rewrite)
        if retried is not None:
            batches += retried.batches[1:]
        elif row.status == BatchStatus.CANCELLED:  # at the last moment: it has only to end anew
            connection.execute(
                change_batch(RETRY_BATCH, BatchStatus.RUNNING, batch.c.id == row.id, **_next_round(row))
            )
            self._drop_callbacks(connection, row)
        else:  # its children completed: perhaps its body did not, or all of it did, and nobody has joined it
            self._retry_body(connection, row, queue, rewrite, batches)

    def _retry_body(
        self, connection: sa.Connection, row: BatchRow, queue: str | None, rewrite: Rewrite | None,
        batches: list[uuid.UUID],
    ) -> None:  # fmt: skip
        body = sa.and_(
            child.c.batch_id == row.id, child.c.kind == Kind.ON_SUCCESS.value, child.c.round == row.round,
            child.c.signature.is_not(None),
        )  # fmt: skip
        for each in self._found(connection, body, NOT_COMPLETED):
            self._take_along(connection, each, queue, rewrite, batches)
        connection.execute(change(RETRY, body, **_afresh()))

    def _found(
        self, connection: sa.Connection, wanted: sa.ColumnElement[bool], statuses: Sequence[Status]
    ) -> list[ChildRow]:
        """The rows that ended so, locked, by position."""
        ended = sa.and_(wanted, child.c.status.in_([each.value for each in statuses]))
        lock_in_order(connection, ended)
        query = sa.select(*CHILD_COLUMNS).where(ended).order_by(child.c.position)
        return [child_row(each) for each in connection.execute(query)]

    def _start_anew(self, connection: sa.Connection, waiting: ChildRow) -> None:
        connection.execute(
            sa.update(child)
            .where(child.c.batch_id == waiting.batch_id, child.c.position == waiting.position)
            .values(waits_on_batch=None)
        )

    def _rewrite(self, connection: sa.Connection, found: Sequence[Any], rewrite: Rewrite) -> None:
        statement = sa.update(child).where(
            child.c.batch_id == sa.bindparam("the_batch"), child.c.position == sa.bindparam("the_position")
        )
        connection.execute(
            statement.values(signature=sa.bindparam("the_signature")),
            [
                {"the_batch": each.batch_id, "the_position": each.position, "the_signature": rewrite(each.signature)}
                for each in found
            ],
        )

    def _to_pending(
        self, connection: sa.Connection, batch_id: uuid.UUID, statuses: Sequence[Status], queue: str | None
    ) -> None:
        """Status by status, since the tally must know where each came from."""
        values = _afresh()
        if queue is not None:
            values.update(queue=queue, rerouted=True)
        for status in statuses:
            rows = connection.execute(
                change(
                    RETRY, child.c.batch_id == batch_id, child.c.kind == Kind.CHILD.value,
                    child.c.status == status.value, child.c.signature.is_not(None), **values,
                ).returning(*MOVED)
            ).all()  # fmt: skip
            move(connection, batch_id, rows, status, Status.PENDING)

    def _drop_callbacks(self, connection: sa.Connection, row: BatchRow) -> None:
        """Callbacks of the old round that have not started never will."""
        waiting = sa.and_(
            child.c.batch_id == row.id, child.c.kind != Kind.CHILD.value, child.c.round == row.round,
            child.c.status == Status.PENDING.value,
        )  # fmt: skip
        lock_in_order(connection, waiting)
        connection.execute(change(CANCEL, waiting, cause=Cause.CANCELLED.value))

    def drop_stale_callbacks(self) -> int:
        """Callbacks of former rounds that ran when their batch went on, and gave their row back since: they never run
        again. Returns how many."""
        over = sa.exists().where(batch.c.id == child.c.batch_id, batch.c.round > child.c.round)
        stale = sa.and_(is_callback(child), child.c.status == Status.PENDING.value, over)
        with self.read() as connection:
            keys = connection.execute(sa.select(child.c.batch_id, child.c.position).where(stale)).all()
        for batch_id, position in sorted(keys):
            here = sa.and_(child.c.batch_id == batch_id, child.c.position == position)
            with self.write() as connection:
                connection.execute(change(CANCEL, here, stale, cause=Cause.CANCELLED.value))
        return len(keys)

    # -- more children ---------------------------------------------------------------------------

    def reopen(self, key: ChildKey, token: uuid.UUID, opened_by: uuid.UUID) -> bool:
        """``ended → open`` in the next round, by a callback of its present one that still runs."""
        with self.write() as connection:
            row = self._locked(connection, key.batch_id, *BATCH_ENDED)
            if row is None or not self._still_runs(connection, key, token, row.round):
                return False
            if row.parent_batch is not None and not self._is_waited_for(connection, row):
                return False
            connection.execute(
                change_batch(
                    REOPEN, BatchStatus.OPEN, batch.c.id == row.id,
                    **{**_next_round(row), "opened_by": opened_by, "sealed_at": None, "start_now": False},
                )
            )  # fmt: skip
            self._drop_callbacks(connection, row)
            return True

    def _is_waited_for(self, connection: sa.Connection, row: BatchRow) -> bool:
        """Whether the child of its parent that waits for it still does; locked, so that it stays so."""
        query = sa.select(child.c.position).where(
            child.c.batch_id == row.parent_batch, child.c.position == row.parent_position,
            child.c.waits_on_batch == row.id, child.c.status == Status.PENDING.value,
        )  # fmt: skip
        return connection.execute(query.with_for_update()).one_or_none() is not None

    def extend(self, key: ChildKey, token: uuid.UUID, children: Sequence[NewChild]) -> int | None:
        """Add children to a batch of which a child still runs, so that it cannot have ended. Returns the first's
        position; None if that run is no longer the child's, or its batch is over."""
        with self.write() as connection:
            row = self._locked(connection, key.batch_id, *BATCH_ALIVE)
            if row is None or not self._still_runs(connection, key, token, None):
                return None
            self._insert(connection, row.id, row.shards, row.next_position, children)
            return row.next_position

    def _still_runs(self, connection: sa.Connection, key: ChildKey, token: uuid.UUID, round: int | None) -> bool:
        """By its run token; with `round`, as a callback of it. Locked, so that it stays so until the commit."""
        query = sa.select(child.c.position).where(
            child.c.batch_id == key.batch_id, child.c.position == key.position, child.c.run_token == token,
            child.c.status == Status.RUNNING.value,
        )  # fmt: skip
        if round is not None:
            query = query.where(child.c.kind != Kind.CHILD.value, child.c.round == round)
        return connection.execute(query.with_for_update()).one_or_none() is not None

    # -- callbacks -------------------------------------------------------------------------------

    def retry_callbacks(self, batch_id: uuid.UUID, statuses: Sequence[Status]) -> Retried | None:
        """Callbacks of the present round that did not complete, back to pending. None: there is no such batch."""
        with self.write() as connection:
            row = self._locked(connection, batch_id, *BatchStatus)
            if row is None:
                return None
            wanted = sa.and_(
                child.c.batch_id == batch_id, child.c.kind != Kind.CHILD.value, child.c.round == row.round,
                child.c.signature.is_not(None),
            )  # fmt: skip
            batches: list[uuid.UUID] = []
            found = self._found(connection, wanted, statuses)
            for each in found:
                self._take_along(connection, each, None, None, batches)
            ended = child.c.status.in_([each.value for each in statuses])
            connection.execute(change(RETRY, wanted, ended, **_afresh()))
            if found:
                connection.execute(sa.update(batch).where(batch.c.id == row.id).values(round_at=now()))
            return Retried(row.id, row.round, len(found), (row.id, *batches))


def _afresh() -> dict[str, Any]:
    """Of a row that runs again: its attempts stay counted, its budgets are new. Workers remember revoked task ids, so
    it gets another."""
    return {
        "cause": None, "verdict": None, "crashes": 0, "retries": 0, "dispatches": 0, "task_id": fresh_id(),
        "dispatched_at": None, "not_before": None, "expires_at": None, "isolated": False, "policy": None,
    }  # fmt: skip


def _next_round(row: BatchRow) -> dict[str, Any]:
    return {
        "round": row.round + 1, "reason": None, "finished_at": None, "paused_at": None, "pause_reason": None,
        "untold": False, "deadline_at": None, "deaths": 0, "crash_samples": None, "round_at": now(),
    }  # fmt: skip


__all__ = ["Rounds"]
