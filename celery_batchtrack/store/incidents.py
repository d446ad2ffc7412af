"""Incidents: evidence of one attempt that did not complete, written in the transaction that ends the attempt."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.evidence import Evidence, fingerprint
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.records import ChildRow, storable
from celery_batchtrack.vocabulary.states import Verdict

from .clock import later, now
from .outcomes import count_death
from .schema import child, incident

#: What an UPDATE of a child must return for `Attempt`, behind its other columns.
TOLD = (child.c.attempt, child.c.task, child.c.queue)


#: Outcomes of what is noted beside the end of an attempt.
BESIDE = ("late_write", "redispatched")


def stands() -> sa.ColumnElement[bool]:
    """It tells how an attempt ended, and was not overturned."""
    return sa.and_(incident.c.overturned_at.is_(None), incident.c.outcome.not_in(BESIDE))


def is_death() -> sa.ColumnElement[bool]:
    """Somebody noticed it (a failure reports itself), and it was not overturned."""
    return sa.and_(incident.c.detected_by.is_not(None), incident.c.overturned_at.is_(None))


@dataclass(frozen=True, slots=True)
class Attempt:
    """Whose incident it is."""

    key: ChildKey
    number: int
    task: str
    queue: str | None
    token: uuid.UUID | None

    @classmethod
    def told(cls, key: ChildKey, changed: sa.Row[Any], token: uuid.UUID | None) -> Attempt:
        """From what an UPDATE returned (`TOLD`)."""
        return cls(key, changed.attempt, changed.task, changed.queue, token)

    @classmethod
    def of(cls, row: ChildRow, number: int | None = None) -> Attempt:
        return cls(row.key, row.attempt if number is None else number, row.task, row.queue, row.run_token)


def record(
    connection: sa.Connection, attempt: Attempt, outcome: str, evidence: Evidence, verdict: Verdict | None = None
) -> None:
    """Insert the incident of one attempt, and count it if somebody died. Comes before the tally is touched."""
    if evidence.detected_by is not None and outcome not in BESIDE:
        count_death(connection, attempt.key.batch_id, attempt.task, evidence.signal or evidence.cause.value)
    connection.execute(
        sa.insert(incident).values(
            id=uuid7(), batch_id=attempt.key.batch_id, position=attempt.key.position, attempt=attempt.number,
            run_token=attempt.token, outcome=str(outcome), cause=evidence.cause.value, phase=evidence.phase,
            signal=evidence.signal, exit_code=evidence.exit_code, message=_text(evidence.message),
            exception=short(evidence.exception), error=_whole(evidence.error), traceback=_text(evidence.traceback),
            stack=_text(evidence.stack),
            python_frame=short(evidence.python_frame), fingerprint=fingerprint(attempt.task, evidence),
            item=short(evidence.item), item_index=evidence.item_index, items_done=evidence.items_done,
            note=_text(evidence.note), peak_memory=evidence.peak_memory, hostname=evidence.hostname,
            boot_id=evidence.boot_id, worker=evidence.worker, worker_id=evidence.worker_id, pid=evidence.pid,
            queue=attempt.queue, versions=dict(evidence.versions) if evidence.versions else None,
            detected_by=evidence.detected_by, verdict=verdict,
            died_at=evidence.died_at or later(min(0.0, evidence.noticed - time.monotonic())), detected_at=now(),
        )
    )  # fmt: skip


def short(value: str | None) -> str | None:
    """What fits a column of 255 characters, and a database takes as text."""
    text = _text(value)
    return None if text is None else text[:255]


def _whole(value: str | None) -> str | None:
    """JSON: all of it, or nothing."""
    return value if value is not None and _text(value) == value else None


def _text(value: str | None, limit: int = 20_000) -> str | None:
    """Bounded, and without what a database refuses in text: NUL characters, lone surrogates."""
    if value is None:
        return None
    value = storable(value)
    return value if len(value) <= limit else value[: limit // 2] + "\n… cut …\n" + value[-limit // 2 :]


__all__ = ["BESIDE", "TOLD", "Attempt", "is_death", "record", "short", "stands"]
