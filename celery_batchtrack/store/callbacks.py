"""Callback rows: inserted in the very transaction that makes them due, once per batch, round and kind."""

from __future__ import annotations

import json
import uuid
from collections.abc import Container
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.states import Kind, Status

from .clock import moment, now
from .schema import batch, child, tally
from .trees import tree_of


@dataclass(frozen=True, slots=True)
class DueCallbacks:
    """A locked batch and what it needs to insert callbacks."""

    batch_id: uuid.UUID
    round: int
    callbacks: str
    next_position: int


_COLUMNS = (batch.c.id, batch.c.round, batch.c.callbacks, batch.c.next_position)


#: In the words of the callbacks' partial index: with a parameter, SQLite would read the whole batch.
_IS_CALLBACK = child.c.kind != sa.literal_column(f"'{Kind.CHILD.value}'")


def is_callback(rows: Any) -> sa.ColumnElement[bool]:
    """The same for an alias of the table."""
    return rows.c.kind != sa.literal_column(f"'{Kind.CHILD.value}'")  # type: ignore[no-any-return]


def _no_row_yet(kind: Kind) -> sa.ColumnElement[bool]:
    return ~sa.exists().where(
        child.c.batch_id == batch.c.id, child.c.round == batch.c.round, child.c.kind == kind.value, _IS_CALLBACK
    )


def lock_for_first_failure(connection: sa.Connection, batch_id: uuid.UUID, status: Status) -> DueCallbacks | None:
    """Before a child fails: lock its batch if that may be the failure `on_first_failure` waits for.

    Locks go batch → child → tally everywhere, so this comes before the child is touched.
    """
    if status not in (Status.FAILED, Status.CRASHED):
        return None
    found = connection.execute(
        sa.select(*_COLUMNS)
        .where(batch.c.id == batch_id, batch.c.watch_failure, _no_row_yet(Kind.ON_FIRST_FAILURE))
        .with_for_update(key_share=True)
    ).one_or_none()
    if found is None:
        return None
    # The lock may have waited for another first failure: look again, in a new statement.
    again = connection.execute(
        sa.select(*_COLUMNS).where(batch.c.id == batch_id, _no_row_yet(Kind.ON_FIRST_FAILURE))
    ).one_or_none()
    return None if again is None else DueCallbacks(*again)


def insert_first_failure(connection: sa.Connection, due: DueCallbacks | None, kind: str) -> bool:
    """Insert the `on_first_failure` rows of a batch locked above. True if there are any."""
    if due is None or kind != Kind.CHILD:
        return False
    return insert(connection, due, (Kind.ON_FIRST_FAILURE,)) > 0


def insert(
    connection: sa.Connection, due: DueCallbacks, kinds: tuple[Kind, ...], *, only: Container[int] | None = None
) -> int:
    """Insert the rows of these kinds, positions from the batch's `next_position`. Returns how many.

    Milestones that were reached before are there already; `only` names those that are reached now.
    """
    declared: dict[str, list[dict[str, Any]]] = json.loads(due.callbacks)
    there = _there(connection, due) if Kind.ON_PROGRESS in kinds and Kind.ON_PROGRESS.value in declared else ()
    used = _used(connection, due) if due.round > 1 else ()
    rows = [
        _row(due, kind, ordinal, callback, used)
        for kind in kinds
        for ordinal, callback in enumerate(declared.get(kind.value, ()))
        if kind is not Kind.ON_PROGRESS or (ordinal not in there and (only is None or ordinal in only))
    ]
    if not rows:
        return 0
    for offset, row in enumerate(rows):
        row["position"] = due.next_position + offset
    connection.execute(
        sa.update(batch).where(batch.c.id == due.batch_id).values(next_position=due.next_position + len(rows))
    )
    for row in rows:
        connection.execute(sa.insert(child).values(created_at=now(), **row))
    return len(rows)


def _there(connection: sa.Connection, due: DueCallbacks) -> set[int]:
    """Ordinals of the milestones of this round that have a row."""
    query = sa.select(child.c.ordinal).where(
        child.c.batch_id == due.batch_id, child.c.round == due.round, child.c.kind == Kind.ON_PROGRESS.value,
        _IS_CALLBACK,
    )  # fmt: skip
    return set(connection.execute(query).scalars())


def _used(connection: sa.Connection, due: DueCallbacks) -> set[str]:
    """Task ids of callbacks of earlier rounds: workers remember revoked ids, so none is used twice."""
    query = sa.select(child.c.task_id).where(child.c.batch_id == due.batch_id, _IS_CALLBACK)
    return set(connection.execute(query).scalars())


def milestones_due(connection: sa.Connection, batch_id: uuid.UUID) -> set[int]:
    """Ordinals of the `on_progress` callbacks that are reached and have no row yet."""
    found = connection.execute(
        sa.select(*_COLUMNS).where(batch.c.id == batch_id, batch.c.watch_progress)
    ).one_or_none()
    if found is None:
        return set()
    due = DueCallbacks(*found)
    tree = tree_of([batch_id])
    done, total = connection.execute(
        sa.select(sa.func.sum(tally.c.weight_done), sa.func.sum(tally.c.weight_total))
        .join(tree, tree.c.id == tally.c.batch_id)
    ).one()  # fmt: skip
    declared = json.loads(due.callbacks).get(Kind.ON_PROGRESS.value, ())
    reached = {ordinal for ordinal, each in enumerate(declared) if total and 100 * done >= each["percent"] * total}
    return reached - _there(connection, due)


def _row(
    due: DueCallbacks, kind: Kind, ordinal: int, callback: dict[str, Any], used: Container[str]
) -> dict[str, Any]:
    task_id = callback["task_id"]
    return {
        "batch_id": due.batch_id,
        "kind": kind.value,
        "ordinal": ordinal,
        "round": due.round,
        "shard": 0,
        "task": callback["task"],
        "task_id": str(uuid.uuid4()) if task_id in used else task_id,
        "result_id": callback.get("result_id") or task_id,
        "status": Status.PENDING.value,
        "signature": callback["signature"],
        "queue": callback.get("queue"),
        "item_count": 0,
        "weight": 0,
        "not_before": moment(callback.get("countdown"), _parsed(callback.get("eta"))),
        "expires_at": moment(callback.get("expires_in"), _parsed(callback.get("expires_at"))),
    }


def _parsed(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
