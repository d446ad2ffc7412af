"""How much of a window is taken, which batches share it, and what a rate allows. Called under the lock that keeps
others from taking meanwhile."""

from __future__ import annotations

import uuid
from enum import Enum
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.pacing import AHEAD
from celery_batchtrack.vocabulary.records import BatchRow
from celery_batchtrack.vocabulary.states import BatchStatus, Kind, Status

from .clock import age, later, now
from .rows import BATCH_COLUMNS, batch_row
from .schema import batch, child, meta, on_its_way_in, open_in, undispatched_in

#: So many batches at most take turns in one look: the first by priority, then by age.
_CONTENDERS = 200

_IS_CHILD = child.c.kind == Kind.CHILD.value
_RUNNING = sa.and_(child.c.status == Status.RUNNING.value, _IS_CHILD)
_SENT = sa.and_(
    child.c.status == Status.PENDING.value, child.c.dispatched_at.is_not(None), child.c.waits_on_batch.is_(None),
    _IS_CHILD,
)  # fmt: skip


def lets_children_run() -> sa.ColumnElement[bool]:
    """Of a batch: its children may be sent."""
    alive = sa.or_(
        batch.c.status == BatchStatus.RUNNING.value,
        sa.and_(batch.c.status == BatchStatus.OPEN.value, batch.c.start_now),
    )
    return sa.and_(alive, batch.c.paused_at.is_(None))


def has_unsent(*wanted: sa.ColumnElement[bool]) -> sa.Exists:
    """Of a batch: it has children that were never sent for their attempt, and such as are `wanted`."""
    return sa.exists().where(undispatched_in(batch.c.id), _IS_CHILD, child.c.waits_on_batch.is_(None), *wanted)


def due() -> sa.ColumnElement[bool]:
    """Of a child: its time has come, or will soon. Until then it takes no place in a window."""
    return sa.or_(child.c.not_before.is_(None), child.c.not_before <= later(AHEAD))


class Lock(Enum):
    """Whether nobody else may take children of a batch before this transaction is over."""

    NO = 0
    IF_LIMITED = 1
    YES = 2


def owner(connection: sa.Connection, batch_id: uuid.UUID, lock: Lock) -> BatchRow | None:
    """The batch's row, locked first where its limits count: what others took before is seen then."""
    query = sa.select(*BATCH_COLUMNS).where(batch.c.id == batch_id)
    locked = query.with_for_update(key_share=True)
    found = connection.execute(locked if lock is Lock.YES else query).one_or_none()
    if found is not None and lock is Lock.IF_LIMITED and is_limited(batch_row(found)):
        found = connection.execute(locked).one_or_none()
    return None if found is None else batch_row(found)


def is_limited(row: BatchRow) -> bool:
    return row.max_in_flight is not None or row.dispatch_at is not None or row.rate is not None


def lock_shared(connection: sa.Connection) -> None:
    """Nobody else takes children through the shared window before this transaction is over."""
    connection.execute(sa.select(meta.c.id).with_for_update())


def in_flight(connection: sa.Connection, batch_id: uuid.UUID) -> int:
    """Children of a batch that were sent or run, or were sent and became batches that they wait for."""
    return int(connection.execute(sa.select(_in_flight(batch_id))).scalar_one())


def _in_flight(batch_id: Any) -> sa.ColumnElement[int]:
    # A child that was made to wait for a batch, by `parent_batch=`, was never sent.
    was_sent = sa.or_(child.c.dispatched_at.is_not(None), child.c.dispatches > 0)
    sent = _count(on_its_way_in(batch_id), was_sent, _IS_CHILD)
    running = _count(open_in(batch_id, Status.RUNNING), _IS_CHILD)
    return sent + running


def _count(*wanted: Any) -> sa.ScalarSelect[int]:
    return sa.select(sa.func.count()).select_from(child).where(*wanted).scalar_subquery()


