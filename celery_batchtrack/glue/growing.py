"""Children added to a batch from within one of its runs."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

from celery_batchtrack import errors
from celery_batchtrack.behaviour import dispatch
from celery_batchtrack.behaviour.run import Run
from celery_batchtrack.behaviour.tracker import Tracker
from celery_batchtrack.vocabulary.records import NewChild
from celery_batchtrack.vocabulary.states import Kind

from . import capture


class Growth:
    """Fenced by the run token: a run that has lost its row adds nothing."""

    def __init__(self, tracker: Tracker, run: Run) -> None:
        self._store, self._tracker = tracker.store, tracker
        self._key, self._token = run.ticket.key, run.claimed.token
        #: By a callback after the end: the batch is open again.
        self.reopened = False
        row = self._store.batch(self._key.batch_id)
        self.options: dict[str, Any] = {} if row is None else row.options
        #: What its batch carries.
        self.captured: capture.Captured = capture.of_batch(None if row is None else row.headers)
        #: It is called by a callback after the end.
        self.reopens = run.claimed.kind != Kind.CHILD and row is not None and row.ended

    def begin(self, opener: uuid.UUID | None) -> None:
        if opener is None:
            return
        self.reopened = self._store.reopen(self._key, self._token, opener)
        if not self.reopened:
            self._refuse()

    def add(self, block: Sequence[NewChild]) -> int | None:
        if self.reopened:
            return self._store.add(self._key.batch_id, block)
        added = self._store.extend(self._key, self._token, block)
        if added is None:
            self._refuse()
        dispatch.pump(self._tracker, self._key.batch_id)
        return added

    def seal(self) -> bool:
        return self._store.seal(self._key.batch_id) if self.reopened else True

    def _refuse(self) -> NoReturn:
        raise errors.BatchStateError(
            f"{self._key} is not the run that may extend its batch (any more): it was cancelled or taken for dead, "
            "another callback opened the next round, or who waited for its batch has gone on"
        )
