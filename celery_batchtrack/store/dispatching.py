"""Rows that wait to be published: taken within their batch's limits, stamped, given back when publishing failed."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Container, Iterable

import sqlalchemy as sa

from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.pacing import Contender, turns
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, Outgoing
from celery_batchtrack.vocabulary.states import CALLBACK_KINDS, BatchStatus, Cause, Kind, Status

from . import windows
from .clock import age, later, now
from .engine import Connected
from .incidents import Attempt, record
from .rows import CHILD_COLUMNS, child_row
from .schema import batch, child, undispatched_in
from .transitions import lock_in_order

_CALLBACKS = [each.value for each in CALLBACK_KINDS]
#: Batches that were held back, and have children to send.
_HELD = sa.and_(batch.c.dispatch_at.is_not(None), windows.lets_children_run(), windows.has_unsent())


def _publishable() -> sa.ColumnElement[bool]:
    """A children's batch must run (or be open with start="now"); a callback's round must be current."""
    header = sa.and_(child.c.kind == Kind.CHILD.value, windows.lets_children_run())
    called = sa.and_(child.c.kind != Kind.CHILD.value, child.c.round == batch.c.round)
    return sa.and_(child.c.status == Status.PENDING.value, child.c.waits_on_batch.is_(None), sa.or_(header, called))


class Dispatching(Connected):
    """Takes rows for publishing. A taken row is stamped first and published after the commit."""

    def undispatched(self) -> list[uuid.UUID]:
        """Batches with rows that were never published for their attempt and may be now."""
        never = sa.and_(
            child.c.status == Status.PENDING.value, child.c.dispatched_at.is_(None), child.c.waits_on_batch.is_(None)
        )
        alive = sa.select(batch.c.id).where(windows.lets_children_run(), windows.has_unsent())
        called = sa.select(child.c.batch_id).where(child.c.kind.in_(_CALLBACKS), never)
        with self.read() as connection:
            found = {*connection.execute(alive).scalars(), *connection.execute(called).scalars()}
        return sorted(found)

    def take_undispatched(
        self, batch_id: uuid.UUID | None, limit: int, *, shared: int | None = None, paced: bool = True,
        callbacks: bool = True,
    ) -> list[Outgoing]:  # fmt: skip
        """Up to `limit` rows that were never published for their attempt, of one batch or of all, within the limits
        of each batch.

        Arguments:
            shared: a window that all batches share. The children are then those whose turn it is, of any batch.
            paced: without it no limits count.
            callbacks: whether callbacks of the batch may be due, too.
        """
        if batch_id is None:
            taken: list[Outgoing] = []
            for each in self.undispatched():
                taken += self.take_undispatched(each, limit - len(taken), shared=shared, paced=paced)
            return taken
        if shared is None or not paced:
            return self._take(batch_id, undispatched_in(batch_id), limit, paced=paced, callbacks=callbacks)
        taken = self._take(batch_id, undispatched_in(batch_id), limit, children=False) if callbacks else []
        return taken + self._take_turns(shared, limit - len(taken))

    def _take_turns(self, shared: int, limit: int) -> list[Outgoing]:
        """Children of all batches, each in its turn, as far as the window that they share lets them."""
        taken: list[Outgoing] = []
        with self.write() as connection:
            windows.lock_shared(connection)
            flying = Counter(windows.all_in_flight(connection))
            free = min(limit, shared - flying.total())
            found = windows.contenders(connection) if free > 0 else []
            flying.update(windows.all_waiting(connection))  # they take no place, but their batch had its turns
            rooms = {owner.id: room for owner, room in found}
            owners = {owner.id: owner for owner, _ in found}
            while free > 0 and owners:
                asked = [Contender(each.id, each.priority, flying[each.id], rooms[each.id]) for each in owners.values()]
                given = turns(free, asked)
                if not given:
                    break
                for batch_id in sorted(given):  # as every writer of several locks them
                    rows = self._take_one_turn(connection, batch_id, given[batch_id])
                    if len(rows) < given[batch_id]:
                        del owners[batch_id]  # it has no more: what it leaves is for the others
                    room = rooms[batch_id]
                    rooms[batch_id] = None if room is None else room - len(rows)
                    flying[batch_id] += len(rows)
                    free -= len(rows)
                    taken += rows
        return taken

    def _take_one_turn(self, connection: sa.Connection, batch_id: uuid.UUID, count: int) -> list[Outgoing]:
        owner = windows.owner(connection, batch_id, windows.Lock.IF_LIMITED)
        if owner is None:
            return []
        rows = _take_children(connection, owner, sa.and_(undispatched_in(batch_id), windows.due()), count)
        return [Outgoing(row, owner) for row in rows]

    def held_back(self) -> list[uuid.UUID]:
        """Batches whose children were held back until about now."""
        query = sa.select(batch.c.id).where(_HELD, batch.c.dispatch_at <= now())
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def any_held_back(self) -> bool:
        """Whether any batch's children are held back, now or for a while to come."""
        query = sa.select(sa.exists().where(_HELD))
        with self.read() as connection:
            return bool(connection.execute(query).scalar_one())

    def first_undispatched(self, batch_id: uuid.UUID) -> tuple[str | None, str] | None:
        """Where the first of a batch's children that were never sent is to go: (queue, its task); None: there is
        none."""
        waiting = sa.and_(undispatched_in(batch_id), child.c.kind == Kind.CHILD.value)
        query = sa.select(child.c.queue, child.c.task).where(waiting).order_by(child.c.position).limit(1)
        with self.read() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else (found.queue, found.task)

    def count_undispatched(self, batch_id: uuid.UUID) -> int:
        """Children of a batch that were never sent for their attempt."""
        wanted = sa.and_(undispatched_in(batch_id), child.c.kind == Kind.CHILD.value)
        with self.read() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(child).where(wanted)).scalar_one())

    def hold_back(self, rows: Iterable[ChildRow], delay: float) -> None:
        """Taken for nothing: as if these had not been, and send no children of their batches for so many seconds."""
        with self.write() as connection:
            windows.lock_shared(connection)  # before any batch, as who takes turns
            for batch_id, positions in sorted(_by_batch(row.key for row in rows).items()):
                windows.give_credit(connection, batch_id, len(positions))
                windows.hold(connection, batch_id, delay)
                here = sa.and_(child.c.batch_id == batch_id, child.c.position.in_(positions))
                lock_in_order(connection, here)
                connection.execute(
                    sa.update(child)
                    .where(here, child.c.status == Status.PENDING.value)
                    .values(dispatched_at=None, dispatches=child.c.dispatches - 1)
                )

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
            wanted = sa.and_(
                child.c.batch_id == batch_id, child.c.position.in_(positions), child.c.dispatched_at <= later(-after)
            )
            taken += self._take(batch_id, wanted, len(positions), lost, paced=False)  # they have their places
        return taken

    def _take(
        self, batch_id: uuid.UUID, wanted: sa.ColumnElement[bool], limit: int, lost: Container[ChildKey] = (), *,
        children: bool = True, callbacks: bool = True, paced: bool = True,
    ) -> list[Outgoing]:  # fmt: skip
        """Stamp rows of one batch: callbacks of its round first, then children, if it lets them run.

        The batch is read first and not joined: joined, every chunk would sort all that is left.
        """
        with self.write() as connection:
            lock = windows.Lock.IF_LIMITED if children and paced else windows.Lock.NO
            owner = windows.owner(connection, batch_id, lock if callbacks else windows.Lock.YES)
            if owner is None or limit <= 0:
                return []
            called = sa.and_(wanted, child.c.kind.in_(_CALLBACKS), child.c.round == owner.round)
            rows = _stamp(connection, called, limit) if callbacks else []
            if children and len(rows) < limit:
                take = _take_children if paced else _stamp_children
                rows += take(connection, owner, wanted, limit - len(rows))
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
        rows = sorted(rows, key=lambda each: each.key)  # as every writer of several locks them
        with self.write() as connection:
            for batch_id, unsent in Counter(each.batch_id for each in rows if each.kind == Kind.CHILD).items():
                windows.give_credit(connection, batch_id, unsent)
            for row in rows:
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


