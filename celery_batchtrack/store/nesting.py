"""A child of several steps: from link to link of a chain, and through a nested batch that it waits for."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import ChildRow, NewBatch, NewChild, Settled, Step
from celery_batchtrack.vocabulary.states import (
    ADVANCE,
    BATCH_ALIVE,
    BATCH_ENDED,
    JOIN,
    JOIN_ADVANCE,
    OPEN,
    REFUSE,
    SETTLED,
    WITHDRAW,
    Kind,
    Status,
)

from . import callbacks
from .batches import BatchWrites
from .clock import moment
from .incidents import TOLD, Attempt, record
from .rows import CHILD_COLUMNS, child_row
from .schema import Json, batch, child
from .transitions import MOVED, Share, change, move, regroup

_ALIVE = [each.value for each in BATCH_ALIVE]
_OPEN = [each.value for each in OPEN]


#: How the reason begins for which a nested batch is paused with its parent.
WITH_PARENT = "with batch "


class _Lost(Exception):
    """A guard was lost: nothing of the transaction may stay."""


def _here(key: ChildKey) -> sa.ColumnElement[bool]:
    return sa.and_(child.c.batch_id == key.batch_id, child.c.position == key.position)


def _step_values(step: Step) -> dict[str, Any]:
    values: dict[str, Any] = {
        "task": step.task, "task_id": step.task_id, "signature": step.signature, "queue": step.queue,
        "link": child.c.link + 1, "result_id": sa.func.coalesce(child.c.result_id, child.c.task_id),
        "retries": 0, "crashes": 0, "dispatches": 0, "policy": None, "isolated": False,
        "rerouted": False, "dispatched_at": None, "waits_on_batch": None, "verdict": None,
        "not_before": moment(step.countdown, step.eta),
        "expires_at": moment(step.expires_in, step.expires_at),
    }  # fmt: skip
    if step.items is not None:
        as_many = child.c.item_count == len(step.items)
        values["items"] = sa.case((as_many, sa.literal(list(step.items), Json)), else_=sa.null())
    return values


class Nesting(BatchWrites):
    """Guarded writes of what lies between a child's links. Losing a guard is an answer, not an error."""

    def advance(self, key: ChildKey, token: uuid.UUID, step: Step) -> bool:
        """``running → pending``: the next link, with this one's result bound; or what replaces this one."""
        statement = change(ADVANCE, _here(key), child.c.run_token == token, **_step_values(step))
        with self.write() as connection:
            return connection.execute(statement).rowcount == 1

    # -- nested batches --------------------------------------------------------------------------

    def nest(self, row: ChildRow, new: NewBatch, children: Sequence[NewChild]) -> bool:
        """Create the batch that a pending child's present step is, and let the child wait for it: both or neither.

        The child weighs nothing while others stand for it: its batch's progress is read through theirs.
        """
        try:
            with self.write() as connection:
                # Locked, so that who pauses, cancels or deletes it finds the nested batch, or keeps it from being.
                parent = connection.execute(
                    sa.select(batch.c.status, batch.c.paused_at, batch.c.round)
                    .where(batch.c.id == row.batch_id)
                    .with_for_update(read=True)
                ).one_or_none()
                if not _lets_nest(row, parent):
                    return False
                self.create_in(connection, new, children, seal=True)
                statement = (
                    sa.update(child)
                    .where(
                        _here(row.key), child.c.status == Status.PENDING.value, child.c.attempt == row.attempt,
                        child.c.waits_on_batch.is_(None),
                    )
                    .values(waits_on_batch=new.id, dispatched_at=None, weight=0)
                )  # fmt: skip
                if connection.execute(statement).rowcount != 1:
                    raise _Lost
                if row.kind == Kind.CHILD and row.weight:
                    before = Share(row.shard, row.item_count, row.weight)
                    regroup(connection, row.batch_id, [before], [Share(row.shard, row.item_count, 0)])
        except _Lost:
            return False
        return True

    def create_nested(
        self, new: NewBatch, waiting: NewChild, children: Sequence[NewChild] = (), *, seal: bool = False
    ) -> int | None:
        """As `create`, and in the batch's parent (`new.parent_batch`) a child that waits for it. Returns that child's
        position; None if the parent has ended."""
        with self.write() as connection:
            found = connection.execute(
                sa.select(batch.c.next_position, batch.c.shards)
                .where(batch.c.id == new.parent_batch, batch.c.status.in_(_ALIVE))
                .with_for_update(key_share=True)
            ).one_or_none()
            if found is None or new.parent_batch is None:
                return None
            position = int(found.next_position)
            self._insert(connection, new.parent_batch, found.shards, position, [waiting])
            self.create_in(connection, replace(new, parent_position=position), children, seal=seal)
            connection.execute(
                sa.update(child)
                .where(_here(ChildKey(new.parent_batch, position)))
                .values(waits_on_batch=new.id)
            )  # fmt: skip
            return position

    def join(self, key: ChildKey, nested: uuid.UUID, nested_round: int, result: str | None, keep: bool) -> Settled:
        """``pending → completed`` with the result of the nested batch's round."""
        values: dict[str, Any] = {"result": result, "cause": None}
        if not keep:
            values["signature"] = None
        with self.write() as connection:
            rows = connection.execute(
                change(JOIN, _here(key), _ended(nested, nested_round), **values).returning(*MOVED)
            ).all()
            if not rows:
                return Settled(False)
            look = move(connection, key.batch_id, rows, None, Status.COMPLETED)
            return Settled(True, look=look, body=rows[0].kind == Kind.ON_SUCCESS)

    def join_advance(self, key: ChildKey, nested: uuid.UUID, nested_round: int, step: Step) -> bool:
        """The nested batch is done, and the child goes to its next link."""
        values = {**_step_values(step), "attempt": child.c.attempt + 1}
        statement = change(JOIN_ADVANCE, _here(key), _ended(nested, nested_round), **values)
        with self.write() as connection:
            return connection.execute(statement).rowcount == 1

    def fail_waiting(
        self, key: ChildKey, nested: uuid.UUID, nested_round: int, status: Status, evidence: Evidence
    ) -> Settled:
        """``pending → failed | cancelled``: the nested batch did not succeed."""
        transition = WITHDRAW if status is Status.CANCELLED else REFUSE
        with self.write() as connection:
            first = callbacks.lock_for_first_failure(connection, key.batch_id, status)
            rows = connection.execute(
                change(transition, _here(key), _ended(nested, nested_round), cause=evidence.cause.value)
                .returning(*MOVED, *TOLD)
            ).all()  # fmt: skip
            if not rows:
                return Settled(False)
            record(connection, Attempt.told(key, rows[0], None), transition.target, evidence)
            look = move(connection, key.batch_id, rows, None, transition.target)
            called = callbacks.insert_first_failure(connection, first, rows[0].kind)
            return Settled(True, look=look, callbacks=called, body=rows[0].kind == Kind.ON_SUCCESS)

    # -- reading ---------------------------------------------------------------------------------

    def waiting_for(self, nested: uuid.UUID) -> ChildRow | None:
        """The open child that waits for a batch."""
        query = sa.select(*CHILD_COLUMNS).where(
            child.c.waits_on_batch == nested, child.c.status == Status.PENDING.value
        )
        with self.read() as connection:
            found = connection.execute(query).one_or_none()
        return None if found is None else child_row(found)

    def joinable(self) -> list[uuid.UUID]:
        """Nested batches that are over, their body included, and that somebody still waits for."""
        called = child.alias("called")
        open_body = sa.exists().where(
            called.c.batch_id == batch.c.id, called.c.round == batch.c.round,
            called.c.kind == Kind.ON_SUCCESS.value, called.c.ordinal == 0, called.c.status.in_(_OPEN),
            callbacks.is_callback(called),
        )  # fmt: skip
        query = (
            sa.select(batch.c.id)
            .join(child, child.c.waits_on_batch == batch.c.id)
            .where(
                child.c.waits_on_batch.is_not(None), child.c.status == Status.PENDING.value,
                batch.c.status.in_([each.value for each in BATCH_ENDED]), ~open_body,
            )
        )  # fmt: skip
        with self.read() as connection:
            return list(connection.execute(query).scalars())

    def nested_in(self, batch_id: uuid.UUID) -> list[tuple[uuid.UUID, bool]]:
        """(id, whether it is alive) of the batches that children or callbacks of this one wait for, or waited for."""
        query = sa.select(batch.c.id, batch.c.status).where(
            batch.c.parent_batch.is_not(None), batch.c.parent_batch == batch_id
        )
        with self.read() as connection:
            return [(row.id, row.status in _ALIVE) for row in connection.execute(query)]

    def out_of_step(self) -> list[tuple[uuid.UUID, uuid.UUID, bool]]:
        """(id, parent, whether that is paused) of nested batches that are not paused with their parent, or not resumed
        with it: who did that to the parent died before it came to them."""
        parent = batch.alias("parent")
        with_it = batch.c.pause_reason.startswith(WITH_PARENT)
        query = (
            sa.select(batch.c.id, parent.c.id, parent.c.paused_at.is_not(None))
            .join(parent, parent.c.id == batch.c.parent_batch)
            .where(
                batch.c.parent_batch.is_not(None), batch.c.status.in_(_ALIVE), parent.c.status.in_(_ALIVE),
                sa.or_(
                    sa.and_(parent.c.paused_at.is_not(None), batch.c.paused_at.is_(None)),
                    sa.and_(parent.c.paused_at.is_(None), batch.c.paused_at.is_not(None), with_it),
                ),
            )
        )  # fmt: skip
        with self.read() as connection:
            return [(row[0], row[1], bool(row[2])) for row in connection.execute(query)]

    def bereft(self) -> list[ChildRow]:
        """Open children that wait for a batch that is not there any more."""
        there = sa.exists().where(batch.c.id == child.c.waits_on_batch)
        query = sa.select(*CHILD_COLUMNS).where(
            child.c.waits_on_batch.is_not(None), child.c.status == Status.PENDING.value, ~there
        )
        with self.read() as connection:
            return [child_row(row) for row in connection.execute(query)]

    def forsaken(self) -> list[uuid.UUID]:
        """Batches that have not ended although nobody waits for them any more."""
        query = (
            sa.select(batch.c.id)
            .join(
                child,
                sa.and_(child.c.batch_id == batch.c.parent_batch, child.c.position == batch.c.parent_position),
            )
            .where(
                batch.c.parent_batch.is_not(None), batch.c.status.in_(_ALIVE),
                child.c.status.in_([each.value for each in SETTLED]),
            )
        )  # fmt: skip
        with self.read() as connection:
            return list(connection.execute(query).scalars())


def _ended(nested: uuid.UUID, nested_round: int) -> sa.ColumnElement[bool]:
    """Fence: the child waits for this batch, and what was read of its end, its body's included, is of its present
    round and not about to change."""
    called = child.alias("called")
    body_runs = sa.exists().where(
        called.c.batch_id == nested, called.c.round == nested_round, called.c.kind == Kind.ON_SUCCESS.value,
        called.c.ordinal == 0, called.c.status.in_(_OPEN), callbacks.is_callback(called),
    )  # fmt: skip
    over = sa.exists().where(
        batch.c.id == nested, batch.c.round == nested_round,
        batch.c.status.in_([each.value for each in BATCH_ENDED]),
    )  # fmt: skip
    return sa.and_(child.c.waits_on_batch == nested, over, ~body_runs)


def _lets_nest(row: ChildRow, found: Any) -> bool:
    """As `batch_lets_claim`, of a batch that is locked."""
    if found is None:
        return False
    if row.kind != Kind.CHILD:
        return bool(row.round == found.round)
    return found.status in _ALIVE and found.paused_at is None


__all__ = ["WITH_PARENT", "Nesting"]
