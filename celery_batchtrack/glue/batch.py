"""`Batch`: what starts a batch, and the handle to one from anywhere."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from celery import current_task
from celery.result import assert_will_not_block

from celery_batchtrack import errors
from celery_batchtrack.behaviour import dispatch, finish, report, results
from celery_batchtrack.behaviour.report import Report
from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.ids import uuid7
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, NewBatch, NewChild, Progress
from celery_batchtrack.vocabulary.states import BatchStatus, EndReason, Kind, Status

from . import codec, signatures
from .extension import BatchTrack
from .narrate import logger
from .options import ValidOptions, validated
from .progress import shown


class Child:
    """A child, or a callback's row, as it was when it was read."""

    def __init__(self, row: ChildRow) -> None:
        self.row = row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "row":
            raise AttributeError(name)
        return getattr(self.row, name)

    def __repr__(self) -> str:
        return f"<Child #{self.row.position} {self.row.task} {self.row.status}>"

    @property
    def result(self) -> Any:
        """What the task returned; None for a child that did not complete."""
        return None if self.row.result is None else codec.loads(self.row.result)

    @property
    def args(self) -> list[Any]:
        """The stored positional arguments; empty once the child completed."""
        return list(signatures.parsed(self.row.signature).get("args") or ())

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(signatures.parsed(self.row.signature).get("kwargs") or {})


