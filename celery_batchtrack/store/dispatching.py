"""Rows that wait to be published: taken, stamped, and given back when publishing failed."""

from __future__ import annotations

import uuid
from collections.abc import Container, Iterable

import sqlalchemy as sa

from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, Outgoing
from celery_batchtrack.vocabulary.states import CALLBACK_KINDS, BatchStatus, Cause, Kind, Status

from .clock import age, later, now
from .engine import Connected
from .incidents import Attempt, record
from .rows import BATCH_COLUMNS, CHILD_COLUMNS, batch_row, child_row
from .schema import batch, child

_CALLBACKS = [each.value for each in CALLBACK_KINDS]


def _publishable() -> sa.ColumnElement[bool]:
    """A children's batch must run (or be open with start="now"); a callback's round must be current."""
    header = sa.and_(
        child.c.kind == Kind.CHILD.value,
        sa.or_(
            batch.c.status == BatchStatus.RUNNING.value,
            sa.and_(batch.c.status == BatchStatus.OPEN.value, batch.c.start_now),
        ),
        batch.c.paused_at.is_(None),
    )
    called = sa.and_(child.c.kind != Kind.CHILD.value, child.c.round == batch.c.round)
    return sa.and_(child.c.status == Status.PENDING.value, child.c.waits_on_batch.is_(None), sa.or_(header, called))


class Dispatching(Connected):
    """Takes rows for publishing. A taken row is stamped first and published after the commit."""

    def undispatched(self) -> list[uuid.UUID]:
        """Batches with rows that were never published for their attempt and may be now."""
        never = sa.and_(
            child.c.status == Status.PENDING.value, child.c.dispatched_at.is_(None), child.c.waits_on_batch.is_(None)
        )
        waiting = sa.exists().where(child.c.kind == Kind.CHILD.value, child.c.batch_id == batch.c.id, never)
        alive = sa.select(batch.c.id).where(
            sa.or_(
                batch.c.status == BatchStatus.RUNNING.value,
                sa.and_(batch.c.status == BatchStatus.OPEN.value, batch.c.start_now),
            ),
            batch.c.paused_at.is_(None),
            waiting,
        )
        called = sa.select(child.c.batch_id).where(child.c.kind.in_(_CALLBACKS), never)
        with self.read() as connection:
            found = {*connection.execute(alive).scalars(), *connection.execute(called).scalars()}
        return sorted(found)

    def take_undispatched(self, batch_id: uuid.UUID | None, limit: int) -> list[Outgoing]:
        """Up to `limit` rows that were never published for their attempt, of one batch or of all."""
        if batch_id is not None:
            return self._take(batch_id, child.c.dispatched_at.is_(None), limit)
        taken: list[Outgoing] = []
        for each in self.undispatched():
            taken += self._take(each, child.c.dispatched_at.is_(None), limit - len(taken))
        return taken

    def overdue_queues(self, after: float) -> list[tuple[str | None, str]]:
        """Where pending rows wait whose last publish is older than `after` seconds: (queue, ""), or (None, task)
        for those that go where their task is routed."""
        task = sa.case((child.c.queue.is_(None), child.c.task), else_="").label("task")
        query = sa.select(child.c.queue, task).where(
            child.c.status == Status.PENDING.value, child.c.dispatched_at <= later(-after),
            child.c.waits_on_batch.is_(None),
        )  # fmt: skip
        with self.read() as connection:
            return [(row[0], row[1]) for row in connection.execute(query.distinct())]

    def overdue(
        self, where: tuple[str | None, str], after: float, limit: int = 5000
    ) -> list[tuple[float, int, ChildKey]]:
        """Pending rows of one queue whose last publish is older than `after` seconds:
        (seconds since the publish, publishes so far, key), oldest first."""
        queue, task = where
        here = child.c.queue == queue if queue is not None else sa.and_(child.c.queue.is_(None), child.c.task == task)
        waited = age(child.c.dispatched_at)
        query = (
            sa.select(waited, child.c.dispatches, child.c.batch_id, child.c.position)
            .join(batch, batch.c.id == child.c.batch_id)
            .where(
                here, _publishable(), child.c.dispatched_at <= later(-after),
                sa.or_(child.c.not_before.is_(None), child.c.not_before <= later(-after)),
            )
            .order_by(child.c.dispatched_at)
            .limit(limit)
        )  # fmt: skip
        with self.read() as connection:
            return [(float(row[0]), row[1], ChildKey(row[2], row[3])) for row in connection.execute(query)]

    def expired(self, limit: int = 1000) -> list[ChildRow]:
        """Pending rows whose time to start is over."""
        query = (
            sa.select(*CHILD_COLUMNS)
            .where(
                child.c.status == Status.PENDING.value, child.c.expires_at <= now(), child.c.waits_on_batch.is_(None)
            )
            .limit(limit)
        )
        with self.read() as connection:
            return [child_row(row) for row in connection.execute(query)]

    def take_again(self, keys: Iterable[ChildKey], after: float, lost: Container[ChildKey] = ()) -> list[Outgoing]:
        """Take these rows for another publish, if nobody else has published them meanwhile. Of those in `lost` the
        message is gone, as far as can be told: that is an incident."""
        taken: list[Outgoing] = []
        for batch_id, positions in _by_batch(keys).items():
            wanted = sa.and_(child.c.position.in_(positions), child.c.dispatched_at <= later(-after))
            taken += self._take(batch_id, wanted, len(positions), lost)
        return taken

    def _take(
        self, batch_id: uuid.UUID, wanted: sa.ColumnElement[bool], limit: int, lost: Container[ChildKey] = ()
    ) -> list[Outgoing]:
        """Stamp rows of one batch: callbacks of its round first, then children, if it lets them run.

        The batch is read first and not joined: joined, every chunk would sort all that is left.
        """
        with self.write() as connection:
            found = connection.execute(sa.select(*BATCH_COLUMNS).where(batch.c.id == batch_id)).one_or_none()
            if found is None or limit <= 0:
                return []
            owner = batch_row(found)
            called = sa.and_(child.c.kind.in_(_CALLBACKS), child.c.round == owner.round)
            rows = _stamp(connection, batch_id, sa.and_(wanted, called), limit)
            if _lets_children_run(owner) and len(rows) < limit:
                header = sa.and_(wanted, child.c.kind == Kind.CHILD.value)
                rows += _stamp(connection, batch_id, header, limit - len(rows))
            for row in rows:
                if row.key in lost:
                    record(connection, Attempt.of(row), "redispatched", _lost(row))
        return [Outgoing(row, owner) for row in rows]

    def postpone(self, key: ChildKey, attempt: int, delay: float) -> bool:
        """A message was given up before its task began: its row is sent again in `delay` seconds."""
        statement = (
            sa.update(child)
            .where(
                child.c.batch_id == key.batch_id, child.c.position == key.position,
                child.c.status == Status.PENDING.value, child.c.attempt == attempt,
            )
            .values(dispatched_at=None, not_before=later(delay))
        )  # fmt: skip
        with self.single() as connection:
            return connection.execute(statement).rowcount == 1

    def give_back(self, rows: Iterable[ChildRow]) -> None:
        """Publishing failed after the stamp: due again at the next look, with as many dispatches as the row says."""
        with self.write() as connection:
            for row in sorted(rows, key=lambda each: each.key):  # as every writer of several locks them
                connection.execute(
                    sa.update(child)
                    .where(
                        child.c.batch_id == row.batch_id, child.c.position == row.position,
                        child.c.status == Status.PENDING.value, child.c.attempt == row.attempt,
                    )
                    .values(dispatched_at=None, dispatches=row.dispatches)
                )  # fmt: skip


