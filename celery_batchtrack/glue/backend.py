"""Outcomes read from the tracking database as Celery reads them from a result backend, and told to the one there is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from celery import states
from celery.app.task import Context
from celery.backends.base import E_CHORD_NO_BACKEND, DisabledBackend
from celery.exceptions import ChordError, TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.utils.functional import maybe_list

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, FirstFailure
from celery_batchtrack.vocabulary.states import BatchStatus, Status

from . import codec, signatures


class ChordFailed(errors.BatchFailed, ChordError):  # type: ignore[misc]
    """`BatchFailed`, for those who catch Celery's ChordError."""


class ResultTimeout(errors.BatchTimeout, CeleryTimeout):  # type: ignore[misc]
    """`BatchTimeout`, for those who catch Celery's TimeoutError."""


def as_batch_failed(error: Exception) -> Exception:
    """The same error, to be caught by its own type or as `BatchFailed`; itself, where no class can be both."""
    kind = type(error)
    if isinstance(error, errors.BatchFailed):
        return error
    try:
        both = type(kind.__name__, (kind, errors.BatchFailed), {
            "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
            "__reduce__": lambda self: (kind, self.args),  # elsewhere it is what it was
        })  # fmt: skip
        made: Exception = both.__new__(both, *error.args)
        made.args = error.args
        made.__dict__.update(error.__dict__)
    except TypeError:
        return error
    return made


def error_json(app: Any, error: BaseException) -> str | None:
    """An exception as Celery's result backends keep it (JSON); None where its arguments are none."""
    if not isinstance(error, Exception):
        return None
    try:
        return json.dumps(app.backend.prepare_exception(error, "json"))
    except Exception:  # noqa: BLE001 (arguments of an exception may be anything)
        return None


def error_of(app: Any, failure: FirstFailure | None) -> Exception:
    """What a child raised, made anew from its incident; for a death, `BatchFailed` with its story."""
    if failure is None:
        return ChordFailed("the batch failed")
    if failure.error is not None:
        with contextlib.suppress(Exception):
            made = app.backend.exception_to_python(json.loads(failure.error))
            if isinstance(made, Exception):
                return made
    told = failure.message or failure.cause or failure.status
    if failure.status == Status.CANCELLED:
        return TaskRevokedError(told)  # type: ignore[no-any-return]
    return ChordFailed(f"#{failure.position} {failure.status}: {told}")