class Batch:
    """A batch of children, to be filled in a ``with`` block, or a handle to one (`Batch.get`).

    ``with Batch("upload", on_success=done.s()) as batch: batch.add(task.s(part))`` writes rows in blocks, so memory
    stays bounded; leaving the block seals the batch, and only then is anything sent (unless ``start="now"``). An
    exception inside, Ctrl-C, or the death of the process cancels it.

    Options: see `BatchOptions`. Errors: InvalidOption at the call, DatabaseUnavailable where the tracking
    database cannot be written; then nothing was started.
    """

    def __init__(self, name: str = "", *, app: Any = None, **options: Any) -> None:
        self._extension = BatchTrack.of(app)
        if name:
            options["name"] = name
        self._options: ValidOptions | None = validated(options, "batch")
        self.id: uuid.UUID = uuid7()
        self._opened = self._broken = False
        self._buffer: list[NewChild] = []
        self._client: Any = None
        #: Task ids of the children, where they were all given at once; empty on a handle from `get`.
        self.task_ids: list[str] = []

    # -- handles ---------------------------------------------------------------------------------

    @classmethod
    def _handle(cls, extension: BatchTrack, batch_id: uuid.UUID) -> Batch:
        batch = cls.__new__(cls)
        batch._extension, batch.id, batch._options = extension, batch_id, None
        batch._opened, batch._buffer, batch._client = False, [], None
        batch._broken = False
        batch.task_ids = []
        return batch

    @classmethod
    def get(cls, batch_id: uuid.UUID | str, app: Any = None) -> Batch:
        """The handle of an existing batch. Raises BatchNotFound."""
        extension = BatchTrack.of(app)
        return cls._handle(extension, extension.store.resolve(str(batch_id)))

    @classmethod
    def create(cls, name: str, children: Iterable[Any], *, app: Any = None, **options: Any) -> Batch:
        """Create, seal and start a batch in one go: rows in one transaction."""
        extension = BatchTrack.of(app)
        return start(extension, validated({"name": name, **options}, name), list(children))

    def __repr__(self) -> str:
        return f"<Batch {self.id}>"

    # -- filling ---------------------------------------------------------------------------------

    def __enter__(self) -> Batch:
        if self._options is None or self._opened:
            raise errors.BatchStateError("a batch is filled once: make a new Batch(…)")
        extension, options = self._extension, self._options
        self._client = extension.client()
        opener = self._client.__enter__()
        try:
            new = new_batch(extension, options, self.id, captured(extension), opened_by=opener)
            extension.store.create(new)
        except BaseException:
            self._client.__exit__(None, None, None)
            raise
        self._opened = True
        return self

    def add(self, *children: Any) -> None:
        """Add children (signatures). Raises BatchStateError outside the ``with`` block, or if the batch has ended."""
        if not self._opened:
            raise errors.BatchStateError(
                "children are added inside the block: `with Batch(…) as batch: batch.add(task.s(…))`"
            )
        self._check_whole()
        for child in children:
            self._buffer.append(signatures.new_child(self._extension.app, child, {}, "a child", self._stored()))
            if len(self._buffer) >= self._extension.settings.insert_chunk:
                self._flush()

    def _stored(self) -> dict[str, Any]:
        return {} if self._options is None else self._options.stored

    def add_many(self, children: Iterable[Any]) -> None:
        """Add the children of any iterable; it is read as it is written."""
        for child in children:
            self.add(child)

    def _flush(self) -> None:
        if not self._buffer:
            return
        block, self._buffer = self._buffer, []
        self._broken = True  # until the block is known to be written: it may be lost, or there already
        added = self._extension.store.add(self.id, block)
        self._broken = False
        if added is None:
            raise errors.BatchStateError(f"batch {self.id} is open no more: it was {self.status} meanwhile")
        if self._options is not None and self._options.start_now:
            dispatch.pump(self._extension.tracker, self.id)

    def _check_whole(self) -> None:
        if self._broken:
            raise errors.BatchStateError(
                f"a block of children of batch {self.id} could not be written: the batch will be cancelled; start anew"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened = False
        try:
            if kind is None:
                self._seal()
            else:
                self._cancel_after(kind)
        finally:
            self._client.__exit__(None, None, None)

    def _seal(self) -> None:
        tracker = self._extension.tracker
        try:
            self._check_whole()
            self._flush()
            sealed = tracker.store.seal(self.id)
        except BaseException:
            finish.cancel(tracker, self.id, EndReason.EXCEPTION)
            raise
        if not sealed:
            raise errors.BatchStateError(f"batch {self.id} could not start: it was {self.status} meanwhile")
        _send(self._extension, self.id)

    def _cancel_after(self, kind: type[BaseException]) -> None:
        try:
            finish.cancel(self._extension.tracker, self.id, EndReason.EXCEPTION)
        except errors.DatabaseUnavailable:
            # The user's own exception matters more. Our pulse ends with the block: a sweep cancels the batch.
            logger.exception("action=cancel_waits batch %s after %s", self.id, kind.__name__)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def row(self) -> BatchRow:
        """The batch's row. Raises BatchNotFound (pruned, or its owner deleted)."""
        row = self._extension.store.batch(self.id)
        if row is None:
            raise errors.BatchNotFound(f"no batch {self.id}")
        return row

    @property
    def status(self) -> BatchStatus:
        return BatchStatus(self.row.status)

    @property
    def name(self) -> str:
        return self.row.name

    def progress(self) -> Progress:
        """Counts by state, percent, rate, ETA. The cost does not grow with the batch."""
        return self._extension.store.progress(self.id)

    def iter_progress(self, every: float | None = None) -> Iterator[Progress]:
        """Progress every so many seconds (default `batchtrack_wait_poll`), until the batch has ended; the last one
        is of the ended batch. Runs a sweep when nobody else does."""
        pause = self._extension.settings.wait_poll if every is None else every
        progress = self.progress()
        while True:
            yield progress
            if progress.ended:
                return
            self._pause(pause)
            progress = self._progress_or(progress)

    def _progress_or(self, last: Progress) -> Progress:
        """A database that goes away while somebody waits is waited for, too."""
        try:
            return self.progress()
        except errors.DatabaseUnavailable as error:
            logger.warning("action=wait_waits batch %s: %s", self.id, error)
            return last

    def _pause(self, seconds: float) -> None:
        """Sleep; sweep whenever nobody else has for an interval. Trouble of a sweep is not the waiter's."""
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            time.sleep(max(0.0, min(left, self._extension.settings.detect_every)))
            try:
                self._extension.sweep_if_overdue()
            except Exception as error:  # noqa: BLE001 (broker, database, anything)
                logger.warning("action=sweep_waits %s: %s", type(error).__name__, error)
            if time.monotonic() >= until:
                return

    def wait(self, timeout: float | None = None, *, bar: bool = False, callbacks: bool = False) -> BatchStatus:
        """Wait for the end; returns how it ended. Inside a task it raises, as Celery's `get()` does.

        Arguments:
            timeout: seconds; then BatchTimeout, and the batch goes on.
            bar: show progress on a terminal (with rich, if installed).
            callbacks: also wait until the callbacks have settled.
        """
        assert_will_not_block()
        return self._wait(timeout, bar=bar, callbacks=callbacks)

    def _wait(self, timeout: float | None, *, bar: bool = False, callbacks: bool = False) -> BatchStatus:
        deadline = None if timeout is None else time.monotonic() + timeout
        told = False
        for progress in shown(self.iter_progress(), bar=bar):
            self._check_time(deadline, timeout, progress)
            if progress.paused_at is not None and not told:
                logger.warning("action=wait_paused batch %s is paused: %s", self.id, progress.pause_reason)
            told = progress.paused_at is not None
        while callbacks and any(row.status in ("pending", "running") for row in self._callback_rows()):
            self._check_time(deadline, timeout, None)
            self._pause(self._extension.settings.wait_poll)
        return BatchStatus(progress.status)

    def _check_time(self, deadline: float | None, timeout: float | None, progress: Progress | None) -> None:
        if deadline is None or time.monotonic() <= deadline or (progress is not None and progress.ended):
            return
        if progress is None:
            raise errors.BatchTimeout(f"batch {self.id} has ended, but its callbacks have not after {timeout:g} s")
        raise errors.BatchTimeout(
            f"batch {self.id} has not ended after {timeout:g} s: {progress.pending} children pending, "
            f"{progress.running} running; "
            + (f"it is paused ({progress.pause_reason}): resume() it" if progress.paused_at else "it goes on")
        )

    def _callback_rows(self) -> list[ChildRow]:
        return self._extension.store.callback_rows(self.id)

    def children(self, status: str | Status | Sequence[str] | None = None, kind: str = "child") -> Iterator[Child]:
        """Children by position, in bounded memory; with ``kind="callbacks"`` the callbacks' rows."""
        statuses = () if status is None else (status,) if isinstance(status, str) else tuple(status)
        for each in statuses:
            if each not in Status._value2member_map_:
                raise errors.InvalidOption(f"{each!r} is no status of a child: {[str(s) for s in Status]}")
        if kind not in ("child", "callbacks"):
            raise errors.InvalidOption(f"kind must be 'child' or 'callbacks', not {kind!r}")
        rows = self._extension.store.children(
            self.id, statuses=[str(each) for each in statuses], callbacks=kind == "callbacks"
        )
        return (Child(row) for row in rows)

    def results(self) -> Iterator[Any]:
        """Results of header positions in order, in bounded memory: of those of which something completed. The parts of
        a child that was split are merged as its task says."""
        return results.of_batch(self._extension.tracker, self.id)

    def incidents(self) -> list[IncidentRow]:
        """Evidence of every attempt that did not complete, oldest first."""
        return self._extension.store.incidents(self.id)

    def report(self) -> Report:
        """What became of it: counts, and the children that did not complete."""
        return report.build(self._extension.tracker, self.id)

    # -- acting ----------------------------------------------------------------------------------

    def cancel(self, *, terminate: bool = True) -> bool:
        """End it now: pending children never start; running ones are terminated where the pool can.

        False if it had ended already.
        """
        return finish.cancel(self._extension.tracker, self.id, terminate=terminate) is not None

    def pause(self) -> bool:
        """Start none of its children any more; what runs goes on, and may end the batch.

        False if it was paused already, or has ended.
        """
        return finish.pause(self._extension.tracker, self.id)

    def resume(self) -> bool:
        """Go on after `pause`, or after the breaker (``max_crash_rate``) paused it. False if it was not paused."""
        return finish.resume(self._extension.tracker, self.id)


def captured(extension: BatchTrack) -> dict[str, Any]:
    """Headers of the creator's context, from the `capture=` hooks."""
    headers: dict[str, Any] = {}
    for hook in extension.capture:
        headers.update(hook() or {})
    return headers


def new_batch(
    extension: BatchTrack, options: ValidOptions, batch_id: uuid.UUID, headers: Mapping[str, Any],
    *, opened_by: uuid.UUID | None = None, errbacks: Sequence[Any] = (), body_id: str | None = None,
) -> NewBatch:  # fmt: skip
    """The row of a new batch, with its parent and callbacks."""
    app = extension.app
    callbacks = {
        kind.value: [signatures.callback_entry(app, each, kind) for each in declared]
        for kind, declared in options.callbacks.items()
    }
    if body_id is not None and callbacks[Kind.ON_SUCCESS.value]:
        callbacks[Kind.ON_SUCCESS.value][0]["task_id"] = body_id
    callbacks[Kind.ON_FAILURE.value] += [
        signatures.callback_entry(app, each, Kind.ON_FAILURE, errback_of=body_id) for each in errbacks
    ]
    parent = current_task.request if current_task and not current_task.request.called_directly else None
    return NewBatch(
        id=batch_id,
        name=options.name,
        callbacks=signatures.callbacks_json(callbacks),
        options=options.stored,
        headers=codec.dumps(dict(headers)) if headers else None,
        start_now=options.start_now,
        shards=extension.settings.shards,
        parent_task_id=parent.id if parent else None,
        parent_task=current_task.name if parent else None,
        root_id=(parent.root_id or parent.id) if parent else None,
        opened_by=opened_by,
    )


def start(
    extension: BatchTrack, options: ValidOptions, header: Sequence[Any], *, overrides: Mapping[str, Any] | None = None,
    errbacks: Sequence[Any] = (), body_id: str | None = None,
) -> Batch:  # fmt: skip
    """Create a sealed batch from signatures, in one transaction, and send its children."""
    headers = captured(extension)
    children = [
        signatures.new_child(extension.app, each, overrides or {}, f"header element {at}", options.stored)
        for at, each in enumerate(header)
    ]
    new = new_batch(extension, options, uuid7(), headers, errbacks=errbacks, body_id=body_id)
    _create(extension, new, children)
    _send(extension, new.id)
    batch = Batch._handle(extension, new.id)
    batch.task_ids = [child.task_id for child in children]
    return batch


def _create(extension: BatchTrack, new: NewBatch, children: Sequence[NewChild]) -> None:
    """Sealed, in one transaction. If only the commit's answer was lost, the batch is there."""
    try:
        extension.store.create(new, children, seal=True)
    except errors.DatabaseUnavailable:
        try:
            there = extension.store.batch(new.id) is not None
        except errors.DatabaseUnavailable:
            there = False
        if not there:
            raise


def _send(extension: BatchTrack, batch_id: uuid.UUID) -> None:
    """Send a sealed batch's children. The rows are there: what cannot be sent now, a sweep sends."""
    try:
        finish.started(extension.tracker, batch_id)
    except errors.DatabaseUnavailable as error:
        logger.warning("action=start_waits batch %s: %s (a sweep sends its children)", batch_id, error)
