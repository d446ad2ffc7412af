"""Figures of a batch for plots and tables: throughput, durations, failures by root cause.

A small batch is read exactly. Of a large one the throughput comes from counts by the minute, durations from a sample of
its children; what has to be read is bounded either way.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.durations import nearest_rank
from celery_batchtrack.vocabulary.states import SETTLED, Kind

from .clock import age, first_item, later
from .engine import Connected
from .incidents import is_death, stands
from .outcomes import DIED
from .schema import RAN, SETTLED_CHILD, batch, child, incident, outcome

#: Children that are read one by one; of more, so many are a sample.
EXACT = 5_000
SAMPLE = 1_000
#: Incidents that are grouped at a time.
GROUPED = 10_000


@dataclass(frozen=True, slots=True)
class Bin:
    """What ended in one bin of a plot."""

    index: int  # bins since the batch's start
    status: str
    children: int


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds that settled children ran. `sampled`: from so many of them; None: from all."""

    p50: float | None
    p95: float | None
    p99: float | None
    max: float | None
    count: int
    sampled: int | None


@dataclass(frozen=True, slots=True)
class Signature:
    """Failures and deaths of one root cause. `counts`: newer than so many seconds each, as they were asked for."""

    fingerprint: str
    task: str
    cause: str
    signal: str | None
    exception: str | None
    python_frame: str | None
    message: str | None
    occurrences: int
    crashes: int
    items: int
    batches: int
    hosts: int
    first_at: datetime
    last_at: datetime
    last_incident: uuid.UUID
    last_batch_id: uuid.UUID
    last_position: int
    last_item: str | None
    exit_code: int | None
    counts: tuple[int, ...]


_NEWEST = ("cause", "signal", "exit_code", "exception", "python_frame", "message")


class Charting(Connected):
    """Figures of one batch, and of failures."""

    def throughput(self, batch_id: uuid.UUID, since: datetime, seconds: float, *, by_minute: bool) -> list[Bin]:
        """What ended in bins of so many seconds since that moment; `by_minute`: from the counts, whose bins are
        whole minutes."""
        moment = outcome.c.time if by_minute else child.c.finished_at
        status = outcome.c.status if by_minute else child.c.status
        count = sa.func.sum(outcome.c.children) if by_minute else sa.func.count()
        index = sa.cast(sa.func.floor(age(sa.literal(since, moment.type), moment) / seconds), sa.Integer)
        if by_minute:
            wanted = [outcome.c.batch_id == batch_id, outcome.c.status != DIED]
        else:
            wanted = [
                child.c.batch_id == batch_id, child.c.kind == Kind.CHILD.value,
                child.c.status.in_([each.value for each in SETTLED]),
            ]  # fmt: skip
        query = sa.select(index.label("bin"), status, count.label("n")).where(*wanted).group_by("bin", status)
        with self.read() as connection:
            return [Bin(max(0, row[0]), row[1], int(row[2])) for row in connection.execute(query)]

    def first_end(self, batch_id: uuid.UUID) -> datetime | None:
        """The minute in which the first of a batch's children ended."""
        query = sa.select(sa.func.min(outcome.c.time)).where(outcome.c.batch_id == batch_id)
        with self.read() as connection:
            found: datetime | None = connection.execute(query).scalar_one()
            return found

    def deaths_of(self, batch_id: uuid.UUID, limit: int = 500) -> list[datetime]:
        """When runs of a batch died."""
        query = sa.select(sa.func.coalesce(incident.c.died_at, incident.c.detected_at, type_=incident.c.died_at.type))
        query = query.where(incident.c.batch_id == batch_id, is_death())
        with self.read() as connection:
            return list(connection.execute(query.limit(limit)).scalars())

    def durations(self, batch_id: uuid.UUID, settled: int) -> Durations:
        """Of a batch with about so many settled children."""
        here = sa.and_(child.c.batch_id == batch_id, SETTLED_CHILD)
        with self.read() as connection:
            longest = connection.execute(sa.select(RAN).where(here).order_by(RAN.desc()).limit(1)).scalar_one_or_none()
            positions = None if settled <= EXACT else _spread(connection, batch_id)
            if positions is not None:
                here = sa.and_(here, child.c.position.in_(positions))
            ran = sorted(float(each) for each in connection.execute(sa.select(RAN).where(here)).scalars())
        p50, p95, p99 = (nearest_rank(ran, share) for share in (0.5, 0.95, 0.99))
        return Durations(p50, p95, p99, longest, settled, None if positions is None else len(ran))

    def signatures(
        self, batch_id: uuid.UUID | None = None, *, task: str | None = None, signal: str | None = None,
        host: str | None = None, within: Sequence[float] = (), since: float | None = None, limit: int = 100,
    ) -> list[Signature]:  # fmt: skip
        """Failures by fingerprint and task, newest first; counted `within` so many seconds each. Of a batch, or in all
        not older than `since`; the newest 10,000 incidents, of a batch any 10,000."""
        each = _failures(batch_id, task, signal, host, since).subquery()
        nth = sa.func.row_number().over(
            partition_by=(each.c.fingerprint, each.c.task), order_by=(each.c.detected_at.desc(), each.c.id.desc())
        )
        ranked = sa.select(each, nth.label("nth")).subquery()

        def of_newest(name: str) -> Any:
            told: Any = ranked.c[name]
            if name in ("id", "batch_id"):  # of a UUID there is no max() before PostgreSQL 18
                told = sa.cast(told, sa.String(36))
            return sa.func.max(sa.case((ranked.c.nth == 1, told))).label(f"last_{name}")

        query = (
            sa.select(
                ranked.c.fingerprint, ranked.c.task, sa.func.count().label("occurrences"),
                sa.func.sum(sa.case((ranked.c.detected_by.is_not(None), 1), else_=0)).label("crashes"),
                *(
                    sa.func.count(ranked.c[name].distinct()).label(label)
                    for name, label in (("item", "items"), ("batch_id", "batches"), ("hostname", "hosts"))
                ),
                sa.func.min(ranked.c.detected_at).label("first_at"), sa.func.max(ranked.c.detected_at).label("last_at"),
                *(of_newest(name) for name in (*_NEWEST, "id", "batch_id", "position", "item")),
                *(
                    sa.func.sum(sa.case((ranked.c.detected_at >= later(-seconds), 1), else_=0)).label(f"within_{index}")
                    for index, seconds in enumerate(within)
                ),
            )
            .group_by(ranked.c.fingerprint, ranked.c.task)
            .order_by(sa.desc("last_at"))
            .limit(limit)
        )  # fmt: skip
        with self.read() as connection:
            return [_signature(row, len(within)) for row in connection.execute(query)]

    def stacks(self, incidents: Sequence[uuid.UUID]) -> dict[uuid.UUID, str | None]:
        """The stack or traceback of each."""
        text = sa.func.coalesce(incident.c.stack, incident.c.traceback)
        query = sa.select(incident.c.id, text).where(incident.c.id.in_(list(incidents)))
        with self.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def last_deaths(
        self, items: Sequence[str], *, since: float, task: str | None = None, signal: str | None = None,
        host: str | None = None,
    ) -> dict[tuple[str, str], tuple[uuid.UUID, int]]:  # fmt: skip
        """(task, item in hand) → (batch, position) of its newest death of the last so many seconds. Only of this task,
        signal (or cause) and host."""
        of_item = _failures(None, task, signal, host, since, newest_first=False).where(
            incident.c.item.in_(list(items)), incident.c.item.is_not(None), incident.c.detected_by.is_not(None)
        )
        with self.read() as connection:
            rows = connection.execute(of_item.order_by(incident.c.detected_at, incident.c.id)).all()
        return {(row.task, row.item): (row.batch_id, row.position) for row in rows}

    def failing(self, column: str, since: float, limit: int = 100) -> Mapping[str, int]:
        """Deaths and failures of the last so many seconds by ``task``, ``signal`` (or cause) or ``hostname``, most
        first."""
        each = _failures(None, None, None, None, since).subquery()
        key = sa.func.coalesce(each.c.signal, each.c.cause) if column == "signal" else each.c[column]
        query = (
            sa.select(key, sa.func.count().label("n")).where(key.is_not(None)).group_by(key)
            .order_by(sa.desc("n"), key).limit(limit)
        )  # fmt: skip
        with self.read() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}


