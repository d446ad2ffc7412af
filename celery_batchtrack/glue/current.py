"""Who am I, from inside a child."""

from __future__ import annotations

from celery import current_task

from .batch import Batch, Child
from .extension import BatchTrack
from .tracked_task import current_run


def current_batch() -> Batch | None:
    """The batch of the running child or callback; None outside one."""
    current = current_run()
    if current is None:
        return None
    return Batch._handle(BatchTrack.of(current_task.app), current.run.ticket.key.batch_id)


def current_child() -> Child | None:
    """The row of the running child or callback, read now; None outside one."""
    current = current_run()
    if current is None:
        return None
    row = BatchTrack.of(current_task.app).store.child(current.run.ticket.key)
    return None if row is None else Child(row)
