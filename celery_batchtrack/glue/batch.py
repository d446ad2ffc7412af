"""`Batch`: what starts a batch, and the handle to one from anywhere."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from celery.result import assert_will_not_block

from celery_batchtrack import errors
from celery_batchtrack.behaviour import dispatch, finish, report, results, rounds
from celery_batchtrack.behaviour.report import Report
from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.ids import uuid7
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, NewChild, Progress
from celery_batchtrack.vocabulary.states import BatchStatus, EndReason, Status

from . import capture, codec, rows, signatures, starting
from .extension import BatchTrack
from .growing import Growth
from .joining import Deferred, Joined, joined
from .narrate import logger
from .options import ValidOptions, overridden, retried, validated
from .progress import shown
from .tracked_task import current_run


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
        if name:
            options["name"] = name
        self._prepare(BatchTrack.of(app), uuid7(), validated(options, "batch"), options.get("parent_batch"))

    def _prepare(
        self, extension: BatchTrack, batch_id: uuid.UUID, options: ValidOptions | None = None, outer: Any = None
    ) -> None:
        self._extension, self._options = extension, options
        self.id: uuid.UUID = batch_id
        self._opened = self._broken = False
        self._buffer: list[NewChild] = []
        self._client: Any = None
        self._chord: dict[str, Any] = {}
        self._more: Growth | None = None
        self._captured: capture.Captured = {}
        self._joined: Joined | Deferred | None = None
        #: It begins with a transaction whose commit nobody has told of yet.
        self._uncommitted = False
        self._outer = outer
        #: Ids of the children's results, where they were given here; empty on a handle from `get`.
        self.task_ids: list[str] = []
        #: Of a chord: the id by which its body's outcome is asked for.
        self.result_id: str | None = None

    # -- handles ---------------------------------------------------------------------------------

    @classmethod
    def _handle(cls, extension: BatchTrack, batch_id: uuid.UUID) -> Batch:
        batch = cls.__new__(cls)
        batch._prepare(extension, batch_id)
        return batch

    @classmethod
    def _of(cls, extension: BatchTrack, options: ValidOptions, **chord: Any) -> Batch:
        """To be filled from a chord's lazy header: its children start at once."""
        batch = cls.__new__(cls)
        batch._prepare(extension, uuid7(), replace(options, start=options.start or "now"))
        batch._chord = chord
        return batch

    @classmethod
    def get(cls, batch_id: uuid.UUID | str, app: Any = None) -> Batch:
        """The handle of an existing batch. Raises BatchNotFound."""
        extension = BatchTrack.of(app)
        return cls._handle(extension, extension.store.resolve(str(batch_id)))

    @classmethod
    def find(
        cls, *, name: str | None = None, tags: str | Sequence[str] = (), metadata: Mapping[str, Any] | None = None,
        status: str | BatchStatus | Sequence[str] | None = None, limit: int = 50, app: Any = None,
    ) -> list[Batch]:  # fmt: skip
        """Handles of batches with this name, all these tags, and these values in their metadata; newest first."""
        extension = BatchTrack.of(app)
        statuses = () if status is None else (status,) if isinstance(status, str) else tuple(status)
        for each in statuses:
            if each not in BatchStatus._value2member_map_:
                raise errors.InvalidOption(f"{each!r} is no status of a batch: {[str(s) for s in BatchStatus]}")
        wanted = (tags,) if isinstance(tags, str) else tuple(tags)
        found = extension.store.list_batches(
            statuses=[str(each) for each in statuses], name=name, tags=wanted, metadata=metadata, limit=limit
        )
        return [cls._handle(extension, each) for each in found]

    @classmethod
    def create(cls, name: str, children: Iterable[Any], *, app: Any = None, **options: Any) -> Batch:
        """Create, seal and start a batch in one go: rows in one transaction."""
        extension = BatchTrack.of(app)
        valid = validated({"name": name, **options}, name)
        _keep_order(options.get("parent_batch"))
        return start(extension, valid, list(children))

    def __repr__(self) -> str:
        return f"<Batch {self.id}>"

    # -- filling ---------------------------------------------------------------------------------

    def __enter__(self) -> Batch:
        if self._options is None or self._opened:
            raise errors.BatchStateError("a batch is filled once: make a new Batch(…)")
        if self._more is not None and not self._more.reopens:
            self._more.begin(None)  # a child of it runs: that holds it
        elif self._more is None:
            self._joined = joined(self._extension, self._options.transaction)
            self._open_in_transaction() if self._joined is not None else self._open_as_client()
        else:
            self._open_as_client()
        self._opened = True
        return self

    def _open_in_transaction(self) -> None:
        assert self._joined is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._joined)
            self._create(None)
            stack.pop_all()  # it is left at the end of the block
        self._uncommitted = True

    def _open_as_client(self) -> None:
        """With a pulse, so that the batch is cancelled if this process dies before it is sealed."""
        self._client = self._extension.client()
        opener = self._client.__enter__()
        try:
            if self._more is None:
                self._create(opener)
            else:
                self._more.begin(opener)
        except BaseException:
            self._client.__exit__(None, None, None)
            raise

    def _create(self, opener: uuid.UUID | None) -> None:
        extension, options = self._extension, self._options
        assert options is not None
        _keep_order(self._outer)
        self._captured = extension.captures.take()
        new = rows.new_batch(
            extension.app, extension.settings, options, self.id, capture.as_text(self._captured), opened_by=opener,
            **self._chord,
        )  # fmt: skip
        self.result_id = new.result_id
        if self._joined is None:
            starting.insert(extension, new)
        else:
            self._joined.insert(new)

    def add(self, *children: Any, weight: int | None = None) -> None:
        """Add children (signatures of any shape). Raises BatchStateError outside the ``with`` block, or if the batch
        has ended; InvalidOption for a wrong `weight` (each child's share of the progress, a whole number).
        """
        if not self._opened:
            raise errors.BatchStateError(
                "children are added inside the block: `with Batch(…) as batch: batch.add(task.s(…))`; to a batch that "
                "is sealed, from one of its own children or callbacks: `with current_batch().extend() as batch: …`"
            )
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int) or weight < 0):
            raise errors.InvalidOption(f"weight must be a whole number of at least 0, not {weight!r}")
        self._check_whole()
        differing = self._extension.captures.differing(self._captured)
        for child in children:
            made = rows.new_child(self._extension.app, child, f"child {len(self._buffer)}", self._stored(), weight)
            self._buffer.append(capture.kept_on(made, differing))
            if self._chord:
                self.task_ids.append(made.result_id or made.task_id)
            if len(self._buffer) >= self._extension.settings.insert_chunk:
                self.flush()

    def _stored(self) -> dict[str, Any]:
        if self._more is not None:
            return self._more.options
        return {} if self._options is None else self._options.stored

    def add_many(self, children: Iterable[Any]) -> None:
        """Add the children of any iterable; it is read as it is written."""
        for child in children:
            self.add(child)

    def flush(self) -> None:
        """Write what was added so far. Happens by itself every `batchtrack_insert_chunk` children, and at the end."""
        if not self._buffer:
            return
        block, self._buffer = self._buffer, []
        self._broken = True  # until the block is known to be written: it may be lost, or there already
        if self._joined is not None:
            added = self._joined.add(self.id, block)
        else:
            added = self._extension.store.add(self.id, block) if self._more is None else self._more.add(block)
        self._broken = False
        if added is None:
            raise errors.BatchStateError(f"batch {self.id} is open no more: it was {self.status} meanwhile")
        if self._options is not None and self._options.start_now and self._joined is None:
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
        if self._joined is not None:
            self._leave_transaction(self._joined, kind, error, trace)
            return
        try:
            if kind is None:
                self._seal()
            else:
                self._cancel_after(kind)
        finally:
            if self._client is not None:
                self._client.__exit__(None, None, None)

    def _leave_transaction(self, outer: Joined | Deferred, *raised: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.push(outer)
            if raised[0] is not None:
                stack.pop_all().__exit__(*raised)
                return
            self._check_whole()
            self.flush()
            if not outer.seal(self.id):
                raise errors.BatchStateError(f"batch {self.id} could not start: somebody ended it meanwhile")
            outer.afterwards(self.id, self._begun)

    def _begun(self) -> None:
        self._uncommitted = False

    def _check_committed(self) -> None:
        """Raises BatchNotFound while its transaction goes on, or if that was rolled back."""
        if not self._uncommitted:
            return
        if not self._is_there():
            raise errors.BatchNotFound(
                f"batch {self.id} is not there: the transaction that it begins with has not been committed (yet)"
            )
        self._uncommitted = False

    def _is_there(self) -> bool:
        store = self._extension.store
        try:
            return store.batch(self.id) is not None
        except errors.DatabaseUnavailable:
            if store.sqlite:  # in memory, as in tests, a table that is being written cannot be read
                return False
            raise

    def _seal(self) -> None:
        tracker = self._extension.tracker
        try:
            self._check_whole()
            self.flush()
            sealed = tracker.store.seal(self.id) if self._more is None else self._more.seal()
        except BaseException as error:
            self._cancel_after(type(error))
            raise
        if not sealed:
            raise errors.BatchStateError(f"batch {self.id} could not start: it was {self.status} meanwhile")
        starting.send(self._extension, self.id, anew=self._more is None or self._more.reopened)

    def _cancel_after(self, kind: type[BaseException]) -> None:
        if self._more is not None and not self._more.reopened:
            return  # what was added runs; the batch, of which a child still runs, goes on
        try:
            finish.cancel(self._extension.tracker, self.id, EndReason.EXCEPTION)
        except errors.DatabaseUnavailable:
            # The user's own exception matters more. Our pulse ends with the block: a sweep cancels the batch.
            logger.exception("action=cancel_waits batch %s after %s", self.id, kind.__name__)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def row(self) -> BatchRow:
        """The batch's row. Raises BatchNotFound (pruned, or its owner deleted)."""
        self._check_committed()
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
        self._check_committed()
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
        self._check_committed()
        rows = self._extension.store.children(
            self.id, statuses=[str(each) for each in statuses], callbacks=kind == "callbacks"
        )
        return (Child(row) for row in rows)

    def results(self) -> Iterator[Any]:
        """Results of header positions in order, in bounded memory: of those of which something completed. The parts of
        a child that was split are merged as its task says."""
        self._check_committed()
        return results.of_batch(self._extension.tracker, self.id)

    def incidents(self) -> list[IncidentRow]:
        """Evidence of every attempt that did not complete, oldest first."""
        self._check_committed()
        return self._extension.store.incidents(self.id)

    def report(self) -> Report:
        """What became of it: counts, and the children that did not complete."""
        self._check_committed()
        return report.build(self._extension.tracker, self.id)

    # -- acting ----------------------------------------------------------------------------------

    def cancel(self, *, terminate: bool = True) -> bool:
        """End it now: pending children never start; running ones are terminated where the pool can.

        False if it had ended already.
        """
        self._check_committed()
        return finish.cancel(self._extension.tracker, self.id, terminate=terminate) is not None

    def pause(self) -> bool:
        """Start none of its children any more, nor of batches nested in it; what runs goes on, and may end the batch.

        False if it was paused already, or has ended.
        """
        self._check_committed()
        return finish.pause(self._extension.tracker, self.id)

    def resume(self) -> bool:
        """Go on after `pause`, or after the breaker (``max_crash_rate``) paused it. False if it was not paused."""
        self._check_committed()
        return finish.resume(self._extension.tracker, self.id)

    def retry(
        self, only: str | Status | Sequence[str] | None = None, *, overrides: Mapping[str, Any] | None = None
    ) -> int:
        """Run the children that did not complete again, in the batch's next round; then its callbacks, with the
        results of all. Returns how many; 0: there is nothing to retry, and the batch stays as it is.

        Arguments:
            only: of the children that ended so: ``"failed"``, ``"crashed"``, ``"cancelled"``, or several of them.
            overrides: for their messages, options of `apply_async` such as ``{"queue": "bigmem"}``; and ``kwargs``,
                put over their own.

        Errors: BatchStateError while the batch runs; InvalidOption.
        """
        self._check_committed()
        return rounds.retry(self._extension.tracker, self.id, retried(only), overridden(overrides))

    def retry_callbacks(self) -> int:
        """Call those callbacks of the present round again that did not complete. Returns how many."""
        return rounds.retry_callbacks(self._extension.tracker, self.id)

    def extend(self) -> Batch:
        """Add children from within: ``with current_batch().extend() as batch: batch.add(…)``.

        From a child that runs, they are added to its batch as they come, and run at once. From a callback after the
        end, the batch is opened again: leaving the block seals it, and its next round runs; its callbacks are called
        once more at the end of that.

        Errors: BatchStateError elsewhere, or if the child has lost its row meanwhile.
        """
        current = current_run()
        if current is None or current.run.ticket.key.batch_id != self.id:
            raise errors.BatchStateError(
                f"batch {self.id} is extended from one of its own children while that runs, or from one of its "
                "callbacks: there, `with current_batch().extend() as batch: batch.add(…)`"
            )
        batch = Batch._handle(self._extension, self.id)
        batch._options = validated({}, "batch")
        batch._more = Growth(self._extension.tracker, current.run)
        batch._captured = batch._more.captured
        return batch

    def nested(self) -> list[Batch]:
        """Handles of the batches that its children wait for, or waited for, newest first."""
        found = self._extension.store.list_batches(parent=self.id, limit=None)
        return [Batch._handle(self._extension, each) for each in found]


def _keep_order(outer: Any) -> None:
    """A nested batch stands behind what was added to its parent before."""
    if isinstance(outer, Batch) and outer._opened:
        outer.flush()


def start(
    extension: BatchTrack, options: ValidOptions, header: Iterable[Any], *, body: Any = None,
    root_id: str | None = None, parent_id: str | None = None,
) -> Batch:  # fmt: skip
    """Create a sealed batch from signatures, in one transaction, and send its children: at once, or after the commit of
    the application's transaction that it begins with."""
    outer = joined(extension, options.transaction)
    with outer or contextlib.nullcontext():
        headers = starting.captured(extension)
        children = [
            rows.new_child(extension.app, each, f"header element {at}", options.stored)
            for at, each in enumerate(header)
        ]
        new = rows.new_batch(
            extension.app, extension.settings, options, uuid7(), headers, body=body, root_id=root_id,
            parent_id=parent_id, children=len(children),
        )  # fmt: skip
        batch = Batch._handle(extension, new.id)
        batch.result_id = new.result_id
        batch.task_ids = [child.result_id or child.task_id for child in children]
        if outer is not None:
            batch._uncommitted = True
            outer.insert(new, children, seal=True)
            outer.afterwards(new.id, batch._begun)
            return batch
    starting.create(extension, new, children)
    starting.send(extension, new.id)
    return batch
