"""What ended, counted as it ends: by batch, minute, task, status and class of duration.

Rows are events and never go down: neither another round nor pruning takes anything away. A batch's own are spread
over its shards, whose tally row the writer has locked already; once it has ended they become one set, and once it was
deleted they are added to those of nobody (`NOBODY`), by the hour and later by the day.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from celery_batchtrack.vocabulary.durations import BOUNDS, NEVER_RAN, bucket
from celery_batchtrack.vocabulary.states import BATCH_ENDED, Kind, Status

from .clock import later, this_minute
from .engine import Connected
from .schema import NOBODY, batch, outcome, unmerged

#: The shard of rows that were put together.
MERGED = -1
#: A death, whatever became of its child; `detail` is its signal or cause.
DIED = "died"
_KEY = ("batch_id", "shard", "time", "task", "status", "detail", "bucket")
_OF_MERGED = ("batch_id", "time", "task", "status", "detail", "bucket")
_COLUMNS = (*_KEY, "children", "items", "seconds", "seconds_max")
_CHUNK = 200
_HOURLY_FOR = 90 * 86_400.0


@dataclass(frozen=True, slots=True)
class OutcomeTotal:
    """All that ever ended so, pruned batches included. `bucket`: see `vocabulary.durations`."""

    task: str
    status: str  # of a child, or `died`
    detail: str  # of a death: its signal or cause
    bucket: int
    children: int
    items: int
    seconds: float


@dataclass(slots=True)
class _Sum:
    children: int = 0
    items: int = 0
    seconds: float = 0.0
    seconds_max: float = 0.0

    def add(self, children: int, items: int, seconds: float, longest: float) -> None:
        self.children += children
        self.items += items
        self.seconds += seconds
        self.seconds_max = max(self.seconds_max, longest)

    def values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


# -- writing ----------------------------------------------------------------------------------------


def _added(insert: Any) -> Any:
    """Insert, or add to what is there."""
    more = insert.excluded
    longest = sa.case((more.seconds_max > outcome.c.seconds_max, more.seconds_max), else_=outcome.c.seconds_max)
    return insert.on_conflict_do_update(
        index_elements=[outcome.c[name] for name in _KEY],
        set_={
            **{name: outcome.c[name] + more[name] for name in ("children", "items", "seconds")}, "seconds_max": longest
        },
    )  # fmt: skip


@cache
def _adding(sqlite_: bool, now: bool) -> Any:
    """Adds rows to what is there, at this minute or at their `time`. Built once: it runs with every settle."""
    insert = (sqlite if sqlite_ else postgresql).insert(outcome)
    return _added(insert.values(time=this_minute()) if now else insert)


def _add(connection: sa.Connection, rows: list[dict[str, Any]], *, now: bool) -> None:
    if rows:
        names = [name for name in _COLUMNS if not (now and name == "time")]
        values = [{name: row[name] for name in names} for row in rows]
        connection.execute(_adding(connection.dialect.name == "sqlite", now), values)


def count(connection: sa.Connection, batch_id: Any, rows: Iterable[Sequence[Any]], status: Status) -> None:
    """Children that have just ended so: rows as `transitions.MOVED`. Their tally shards are locked."""
    sums: dict[tuple[int, str, int], _Sum] = defaultdict(_Sum)
    for shard, kind, items, _, task, seconds, *_ in rows:
        if kind == Kind.CHILD:
            ran = max(0.0, seconds) if seconds is not None else None
            sums[shard, task, bucket(ran)].add(1, items, ran or 0.0, ran or 0.0)
    told = {"batch_id": batch_id, "status": status.value, "detail": ""}
    added = [{**told, "shard": key[0], "task": key[1], "bucket": key[2], **sums[key].values()} for key in sorted(sums)]
    _add(connection, added, now=True)


def count_death(connection: sa.Connection, batch_id: Any, task: str, how: str) -> None:
    """A run died of this signal or cause. Comes before its child's tally shard."""
    told = {"batch_id": batch_id, "shard": 0, "task": task, "status": DIED, "detail": how[:32], "bucket": NEVER_RAN}
    _add(connection, [{**told, **_Sum(children=1).values()}], now=True)


def counted_with(settled: sa.CTE, moved: sa.CTE, target: Status) -> sa.CTE:
    """PostgreSQL: the same as part of a statement that settles one child, after its tally (`moved`)."""
    seconds = sa.func.greatest(0.0, settled.c.seconds)
    classes = [(seconds <= bound, index) for index, bound in enumerate(BOUNDS)]
    selected = sa.select(
        settled.c.batch_id, settled.c.shard, this_minute(), settled.c.of_task, sa.literal_column(f"'{target.value}'"),
        sa.literal_column("''"), sa.case(*classes, else_=len(BOUNDS)), sa.literal_column("1"), settled.c.item_count,
        seconds, seconds,
    ).select_from(settled.join(moved, sa.true()))  # fmt: skip
    added: sa.CTE = _added(postgresql.insert(outcome).from_select(list(_COLUMNS), selected)).cte("counted")
    return added


