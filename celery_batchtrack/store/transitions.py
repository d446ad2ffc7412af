"""The one place that writes `status`: a transition becomes one guarded UPDATE."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.states import SETTLED, BatchStatus, BatchTransition, Kind, Status, Transition

from . import outcomes
from .clock import now
from .schema import RAN, batch, child, tally

#: Columns that a transition needs from the rows it changed, to move the tally.
MOVED = (
    child.c.shard, child.c.kind, child.c.item_count, child.c.weight, child.c.task.label("of_task"),
    RAN.label("seconds"),
)  # fmt: skip



def change(transition: Transition, *guards: sa.ColumnElement[bool], **values: Any) -> sa.Update:
    """UPDATE of the children that `guards` select and whose state allows `transition`."""
    settled: dict[str, Any] = {"status": transition.target.value}
    if transition.settles:
        settled["finished_at"] = now()
    elif transition.target is Status.PENDING:
        settled.update(worker_id=None, slot=None, started_at=None, finished_at=None)
    allowed = [source.value for source in transition.sources]
    state = child.c.status == allowed[0] if len(allowed) == 1 else child.c.status.in_(allowed)
    return sa.update(child).where(*guards, state).values({**settled, **values})


def lock_in_order(connection: sa.Connection, *guards: sa.ColumnElement[bool]) -> None:
    """Lock the children that `guards` select by position, so that writers of several never wait crosswise."""
    if connection.dialect.name == "sqlite":
        return
    locked = sa.select(child.c.position).where(*guards).order_by(child.c.position).with_for_update().subquery()
    connection.execute(sa.select(sa.func.count()).select_from(locked))


def change_batch(
    transition: BatchTransition, target: BatchStatus, *guards: sa.ColumnElement[bool], **values: Any
) -> sa.Update:
    """UPDATE of the batches that `guards` select and whose state allows `transition` to `target`."""
    if target not in transition.targets:
        raise ValueError(f"{transition.name} does not lead to {target}")
    ended = {"finished_at": now()} if target not in (BatchStatus.OPEN, BatchStatus.RUNNING) else {}
    allowed = [source.value for source in transition.sources]
    return (
        sa.update(batch).where(*guards, batch.c.status.in_(allowed)).values({"status": target.value, **ended, **values})
    )


def counted(source: Status | None, target: Status, items: Any, weight: Any, count: Any = 1) -> dict[str, Any]:
    """Tally columns that change when a child goes from `source` to `target` (open states count nowhere)."""
    values: dict[str, Any] = {}
    done = (target in SETTLED) - (source in SETTLED)
    if done:
        values["weight_done"] = tally.c.weight_done + done * weight
    for state, sign in ((source, -1), (target, 1)):
        if state in SETTLED:
            values[state.value] = tally.c[state.value] + sign * count
            values[f"items_{state.value}"] = tally.c[f"items_{state.value}"] + sign * items
    return values


#: How many children of the shard are still open, after the change.
OPEN_IN_SHARD = (tally.c.total - tally.c.completed - tally.c.failed - tally.c.crashed - tally.c.cancelled).label("open")


def move(
    connection: sa.Connection, batch_id: Any, rows: Iterable[Sequence[Any]], source: Status | None, target: Status
) -> bool:
    """Move the tally for `rows` (as `MOVED`) of one batch, shards in order, and count what ended.

    Answers whether a shard has nothing open any more: then the batch may be over.
    """
    rows = list(rows)
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for shard, kind, item_count, weight, *_ in rows:
        if kind == Kind.CHILD:
            sums[shard][0] += 1
            sums[shard][1] += item_count
            sums[shard][2] += weight
    emptied = False
    for shard in sorted(sums):
        count, items, weight = sums[shard]
        left = connection.execute(
            sa.update(tally)
            .where(tally.c.batch_id == batch_id, tally.c.shard == shard)
            .values(counted(source, target, items, weight, count))
            .returning(OPEN_IN_SHARD)
        ).scalar_one()
        emptied |= left == 0
    if target in SETTLED:
        outcomes.count(connection, batch_id, rows, target)
    return emptied


@dataclass(frozen=True, slots=True)
class Share:
    """What one child adds to its shard of the tally."""

    shard: int
    items: int
    weight: int
    status: Status = Status.PENDING
    task: str = ""
    seconds: float | None = None  # that it ran, if it has ended


def regroup(connection: sa.Connection, batch_id: Any, removed: Iterable[Share], added: Iterable[Share]) -> None:
    """Move the tally where open children go and others come in their place, shards in order."""
    added = list(added)
    sums: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for sign, shares in ((-1, removed), (1, added)):
        for share in shares:
            _add_share(sums[share.shard], share, sign)
    for shard in sorted(sums):
        connection.execute(
            sa.update(tally)
            .where(tally.c.batch_id == batch_id, tally.c.shard == shard)
            .values({name: tally.c[name] + value for name, value in sums[shard].items()})
        )
    for status in SETTLED:
        ended = [share for share in added if share.status is status]
        rows = [(each.shard, Kind.CHILD, each.items, each.weight, each.task, each.seconds) for each in ended]
        outcomes.count(connection, batch_id, rows, status)


def _add_share(sums: dict[str, int], share: Share, sign: int) -> None:
    for name in ("total", *((share.status.value,) if share.status in SETTLED else ())):
        sums[name] += sign
        sums[f"items_{name}"] += sign * share.items
    sums["weight_total"] += sign * share.weight
    if share.status in SETTLED:
        sums["weight_done"] += sign * share.weight


def settle_and_count(settle: sa.Update, target: Status) -> sa.Select[Any]:
    """PostgreSQL: a settle of one running child, its tally shard and the count of what ended in one statement.

    Returns (kind, open): no row where the guard lost; `open` is None for a callback's row.
    """
    settled = settle.returning(child.c.batch_id, *MOVED).cte("settled")
    moved = (
        sa.update(tally)
        .where(
            tally.c.batch_id == settled.c.batch_id,
            tally.c.shard == settled.c.shard,
            settled.c.kind == Kind.CHILD.value,
        )
        .values(counted(None, target, settled.c.item_count, settled.c.weight))
        .returning(OPEN_IN_SHARD)
        .cte("moved")
    )
    told = sa.select(settled.c.kind, moved.c.open).select_from(settled.outerjoin(moved, sa.true()))
    return told.add_cte(outcomes.counted_with(settled, moved, target))
