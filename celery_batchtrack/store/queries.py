"""Reading: progress, lists, children, results, incidents."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.aftermath import CrashGroup, HeaderResult
from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, Progress
from celery_batchtrack.vocabulary.states import Kind, Status

from .callbacks import is_callback
from .clock import age, later, now
from .engine import Connected
from .incidents import is_death
from .rows import BATCH_COLUMNS, CHILD_COLUMNS, batch_row, child_row
from .schema import batch, child, incident, open_in, tally
from .trees import tree_of

_COUNTS = tuple(
    prefix + name for prefix in ("", "items_") for name in ("total", "completed", "failed", "crashed", "cancelled")
)
_OF_PROGRESS = (
    "id", "name", "status", "round", "created_at", "started_at", "finished_at", "paused_at", "pause_reason",
)  # fmt: skip
_PAGE = 1000


class Queries(Connected):
    """Everything that only reads."""

    def batch(self, batch_id: uuid.UUID) -> BatchRow | None:
        with self.read() as connection:
            found = connection.execute(sa.select(*BATCH_COLUMNS).where(batch.c.id == batch_id)).one_or_none()
        return None if found is None else batch_row(found)

    def batches(self, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, BatchRow]:
        """The rows of those that are there."""
        with self.read() as connection:
            rows = connection.execute(sa.select(*BATCH_COLUMNS).where(batch.c.id.in_(list(ids)))).all()
        return {row.id: batch_row(row) for row in rows}

    def progress(self, batch_id: uuid.UUID) -> Progress:
        """Counts of one batch. Sums its tally shards: the cost does not grow with the batch."""
        found = self.progress_of([batch_id])
        if not found:
            raise errors.BatchNotFound(f"no batch {batch_id} in {self.shown_url}")
        return found[0]

    def progress_of(self, ids: Sequence[uuid.UUID]) -> list[Progress]:
        """Counts of several batches, in the order of `ids`; one statement, one snapshot."""
        if not ids:
            return []
        running = (
            sa.select(sa.func.count())
            .where(open_in(batch.c.id, Status.RUNNING), child.c.kind == Kind.CHILD.value)
            .scalar_subquery()
        )
        tree = tree_of(ids)
        own = tally.c.batch_id == tree.c.root
        sums = (
            sa.select(
                tree.c.root.label("batch_id"),
                *(sa.func.sum(sa.case((own, tally.c[name]), else_=0)).label(name) for name in _COUNTS),
                sa.func.sum(tally.c.weight_total).label("weight_total"),
                sa.func.sum(tally.c.weight_done).label("weight_done"),
                (sa.func.count(tree.c.id.distinct()) - 1).label("nested"),
            )
            .join(tally, tally.c.batch_id == tree.c.id)
            .group_by(tree.c.root)
            .subquery()
        )  # fmt: skip
        until = sa.func.coalesce(batch.c.finished_at, now())
        query = sa.select(
            *(batch.c[name] for name in _OF_PROGRESS),
            *(sums.c[name] for name in (*_COUNTS, "weight_total", "weight_done", "nested")),
            running.label("running"),
            age(batch.c.started_at, until).label("seconds"),
        ).join(sums, sums.c.batch_id == batch.c.id)
        with self.read() as connection:
            rows = {row.id: row for row in connection.execute(query)}
        return [_progress(rows[each]) for each in ids if each in rows]

    def children(
        self, batch_id: uuid.UUID, *, statuses: Sequence[str] = (), callbacks: bool = False
    ) -> Iterator[ChildRow]:
        """Children (or callback rows) by position, fetched in pages: memory does not grow with the batch."""
        if callbacks:
            yield from self.callback_rows(batch_id, statuses)
            return
        wanted = [child.c.batch_id == batch_id, child.c.kind == Kind.CHILD.value]
        if statuses:
            wanted.append(child.c.status.in_(list(statuses)))
        after = -1
        while True:
            query = (
                sa.select(*CHILD_COLUMNS).where(*wanted, child.c.position > after)
                .order_by(child.c.position).limit(_PAGE)
            )  # fmt: skip
            with self.read() as connection:
                page = [child_row(row) for row in connection.execute(query)]
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].position

    def results(self, batch_id: uuid.UUID) -> Iterator[HeaderResult]:
        """One for each header position that returned something, in order, fetched in pages."""
        after = -1
        while True:
            query = (
                sa.select(child.c.position, child.c.result, child.c.status, child.c.policy)
                .where(
                    child.c.batch_id == batch_id, child.c.kind == Kind.CHILD.value, child.c.origin.is_(None),
                    child.c.status.in_([Status.COMPLETED.value, Status.SPLIT.value]), child.c.position > after,
                )
                .order_by(child.c.position)
                .limit(_PAGE)
            )  # fmt: skip
            with self.read() as connection:
                page = connection.execute(query).all()
                split = [row.position for row in page if row.status == Status.SPLIT.value]
                parts = _completed_parts(connection, batch_id, split)
            for row in page:
                merge = (row.policy or {}).get("merge")
                if row.status != Status.SPLIT.value:
                    yield HeaderResult(row.position, (row.result,), merge=merge)
                elif parts[row.position]:
                    yield HeaderResult(row.position, tuple(parts[row.position]), split=True, merge=merge)
            if len(page) < _PAGE:
                return
            after = page[-1].position

    def callback_rows(self, batch_id: uuid.UUID, statuses: Sequence[str] = ()) -> list[ChildRow]:
        """A batch's callbacks of all rounds, by position."""
        wanted = [child.c.batch_id == batch_id, is_callback(child)]
        if statuses:
            wanted.append(child.c.status.in_(list(statuses)))
        query = sa.select(*CHILD_COLUMNS).where(*wanted)  # unordered: for its order SQLite would read all the batch
        with self.read() as connection:
            return sorted((child_row(row) for row in connection.execute(query)), key=lambda row: row.position)

    def incidents(
        self, batch_id: uuid.UUID | Sequence[uuid.UUID] | None = None, *, outcomes: Sequence[str] = (),
        crashes_only: bool = False, since: float | None = None, limit: int | None = None, position: int | None = None,
        stacks: bool = True, nested: bool = False,
    ) -> list[IncidentRow]:  # fmt: skip
        """Incidents of one batch, of several or of all, oldest first; with `limit`, the newest. `crashes_only`: deaths,
        those included after which a child ran again; `since`: not older than that many seconds; `position`: of one
        child of the batch; `nested`: of several batches, and of those nested in them; without `stacks`, those and
        tracebacks (20 kB each) are left out."""
        special: dict[str, Any] = {"task": child.c.task, "task_id": child.c.task_id, "items": child.c["items"]}
        if not stacks:
            special.update(stack=sa.null().label("stack"), traceback=sa.null().label("traceback"))
        columns = [special[name] if name in special else incident.c[name] for name in IncidentRow.__slots__]
        query = sa.select(*columns).join(
            child, sa.and_(child.c.batch_id == incident.c.batch_id, child.c.position == incident.c.position)
        )
        if isinstance(batch_id, uuid.UUID):
            query = query.where(incident.c.batch_id == batch_id)
        elif batch_id is not None:
            among: Any = sa.select(tree_of(batch_id).c.id) if nested else list(batch_id)
            query = query.where(incident.c.batch_id.in_(among))
        if position is not None:
            query = query.where(incident.c.position == position)
        if outcomes:
            query = query.where(incident.c.outcome.in_(list(outcomes)))
        if crashes_only:
            query = query.where(is_death())
        if since is not None:
            query = query.where(incident.c.detected_at >= later(-since))
        query = query.order_by(incident.c.detected_at.desc() if limit else incident.c.detected_at, incident.c.id)
        with self.read() as connection:
            rows = [_incident_row(row) for row in connection.execute(query.limit(limit) if limit else query)]
        return rows[::-1] if limit else rows

    def crash_groups(
        self, by: str, batch_id: uuid.UUID | None = None, *, since: float | None = None, limit: int = 1000,
        newest: int | None = None, task: str | None = None, signal: str | None = None, host: str | None = None,
    ) -> list[CrashGroup]:  # fmt: skip
        """Deaths grouped by ``fingerprint``, ``item``, ``signal`` or ``host``, most deaths first. Of an item, each
        task's deaths are a group of their own. What may differ within a group is that of its newest death.
        `newest`: only of so many deaths. Only of this task, signal (or cause) and host."""
        first = None if newest is None else self._moment_of_incident(newest)
        each = _deaths_by(by, batch_id, since, first).where(*_narrowed(task, signal, host)).subquery()

        def of_newest(name: str) -> Any:
            return sa.func.max(sa.case((each.c.nth == 1, each.c[name])))

        of_all: dict[str, Any] = {
            "key": each.c.key, "deaths": sa.func.count(), "batches": sa.func.count(each.c.batch_id.distinct()),
            "items": sa.func.count(each.c.item.distinct()), "first_at": sa.func.min(each.c.detected_at),
            "last_at": sa.func.max(each.c.detected_at),
        }  # fmt: skip
        columns = ((of_all[name] if name in of_all else of_newest(name)).label(name) for name in CrashGroup.__slots__)
        query = (
            sa.select(*columns).group_by(each.c.key, each.c.apart)
            .order_by(sa.desc("deaths"), sa.desc("last_at")).limit(limit)
        )  # fmt: skip
        with self.read() as connection:
            return [CrashGroup(*row) for row in connection.execute(query)]

    def _moment_of_incident(self, count: int) -> datetime | None:
        """Of the last of so many newest; None if there are not so many."""
        query = sa.select(incident.c.detected_at).order_by(incident.c.detected_at.desc()).offset(count - 1).limit(1)
        with self.read() as connection:
            found: datetime | None = connection.execute(query).scalar_one_or_none()
            return found

    def parts_of(self, row: ChildRow) -> list[ChildRow]:
        """The rows that took over the items of a split child, by position."""
        origin = row.position if row.origin is None else row.origin
        query = (
            sa.select(*CHILD_COLUMNS)
            .where(child.c.batch_id == row.batch_id, child.c.origin == origin, child.c.split_from == row.position)
            .order_by(child.c.position)
        )
        with self.read() as connection:
            return [child_row(each) for each in connection.execute(query)]

    def split_count(self, batch_id: uuid.UUID) -> int:
        """How many children of a batch were split. Its parts are counted, which have an index, not all its rows."""
        query = sa.select(sa.func.count(child.c.split_from.distinct())).where(
            child.c.batch_id == batch_id, child.c.origin.is_not(None)
        )
        with self.read() as connection:
            return int(connection.execute(query).scalar_one())

    def isolated_queues(self) -> list[str]:
        """Queues in which suspects wait."""
        query = sa.select(child.c.queue).where(
            child.c.isolated, child.c.status == Status.PENDING.value, child.c.queue.is_not(None)
        )
        with self.read() as connection:
            return list(connection.execute(query.distinct()).scalars())

    def current_time(self) -> datetime:
        """The database's clock."""
        with self.read() as connection:
            return connection.execute(sa.select(now())).scalar_one()


