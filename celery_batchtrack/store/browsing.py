"""What pages list: batches, children and failures, a page at a time, each by an index, however much there is.

What no index knows (an item among the several of one child, children of one worker) is looked for in so many rows at a
time, and the answer says how far that was.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from celery_batchtrack.vocabulary.ids import SHORTEST_ID, digits_of
from celery_batchtrack.vocabulary.records import ChildRow
from celery_batchtrack.vocabulary.states import BATCH_ALIVE, NOT_COMPLETED, OPEN, BatchStatus, EndReason, Kind, Status

from .clock import age, first_item, now
from .finding import Finding
from .incidents import stands
from .rows import CHILD_COLUMNS, child_row
from .schema import (
    BATCH_NOT_COMPLETED,
    HAS_ENDED,
    ONE_ITEM,
    batch,
    child,
    in_state,
    incident,
    meta,
    open_in,
    tally,
    worker,
)

#: Children that are read through for what no index knows.
SEARCHED = 50_000
#: Batches that may have an item in common.
HAVING = 500
_ALIVE = [each.value for each in BATCH_ALIVE]


@dataclass(frozen=True, slots=True)
class Found:
    """Batches by what people know of them. `beyond`: there are children that were not looked through for an item."""

    ids: list[uuid.UUID]
    more: bool
    beyond: bool = False


@dataclass(frozen=True, slots=True)
class ChildPage:
    """Children by position. `next`: what to go on after; `searched_to`: the position up to which was looked."""

    rows: list[ChildRow]
    next: int | None
    searched_to: int | None = None


def _chip(chip: str) -> sa.ColumnElement[bool]:
    ended_badly = [BatchStatus.PARTIAL.value, BatchStatus.FAILED.value]
    own_will = sa.and_(
        batch.c.status == BatchStatus.CANCELLED.value,
        batch.c.reason.in_([EndReason.ABANDONED.value, EndReason.DEADLINE.value]),
    )
    crashed = sa.select(tally.c.batch_id).where(sa.text("batchtrack_tally.crashed > 0"))
    failed = sa.select(tally.c.batch_id).where(sa.text("batchtrack_tally.failed > 0"))
    chips: dict[str, sa.ColumnElement[bool]] = {
        "attention": sa.and_(BATCH_NOT_COMPLETED, sa.or_(batch.c.status.in_([*_ALIVE, *ended_badly]), own_will)),
        "running": sa.and_(BATCH_NOT_COMPLETED, batch.c.status.in_(_ALIVE)),
        "crashed": batch.c.id.in_(crashed),
        "failed": sa.or_(batch.c.id.in_(failed), batch.c.status == BatchStatus.FAILED.value),
        "completed": batch.c.status == BatchStatus.COMPLETED.value,
        "all": sa.true(),
    }
    return chips[chip]


class Browsing(Finding):
    """Pages of what there is."""

    def browse_batches(
        self, *, chip: str = "all", search: str = "", after: tuple[datetime, uuid.UUID] | None = None, limit: int = 25
    ) -> Found:
        """Batches, newest first: of those that `chip` names, those whose name contains `search`, or that have it as a
        tag, an item, the beginning of their id, or the id of a task. `after`: what the last page ended with."""
        query = sa.select(batch.c.id).where(_chip(chip))
        beyond = False
        if search:
            ids, beyond = self._with_child(search)
            query = query.where(sa.or_(*self._known_by(search), batch.c.id.in_(ids)))
        if after is not None:
            moment, last = after
            same = sa.and_(batch.c.created_at == moment, batch.c.id < last)
            query = query.where(batch.c.created_at <= moment, sa.or_(batch.c.created_at < moment, same))
        query = query.order_by(batch.c.created_at.desc(), batch.c.id.desc()).limit(limit + 1)
        with self.read() as connection:
            found = list(connection.execute(query).scalars())
        return Found(found[:limit], len(found) > limit, beyond)

    def _known_by(self, text: str) -> list[sa.ColumnElement[bool]]:
        known = [batch.c.name.icontains(text, autoescape=True), self._has_tag(text)]
        digits = digits_of(text)
        if len(digits) >= SHORTEST_ID:
            first, last = (uuid.UUID(digits.ljust(32, fill)) for fill in "0f")
            known.append(batch.c.id.between(first, last))
        return known

    def _with_child(self, text: str) -> tuple[list[uuid.UUID], bool]:
        """Batches with a child that has this item or task id; whether there is more than was looked through."""
        by_index = [
            sa.select(child.c.batch_id).where(first_item(child.c["items"]) == text, ONE_ITEM),
            sa.select(child.c.batch_id).where(child.c.task_id == text, HAS_ENDED),
            sa.select(incident.c.batch_id).where(incident.c.item == text, incident.c.item.is_not(None)),
        ]
        found: set[uuid.UUID] = set()
        with self.read() as connection:
            newest, beyond = _newest_with(connection, SEARCHED)
            for query in by_index:  # ids are ordered by time: the newest are those to keep
                having = query.distinct().order_by(sa.desc("batch_id")).limit(HAVING + 1)
                ids = list(connection.execute(having).scalars())
                beyond |= len(ids) > HAVING
                found.update(ids[:HAVING])
            others = sa.select(child.c.batch_id).where(
                child.c.batch_id.in_(newest), sa.or_(child.c.item_count > 1, child.c.finished_at.is_(None)),
                sa.or_(self._has_item(text), child.c.task_id == text),
            )  # fmt: skip
            found |= set(connection.execute(others.distinct()).scalars())
        return list(found), beyond

    def _has_item(self, text: str) -> sa.ColumnElement[bool]:
        if self.sqlite:  # as text, each in its quotes
            return sa.func.instr(sa.type_coerce(child.c["items"], sa.Text), json.dumps(text)) > 0
        return sa.type_coerce(child.c["items"], JSONB).contains([text])

    def browse_children(
        self, batch_id: uuid.UUID, *, status: str | None = None, item: str | None = None,
        worker_name: str | None = None, fingerprint: str | None = None, after: int = -1, limit: int = 50,
    ) -> ChildPage:  # fmt: skip
        """Children by position, from behind `after`: in this state, with this item, run last by a worker or host of
        this name, with an incident of this fingerprint."""
        wanted = [*_of(batch_id, status), child.c.kind == Kind.CHILD.value]
        until, alike = None, None
        if fingerprint is not None:
            alike = self._with_incident(batch_id, fingerprint, after, limit + 1)
            wanted.append(child.c.position.in_(alike))
        else:
            wanted.append(child.c.position > after)
        if worker_name is not None:
            named = sa.select(worker.c.id).where(sa.or_(worker.c.name == worker_name, worker.c.hostname == worker_name))
            wanted.append(child.c.worker_id.in_(named))
        if item is not None:
            wanted.append(self._has_item(item))
        no_index = worker_name is not None or item is not None or status in (Status.COMPLETED, Status.SPLIT)
        if no_index and alike is None:
            until = after + SEARCHED
            wanted.append(child.c.position <= until)
        query = sa.select(*CHILD_COLUMNS).where(*wanted).order_by(child.c.position).limit(limit + 1)
        last = sa.select(batch.c.next_position - 1).where(batch.c.id == batch_id)
        with self.read() as connection:
            rows = [child_row(row) for row in connection.execute(query)]
            end = connection.execute(last).scalar_one_or_none() or 0 if until is not None else 0
        if len(rows) > limit:
            return ChildPage(rows[:limit], rows[limit - 1].position)
        if alike is not None and len(alike) > limit:  # not all of them are in this state, too
            return ChildPage(rows, alike[-1], alike[-1])
        if until is not None and until < end:
            return ChildPage(rows, until, until)
        return ChildPage(rows, None)

    def _with_incident(self, batch_id: uuid.UUID, fingerprint: str, after: int, limit: int) -> list[int]:
        """The first positions behind `after` with such an incident. Asked first: as a subquery, it would be looked up
        for each child of the batch in turn."""
        query = (
            sa.select(incident.c.position).distinct()
            .where(
                incident.c.batch_id == batch_id, incident.c.fingerprint == fingerprint, incident.c.position > after
            )
            .order_by(incident.c.position)
            .limit(limit)
        )  # fmt: skip
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def newest_incidents(self, batch_id: uuid.UUID, positions: Sequence[int]) -> dict[int, sa.Row[Any]]:
        """Of these children the newest incident that stands, without stacks."""
        names = (
            "id", "position", "attempt", "cause", "signal", "exit_code", "exception", "python_frame", "message",
            "fingerprint", "item", "hostname", "worker", "detected_at",
        )  # fmt: skip
        query = (
            sa.select(*(incident.c[name] for name in names))
            .where(
                incident.c.batch_id == batch_id, incident.c.position.in_(list(positions)), stands()
            )
            .order_by(incident.c.detected_at, incident.c.id)
        )  # fmt: skip
        with self.read() as connection:
            return {row.position: row for row in connection.execute(query)}

    def worker_names(self, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, tuple[str, str]]:
        """(name, hostname) of workers."""
        query = sa.select(worker.c.id, worker.c.name, worker.c.hostname).where(worker.c.id.in_(list(ids)))
        with self.read() as connection:
            return {row.id: (row.name, row.hostname) for row in connection.execute(query)}

    def facts(self) -> Mapping[str, Any]:
        """Of the database: current_time, swept_at, swept_by, sweep_age_seconds, open_batches, oldest_open."""
        alive = sa.and_(BATCH_NOT_COMPLETED, batch.c.status.in_(_ALIVE))
        query = sa.select(
            now().label("current_time"), meta.c.swept_at, meta.c.swept_by,
            age(meta.c.swept_at).label("sweep_age_seconds"),
            sa.select(sa.func.count()).select_from(batch).where(alive).scalar_subquery().label("open_batches"),
            sa.select(sa.func.min(batch.c.created_at)).where(alive).scalar_subquery().label("oldest_open"),
        )
        with self.read() as connection:
            return dict(connection.execute(query).mappings().one())


def _of(batch_id: uuid.UUID, status: str | None) -> list[sa.ColumnElement[bool]]:
    """Children of a batch, in some state: in the words of the index that knows it, and of no other."""
    if status is None:
        return [child.c.batch_id == batch_id]
    state = Status(status)
    if state in OPEN:
        return [open_in(batch_id, state)]
    known = [in_state(*NOT_COMPLETED)] if state in NOT_COMPLETED else []
    return [child.c.batch_id == batch_id, in_state(state), *known]


def _newest_with(connection: sa.Connection, children: int) -> tuple[list[uuid.UUID], bool]:
    """The newest batches that have so many children together; whether there are others."""
    newest = sa.select(batch.c.id, batch.c.next_position).order_by(batch.c.created_at.desc(), batch.c.id.desc())
    ids: list[uuid.UUID] = []
    beyond = False
    for row in connection.execute(newest.limit(201)):
        if row.next_position > children or len(ids) == 200:
            beyond = True  # one that is too large by itself must not hide those before it
            continue
        children -= row.next_position
        ids.append(row.id)
    return ids, beyond


__all__ = ["SEARCHED", "Browsing", "ChildPage", "Found"]
