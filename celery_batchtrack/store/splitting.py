"""A child's items are handed on to successors: one transaction, and no item is lost or doubled."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.aftermath import Killer, Part
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import ChildRow, Settled
from celery_batchtrack.vocabulary.states import (
    BATCH_ALIVE,
    SPLIT,
    SPLIT_UNCLAIMED,
    Cause,
    Kind,
    Status,
    Verdict,
)

from . import breaker, callbacks
from .clock import Moment, age, now
from .engine import Connected
from .incidents import Attempt, record
from .quarantine import count_kill
from .schema import batch, child
from .transitions import Share, change, regroup


@dataclass(frozen=True, slots=True)
class _Owner:
    next_position: int
    shards: int


class Splitting(Connected):
    """Locks: the batch (its `next_position` moves), then the child, then the tally by shard."""

    def split(
        self, row: ChildRow, parts: Sequence[Part], evidence: Evidence | None, *, killer: Killer | None = None,
        claimed: bool = True, death: bool = True, policy: Mapping[str, Any] | None = None,
    ) -> Settled:  # fmt: skip
        """``running → split`` (or pending, where it was never claimed): its items are those of `parts` from now on.

        `evidence` is the split child's own incident, where no part carries it. Fenced by the run token that `row`
        was read with, or by its attempt. With `death`, it is counted as one. `policy` is for a row that has none
        yet, since it was never claimed: results are merged as it says.
        """
        row = replace(row, policy=row.policy or (None if policy is None else dict(policy)))
        failed = any(part.status is Status.CRASHED for part in parts)
        with self.write() as connection:
            first = callbacks.lock_for_first_failure(
                connection, row.batch_id, Status.CRASHED if failed else Status.SPLIT
            )
            watched = breaker.lock(connection, row.batch_id) if death else None
            owner = self._owner(connection, row.batch_id)
            if owner is None or not self._leave(connection, row, claimed=claimed, death=death, evidence=evidence):
                return Settled(False)
            attempt = row.attempt if claimed or not death else row.attempt + 1
            if evidence is not None:
                record(connection, Attempt.of(row, attempt), Status.SPLIT, evidence, Verdict.OBSERVED)
            position, quarantined = self._insert_parts(connection, row, parts, owner, attempt, killer)
            if first is not None:
                first = replace(first, next_position=position)
            called = failed and callbacks.insert_first_failure(connection, first, row.kind)
            paused = breaker.count_death(connection, watched)
            pending = sum(part.status is Status.PENDING for part in parts)
            return Settled(
                True, look=not pending, callbacks=called, successors=pending, paused=paused, quarantined=quarantined
            )

    def _owner(self, connection: sa.Connection, batch_id: uuid.UUID) -> _Owner | None:
        found = connection.execute(
            sa.select(batch.c.next_position, batch.c.shards)
            .where(batch.c.id == batch_id, batch.c.status.in_([each.value for each in BATCH_ALIVE]))
            .with_for_update(key_share=True)
        ).one_or_none()
        return None if found is None else _Owner(*found)

    def _leave(
        self, connection: sa.Connection, row: ChildRow, *, claimed: bool, death: bool, evidence: Evidence | None
    ) -> bool:
        here = sa.and_(child.c.batch_id == row.batch_id, child.c.position == row.position)
        values: dict[str, Any] = {
            "cause": evidence.cause.value if evidence else None, "signature": None, "policy": row.policy
        }  # fmt: skip
        if death:
            values.update(crashes=child.c.crashes + 1, verdict=Verdict.OBSERVED.value)
        if claimed:
            statement = change(SPLIT, here, child.c.run_token == row.run_token, **values)
        else:
            values["attempt"] = child.c.attempt + int(death)
            statement = change(SPLIT_UNCLAIMED, here, child.c.attempt == row.attempt, **values)
        return connection.execute(statement).rowcount == 1

    def _insert_parts(
        self, connection: sa.Connection, row: ChildRow, parts: Sequence[Part], owner: _Owner, attempt: int,
        killer: Killer | None,
    ) -> tuple[int, bool]:  # fmt: skip
        """The next free position, and whether the killer is in quarantine from now on."""
        quarantined = False
        added: list[Share] = []
        ran = _ran(connection, row) if any(part.status is not Status.PENDING for part in parts) else None
        position = owner.next_position
        for part, weight in zip(parts, _weights(row, parts), strict=True):
            shard = position % owner.shards
            values = _values(row, part, position, shard, attempt)
            connection.execute(sa.insert(child).values(**values, weight=weight))
            added.append(Share(shard, part.item_count, weight, part.status, row.task, ran))
            if part.evidence is not None:
                key = ChildKey(row.batch_id, position)
                told = replace(Attempt.of(row, attempt), key=key)
                record(connection, told, part.status, part.evidence, Verdict.OBSERVED)
                quarantined |= count_kill(connection, row.task, killer, key, part.evidence)
            position += 1
        regroup(connection, row.batch_id, [Share(row.shard, row.item_count, row.weight)], added)
        connection.execute(sa.update(batch).where(batch.c.id == row.batch_id).values(next_position=position))
        return position, quarantined

    def splits_of(self, row: ChildRow) -> int:
        """How often the items of this row's header position have been halved.

        Where an item was found, or what was done is known, each death brought the end nearer: those are not counted.
        """
        origin = row.position if row.origin is None else row.origin
        part = child.alias("part")
        done_before = sa.exists().where(
            part.c.batch_id == row.batch_id, part.c.origin == origin, part.c.split_from == child.c.position,
            part.c.status == Status.COMPLETED.value, part.c.dispatches == 0,
        )  # fmt: skip
        is_split = sa.and_(
            child.c.batch_id == row.batch_id, child.c.status == Status.SPLIT.value, child.c.cause.is_not(None),
            ~done_before,
        )  # fmt: skip
        # Two counts, each by an index: with OR, SQLite reads the whole batch.
        itself, parts = (
            sa.select(sa.func.count()).where(is_split, where).scalar_subquery()
            for where in (child.c.position == origin, child.c.origin == origin)
        )
        with self.read() as connection:
            return int(connection.execute(sa.select(itself + parts)).scalar_one())


def _ran(connection: sa.Connection, row: ChildRow) -> float | None:
    """Seconds since its last start."""
    if row.started_at is None:
        return None
    return float(connection.execute(sa.select(age(sa.literal(row.started_at, Moment)))).scalar_one())


def _weights(row: ChildRow, parts: Sequence[Part]) -> list[int]:
    """The child's weight, shared out by items; none of it is lost by rounding."""
    weights, before, given = [], 0, 0
    for part in parts:
        before += part.item_count
        until = row.weight * before // row.item_count if row.item_count else 0
        weights.append(until - given)
        given = until
    weights[-1] += row.weight - given
    return weights