def _completed_parts(
    connection: sa.Connection, batch_id: uuid.UUID, origins: Sequence[int]
) -> dict[int, list[str | None]]:
    """Results of the completed parts of split header positions, in the order of their items."""
    found: dict[int, list[str | None]] = {}
    for start in range(0, len(origins), _PAGE):
        some = origins[start : start + _PAGE]
        query = (
            sa.select(child.c.origin, child.c.position, child.c.split_from, child.c.status, child.c.result)
            .where(child.c.batch_id == batch_id, child.c.origin.in_(list(some)))
            .order_by(child.c.position)
        )
        parts: dict[int, list[Any]] = {}
        for row in connection.execute(query):
            parts.setdefault(row.split_from, []).append(row)
        found.update((origin, list(_in_order(origin, parts))) for origin in some)
    return found


def _in_order(root: int, parts: dict[int, list[Any]]) -> Iterator[str | None]:
    """Depth first: the parts of a part stand where it stood."""
    waiting = list(reversed(parts.get(root, ())))
    while waiting:
        row = waiting.pop()
        if row.status == Status.COMPLETED.value:
            yield row.result
        waiting += reversed(parts.get(row.position, ()))


def _progress(row: Any) -> Progress:
    counts = {name: int(getattr(row, name) or 0) for name in _COUNTS}
    settled = counts["completed"] + counts["failed"] + counts["crashed"] + counts["cancelled"]
    # Tallies and rows are read in one statement, but a claim may sit between a settle's two halves
    # only on the other side of a commit: `running` never exceeds what is open.
    running = min(int(row.running), counts["total"] - settled)
    return Progress(
        batch_id=row.id, name=row.name, status=row.status, round=row.round,
        pending=counts["total"] - settled - running, running=running, **counts,
        created_at=row.created_at, started_at=row.started_at, finished_at=row.finished_at,
        seconds=None if row.seconds is None else float(row.seconds),
        paused_at=row.paused_at, pause_reason=row.pause_reason, weight_total=int(row.weight_total or 0),
        weight_done=int(row.weight_done or 0), nested=int(row.nested),
    )  # fmt: skip


