"""`chord`: called as Celery's, tracked as a batch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NoReturn

from celery.canvas import Signature, group, maybe_signature
from celery.canvas import chord as celery_chord
from celery.result import AsyncResult, assert_will_not_block
from celery.utils.functional import maybe_list
from kombu.utils.uuid import uuid as new_task_id

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.records import ChildRow
from celery_batchtrack.vocabulary.states import BatchStatus, Kind, Status

from . import codec, signatures
from .batch import Batch, start
from .extension import BatchTrack
from .narrate import logger
from .options import ValidOptions, validated

#: Options of `apply_async` that belong to the body, not to the header's tasks.
_BODY_ONLY = ("task_id", "link", "link_error")


class ChordResult(AsyncResult):  # type: ignore[misc]
    """The body's result, read from the tracking database: no result backend is needed.

    `batch` is the handle of the chord's batch; `parent` the header's group result (its ids).
    """

    batch: Batch

    def __init__(self, id: str, batch: Batch, app: Any = None, parent: Any = None) -> None:
        super().__init__(id, app=app, parent=parent)
        self.batch = batch

    def _body(self) -> ChildRow | None:
        rows = self.batch._extension.store.callback_rows(self.batch.id)
        return next((row for row in rows if row.kind == Kind.ON_SUCCESS and row.task_id == self.id), None)

    def get(self, timeout: float | None = None, propagate: bool = True, interval: float = 0.5, **options: Any) -> Any:
        """What the body returned, once it has run.

        Errors: BatchTimeout after `timeout` seconds; with `propagate`, BatchFailed where the batch failed (the
        body never ran), or where the body itself did.
        """
        if options.get("disable_sync_subtasks", True):
            assert_will_not_block()
        deadline = None if timeout is None else time.monotonic() + timeout
        ended = self.batch._wait(timeout)
        if ended in (BatchStatus.FAILED, BatchStatus.CANCELLED):
            return self._no_body(ended, propagate)
        while True:
            body = self._body()
            if body is None or body.status not in (Status.PENDING, Status.RUNNING):
                return self._answer(body, propagate)
            if deadline is not None and time.monotonic() > deadline:
                raise errors.BatchTimeout(f"the callback {body.task} of batch {self.batch.id} has not ended")
            self.batch._pause(min(interval, self.batch._extension.settings.wait_poll))

    def _no_body(self, ended: BatchStatus, propagate: bool) -> Any:
        error = errors.BatchFailed(str(self.batch.report()))
        if propagate:
            raise error
        return error

    def _answer(self, body: ChildRow | None, propagate: bool) -> Any:
        if body is not None and body.status == Status.COMPLETED:
            return None if body.result is None else codec.loads(body.result)
        said = f"the callback {body.task} {body.status}: {body.cause}" if body else "the batch has no callback"
        incidents = self.batch.incidents() if body else []
        message = next((each.message for each in reversed(incidents) if body and each.position == body.position), None)
        error = errors.BatchFailed(f"{said}{f' ({message})' if message else ''}; batch {self.batch.id}")
        if propagate:
            raise error
        return error

    wait = get  # Celery's deprecated alias

    @property
    def state(self) -> str:
        """SUCCESS, FAILURE, STARTED or PENDING, of the body."""
        ended = self.batch.status
        if ended in (BatchStatus.FAILED, BatchStatus.CANCELLED):
            return "FAILURE"
        body = self._body()
        if body is None or body.status == Status.PENDING:
            return "PENDING"
        return {Status.COMPLETED: "SUCCESS", Status.RUNNING: "STARTED"}.get(Status(body.status), "FAILURE")

    status = state

    def _get_task_meta(self) -> dict[str, Any]:
        """What Celery's own properties (`result`, `info`, …) read; from the row, not from a backend."""
        state = self.state
        body = self._body() if state in ("SUCCESS", "FAILURE") else None
        result: Any = None
        if state == "SUCCESS" and body is not None and body.result is not None:
            result = codec.loads(body.result)
        elif state == "FAILURE":
            result = errors.BatchFailed(str(self.batch.report()))
        return {"status": state, "result": result, "traceback": None, "children": [], "task_id": self.id}

    def forget(self) -> None:
        """Nothing to forget: the row stays until its batch is pruned."""

    def ready(self) -> bool:
        return self.state in ("SUCCESS", "FAILURE")

    def successful(self) -> bool:
        return self.state == "SUCCESS"

    def failed(self) -> bool:
        return self.state == "FAILURE"


