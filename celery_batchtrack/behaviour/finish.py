"""Ending batches: the last settle looks, and so does every sweep."""

from __future__ import annotations

import uuid

from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Finished, Settled
from celery_batchtrack.vocabulary.states import EndReason

from . import dispatch, ending
from .tracker import Tracker


def after(tracker: Tracker, key: ChildKey, settled: Settled) -> None:
    """What follows a settle's commit: the finish check, and callbacks that became due."""
    finished = look(tracker, key.batch_id) if settled.look else None
    if settled.callbacks and not (finished and finished.callbacks):
        dispatch.pump(tracker, key.batch_id)


def look(tracker: Tracker, batch_id: uuid.UUID) -> Finished | None:
    """End the batch if nothing of it is open, and publish its callbacks."""
    finished = ending.conclude(tracker, batch_id)
    if finished is not None and finished.callbacks:
        dispatch.pump(tracker, batch_id)
    return finished


def started(tracker: Tracker, batch_id: uuid.UUID) -> None:
    """What follows the seal's commit."""
    if look(tracker, batch_id) is None:
        dispatch.pump(tracker, batch_id)


def pause(tracker: Tracker, batch_id: uuid.UUID, reason: str = "by hand") -> bool:
    """Dispatch and claim none of its children any more; what runs goes on. False if it was paused or has ended."""
    done = tracker.store.pause(batch_id, reason)
    if done:
        tracker.emit(events.BatchPaused(batch_id, reason, by_hand=True))
    return done


def resume(tracker: Tracker, batch_id: uuid.UUID) -> bool:
    """Go on with a paused batch. False if it was not paused, or has ended."""
    done = tracker.store.resume(batch_id)
    if done:
        tracker.emit(events.BatchResumed(batch_id))
        dispatch.pump(tracker, batch_id)
    return done


def cancel(
    tracker: Tracker, batch_id: uuid.UUID, reason: EndReason = EndReason.USER, *, terminate: bool = True
) -> Finished | None:
    """End the batch now: pending children never start; running ones lose their rows and, with
    `terminate`, their processes (prefork). None if it had ended already."""
    finished = tracker.store.cancel(batch_id, reason, terminate=terminate)
    if finished is None:
        return None
    ending.tell(tracker, finished)
    if finished.callbacks:
        dispatch.pump(tracker, batch_id)
    if terminate and finished.cancelled_runs:
        tracker.publisher.terminate([run.task_id for run in finished.cancelled_runs])
    return finished
