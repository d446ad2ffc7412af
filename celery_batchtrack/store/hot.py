"""The two statements that every child costs, built once: building them anew took longer than running them."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.states import BATCH_ALIVE, CLAIM, COMPLETE, Kind, Status

from .clock import Identifier, now
from .schema import Json, batch, child, worker
from .transitions import change, settle_and_count

_BATCH = sa.bindparam("the_batch", type_=Identifier)
_POSITION = sa.bindparam("the_position", type_=sa.BigInteger)
_TOKEN = sa.bindparam("the_token", type_=Identifier)
_WORKER = sa.bindparam("the_worker", type_=Identifier)
_HERE = sa.and_(child.c.batch_id == _BATCH, child.c.position == _POSITION)


def batch_lets_claim() -> sa.ColumnElement[bool]:
    """A child's batch is alive and not paused; a callback's round is the batch's."""
    alive = sa.and_(
        child.c.kind == Kind.CHILD.value,
        batch.c.status.in_([each.value for each in BATCH_ALIVE]),
        batch.c.paused_at.is_(None),
    )
    called = sa.and_(child.c.kind != Kind.CHILD.value, child.c.round == batch.c.round)
    return sa.exists().where(batch.c.id == child.c.batch_id, sa.or_(alive, called))


def worker_lives(worker_id: Any) -> sa.ColumnElement[bool]:
    """The worker is registered and has not ended in order. No foreign key: that would lock its row."""
    return sa.exists().where(worker.c.id == worker_id, worker.c.stopped_at.is_(None))


@cache
def claim() -> Any:
    """``pending → running`` of the row at the message's attempt; returns (attempt, kind)."""
    return (
        change(
            CLAIM,
            _HERE,
            child.c.attempt == sa.bindparam("the_attempt", type_=sa.Integer),
            sa.or_(child.c.expires_at.is_(None), child.c.expires_at > now()),
            batch_lets_claim(),
            worker_lives(_WORKER),
        )
        .values(
            attempt=child.c.attempt + 1, run_token=_TOKEN, worker_id=_WORKER,
            slot=sa.bindparam("the_slot", type_=sa.String), started_at=now(),
            policy=sa.bindparam("the_policy", type_=Json), verdict=None,
        )
        .returning(child.c.attempt, child.c.kind)
    )  # fmt: skip


@cache
def complete(keep_signature: bool) -> Any:
    """PostgreSQL: ``running → completed`` with its count; returns (kind, open in the shard)."""
    values: dict[str, Any] = {"result": sa.bindparam("the_result", type_=sa.Text), "cause": None}
    if not keep_signature:
        values["signature"] = None  # arguments are customers' data: gone when no longer needed
    settle = change(COMPLETE, _HERE, child.c.run_token == _TOKEN, **values)
    return settle_and_count(settle, Status.COMPLETED)