def _deaths_by(
    by: str, batch_id: uuid.UUID | None, since: float | None, first: datetime | None
) -> sa.Select[Any]:
    """Deaths with the `key` of their group, and the how-many-eth newest of it they are (`nth`)."""
    key: Any = {
        "fingerprint": incident.c.fingerprint, "item": incident.c.item, "host": incident.c.hostname,
        "signal": sa.func.coalesce(incident.c.signal, incident.c.cause),
    }[by]  # fmt: skip
    apart: tuple[Any, ...] = (child.c.task,) if by in ("item", "fingerprint") else ()
    newest_first = (incident.c.detected_at.desc(), incident.c.id.desc())
    told = ("batch_id", "detected_at", "cause", "signal", "exit_code", "python_frame", "item")
    query = (
        sa.select(
            key.label("key"), child.c.task, *(incident.c[name] for name in told),
            (apart[0] if apart else sa.null()).label("apart"),
            sa.func.row_number().over(partition_by=(key, *apart), order_by=newest_first).label("nth"),
        )
        .join(child, sa.and_(child.c.batch_id == incident.c.batch_id, child.c.position == incident.c.position))
        .where(is_death(), key.is_not(None))
    )  # fmt: skip
    if batch_id is not None:
        query = query.where(incident.c.batch_id == batch_id)
    if since is not None:
        query = query.where(incident.c.detected_at >= later(-since))
    if first is not None:
        query = query.where(incident.c.detected_at >= first)
    return query


def _narrowed(task: str | None, signal: str | None, host: str | None) -> list[sa.ColumnElement[bool]]:
    wanted = (
        (child.c.task, task), (sa.func.coalesce(incident.c.signal, incident.c.cause), signal),
        (incident.c.hostname, host),
    )  # fmt: skip
    return [column == value for column, value in wanted if value is not None]


def _incident_row(row: Any) -> IncidentRow:
    values = dict(zip(IncidentRow.__slots__, row, strict=True))
    values["items"] = values["items"] or []
    return IncidentRow(**values)