class chord(Signature):  # type: ignore[misc]
    """``chord(header)(body)``: run the header's tasks, then the body with their results in order.

    Called as Celery's chord; ``batch={…}`` takes the options of a batch (`BatchOptions`). The body runs when the
    batch ends `completed` or `partial`; otherwise its errbacks do. With ``batchtrack_enabled = False`` it is Celery's.

    Arguments:
        header: signatures of tasks: a list, a generator, a group. None at all: the body runs with ``[]``.
        body: signature of one task; may be given at the call.
        batch: options of the batch; unknown ones are an error at the call.

    Errors: UnsupportedCanvas for shapes this version does not track (chains, nested chords and groups), at the call.
    """

    def __init__(
        self, header: Any, body: Any = None, *, app: Any = None, batch: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__("celery_batchtrack.chord", app=app, **options)
        if batch is not None and not isinstance(batch, Mapping):
            raise errors.InvalidOption(f"batch= takes a mapping of options, not {batch!r:.100}")
        given = dict(batch or {})
        if "on_success" in given:
            raise errors.InvalidOption("a chord's on_success is its body: leave it out of batch={…}, or use Batch(…)")
        self.header, self.body, self.batch_options = _members(header), body, given
        self._valid(given)

    def _valid(self, given: Mapping[str, Any]) -> ValidOptions:
        return validated(given, str(getattr(self.body, "task", None) or "chord"))

    def __call__(self, body: Any = None, **options: Any) -> Any:
        """Start the chord; `options` are those of `apply_async` for the header's tasks. Returns a ChordResult."""
        return self.apply_async(body=body, **options)

    def apply_async(self, args: Any = None, kwargs: Any = None, *, body: Any = None, **options: Any) -> Any:
        """Start the chord. `args` and `kwargs` are added to each header task's own."""
        body = body if body is not None else self.body
        if body is None:
            raise errors.InvalidOption("a chord needs a body: chord(header)(body)")
        if "batch" in options:  # would go to the broker with each message, and be lost
            raise errors.InvalidOption("batch= belongs to the chord, not to its call: chord(header, batch={…})(body)")
        options = {**(self.get("options") or {}), **options}
        extension = BatchTrack.of(self._app or getattr(body, "_app", None))
        header = [_partial(each, args, kwargs, extension.app) for each in self.header]
        if not extension.enabled:
            if self.batch_options:
                logger.warning(
                    "action=untracked_chord batchtrack_enabled is off: batch=%s has no effect", self.batch_options
                )
            return celery_chord(header, app=extension.app)(maybe_signature(body, app=extension.app), **options)
        return self._start(extension, header, body, options)

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """`apply_async` with these arguments added to each header task's own."""
        return self.apply_async(args, kwargs)

    def _start(self, extension: BatchTrack, header: list[Any], body: Any, options: dict[str, Any]) -> ChordResult:
        app = extension.app
        body = signatures.plain_signature(app, body, "the body").clone()
        for name in ("link", "link_error"):
            for callback in maybe_list(options.get(name)) or []:
                body.append_to_list_option(name, callback)
        body_id = str(options.get("task_id") or body.options.get("task_id") or new_task_id())
        given = {**self.batch_options, "on_success": body}
        given.setdefault("name", body.task)
        overrides = {key: value for key, value in options.items() if key not in _BODY_ONLY}
        batch = start(
            extension, self._valid(given), header, overrides=overrides,
            errbacks=maybe_list(body.options.get("link_error")) or [], body_id=body_id,
        )  # fmt: skip
        children = [app.AsyncResult(task_id) for task_id in batch.task_ids]
        parent = app.GroupResult(str(batch.id), children)
        return ChordResult(body_id, batch, app=app, parent=parent)

    def link(self, callback: Any) -> Any:
        """A callback of the body, as with Celery's chord."""
        self.append_to_list_option("link", callback)
        return callback

    def link_error(self, errback: Any) -> Any:
        """An errback of the chord: for a header that failed, and for a body that did."""
        self.append_to_list_option("link_error", errback)
        return errback

    def on_error(self, errback: Any) -> chord:
        self.link_error(errback)
        return self

    def set(self, immutable: Any = None, **options: Any) -> chord:
        """Options of the header's tasks (`task_id`: of the body)."""
        self["options"] = {**(self.get("options") or {}), **options}
        return self

    def _unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise errors.UnsupportedCanvas(
            "this version of celery-batchtrack starts a chord by chord(header)(body) or apply_async(); it cannot be "
            "copied, frozen, stamped or put into other canvas (chains, groups, other chords): use Celery's own there"
        )

    clone = freeze = __or__ = __ror__ = __deepcopy__ = __copy__ = __reduce__ = __json__ = _unsupported
    stamp = apply = set_immutable = replace = _unsupported

    def __repr__(self) -> str:
        return f"<celery_batchtrack.chord {self.body!r}>"


def _members(header: Any) -> list[Any]:
    if isinstance(header, group):
        return list(header.tasks)
    if isinstance(header, Mapping):
        return [header]
    try:
        return list(header)
    except TypeError:
        raise errors.UnsupportedCanvas(
            f"a header is signatures in a list, a generator or a group, not {header!r:.100}"
        ) from None


def _partial(signature: Any, args: Any, kwargs: Any, app: Any) -> Any:
    if not (args or kwargs) or not isinstance(signature, Mapping):
        return signature
    return maybe_signature(signature, app=app).clone(args, kwargs)