def _lost(row: ChildRow) -> Evidence:
    return Evidence(
        Cause.LOST_MESSAGE, phase="before_claim",
        message=f"nobody claimed it and its queue is empty: published for the {row.dispatches}. time",
    )  # fmt: skip


def _lets_children_run(row: BatchRow) -> bool:
    alive = row.status == BatchStatus.RUNNING or (row.status == BatchStatus.OPEN and row.start_now)
    return alive and row.paused_at is None


def _stamp(
    connection: sa.Connection, batch_id: uuid.UUID, wanted: sa.ColumnElement[bool], limit: int
) -> list[ChildRow]:
    # MATERIALIZED: inlined, LIMIT with SKIP LOCKED may be evaluated again for every row.
    due = (
        sa.select(child.c.position)
        .where(
            child.c.batch_id == batch_id, child.c.status == Status.PENDING.value,
            child.c.waits_on_batch.is_(None), wanted,
        )
        .order_by(child.c.position)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )  # fmt: skip
    statement = (
        sa.update(child)
        .where(child.c.batch_id == batch_id, child.c.position == due.c.position)
        .values(dispatched_at=now(), dispatches=child.c.dispatches + 1)
        .returning(*CHILD_COLUMNS)
    )
    return sorted((child_row(row) for row in connection.execute(statement)), key=lambda row: row.position)


def _by_batch(keys: Iterable[ChildKey]) -> dict[uuid.UUID, list[int]]:
    grouped: dict[uuid.UUID, list[int]] = {}
    for key in keys:
        grouped.setdefault(key.batch_id, []).append(key.position)
    return grouped