class TablesBackend(DisabledBackend):  # type: ignore[misc]
    """Where an application has no result backend: results of chords come from the tracking database, for everything
    else it is as disabled as before.

    `known`: keys of rows by the task id that is asked for; others are looked up by the id of a chord's body.
    An id that is not found is of no chord, and is refused as Celery's disabled backend does; but once a canvas with a
    chord was started in this process, it may be of one that has not begun, and is pending.
    """

    _chords_started = False

    def __init__(self, app: Any = None, known: Mapping[str, ChildKey] | None = None, **options: Any) -> None:
        super().__init__(app=app, **options)
        self.known = dict(known or {})

    def ensure_chords_allowed(self) -> None:
        """Chords of ours are; Celery's own ask `apply_chord`."""
        type(self)._chords_started = True

    def apply_chord(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(E_CHORD_NO_BACKEND.strip())

    def get_task_meta(self, task_id: str, cache: bool = True) -> dict[str, Any]:
        """As Celery's backends: status, result, traceback, children. Raises NotImplementedError for other ids."""
        extension = getattr(self.app, "batchtrack", None)
        found = None if extension is None else self._found(extension.store, str(task_id))
        if isinstance(found, ChildRow):
            return _meta(task_id, *_outcome(self.app, extension, found), found.finished_at)
        if isinstance(found, BatchRow):
            return _meta(task_id, *_without_body(self.app, extension, found), found.finished_at)
        if task_id not in self.known and not self._chords_started:
            self._is_disabled()
        return _meta(task_id, states.PENDING, None)

    def _found(self, store: Any, task_id: str) -> ChildRow | BatchRow | None:
        key = self.known.get(task_id)
        if key is not None:
            row: ChildRow | None = store.child(key)
            return row
        called: ChildRow | None = store.by_result_id(task_id)
        batch: BatchRow | None = None if called is not None else store.batch_by_result_id(task_id)
        return called or batch

    def get_state(self, task_id: str) -> str:
        return str(self.get_task_meta(task_id)["status"])

    get_status = get_state

    def get_result(self, task_id: str) -> Any:
        return self.get_task_meta(task_id).get("result")

    def get_traceback(self, task_id: str) -> Any:
        return self.get_task_meta(task_id).get("traceback")

    def get_children(self, task_id: str) -> list[Any]:
        return []

    def task_result_exists(self, task_id: str) -> bool:
        return bool(self.get_state(task_id) != states.PENDING)

    def wait_for(self, task_id: str, timeout: float | None = None, interval: float = 0.5, **options: Any) -> Any:
        return super(DisabledBackend, self).wait_for(task_id, timeout=timeout, interval=interval, **options)

    def forget(self, task_id: str) -> None:
        """Nothing to forget: rows stay until their batch is pruned."""


def note_chord(app: Any) -> None:
    """A chord is started here: its ids may be asked for before anything of it is known."""
    if isinstance(app.backend, TablesBackend):
        app.backend.ensure_chords_allowed()


def _meta(task_id: str, status: str, result: Any, date_done: datetime | None = None) -> dict[str, Any]:
    return {
        "status": status, "result": result, "traceback": None, "children": [], "task_id": task_id,
        "date_done": date_done,
    }  # fmt: skip


_STATES = {
    Status.PENDING: states.PENDING, Status.RUNNING: states.STARTED, Status.COMPLETED: states.SUCCESS,
    Status.CANCELLED: states.REVOKED,
}  # fmt: skip


def _outcome(app: Any, extension: Any, row: ChildRow) -> tuple[str, Any]:
    status = _STATES.get(Status(row.status), states.FAILURE)
    if row.status == Status.SPLIT:
        return states.STARTED, None
    if status == states.SUCCESS:
        return status, None if row.result is None else codec.loads(row.result)
    if status in (states.FAILURE, states.REVOKED):
        return status, error_of(app, extension.store.failure(row))
    return status, None


def _without_body(app: Any, extension: Any, batch: BatchRow) -> tuple[str, Any]:
    """A body that has no row: its batch runs, or ended in a way that leaves it out."""
    if batch.status == BatchStatus.FAILED:
        return states.FAILURE, error_of(app, extension.store.first_failure(batch.id))
    if batch.status == BatchStatus.CANCELLED:
        return states.REVOKED, TaskRevokedError(f"batch {batch.id} was cancelled ({batch.reason})")
    return states.PENDING, None


class AppBackend:
    """`behaviour.tracker.Backend`: tells the application's result backend what will never come."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def tell(self, batch: BatchRow, why: FirstFailure | None) -> None:
        backend = self.app.backend
        if isinstance(backend, DisabledBackend):
            return
        waiting = [str(each) for each in batch.options.get("tell") or ()]
        if batch.status in (BatchStatus.COMPLETED, BatchStatus.PARTIAL):
            waiting = waiting[-1:]  # its links told of themselves; the last one could not
        error = self._error(batch, why)
        joint = self._joint(batch)
        for at, task_id in enumerate(waiting):
            request = joint if joint is not None and at == len(waiting) - 1 else None
            backend.mark_as_failure(task_id, error, request=request, call_errbacks=False)

    def died(self, row: ChildRow, why: FirstFailure) -> None:
        errbacks = (signatures.parsed(row.signature).get("options") or {}).get("link_error")
        request = Context(id=row.task_id, task=row.task, errbacks=list(maybe_list(errbacks) or ()), delivery_info={})
        self.app.backend._call_task_errbacks(request, error_of(self.app, why), None)

    def _error(self, batch: BatchRow, why: FirstFailure | None) -> Exception:
        """What `get()` raises there: as with Celery's chord, what the child raised; for a death, its story."""
        if why is None:
            return ChordError(f"batch {batch.id} was {batch.status} ({batch.reason})")  # type: ignore[no-any-return]
        if why.error is not None:
            return error_of(self.app, why)
        return ChordError(f"Dependency {why.task_id} raised {why.message or why.cause}")  # type: ignore[no-any-return]

    def _joint(self, batch: BatchRow) -> Context | None:
        """A chord of Celery's own that waits for the body."""
        declared = json.loads(batch.callbacks).get("on_success") or [{}]
        kept = signatures.parsed(declared[0].get("signature"))
        options = ((kept.get("chain") or [kept])[-1]).get("options") or {}
        if not options.get("chord"):
            return None
        return Context(
            id=batch.result_id, chord=options["chord"], group=options.get("group_id"),
            group_index=options.get("group_index"), errbacks=[], chain=None, delivery_info={},
        )  # fmt: skip
