"""Reading: progress, lists, children, results, incidents."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.aftermath import CrashGroup, HeaderResult
from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, FirstFailure, Progress
from celery_batchtrack.vocabulary.states import BATCH_ALIVE, OPEN, Kind, Status

from .callbacks import is_callback
from .clock import age, later, now
from .engine import Connected
from .rows import BATCH_COLUMNS, CHILD_COLUMNS, batch_row, child_row
from .schema import batch, child, incident, tally

_COUNTS = tuple(
    prefix + name for prefix in ("", "items_") for name in ("total", "completed", "failed", "crashed", "cancelled")
)
_OF_PROGRESS = (
    "id", "name", "status", "round", "created_at", "started_at", "finished_at", "paused_at", "pause_reason",
)  # fmt: skip
_PAGE = 1000
#: Outcomes of incidents that ended their child.
_ENDS = tuple(each.value for each in (Status.FAILED, Status.CRASHED, Status.CANCELLED))


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

    def resolve(self, prefix: str) -> uuid.UUID:
        """The batch whose id is, or starts with, `prefix` (hyphens may be left out). Raises BatchNotFound."""
        digits = prefix.lower().replace("-", "")
        if not 0 < len(digits) <= 32 or set(digits) - set("0123456789abcdef"):
            return self._not_found(prefix)
        parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
        start = "-".join(part for part in parts if part)
        text = sa.cast(batch.c.id, sa.String(36)) if not self.sqlite else sa.type_coerce(batch.c.id, sa.String)
        with self.read() as connection:
            found = list(
                connection.execute(
                    sa.select(batch.c.id).where(text.startswith(start, autoescape=True)).limit(2)
                ).scalars()
            )
        if len(found) > 1:
            raise errors.BatchNotFound(f"several batches' ids start with {prefix!r}: give more of it")
        return found[0] if found else self._not_found(prefix)

    def _not_found(self, prefix: str) -> uuid.UUID:
        raise errors.BatchNotFound(f"no batch {prefix!r} in {self.shown_url}")

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
            .where(
                child.c.batch_id == batch.c.id, child.c.status == Status.RUNNING.value,
                child.c.kind == Kind.CHILD.value,
            )
            .scalar_subquery()
        )  # fmt: skip
        tree = _tree(ids)
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

    def list_batches(
        self, *, statuses: Sequence[str] = (), name: str | None = None, tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None, parent: uuid.UUID | None = None, limit: int | None = 50,
    ) -> list[uuid.UUID]:  # fmt: skip
        """Ids of batches, newest first; of those that have all these tags, and these values in their metadata."""
        query = sa.select(batch.c.id).order_by(batch.c.created_at.desc(), batch.c.id.desc()).limit(limit)
        if statuses:
            query = query.where(batch.c.status.in_(list(statuses)))
        if name is not None:
            query = query.where(batch.c.name == name)
        if parent is not None:
            query = query.where(batch.c.parent_batch.is_not(None), batch.c.parent_batch == parent)
        for tag in tags:
            query = query.where(self._has_tag(tag))
        for key, value in (metadata or {}).items():
            query = query.where(self._has_value(key, value))
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def unsettled(self, limit: int = 1000) -> list[uuid.UUID]:
        """Batches that have not ended, or of which a callback is still open; oldest first."""
        open_callback = sa.exists().where(
            child.c.batch_id == batch.c.id, is_callback(child), child.c.round == batch.c.round,
            child.c.status.in_([each.value for each in OPEN]),
        )  # fmt: skip
        alive = batch.c.status.in_([each.value for each in BATCH_ALIVE])
        query = sa.select(batch.c.id).where(sa.or_(alive, open_callback)).order_by(batch.c.created_at).limit(limit)
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def _has_tag(self, tag: str) -> sa.ColumnElement[bool]:
        if self.sqlite:
            each = sa.func.json_each(batch.c.tags).table_valued("value")
            return sa.exists(sa.select(each.c.value).where(each.c.value == tag))
        return sa.type_coerce(batch.c.tags, JSONB).contains([tag])

    def _has_value(self, key: str, value: Any) -> sa.ColumnElement[bool]:
        if self.sqlite:
            each = sa.func.json_each(batch.c["metadata"]).table_valued("key", "value")
            told = sa.func.json_quote(each.c.value) == sa.func.json_quote(value)
            return sa.exists(sa.select(each.c.key).where(each.c.key == key, told))
        return sa.type_coerce(batch.c["metadata"], JSONB).contains({key: value})

    def by_result_id(self, result_id: str) -> ChildRow | None:
        """The callback or chain whose outcome is asked for by this id: that of its newest round."""
        query = (
            sa.select(*CHILD_COLUMNS)
            .where(child.c.result_id.is_not(None), child.c.result_id == result_id)
            .order_by(child.c.round.desc(), child.c.created_at.desc())
            .limit(1)
        )
        with self.read() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else child_row(found)

    def header_task_id(self, batch_id: uuid.UUID) -> str | None:
        """The id by which the first header position is known."""
        query = sa.select(sa.func.coalesce(child.c.result_id, child.c.task_id)).where(
            child.c.batch_id == batch_id, child.c.position == 0, child.c.kind == Kind.CHILD.value
        )
        with self.read() as connection:
            return connection.execute(query).scalar_one_or_none()

    def batch_by_result_id(self, result_id: str) -> BatchRow | None:
        """The batch whose body's outcome is asked for by this id."""
        query = sa.select(*BATCH_COLUMNS).where(batch.c.result_id.is_not(None), batch.c.result_id == result_id)
        with self.read() as connection:
            found = connection.execute(query.order_by(batch.c.created_at.desc()).limit(1)).one_or_none()
        return None if found is None else batch_row(found)

    def failure(self, row: ChildRow) -> FirstFailure:
        """Why a child did not complete: the last incident of its end."""
        query = (
            sa.select(incident.c.message, incident.c.exception, incident.c.error)
            .where(
                incident.c.batch_id == row.batch_id, incident.c.position == row.position,
                incident.c.outcome.in_(_ENDS),
            )
            .order_by(incident.c.detected_at.desc(), incident.c.id.desc())
            .limit(1)
        )  # fmt: skip
        with self.read() as connection:
            told = connection.execute(query).one_or_none() or (None, None, None)
        return FirstFailure(row.position, row.result_id or row.task_id, row.status, row.cause, *told)

    def children(
        self, batch_id: uuid.UUID, *, statuses: Sequence[str] = (), callbacks: bool = False
    ) -> Iterator[ChildRow]:
        """Children (or callback rows) by position, fetched in pages: memory does not grow with the batch."""
        kind = child.c.kind != Kind.CHILD.value if callbacks else child.c.kind == Kind.CHILD.value
        wanted = [child.c.batch_id == batch_id, kind]
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

    def callback_rows(self, batch_id: uuid.UUID) -> list[ChildRow]:
        return list(self.children(batch_id, callbacks=True))

    def incidents(
        self, batch_id: uuid.UUID | None = None, *, outcomes: Sequence[str] = (), crashes_only: bool = False,
        since: float | None = None, limit: int | None = None, position: int | None = None, stacks: bool = True,
    ) -> list[IncidentRow]:  # fmt: skip
        """Incidents, oldest first. `crashes_only`: deaths, those included after which a child ran again;
        `since`: not older than that many seconds; `position`: of one child of the batch; without `stacks`, those
        and tracebacks (20 kB each) are left out."""
        special: dict[str, Any] = {"task": child.c.task, "task_id": child.c.task_id, "items": child.c["items"]}
        if not stacks:
            special.update(stack=sa.null().label("stack"), traceback=sa.null().label("traceback"))
        columns = [special[name] if name in special else incident.c[name] for name in IncidentRow.__slots__]
        query = sa.select(*columns).join(
            child, sa.and_(child.c.batch_id == incident.c.batch_id, child.c.position == incident.c.position)
        )
        if batch_id is not None:
            query = query.where(incident.c.batch_id == batch_id)
        if position is not None:
            query = query.where(incident.c.position == position)
        if outcomes:
            query = query.where(incident.c.outcome.in_(list(outcomes)))
        if crashes_only:
            query = query.where(_is_death())
        if since is not None:
            query = query.where(incident.c.detected_at >= later(-since))
        query = query.order_by(incident.c.detected_at.desc() if limit else incident.c.detected_at, incident.c.id)
        with self.read() as connection:
            rows = [_incident_row(row) for row in connection.execute(query.limit(limit) if limit else query)]
        return rows[::-1] if limit else rows

    def first_failure(self, batch_id: uuid.UUID) -> FirstFailure | None:
        """The first child that failed or crashed, for an errback's text and for who waits."""
        query = (
            sa.select(
                child.c.position, sa.func.coalesce(child.c.result_id, child.c.task_id), child.c.status, child.c.cause,
                incident.c.message, incident.c.exception, incident.c.error,
            )
            .join(incident, sa.and_(incident.c.batch_id == child.c.batch_id, incident.c.position == child.c.position))
            .where(
                child.c.batch_id == batch_id, child.c.kind == Kind.CHILD.value,
                child.c.status.in_([Status.FAILED.value, Status.CRASHED.value, Status.CANCELLED.value]),
                incident.c.outcome.not_in(["retried", "redispatched"]),
            )
            .order_by(child.c.finished_at, child.c.position, incident.c.detected_at.desc())
            .limit(1)
        )  # fmt: skip
        with self.read() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else FirstFailure(*found)

    def crash_groups(
        self, by: str, batch_id: uuid.UUID | None = None, *, since: float | None = None, limit: int = 1000
    ) -> list[CrashGroup]:
        """Deaths grouped by ``fingerprint``, ``item``, ``signal`` or ``host``, most deaths first. Of an item, each
        task's deaths are a group of their own. What may differ within a group is that of its newest death."""
        each = _deaths_by(by, batch_id, since).subquery()

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


