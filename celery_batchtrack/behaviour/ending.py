"""The end of a batch: decided under its lock, told after the commit."""

from __future__ import annotations

import uuid

from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.records import Finished

from . import failpoints
from .tracker import Tracker


def conclude(tracker: Tracker, batch_id: uuid.UUID) -> Finished | None:
    """End the batch if nothing of it is open. Its callbacks are rows then, still to be published."""
    finished = tracker.store.finish(batch_id)
    if finished is not None:
        failpoints.reach("finish.committed")
        tell(tracker, finished)
    return finished


def tell(tracker: Tracker, finished: Finished) -> None:
    tracker.emit(events.BatchEnded(finished.batch_id, finished.name, finished.status, finished.reason))
