"""Rounds: what did not complete runs again, and callbacks are called anew."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from celery_batchtrack import errors
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.records import BatchRow, Retried
from celery_batchtrack.vocabulary.states import NOT_COMPLETED, Status

from . import finish
from .tracker import Tracker


def retry(
    tracker: Tracker, batch_id: uuid.UUID, statuses: Sequence[Status] = NOT_COMPLETED,
    overrides: Mapping[str, Any] | None = None,
) -> int:  # fmt: skip
    """Run the children that ended so again, in the batch's next round. Returns how many; 0: there are none, and the
    batch stays as it is.

    Arguments:
        overrides: options of `apply_async` for their messages, and ``kwargs`` to be put over their own.

    Errors: BatchNotFound; BatchStateError while the batch runs.
    """
    row = tracker.store.batch(batch_id)
    if row is not None and row.parent_batch is not None and row.ended and tracker.store.waiting_for(batch_id) is None:
        raise errors.BatchStateError(
            f"batch {batch_id} is nested in {row.parent_batch}, which has gone on without it: retry that one, and this "
            "one goes on with it"
        )
    options = dict(overrides or {})
    queue = options.pop("queue", None)

    def rewrite(text: str) -> str:
        return tracker.codec.dumps(_changed(tracker.codec.loads(text), options))

    done = tracker.store.retry(batch_id, statuses, queue=queue, rewrite=rewrite if options else None)
    if done is None:
        raise errors.BatchNotFound(f"no batch {batch_id} in {tracker.store.shown_url}")
    if isinstance(done, BatchRow):
        if not done.ended:
            raise errors.BatchStateError(
                f"batch {batch_id} is {done.status}: retry it when it has ended (cancel() ends it now)"
            )
        if done.sealed_at is None:
            raise errors.BatchStateError(
                f"batch {batch_id} was cancelled before it was sealed ({done.reason}): not all of its children are "
                "there; make a new one"
            )
        return 0
    return _run(tracker, done)


def _run(tracker: Tracker, retried: Retried) -> int:
    tracker.emit(events.BatchRetried(retried.batch_id, retried.round, retried.children))
    _start(tracker, retried)
    return retried.children


def _start(tracker: Tracker, retried: Retried) -> None:
    for batch_id in retried.batches:
        finish.started(tracker, batch_id)
        if batch_id != retried.batch_id:
            finish.join(tracker, batch_id)  # it may have been over, and nobody had gone on with it


def _changed(signature: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in overrides.items() if name != "kwargs"}
    changed = {**signature, "options": {**(signature.get("options") or {}), **options}}
    if "kwargs" in overrides:
        changed["kwargs"] = {**(signature.get("kwargs") or {}), **overrides["kwargs"]}
    return changed


def retry_callbacks(tracker: Tracker, batch_id: uuid.UUID) -> int:
    """Call those callbacks of the present round again that did not complete. Returns how many."""
    done = tracker.store.retry_callbacks(batch_id, NOT_COMPLETED)
    if done is None or not done.children:
        return 0
    _start(tracker, done)
    return done.children