def _values(row: ChildRow, part: Part, position: int, shard: int, attempt: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "batch_id": row.batch_id, "position": position, "kind": Kind.CHILD.value, "round": row.round, "shard": shard,
        "task": row.task, "task_id": part.task_id, "status": part.status.value, "split_from": row.position,
        "origin": row.position if row.origin is None else row.origin, "policy": row.policy,
        "items": list(part.items) or None, "item_count": part.item_count, "created_at": now(),
        "queue": part.queue or row.queue, "rerouted": row.rerouted or part.queue is not None,
        "isolated": part.isolated, "expires_at": row.expires_at, "signature": part.signature, "link": row.link,
        "result_id": None if row.result_id is None else part.task_id,
    }  # fmt: skip
    if part.status is not Status.PENDING:  # it ended in the attempt that its predecessor died in
        values.update(
            finished_at=now(), started_at=row.started_at, attempt=attempt, run_token=row.run_token,
            worker_id=row.worker_id, slot=row.slot,
        )  # fmt: skip
    if part.evidence is not None:
        values.update(cause=part.evidence.cause.value, verdict=Verdict.OBSERVED.value, crashes=_deaths(part))
    return values


def _deaths(part: Part) -> int:
    """One that is set aside by quarantine was not even sent."""
    return int(part.evidence is not None and part.evidence.cause is not Cause.QUARANTINED)


__all__ = ["Splitting"]
