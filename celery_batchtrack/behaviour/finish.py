"""What follows a settle, a seal, a pause, a cancel."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from celery_batchtrack.store import WITH_PARENT
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Finished, Settled
from celery_batchtrack.vocabulary.states import Cause, EndReason, Status

from . import dispatch, ending
from .tracker import Tracker


def after(
    tracker: Tracker, key: ChildKey, settled: Settled, *, milestones: bool = True, refill: int = 1
) -> None:
    """What follows a settle's commit: the finish check, callbacks that became due, and the next children of a window.

    Arguments:
        milestones: whether the batch may have such callbacks.
        refill: one in so many of such settles fills up the window; 0: there is none.
    """
    due: list[uuid.UUID] = [key.batch_id] if settled.callbacks else []
    if milestones and settled.written and tracker.store.reach_milestones(key.batch_id):
        due.append(key.batch_id)
    if settled.look:
        ended = ending.conclude(tracker, key.batch_id)
        due += ended.due if ended is not None else ()
    if settled.body:
        due += ending.body_settled(tracker, key)
    _publish(tracker, due)
    if settled.written and key.batch_id not in due:
        dispatch.refill(tracker, key.batch_id, refill)


def never_ran(tracker: Tracker, key: ChildKey, attempt: int, status: Status, evidence: Evidence) -> None:
    """End a child that was not started for this attempt and will not be, with what follows."""
    settled = tracker.store.settle_unstarted(key, attempt, status, evidence)
    tell_settled(tracker, key, settled, status)
    after(tracker, key, settled)


def tell_settled(tracker: Tracker, key: ChildKey, settled: Settled, status: Status) -> None:
    """For those who know no more than the key of what they settled."""
    row = tracker.store.child(key) if settled.written else None
    if row is not None:
        tracker.emit(events.ChildSettled(key, row.task, status, row.attempt))


def _publish(tracker: Tracker, due: Iterable[uuid.UUID]) -> None:
    for batch_id in dict.fromkeys(due):
        dispatch.pump(tracker, batch_id)


def look(tracker: Tracker, batch_id: uuid.UUID) -> Finished | None:
    """End the batch if nothing of it is open, and publish its callbacks."""
    ended = ending.conclude(tracker, batch_id)
    if ended is None:
        return None
    _publish(tracker, ended.due)
    return ended.finished


def join(tracker: Tracker, nested_id: uuid.UUID) -> None:
    """Let the child that waits for a nested batch go on, if that is over."""
    _publish(tracker, ending.joined(tracker, nested_id))


def milestones(tracker: Tracker, batch_id: uuid.UUID) -> None:
    """Call the `on_progress` callbacks that are due."""
    if tracker.store.reach_milestones(batch_id):
        dispatch.pump(tracker, batch_id)


def started(tracker: Tracker, batch_id: uuid.UUID, *, anew: bool = True) -> None:
    """What follows the seal's commit. Not `anew`: it ran already, and has more children now."""
    row = tracker.store.batch(batch_id)
    if row is None:
        return
    if anew and not row.ended:
        tracker.emit(events.BatchStarted(batch_id, row.name, row.round, row.parent_batch))
    if look(tracker, batch_id) is None:
        dispatch.begin(tracker, row)


def pause(tracker: Tracker, batch_id: uuid.UUID, reason: str = "by hand") -> bool:
    """Dispatch and claim none of its children any more, nor of batches nested in it; what runs goes on. False if it
    was paused or has ended."""
    done = tracker.store.pause(batch_id, reason)
    if done:
        tracker.emit(events.BatchPaused(batch_id, reason, by_hand=True))
        for nested, alive in tracker.store.nested_in(batch_id):
            if alive:
                pause(tracker, nested, f"{WITH_PARENT}{batch_id}")
        dispatch.fill_shared(tracker, batch_id)
    return done


def resume(tracker: Tracker, batch_id: uuid.UUID) -> bool:
    """Go on with a paused batch, and those nested in it. False if it was not paused, or has ended."""
    done = tracker.store.resume(batch_id)
    if done:
        tracker.emit(events.BatchResumed(batch_id))
        for nested, alive in tracker.store.nested_in(batch_id):
            if alive:
                resume(tracker, nested)
        dispatch.pump(tracker, batch_id)
    return done


def cancel(
    tracker: Tracker, batch_id: uuid.UUID, reason: EndReason = EndReason.USER, *, terminate: bool = True
) -> Finished | None:
    """End the batch now, and those nested in it: pending children never start; running ones lose their rows and, with
    `terminate`, their processes (prefork). None if it had ended already."""
    finished = tracker.store.cancel(batch_id, reason, terminate=terminate)
    if finished is None:
        return None
    _cancel_nested(tracker, batch_id, {batch_id}, terminate=terminate)
    _publish(tracker, ending.tell(tracker, finished).due)
    dispatch.fill_shared(tracker, batch_id)
    if terminate and finished.cancelled_runs:
        tracker.publisher.terminate([run.task_id for run in finished.cancelled_runs])
    return finished


def _cancel_nested(tracker: Tracker, batch_id: uuid.UUID, seen: set[uuid.UUID], *, terminate: bool) -> None:
    """`seen`: batches that were looked at; a circle of parents, made by hand, must not go on for ever."""
    for nested, alive in tracker.store.nested_in(batch_id):
        if nested in seen or (alive and cancel(tracker, nested, EndReason.PARENT, terminate=terminate) is not None):
            continue
        seen.add(nested)
        _cancel_nested(tracker, nested, seen, terminate=terminate)  # it has ended, but what its body waits for has not


def keep_step(tracker: Tracker) -> None:
    """Pause and resume nested batches with their parents, where who began it died before it came to them, and where a
    breaker paused the parent."""
    for nested, parent, paused in tracker.store.out_of_step():
        if paused:
            pause(tracker, nested, f"{WITH_PARENT}{parent}")
        else:
            resume(tracker, nested)


def bury(tracker: Tracker) -> None:
    """End the children whose nested batch somebody has deleted."""
    for row in tracker.store.bereft():
        evidence = Evidence(Cause.NESTED, phase="before_claim", message=f"nested batch {row.waits_on_batch} is gone")
        never_ran(tracker, row.key, row.attempt, Status.FAILED, evidence)