def _tree(ids: Sequence[uuid.UUID]) -> sa.CTE:
    """(root, id): each batch, and those nested in it at any depth."""
    tree = sa.select(batch.c.id.label("root"), batch.c.id).where(batch.c.id.in_(ids)).cte("tree", recursive=True)
    inner = batch.alias("inner_batch")
    return tree.union(
        sa.select(tree.c.root, inner.c.id).where(inner.c.parent_batch.is_not(None), inner.c.parent_batch == tree.c.id)
    )


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


def _is_death() -> sa.ColumnElement[bool]:
    """Somebody noticed it (a failure reports itself), and it was not overturned."""
    return sa.and_(incident.c.detected_by.is_not(None), incident.c.overturned_at.is_(None))


def _deaths_by(by: str, batch_id: uuid.UUID | None, since: float | None) -> sa.Select[Any]:
    """Deaths with the `key` of their group, and the how-many-eth newest of it they are (`nth`)."""
    key: Any = {
        "fingerprint": incident.c.fingerprint, "item": incident.c.item, "host": incident.c.hostname,
        "signal": sa.func.coalesce(incident.c.signal, incident.c.cause),
    }[by]  # fmt: skip
    apart: tuple[Any, ...] = (child.c.task,) if by in ("item", "fingerprint") else ()
    newest_first = (incident.c.detected_at.desc(), incident.c.id.desc())
    told = ("batch_id", "detected_at", "cause", "signal", "python_frame", "item")
    query = (
        sa.select(
            key.label("key"), child.c.task, *(incident.c[name] for name in told),
            (apart[0] if apart else sa.null()).label("apart"),
            sa.func.row_number().over(partition_by=(key, *apart), order_by=newest_first).label("nth"),
        )
        .join(child, sa.and_(child.c.batch_id == incident.c.batch_id, child.c.position == incident.c.position))
        .where(_is_death(), key.is_not(None))
    )  # fmt: skip
    if batch_id is not None:
        query = query.where(incident.c.batch_id == batch_id)
    if since is not None:
        query = query.where(incident.c.detected_at >= later(-since))
    return query


def _incident_row(row: Any) -> IncidentRow:
    values = dict(zip(IncidentRow.__slots__, row, strict=True))
    values["items"] = values["items"] or []
    return IncidentRow(**values)