def _take_children(
    connection: sa.Connection, owner: BatchRow, wanted: sa.ColumnElement[bool], limit: int
) -> list[ChildRow]:
    """Stamp children within the limits of their batch, whose row is locked if it has any."""
    if not _lets_children_run(owner) or windows.is_held(connection, owner):
        return []
    if owner.max_in_flight is not None:
        limit = min(limit, owner.max_in_flight - windows.in_flight(connection, owner.id))
        wanted = sa.and_(wanted, windows.due())
    allowed = windows.allowance(connection, owner)
    rows = _stamp_children(connection, owner, wanted, limit if allowed is None else min(limit, int(allowed)))
    windows.taken(connection, owner, allowed, len(rows))
    return rows


def _stamp_children(
    connection: sa.Connection, owner: BatchRow, wanted: sa.ColumnElement[bool], limit: int
) -> list[ChildRow]:
    if limit <= 0 or not _lets_children_run(owner):
        return []
    return _stamp(connection, sa.and_(wanted, child.c.kind == Kind.CHILD.value), limit)


def _stamp(connection: sa.Connection, wanted: sa.ColumnElement[bool], limit: int) -> list[ChildRow]:
    # MATERIALIZED: inlined, LIMIT with SKIP LOCKED may be evaluated again for every row.
    due = (
        sa.select(child.c.batch_id, child.c.position)
        .where(child.c.status == Status.PENDING.value, child.c.waits_on_batch.is_(None), wanted)
        .order_by(child.c.position)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    statement = (
        sa.update(child)
        .where(child.c.batch_id == due.c.batch_id, child.c.position == due.c.position)
        .values(dispatched_at=now(), dispatches=child.c.dispatches + 1)
        .returning(*CHILD_COLUMNS)
    )
    return sorted((child_row(row) for row in connection.execute(statement)), key=lambda row: row.position)


def _by_batch(keys: Iterable[ChildKey]) -> dict[uuid.UUID, list[int]]:
    grouped: dict[uuid.UUID, list[int]] = {}
    for key in keys:
        grouped.setdefault(key.batch_id, []).append(key.position)
    return grouped