def all_in_flight(connection: sa.Connection) -> dict[uuid.UUID, int]:
    """Children that were sent or run, of each batch that has any.

    Those that a paused batch had sent do not count: workers refuse them, and nothing tells when they are gone.
    """
    paused = sa.exists().where(batch.c.id == child.c.batch_id, batch.c.paused_at.is_not(None))
    # Two parts: each is read over the partial index that holds no other rows.
    parts = [sa.select(child.c.batch_id).where(wanted) for wanted in (sa.and_(_SENT, ~paused), _RUNNING)]
    return _by_batch(connection, sa.union_all(*parts))


def all_waiting(connection: sa.Connection) -> dict[uuid.UUID, int]:
    """Children that were sent and became batches that they wait for, of each batch that has any."""
    became = sa.and_(
        child.c.waits_on_batch.is_not(None), child.c.status == Status.PENDING.value, child.c.dispatches > 0, _IS_CHILD
    )
    return _by_batch(connection, sa.select(child.c.batch_id).where(became))


def _by_batch(connection: sa.Connection, rows: Any) -> dict[uuid.UUID, int]:
    found = rows.subquery()
    query = sa.select(found.c.batch_id, sa.func.count()).group_by(found.c.batch_id)
    return {row[0]: row[1] for row in connection.execute(query)}


def contenders(connection: sa.Connection) -> list[tuple[BatchRow, int | None]]:
    """Batches with children to be sent now, and how many their own windows let them send (None: any number), by
    priority and then by age."""
    waiting = has_unsent(due())
    held = sa.and_(batch.c.dispatch_at.is_not(None), batch.c.dispatch_at > now())
    room = sa.case((batch.c.max_in_flight.is_not(None), batch.c.max_in_flight - _in_flight(batch.c.id)))
    query = (
        sa.select(*BATCH_COLUMNS, room)
        .where(
            lets_children_run(), sa.not_(held), waiting,
            sa.or_(batch.c.max_in_flight.is_(None), _in_flight(batch.c.id) < batch.c.max_in_flight),
        )
        .order_by(batch.c.priority.desc(), batch.c.created_at, batch.c.id)
        .limit(_CONTENDERS)
    )  # fmt: skip
    return [(batch_row(row[:-1]), row[-1]) for row in connection.execute(query)]


def is_held(connection: sa.Connection, row: BatchRow) -> bool:
    """Its children are held back for a moment."""
    if row.dispatch_at is None:
        return False
    held = sa.select(batch.c.dispatch_at > now()).where(batch.c.id == row.id)
    return bool(connection.execute(held).scalar_one())


def hold(connection: sa.Connection, batch_id: uuid.UUID, delay: float) -> None:
    """Send none of its children for so many seconds."""
    connection.execute(sa.update(batch).where(batch.c.id == batch_id).values(dispatch_at=later(delay)))


def allowance(connection: sa.Connection, row: BatchRow) -> float | None:
    """How many children the batch's rate lets go now, parts of one included; None: it has no rate."""
    rate = row.rate
    if rate is None:
        return None
    elapsed = connection.execute(sa.select(age(batch.c.paid_until)).where(batch.c.id == row.id)).scalar_one()
    return rate.allowance(elapsed)


def give_credit(connection: sa.Connection, batch_id: uuid.UUID, unsent: int) -> None:
    """So many children that its rate had let go were not sent: they may go again."""
    row = owner(connection, batch_id, Lock.YES)
    if row is None or row.rate is None:
        return
    elapsed = connection.execute(sa.select(age(batch.c.paid_until)).where(batch.c.id == batch_id)).scalar_one()
    paid = later(-((elapsed or 0.0) + unsent / row.rate.per_second))
    connection.execute(sa.update(batch).where(batch.c.id == batch_id).values(paid_until=paid, dispatch_at=None))


def taken(connection: sa.Connection, row: BatchRow, allowed: float | None, sent: int) -> None:
    """So many children were let go; if that was all that the rate allowed, the batch is held until the next one."""
    values: dict[str, Any] = {}
    if row.dispatch_at is not None:
        values["dispatch_at"] = None
    rate = row.rate
    if rate is not None and allowed is not None:
        if sent:
            values["paid_until"] = later(-rate.paid_since(allowed, sent))
        if sent >= int(allowed):
            values["dispatch_at"] = later(rate.wait(allowed, sent))
    if values:
        connection.execute(sa.update(batch).where(batch.c.id == row.id).values(values))
