"""A batch's beginning: its rows, and its first messages."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from celery_batchtrack import errors
from celery_batchtrack.behaviour import finish
from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary.records import NewBatch, NewChild

from . import capture
from .extension import BatchTrack
from .narrate import logger


def captured(extension: BatchTrack) -> str | None:
    """What goes along from the creator's context, as a batch keeps it."""
    return capture.as_text(extension.captures.take())


def create(extension: BatchTrack, new: NewBatch, children: Sequence[NewChild]) -> None:
    """Sealed, in one transaction. If only the commit's answer was lost, the batch is there."""
    try:
        insert(extension, new, children, seal=True)
    except errors.DatabaseUnavailable:
        try:
            there = extension.store.batch(new.id) is not None
        except errors.DatabaseUnavailable:
            there = False
        if not there:
            raise


def insert(
    extension: BatchTrack, new: NewBatch, children: Sequence[NewChild] = (), *, seal: bool = False,
    store: Store | None = None,
) -> None:  # fmt: skip
    """`store`: in whose transaction, if it is not the extension's own."""
    store = store or extension.store
    if new.parent_batch is None:
        store.create(new, children, seal=seal)
        return
    name = str(new.id)
    waiting = NewChild(task="celery.group", task_id=name, signature='{"args": []}', weight=0, result_id=name)
    if store.create_nested(new, waiting, children, seal=seal) is None:
        raise errors.BatchStateError(
            f"parent_batch {new.parent_batch} has ended, or is not there: a batch is nested in one that still runs"
        )


def send(extension: BatchTrack, batch_id: uuid.UUID, *, anew: bool = True) -> None:
    """Send a sealed batch's children. The rows are there: what cannot be sent now, a sweep sends."""
    try:
        finish.started(extension.tracker, batch_id, anew=anew)
    except errors.DatabaseUnavailable as error:
        logger.warning("action=start_waits batch %s: %s (a sweep sends its children)", batch_id, error)