# -- putting together -------------------------------------------------------------------------------


def _whole(moment: datetime, unit: str) -> datetime:
    if unit == "minute":
        return moment
    return moment.replace(minute=0) if unit == "hour" else moment.replace(hour=0, minute=0)


def _gather(connection: sa.Connection, into: uuid.UUID | None, unit: str, *taken: sa.ColumnElement[bool]) -> int:
    """Take rows away and add them to the merged ones of their batch, or of `into`. Who has taken them, has them."""
    gone = connection.execute(sa.delete(outcome).where(*taken).returning(*(outcome.c[name] for name in _COLUMNS))).all()
    sums: dict[tuple[Any, ...], _Sum] = defaultdict(_Sum)
    for row in gone:
        key = (into or row.batch_id, _whole(row.time, unit), row.task, row.status, row.detail, row.bucket)
        sums[key].add(row.children, row.items, row.seconds, row.seconds_max)
    keys = sorted(sums, key=lambda each: (str(each[0]), *each[1:]))
    rows = [dict(zip(_OF_MERGED, key, strict=True), shard=MERGED, **sums[key].values()) for key in keys]
    _add(connection, rows, now=False)
    return len(gone)


class Outcomes(Connected):
    """Counts of what ended, put together when nothing more is added to them, and read."""

    def merge_outcomes(self, limit: int = _CHUNK) -> int:
        """Of batches that have ended, one set instead of one for each shard. Returns how many batches."""
        ended = [each.value for each in BATCH_ENDED]
        query = (
            sa.select(outcome.c.batch_id)
            .join(batch, batch.c.id == outcome.c.batch_id)
            .where(unmerged(), batch.c.status.in_(ended))
            .distinct()
            .limit(limit)
        )
        with self.read() as connection:
            ids = list(connection.execute(query).scalars())
        done = 0
        for batch_id in ids:
            with self.write() as connection:
                still = sa.select(batch.c.id).where(batch.c.id == batch_id, batch.c.status.in_(ended))
                # Whoever takes it to another round waits: nobody adds to what is taken away here.
                if connection.execute(still.with_for_update(key_share=True)).one_or_none() is not None:
                    done += bool(_gather(connection, None, "minute", outcome.c.batch_id == batch_id, unmerged()))
        return done

    def keep_outcomes(self) -> int:
        """Of batches that are deleted, by whomever: added to those of nobody, by the hour; after 90 days by the day.
        Returns how many rows were taken."""
        there = sa.exists().where(batch.c.id == outcome.c.batch_id)
        query = sa.select(outcome.c.batch_id).where(outcome.c.batch_id != NOBODY, ~there).distinct()
        with self.read() as connection:
            ids = list(connection.execute(query).scalars())
        taken = 0
        for start in range(0, len(ids), _CHUNK):
            with self.write() as connection:
                taken += _gather(connection, NOBODY, "hour", outcome.c.batch_id.in_(ids[start : start + _CHUNK]))
        if self._has_old_hours():
            with self.write() as connection:
                taken += _gather(connection, NOBODY, "day", *self._old_hours())
        return taken

    def _old_hours(self) -> tuple[sa.ColumnElement[bool], ...]:
        hour = sa.extract("hour", outcome.c.time)
        if not self.sqlite:  # by UTC, whatever the session's time zone
            hour = sa.extract("hour", sa.func.timezone("UTC", outcome.c.time))
        return outcome.c.batch_id == NOBODY, outcome.c.time < later(-_HOURLY_FOR), hour != 0

    def _has_old_hours(self) -> bool:
        with self.read() as connection:
            return bool(connection.execute(sa.select(sa.exists().where(*self._old_hours()))).scalar_one())

    def outcome_totals(self) -> list[OutcomeTotal]:
        """All that ever ended: counters that never go down."""
        keys = [outcome.c[name] for name in ("task", "status", "detail", "bucket")]
        sums = [sa.func.sum(outcome.c[name]) for name in ("children", "items", "seconds")]
        with self.read() as connection:
            rows = connection.execute(sa.select(*keys, *sums).group_by(*keys)).all()
        return [
            OutcomeTotal(task, status, detail, bucket, int(children), int(items), float(seconds))
            for task, status, detail, bucket, children, items, seconds in rows
        ]


__all__ = ["DIED", "MERGED", "OutcomeTotal", "Outcomes", "count", "count_death", "counted_with"]
