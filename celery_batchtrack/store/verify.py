"""Invariants, each a query that must return 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.records import Violation
from celery_batchtrack.vocabulary.states import (
    BATCH_ALIVE,
    BATCH_ENDED,
    CALLBACK_KINDS,
    OPEN,
    SETTLED,
    BatchStatus,
    Kind,
    Status,
)

from .clock import age
from .engine import Connected
from .schema import batch, child, incident, meta, outcome, tally, worker

_OPEN = [each.value for each in OPEN]
_ENDED = [each.value for each in BATCH_ENDED]
_CHILD = child.c.kind == Kind.CHILD.value

#: Checks of what must become true again within detection time; all others must always hold.
LIVENESS = (
    "running_on_a_living_worker", "sealed_batch_with_nothing_open_ended", "waiting_for_a_batch_that_exists",
    "nested_batch_is_waited_for",
)  # fmt: skip

Check = Callable[[float], sa.Select[Any]]
#: name → query of the offenders' ids. The argument is the time (s) a dead worker's rows may stay running.
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def _label(*columns: Any) -> Any:
    text: sa.ColumnElement[str] = sa.cast(columns[0], sa.String(36))
    for column in columns[1:]:
        text = text + "#" + sa.cast(column, sa.String(36))
    return text.label("example")


_CHILD_LABEL = (child.c.batch_id, child.c.position)


@check
def tally_equals_rows(grace: float) -> sa.Select[Any]:
    """Every shard counts what its rows say, by children and by items."""
    counts = [sa.func.sum(sa.case((child.c.status != Status.SPLIT.value, 1), else_=0)).label("total")]
    counts.append(
        sa.func.sum(sa.case((child.c.status != Status.SPLIT.value, child.c.item_count), else_=0)).label("items_total")
    )
    for status in SETTLED:
        is_it = child.c.status == status.value
        counts.append(sa.func.sum(sa.case((is_it, 1), else_=0)).label(status.value))
        counts.append(sa.func.sum(sa.case((is_it, child.c.item_count), else_=0)).label(f"items_{status.value}"))
    weight = sa.func.sum(sa.case((child.c.status != Status.SPLIT.value, child.c.weight), else_=0))
    done = sa.func.sum(sa.case((child.c.status.in_([each.value for each in SETTLED]), child.c.weight), else_=0))
    counts += [weight.label("weight_total"), done.label("weight_done")]
    rows = (
        sa.select(child.c.batch_id, child.c.shard, *counts)
        .where(_CHILD)
        .group_by(child.c.batch_id, child.c.shard)
        .subquery()
    )
    names = [each.name for each in counts]
    differs = sa.or_(*(sa.func.coalesce(rows.c[name], 0) != tally.c[name] for name in names))
    joined = tally.outerjoin(rows, sa.and_(rows.c.batch_id == tally.c.batch_id, rows.c.shard == tally.c.shard))
    return sa.select(_label(tally.c.batch_id, tally.c.shard)).select_from(joined).where(differs)


@check
def what_ended_is_counted(grace: float) -> sa.Select[Any]:
    """As many ends as there are settled children were counted, or more, where some ended more than once. Batches that
    were there before ends were counted, or within a day of that, are not judged: older workers count nothing."""
    ended = [each.value for each in SETTLED]
    count = tally.c.completed + tally.c.failed + tally.c.crashed + tally.c.cancelled
    settled = (
        sa.select(tally.c.batch_id, sa.func.sum(count).label("n"))
        .group_by(tally.c.batch_id).subquery()
    )
    events = (
        sa.select(outcome.c.batch_id, sa.func.sum(outcome.c.children).label("n"))
        .where(outcome.c.status.in_(ended)).group_by(outcome.c.batch_id).subquery()
    )
    joined = settled.outerjoin(events, events.c.batch_id == settled.c.batch_id)
    joined = joined.join(batch, batch.c.id == settled.c.batch_id)
    too_old = sa.exists().where(meta.c.counted_from > batch.c.created_at)
    return (
        sa.select(_label(settled.c.batch_id)).select_from(joined)
        .where(sa.func.coalesce(events.c.n, 0) < settled.c.n, ~too_old)
    )  # fmt: skip


@check
def every_child_has_a_tally(grace: float) -> sa.Select[Any]:
    there = sa.exists().where(tally.c.batch_id == child.c.batch_id, tally.c.shard == child.c.shard)
    return sa.select(_label(*_CHILD_LABEL)).where(_CHILD, ~there)


@check
def settled_has_finished_at(grace: float) -> sa.Select[Any]:
    return sa.select(_label(*_CHILD_LABEL)).where(child.c.status.in_(_OPEN) != child.c.finished_at.is_(None))


@check
def pending_has_no_worker(grace: float) -> sa.Select[Any]:
    return sa.select(_label(*_CHILD_LABEL)).where(
        child.c.status == Status.PENDING.value,
        sa.or_(child.c.worker_id.is_not(None), child.c.slot.is_not(None)),
    )


@check
def running_has_worker_and_start(grace: float) -> sa.Select[Any]:
    return sa.select(_label(*_CHILD_LABEL)).where(
        child.c.status == Status.RUNNING.value,
        sa.or_(
            child.c.worker_id.is_(None), child.c.slot.is_(None), child.c.run_token.is_(None),
            child.c.started_at.is_(None), child.c.attempt < 1,
        ),
    )  # fmt: skip


@check
def not_completed_has_cause(grace: float) -> sa.Select[Any]:
    """A child that did not complete says why, and one that did has no cause."""
    unhappy = [Status.FAILED.value, Status.CRASHED.value, Status.CANCELLED.value]
    return sa.select(_label(*_CHILD_LABEL)).where(
        sa.or_(
            sa.and_(child.c.status.in_(unhappy), child.c.cause.is_(None)),
            sa.and_(child.c.status == Status.COMPLETED.value, child.c.cause.is_not(None)),
        )
    )


@check
def crashed_has_incident(grace: float) -> sa.Select[Any]:
    there = sa.exists().where(incident.c.batch_id == child.c.batch_id, incident.c.position == child.c.position)
    return sa.select(_label(*_CHILD_LABEL)).where(child.c.status == Status.CRASHED.value, ~there)


@check
def split_hands_on_every_item(grace: float) -> sa.Select[Any]:
    """The parts of a split child have its items: none lost, none doubled."""
    part = child.alias("part")
    handed = (
        sa.select(part.c.batch_id, part.c.split_from, sa.func.sum(part.c.item_count).label("total"))
        .where(part.c.split_from.is_not(None))
        .group_by(part.c.batch_id, part.c.split_from)
        .subquery()
    )
    own = sa.and_(handed.c.batch_id == child.c.batch_id, handed.c.split_from == child.c.position)
    return (
        sa.select(_label(*_CHILD_LABEL)).select_from(child.outerjoin(handed, own))
        .where(child.c.status == Status.SPLIT.value, sa.func.coalesce(handed.c.total, 0) != child.c.item_count)
    )  # fmt: skip


@check
def parts_belong_to_a_split_child(grace: float) -> sa.Select[Any]:
    """What was split off says of whom, and of which header position; and only a split child has parts."""
    whole, root = child.alias("whole"), child.alias("root")
    split = sa.exists().where(
        whole.c.batch_id == child.c.batch_id, whole.c.position == child.c.split_from,
        whole.c.status == Status.SPLIT.value,
    )  # fmt: skip
    header = sa.exists().where(
        root.c.batch_id == child.c.batch_id, root.c.position == child.c.origin, root.c.origin.is_(None),
        root.c.status == Status.SPLIT.value,
    )  # fmt: skip
    return sa.select(_label(*_CHILD_LABEL)).where(
        sa.or_(
            child.c.split_from.is_(None) != child.c.origin.is_(None),
            sa.and_(child.c.split_from.is_not(None), sa.or_(~split, ~header)),
        )
    )


@check
def running_on_a_living_worker(grace: float) -> sa.Select[Any]:
    """Nothing runs on a worker that is unknown, or was stopped, lost or silent for longer than allowed."""
    over = sa.func.coalesce(worker.c.stopped_at, worker.c.lost_at)
    dead = sa.or_(
        worker.c.id.is_(None),
        sa.and_(over.is_not(None), age(over) > grace),
        sa.and_(over.is_(None), age(worker.c.beat_at) > worker.c.lease * 2 + grace),
    )
    joined = child.outerjoin(worker, worker.c.id == child.c.worker_id)
    return (
        sa.select(_label(*_CHILD_LABEL)).select_from(joined)
        .where(child.c.status == Status.RUNNING.value, dead)
    )  # fmt: skip


@check
def no_slot_runs_two(grace: float) -> sa.Select[Any]:
    return (
        sa.select(_label(child.c.worker_id, child.c.slot))
        .where(child.c.status == Status.RUNNING.value)
        .group_by(child.c.worker_id, child.c.slot)
        .having(sa.func.count() > 1)
    )


@check
def ended_batch_has_no_open_child(grace: float) -> sa.Select[Any]:
    return (
        sa.select(_label(*_CHILD_LABEL))
        .join(batch, batch.c.id == child.c.batch_id)
        .where(_CHILD, child.c.status.in_(_OPEN), batch.c.status.in_(_ENDED))
    )


@check
def ended_batch_has_finished_at(grace: float) -> sa.Select[Any]:
    return sa.select(_label(batch.c.id)).where(
        batch.c.status.in_([each.value for each in BATCH_ALIVE]) != batch.c.finished_at.is_(None)
    )


@check
def sealed_batch_with_nothing_open_ended(grace: float) -> sa.Select[Any]:
    open_child = sa.exists().where(child.c.batch_id == batch.c.id, _CHILD, child.c.status.in_(_OPEN))
    last = (
        sa.select(sa.func.coalesce(sa.func.max(child.c.finished_at), batch.c.sealed_at))
        .where(child.c.batch_id == batch.c.id)
        .scalar_subquery()
    )
    return sa.select(_label(batch.c.id)).where(
        batch.c.status == BatchStatus.RUNNING.value, ~open_child, age(last) > grace
    )


@check
def open_batch_dispatches_nothing(grace: float) -> sa.Select[Any]:
    """Without start="now", no child was published before the seal."""
    return (
        sa.select(_label(*_CHILD_LABEL))
        .join(batch, batch.c.id == child.c.batch_id)
        .where(_CHILD, batch.c.status == BatchStatus.OPEN.value, ~batch.c.start_now, child.c.dispatches > 0)
    )


def _declared(kind: Kind) -> sa.ColumnElement[bool]:
    return batch.c.callbacks.contains(f'"{kind.value}": [{{', autoescape=True)


@check
def ended_batch_has_its_callbacks(grace: float) -> sa.Select[Any]:
    """An ended batch has the rows of every callback kind that it declared for its outcome."""
    good = [BatchStatus.COMPLETED.value, BatchStatus.PARTIAL.value]
    unhappy = sa.exists().where(
        tally.c.batch_id == batch.c.id, tally.c.failed + tally.c.crashed > 0,
        batch.c.status.in_([BatchStatus.PARTIAL.value, BatchStatus.FAILED.value]),
    )  # fmt: skip
    due = {
        Kind.ON_FIRST_FAILURE: unhappy,
        Kind.ON_SUCCESS: batch.c.status.in_(good),
        Kind.ON_FAILURE: batch.c.status == BatchStatus.FAILED.value,
        Kind.ON_FINISH: batch.c.status.in_(_ENDED),
    }
    missing = [
        sa.and_(
            when, _declared(kind),
            ~sa.exists().where(
                child.c.batch_id == batch.c.id, child.c.round == batch.c.round, child.c.kind == kind.value
            ),
        )
        for kind, when in due.items()
    ]  # fmt: skip
    return sa.select(_label(batch.c.id)).where(sa.or_(*missing))


@check
def callback_rows_once(grace: float) -> sa.Select[Any]:
    return (
        sa.select(_label(child.c.batch_id, child.c.round))
        .where(child.c.kind.in_([each.value for each in CALLBACK_KINDS]))
        .group_by(child.c.batch_id, child.c.round, child.c.kind, child.c.ordinal)
        .having(sa.func.count() > 1)
    )


@check
def no_callback_before_the_end(grace: float) -> sa.Select[Any]:
    """Only `on_first_failure` and `on_progress` may exist while their batch runs."""
    return (
        sa.select(_label(*_CHILD_LABEL))
        .join(batch, batch.c.id == child.c.batch_id)
        .where(
            ~_CHILD, child.c.kind.not_in([Kind.ON_FIRST_FAILURE.value, Kind.ON_PROGRESS.value]),
            child.c.round == batch.c.round,
            batch.c.status.in_([each.value for each in BATCH_ALIVE]),
        )
    )  # fmt: skip


@check
def outcome_fits_the_children(grace: float) -> sa.Select[Any]:
    """`completed` exactly if every child completed; cancelled batches aside."""
    done = (
        sa.select(sa.func.coalesce(sa.func.sum(tally.c.total - tally.c.completed), 0))
        .where(tally.c.batch_id == batch.c.id)
        .scalar_subquery()
    )
    judged = [BatchStatus.COMPLETED.value, BatchStatus.PARTIAL.value, BatchStatus.FAILED.value]
    return sa.select(_label(batch.c.id)).where(
        batch.c.status.in_(judged), (batch.c.status == BatchStatus.COMPLETED.value) != (done == 0)
    )


@check
def positions_below_next(grace: float) -> sa.Select[Any]:
    return (
        sa.select(_label(*_CHILD_LABEL))
        .join(batch, batch.c.id == child.c.batch_id)
        .where(child.c.position >= batch.c.next_position)
    )


@check
def waiting_for_a_batch_that_exists(grace: float) -> sa.Select[Any]:
    """An open child waits for a batch that is there, that names it, and that is not long over."""
    nested = batch.alias("nested")
    names_it = sa.and_(nested.c.parent_batch == child.c.batch_id, nested.c.parent_position == child.c.position)
    called = child.alias("called")
    last = (
        sa.select(sa.func.coalesce(sa.func.max(called.c.finished_at), nested.c.finished_at))
        .where(called.c.batch_id == nested.c.id, called.c.kind == Kind.ON_SUCCESS.value)
        .scalar_subquery()
    )
    open_body = sa.exists().where(
        called.c.batch_id == nested.c.id, called.c.kind == Kind.ON_SUCCESS.value, called.c.status.in_(_OPEN),
    )  # fmt: skip
    over = sa.and_(nested.c.status.in_(_ENDED), ~open_body, age(last) > grace)
    return (
        sa.select(_label(*_CHILD_LABEL))
        .select_from(child.outerjoin(nested, nested.c.id == child.c.waits_on_batch))
        .where(
            child.c.waits_on_batch.is_not(None), child.c.status == Status.PENDING.value,
            sa.or_(nested.c.id.is_(None), nested.c.parent_batch.is_(None), ~names_it, over),
        )
    )  # fmt: skip


@check
def nested_batch_is_waited_for(grace: float) -> sa.Select[Any]:
    """A nested batch that has not ended has a child that waits for it, or one that settled just now."""
    holds = sa.exists().where(
        child.c.batch_id == batch.c.parent_batch, child.c.position == batch.c.parent_position,
        sa.or_(child.c.status.in_(_OPEN), age(child.c.finished_at) <= grace),
    )  # fmt: skip
    return sa.select(_label(batch.c.id)).where(
        batch.c.parent_batch.is_not(None), batch.c.status.in_([each.value for each in BATCH_ALIVE]), ~holds
    )


@check
def window_is_kept(grace: float) -> sa.Select[Any]:
    """No more children of a batch than its window lets through are at the broker, run, or wait for a batch that they
    became."""
    became = sa.and_(child.c.waits_on_batch.is_not(None), child.c.dispatches > 0)
    sent = sa.or_(child.c.dispatched_at.is_not(None), became)
    flying = sa.or_(child.c.status == Status.RUNNING.value, sa.and_(child.c.status == Status.PENDING.value, sent))
    count = (
        sa.select(sa.func.count()).where(child.c.batch_id == batch.c.id, _CHILD, flying).scalar_subquery()
    )
    return sa.select(_label(batch.c.id)).where(batch.c.max_in_flight.is_not(None), count > batch.c.max_in_flight)


class Verifying(Connected):
    """Proves the promise on the data itself."""

    def verify(self, grace: float) -> list[Violation]:
        """Run every check. `grace`: seconds that detection may take before a dead worker's row is a violation."""
        return [self._run(name, query(grace)) for name, query in CHECKS.items()]

    def _run(self, name: str, query: sa.Select[Any]) -> Violation:
        offenders = query.subquery()
        with self.read() as connection:
            count = connection.execute(sa.select(sa.func.count()).select_from(offenders)).scalar_one()
            examples = connection.execute(sa.select(offenders).limit(5)).scalars().all() if count else []
        return Violation(name, count, tuple(str(each) for each in examples))
