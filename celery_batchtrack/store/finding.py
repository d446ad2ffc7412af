"""Finding batches by what people know of them, and outcomes by the id that a caller holds."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.ids import digits_of
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, FirstFailure
from celery_batchtrack.vocabulary.states import BATCH_ALIVE, NOT_COMPLETED, OPEN, Kind

from .callbacks import is_callback
from .clock import later
from .engine import Connected
from .rows import BATCH_COLUMNS, CHILD_COLUMNS, batch_row, child_row
from .schema import batch, child, incident

#: Outcomes of incidents that ended their child.
_ENDS = tuple(each.value for each in NOT_COMPLETED)


class Finding(Connected):
    """Reads by name, label, prefix or result id."""

    def resolve(self, prefix: str) -> uuid.UUID:
        """The batch whose id is, or starts with, `prefix` (hyphens may be left out). Raises BatchNotFound."""
        digits = digits_of(prefix)
        if not digits:
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

    def list_batches(
        self, *, statuses: Sequence[str] = (), name: str | None = None, tags: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None, parent: uuid.UUID | None = None, roots: bool = False,
        since: float | None = None, limit: int | None = 50,
    ) -> list[uuid.UUID]:  # fmt: skip
        """Ids of batches, newest first; of those that have all these tags, and these values in their metadata.
        `roots`: nested in no other; `since`: created in the last so many seconds."""
        query = sa.select(batch.c.id).order_by(batch.c.created_at.desc(), batch.c.id.desc()).limit(limit)
        if statuses:
            query = query.where(batch.c.status.in_(list(statuses)))
        if name is not None:
            query = query.where(batch.c.name == name)
        if parent is not None:
            query = query.where(batch.c.parent_batch.is_not(None), batch.c.parent_batch == parent)
        if roots:
            query = query.where(batch.c.parent_batch.is_(None))
        if since is not None:
            query = query.where(batch.c.created_at >= later(-since))
        for tag in tags:
            query = query.where(self._has_tag(tag))
        for key, value in (metadata or {}).items():
            query = query.where(self._has_value(key, value))
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def unsettled(self, limit: int = 1000, *, roots: bool = False) -> list[uuid.UUID]:
        """Batches that have not ended, or of which a callback is still open; oldest first. `roots`: nested in no
        other."""
        open_callback = sa.exists().where(
            child.c.batch_id == batch.c.id, is_callback(child), child.c.round == batch.c.round,
            child.c.status.in_([each.value for each in OPEN]),
        )  # fmt: skip
        alive = batch.c.status.in_([each.value for each in BATCH_ALIVE])
        query = sa.select(batch.c.id).where(sa.or_(alive, open_callback)).order_by(batch.c.created_at).limit(limit)
        if roots:
            query = query.where(batch.c.parent_batch.is_(None))
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def callbacks_of(self, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[str]]:
        """Statuses of these batches' callbacks, of their present round; batches without callbacks are left out."""
        query = (
            sa.select(child.c.batch_id, child.c.status)
            .join(batch, batch.c.id == child.c.batch_id)
            .where(child.c.batch_id.in_(list(ids)), is_callback(child), child.c.round == batch.c.round)
        )
        found: dict[uuid.UUID, list[str]] = {}
        with self.read() as connection:
            for batch_id, status in connection.execute(query):
                found.setdefault(batch_id, []).append(status)
        return found

    def _has_tag(self, tag: str) -> sa.ColumnElement[bool]:
        if self.sqlite:
            each = sa.func.json_each(batch.c.tags).table_valued("value")
            return sa.exists(sa.select(each.c.value).where(each.c.value == tag))
        return sa.type_coerce(batch.c.tags, JSONB).contains([tag])

    def _has_value(self, key: str, value: Any) -> sa.ColumnElement[bool]:
        if self.sqlite:
            each = sa.func.json_each(batch.c["metadata"]).table_valued("key", "value", "type")
            return sa.exists(sa.select(each.c.key).where(each.c.key == key, _is_json(each, value)))
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
                child.c.status.in_(_ENDS),
                incident.c.outcome.not_in(["retried", "redispatched"]),
            )
            .order_by(child.c.finished_at, child.c.position, incident.c.detected_at.desc())
            .limit(1)
        )  # fmt: skip
        with self.read() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else FirstFailure(*found)


def _is_json(each: Any, value: Any) -> sa.ColumnElement[bool]:
    """SQLite: whether a member of an object is this value, of this type; 1 and true are two."""
    if isinstance(value, (dict, list)):
        kind = "object" if isinstance(value, dict) else "array"
        return sa.and_(each.c.type == kind, sa.func.json(each.c.value) == sa.func.json(json.dumps(value)))
    if value is None or isinstance(value, bool):
        return each.c.type == json.dumps(value)  # type: ignore[no-any-return]
    kinds = ("text",) if isinstance(value, str) else ("integer", "real")
    return sa.and_(each.c.type.in_(kinds), each.c.value == value)
