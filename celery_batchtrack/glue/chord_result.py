"""What starting a chord returns: Celery's results, read from the tracking database."""

from __future__ import annotations

import time
from typing import Any

from celery import states
from celery.result import AsyncResult, GroupResult, assert_will_not_block

from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.states import BATCH_ENDED

from .backend import ResultTimeout, TablesBackend, as_batch_failed
from .batch import Batch


class _FromTables:
    """Reads the body's outcome from its row; works with and without a result backend."""

    batch: Batch
    id: str
    app: Any

    def _body_meta(self) -> dict[str, Any]:
        found = self.batch.result_id or self.id
        backend = TablesBackend(app=self.batch._extension.app)
        backend.ensure_chords_allowed()
        meta = backend.get_task_meta(found)
        if isinstance(meta["result"], Exception):
            meta["result"] = as_batch_failed(meta["result"])
        return meta

    def _wait_for_body(self, timeout: float | None, interval: float) -> dict[str, Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = min(interval, self.batch._extension.settings.wait_poll)
        self.batch._check_committed()  # who waits inside the transaction would wait for ever
        while True:
            meta = self._body_meta()
            if meta["status"] in states.READY_STATES:
                return meta
            if deadline is not None and time.monotonic() >= deadline:
                raise ResultTimeout(self._late(timeout))
            left = pause if deadline is None else min(pause, max(0.0, deadline - time.monotonic()))
            self.batch._pause(left)

    def _late(self, timeout: float | None) -> str:
        progress = self.batch.progress()
        if progress.status in BATCH_ENDED:
            return f"the callback of batch {self.batch.id} has not ended after {timeout:g} s"
        paused = f"; it is paused ({progress.pause_reason}): resume() it" if progress.paused_at else ""
        return (
            f"batch {self.batch.id} has not ended after {timeout:g} s: {progress.pending} children pending, "
            f"{progress.running} running{paused}"
        )

    def get(
        self, timeout: float | None = None, propagate: bool = True, interval: float = 0.5,
        disable_sync_subtasks: bool = True, callback: Any = None, **options: Any,
    ) -> Any:  # fmt: skip
        """What the body returned, once it has run.

        Errors: BatchTimeout (also Celery's TimeoutError) after `timeout` seconds, and the batch goes on. With
        `propagate`: what the body, or the child that kept it from running, raised, which is a BatchFailed too;
        BatchFailed that is Celery's ChordError too where that died without raising; TaskRevokedError where the batch
        was cancelled.
        """
        if disable_sync_subtasks:
            assert_will_not_block()
        meta = self._wait_for_body(timeout, interval)
        self._tell_who_waits()
        if meta["status"] in states.PROPAGATE_STATES and propagate:
            raise meta["result"]
        if callback is not None:
            callback(self.id, meta["result"])
        return meta["result"]

    wait = get  # Celery's deprecated alias

    def _tell_who_waits(self) -> None:
        """Callbacks given by `then()`."""

    @property
    def state(self) -> str:
        """SUCCESS, FAILURE, REVOKED, STARTED or PENDING, of the body."""
        return str(self._body_meta()["status"])

    def ready(self) -> bool:
        return bool(self.state in states.READY_STATES)

    def successful(self) -> bool:
        return bool(self.state == states.SUCCESS)

    def failed(self) -> bool:
        return bool(self.state in states.PROPAGATE_STATES)

    def forget(self) -> None:
        """Nothing to forget: rows stay until their batch is pruned."""


class ChordResult(_FromTables, AsyncResult):  # type: ignore[misc]
    """The body's result. `batch` is the handle of the chord's batch; `parent` leads to the header's group result."""

    def __init__(self, id: str, batch: Batch, app: Any = None, parent: Any = None) -> None:
        AsyncResult.__init__(self, id, backend=TablesBackend(app=app), app=app, parent=parent)
        self.batch = batch

    def _get_task_meta(self) -> dict[str, Any]:
        """What Celery's own properties (`result`, `info`, …) read."""
        return self._body_meta()

    def _tell_who_waits(self) -> None:
        self.on_ready(self)

    status = _FromTables.state

    def __reduce__(self) -> Any:
        return AsyncResult, (self.id,)


class ChordGroupResult(_FromTables, GroupResult):  # type: ignore[misc]
    """The result of a body that is a group: the list of what its tasks returned."""

    def __init__(self, id: str, results: Any, batch: Batch, app: Any = None, parent: Any = None) -> None:
        GroupResult.__init__(self, id, results, app=app, parent=parent)
        self.batch = batch

    join = join_native = _FromTables.get

    def __reduce__(self) -> Any:
        return GroupResult, (self.id, list(self.results))


class FrozenHeader(GroupResult):  # type: ignore[misc]
    """A header's results as a canvas freezes them, before it is started.

    Children ignore their results as far as a result backend is concerned, and what one of them raised is told under
    the id of the body: to ask for each of a thousand, at each look, would find nothing and take for ever.
    """

    def maybe_throw(self, callback: Any = None, propagate: bool = True) -> None:
        """Nothing here to throw."""


def frozen_header(body: Any, group_id: str) -> None:
    """Mark the header's result among the parents of a frozen body's."""
    node, seen = body, set()
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        if isinstance(node, GroupResult) and node.id == group_id:
            node.__class__ = FrozenHeader
        node = node.parent


def header_result(batch: Batch, group_id: str, ids: list[str], app: Any) -> GroupResult:
    """The header's results, by position, read from its children's rows."""
    known = {task_id: ChildKey(batch.id, position) for position, task_id in enumerate(ids)}
    backend = TablesBackend(app=app, known=known)
    return GroupResult(group_id, [AsyncResult(task_id, backend=backend, app=app) for task_id in ids], app=app)


def body_result(frozen: Any, batch: Batch, header: GroupResult, app: Any) -> Any:
    """A frozen body's result with the header's as its parent, as Celery's chord returns it."""
    if isinstance(frozen, GroupResult):
        return ChordGroupResult(frozen.id, frozen.results, batch, app=app, parent=header)
    return ChordResult(frozen.id, batch, app=app, parent=header)