def _spread(connection: sa.Connection, batch_id: uuid.UUID) -> list[int]:
    """Positions drawn from all of a batch, the same each time: at even distances, shards and cycles would show."""
    end = connection.execute(sa.select(batch.c.next_position).where(batch.c.id == batch_id)).scalar_one_or_none() or 0
    return random.Random(batch_id.int).sample(range(end), min(SAMPLE, end))


def _failures(
    batch_id: uuid.UUID | None, task: str | None, signal: str | None, host: str | None, since: float | None, *,
    newest_first: bool = True,
) -> sa.Select[Any]:  # fmt: skip
    own = sa.case((child.c.item_count == 1, first_item(child.c["items"])))
    item = sa.func.coalesce(incident.c.item, own).label("item")
    names = (
        "id", "batch_id", "position", "fingerprint", *_NEWEST, "hostname", "detected_at", "detected_by",
    )  # fmt: skip
    query = (
        sa.select(*(incident.c[name] for name in names), item, child.c.task)
        .join(child, sa.and_(child.c.batch_id == incident.c.batch_id, child.c.position == incident.c.position))
        .where(stands(), incident.c.fingerprint.is_not(None))
    )
    if batch_id is not None:
        query = query.where(incident.c.batch_id == batch_id)
    elif newest_first:
        query = query.order_by(incident.c.detected_at.desc())
    if since is not None:
        query = query.where(incident.c.detected_at >= later(-since))
    if task is not None:
        query = query.where(child.c.task == task)
    if signal is not None:
        query = query.where(sa.func.coalesce(incident.c.signal, incident.c.cause) == signal)
    if host is not None:
        query = query.where(incident.c.hostname == host)
    return query.limit(GROUPED)


def _signature(row: Any, windows: int) -> Signature:
    return Signature(
        row.fingerprint, row.task, row.last_cause, row.last_signal, row.last_exception, row.last_python_frame,
        row.last_message, row.occurrences, int(row.crashes), row.items, row.batches, row.hosts, row.first_at,
        row.last_at, uuid.UUID(row.last_id), uuid.UUID(row.last_batch_id), row.last_position, row.last_item,
        row.last_exit_code,
        tuple(int(getattr(row, f"within_{index}")) for index in range(windows)),
    )  # fmt: skip


__all__ = ["EXACT", "Bin", "Charting", "Durations", "Signature"]
