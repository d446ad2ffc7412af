"""The end of a batch: decided under its lock, told after the commit; and of those that waited for it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from celery_batchtrack import errors
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, Finished, FirstFailure, Settled
from celery_batchtrack.vocabulary.states import OPEN, BatchStatus, Cause, Kind, Status

from . import failpoints, results
from .tracker import Tracker

#: What cannot be read, or made into the next step: trying again would not mend it.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Ended:
    """A batch that this call ended. `due`: batches with something to publish now, its own callbacks included."""

    finished: Finished
    due: tuple[uuid.UUID, ...] = ()


def conclude(tracker: Tracker, batch_id: uuid.UUID) -> Ended | None:
    """End the batch if nothing of it is open. Its callbacks are rows then, still to be published."""
    finished = tracker.store.finish(batch_id)
    if finished is None:
        return None
    failpoints.reach("finish.committed")
    return tell(tracker, finished)


def tell(tracker: Tracker, finished: Finished) -> Ended:
    """What follows the commit of an end."""
    tracker.emit(events.BatchEnded(finished.batch_id, finished.name, finished.status, finished.reason))
    if finished.untold:
        tell_backend(tracker, finished.batch_id)
    due = [finished.batch_id] if finished.callbacks else []
    if finished.parent_batch is not None:
        due += joined(tracker, finished.batch_id)
    return Ended(finished, tuple(due))


def tell_backend(tracker: Tracker, batch_id: uuid.UUID) -> None:
    """The body will never run, or did not complete: who waits for it in Celery's result backend learns of it. If that
    fails, a sweep tries again."""
    batch = tracker.store.batch(batch_id)
    if tracker.backend is None or batch is None:
        return
    why = tracker.store.first_failure(batch_id)
    if batch.status in (BatchStatus.COMPLETED, BatchStatus.PARTIAL):
        body = body_of(tracker, batch)
        why = None if body is None else tracker.store.failure(body)
    try:
        tracker.backend.tell(batch, why)
    except Exception as error:  # noqa: BLE001 (a backend may raise anything)
        tracker.emit(events.BackendAway(batch_id, f"{type(error).__name__}: {error}"))
        tracker.store.told(batch_id, batch.round, done=False)
        return
    tracker.store.told(batch_id, batch.round)


def body_settled(tracker: Tracker, key: ChildKey) -> list[uuid.UUID]:
    """An `on_success` callback is over: who waits for its batch may go on. Returns batches with something to
    publish."""
    if tracker.backend is not None:
        row = tracker.store.child(key)
        if row is not None and row.ordinal == 0 and row.status not in (*OPEN, Status.COMPLETED):
            batch = tracker.store.batch(key.batch_id)
            if batch is not None and batch.options.get("tell"):
                tell_backend(tracker, key.batch_id)
    return joined(tracker, key.batch_id)


# -- nested batches --------------------------------------------------------------------------------


def joined(tracker: Tracker, nested_id: uuid.UUID) -> list[uuid.UUID]:
    """Let the child that waits for a batch go on, if that batch and its body are over. Returns batches with something
    to publish."""
    nested = tracker.store.batch(nested_id)
    if nested is None or nested.parent_batch is None or not nested.ended:
        return []
    waiting = tracker.store.waiting_for(nested_id)
    if waiting is None:
        return []
    try:
        answer = _outcome(tracker, nested)
        if answer is None:
            return []
        if isinstance(answer, _Failed):
            settled = _fail(tracker, waiting, nested, answer)
        else:
            settled = _go_on(tracker, waiting, nested, answer.result)
    except (errors.BatchTrackError, *UNREADABLE) as error:
        if isinstance(error, errors.DatabaseUnavailable):
            raise
        evidence = Evidence(Cause.NOT_SENT, phase="before_claim", message=f"{type(error).__name__}: {error}")
        settled = _fail(tracker, waiting, nested, _Failed(Status.FAILED, evidence))
    return _after_join(tracker, waiting, settled)


def _fail(tracker: Tracker, waiting: ChildRow, nested: BatchRow, why: _Failed) -> Settled:
    settled = tracker.store.fail_waiting(waiting.key, nested.id, nested.round, why.status, why.evidence)
    if settled.written:
        tracker.emit(events.ChildSettled(waiting.key, waiting.task, why.status, waiting.attempt))
    return settled


def _after_join(tracker: Tracker, waiting: ChildRow, settled: Settled) -> list[uuid.UUID]:
    if not settled.written:
        return []
    parent = waiting.batch_id
    due = [parent] if settled.callbacks or settled.successors else []
    ended = conclude(tracker, parent) if settled.look else None
    if ended is not None:
        due += ended.due
    elif waiting.dispatches and _has_window(tracker, parent):
        due.append(parent)  # it was sent, and so had a place there, which is free now
    if settled.body:
        due += body_settled(tracker, waiting.key)
    if tracker.store.reach_milestones(parent):
        due.append(parent)
    return due


def _has_window(tracker: Tracker, batch_id: uuid.UUID) -> bool:
    batch = tracker.store.batch(batch_id)
    return batch is not None and batch.max_in_flight is not None


@dataclass(frozen=True, slots=True)
class _Done:
    result: Any


@dataclass(frozen=True, slots=True)
class _Failed:
    status: Status
    evidence: Evidence


def _outcome(tracker: Tracker, nested: BatchRow) -> _Done | _Failed | None:
    """What a nested batch comes to; None while its body runs."""
    if nested.status == BatchStatus.CANCELLED:
        message = f"nested batch {nested.id} was cancelled ({nested.reason})"
        return _Failed(Status.CANCELLED, Evidence(Cause.NESTED, phase="before_claim", message=message))
    if nested.status == BatchStatus.FAILED:
        return _failed(nested, tracker.store.first_failure(nested.id))
    body = body_of(tracker, nested)
    if body is None:
        wanted = nested.options.get("canvas") and nested.options.get("results") != "none"
        return _Done(list(results.of_batch(tracker, nested.id)) if wanted else None)
    if body.status in OPEN:
        return None
    if body.status == Status.COMPLETED:
        return _Done(None if body.result is None else tracker.codec.loads(body.result))
    return _failed(nested, tracker.store.failure(body))


def body_of(tracker: Tracker, batch: BatchRow) -> ChildRow | None:
    """The first `on_success` callback's row of the batch's present round."""
    rows = (row for row in tracker.store.callback_rows(batch.id) if row.kind == Kind.ON_SUCCESS and not row.ordinal)
    return next((row for row in rows if row.round == batch.round), None)


def _failed(nested: BatchRow, first: FirstFailure | None) -> _Failed:
    where = f"nested batch {nested.id} ({nested.name})"
    if first is None:
        return _Failed(Status.FAILED, Evidence(Cause.NESTED, phase="before_claim", message=f"{where} failed"))
    evidence = Evidence(
        Cause.NESTED, phase="before_claim", exception=first.exception, error=first.error,
        message=f"{where}: #{first.position} {first.status}: {first.message or first.cause}",
    )  # fmt: skip
    return _Failed(Status.FAILED, evidence)


def _go_on(tracker: Tracker, waiting: ChildRow, nested: BatchRow, result: Any) -> Settled:
    """To the next link, or to the end of the child."""
    parent = tracker.store.batch(waiting.batch_id)
    step = None if parent is None else tracker.canvas.next_step(waiting, parent, result)
    if step is not None:
        advanced = tracker.store.join_advance(waiting.key, nested.id, nested.round, step)
        return Settled(advanced, successors=int(advanced))
    wanted = waiting.kind != Kind.CHILD or (parent is not None and parent.options.get("results") != "none")
    text = tracker.codec.dumps(result) if wanted else None
    settled = tracker.store.join(waiting.key, nested.id, nested.round, text, keep=False)
    if settled.written:
        tracker.emit(events.ChildSettled(waiting.key, waiting.task, Status.COMPLETED, waiting.attempt))
    return settled
