"""What follows a settle, a seal, a pause, a cancel."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Finished, Settled
from celery_batchtrack.vocabulary.states import EndReason

from . import dispatch, ending
from .tracker import Tracker


def after(tracker: Tracker, key: ChildKey, settled: Settled, *, milestones: bool = True) -> None:
    """What follows a settle's commit: the finish check, and callbacks that became due. `milestones`: whether the batch
    may have such."""
    due: list[uuid.UUID] = [key.batch_id] if settled.callbacks else []
    if milestones and settled.written and tracker.store.reach_milestones(key.batch_id):
        due.append(key.batch_id)
    if settled.look:
        ended = ending.conclude(tracker, key.batch_id)
        due += ended.due if ended is not None else ()
    if settled.body:
        due += ending.body_settled(tracker, key)
    _publish(tracker, due)


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


def started(tracker: Tracker, batch_id: uuid.UUID) -> None:
    """What follows the seal's commit."""
    if look(tracker, batch_id) is None:
        dispatch.pump(tracker, batch_id)


def pause(tracker: Tracker, batch_id: uuid.UUID, reason: str = "by hand") -> bool:
    """Dispatch and claim none of its children any more, nor of batches nested in it; what runs goes on. False if it
    was paused or has ended."""
    done = tracker.store.pause(batch_id, reason)
    if done:
        tracker.emit(events.BatchPaused(batch_id, reason, by_hand=True))
        for nested in tracker.store.nested_alive(batch_id):
            pause(tracker, nested, f"with batch {batch_id}")
    return done


def resume(tracker: Tracker, batch_id: uuid.UUID) -> bool:
    """Go on with a paused batch, and those nested in it. False if it was not paused, or has ended."""
    done = tracker.store.resume(batch_id)
    if done:
        tracker.emit(events.BatchResumed(batch_id))
        for nested in tracker.store.nested_alive(batch_id):
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
    for nested in tracker.store.nested_alive(batch_id):
        cancel(tracker, nested, EndReason.PARENT, terminate=terminate)
    _publish(tracker, ending.tell(tracker, finished).due)
    if terminate and finished.cancelled_runs:
        tracker.publisher.terminate([run.task_id for run in finished.cancelled_runs])
    return finished
