"""The wrapper around a child: claim → run → settle, in the class of each task.

Every task of the app gets a subclass of its own class, swapped in (`track`): an app-wide base would miss
tasks with their own base, and a shared class would be patched once per task by others (Sentry does).
`__call__` of the class sees what the tracer would see, `Retry` after `autoretry_for` included.
"""

from __future__ import annotations

import contextlib
import dis
import operator
import pickle
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn

from celery.app.task import Context, Task
from celery.exceptions import (
    ChordError,
    Ignore,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
    WorkerShutdown,
    WorkerTerminate,
)
from celery.utils.functional import arity_greater
from celery.utils.imports import symbol_by_name
from kombu.exceptions import OperationalError

from celery_batchtrack import errors
from celery_batchtrack.behaviour import dossier, memory
from celery_batchtrack.behaviour.run import Run, Runner
from celery_batchtrack.vocabulary.crash_policy import RowPolicy, backoff
from celery_batchtrack.vocabulary.evidence import Evidence, application_frame, frames
from celery_batchtrack.vocabulary.ids import HEADER, Ticket
from celery_batchtrack.vocabulary.records import Ending, Refused, Release
from celery_batchtrack.vocabulary.states import Cause, Status

from . import capture, codec, declare, rows, signatures
from .backend import error_json
from .growing import Growth

#: Seconds until a child of another database's batch is offered again.
_WRONG_STORE_DELAY = 10

_local = threading.local()


class Place(NamedTuple):
    """An instruction in a frame that may be gone by now."""

    frame: int
    code: CodeType
    instruction: int


#: Instructions that let an exception pass on.
_RAISING = tuple(dis.opmap[name] for name in ("RERAISE", "RAISE_VARARGS") if name in dis.opmap)


@dataclass(slots=True)
class CurrentRun:
    """The child that runs in this thread."""

    run: Run
    task: Any
    policy: RowPolicy
    #: The items, as they were sent: the task may sort its list.
    declared: tuple[Any, ...] | None = None
    #: The user's function is over; what it came to is being written.
    ended: bool = False
    #: It is within `each_item`.
    walking: bool = False
    #: Where it was left with an item in hand, innermost first: see `Place`.
    left_at: tuple[Place, ...] = ()

    def goes_over_declared(self, items: object) -> bool:
        """Whether these are the declared items, each of them, in the order in which they were sent."""
        declared = self.declared
        return (
            declared is not None
            and isinstance(items, list | tuple)
            and len(items) == len(declared)
            and all(map(operator.is_, items, declared))
        )


def _was_left_by(error: BaseException, left_at: tuple[Place, ...]) -> bool:
    """Whether a loop ended where this exception, or one behind it, came through. A `break` ends it elsewhere."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        passed = {
            (id(frame), frame.f_code): instruction for frame, instruction in _passed_by(error.__traceback__)
        }
        for place in left_at:
            instruction = passed.get((place.frame, place.code))
            if instruction is not None:
                if instruction == place.instruction or place.code.co_code[place.instruction] in _RAISING:
                    return True
                break
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def _passed_by(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lasti
        trace = trace.tb_next


def current_run() -> CurrentRun | None:
    """The tracked run of this thread, innermost first; None outside a child."""
    runs = getattr(_local, "runs", None)
    return runs[-1] if runs else None


def ticket_of(request: Any) -> Ticket | None:
    """The ticket in a task's request; in a worker it is an attribute, in eager mode a header."""
    header = getattr(request, HEADER, None)
    if header is None:
        headers = getattr(request, "headers", None)
        header = headers.get(HEADER) if isinstance(headers, dict) else None
    return Ticket.from_header(header) if header is not None else None


class TrackedTask:
    """Mixed into the class of every task. Outside a batch it does nothing but look for a header."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        if request.called_directly or getattr(request, "_batchtrack_entered", False):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        request._batchtrack_entered = True  # a direct call of the same task from within is not the child
        ticket = ticket_of(request)
        if ticket is None:
            return _call_through(super(), self, args, kwargs)
        return _tracked(self, super(), ticket, args, kwargs)

    def on_replace(self: Any, sig: Any) -> Any:
        """`self.replace()` in a child: the row goes on as what replaces it; nothing is sent here."""
        if _is_child(self):

            def instead(*args: Any, **kwargs: Any) -> NoReturn:
                raise Replaced(sig)

            sig.delay = sig.apply = instead  # what `Task.on_replace` ends with; classes between may override it
        return super().on_replace(sig)  # type: ignore[misc]

    def add_to_chord(self: Any, sig: Any, lazy: bool = False) -> Any:
        """In a child: one more child of its batch. With `lazy`, only when ``delay()`` of what is returned is called."""
        if not _is_child(self):
            return super().add_to_chord(sig, lazy=lazy)  # type: ignore[misc]
        current = current_run()
        assert current is not None
        growth = Growth(self.app.batchtrack.tracker, current.run)
        made = sig.clone()

        def add(*args: Any, **kwargs: Any) -> Any:
            result = made.freeze()
            new = rows.new_child(self.app, made, "what add_to_chord() adds", growth.options)
            growth.add([self.app.batchtrack.captures.on(new, growth.captured)])
            return result

        if not lazy:
            return add()
        made.delay = made.apply_async = add
        return made


class Replaced(Ignore):  # type: ignore[misc]
    """The task goes on as another signature."""

    def __init__(self, signature: Any) -> None:
        super().__init__("replaced by new task")
        self.signature = signature


def _is_child(task: Any) -> bool:
    run = current_run()
    return run is not None and run.task is task and ticket_of(task.request) is not None


def track(task: Any, request_mixin: type) -> None:
    """Give the task its own class with the wrapper, and a Request class with the main process's hooks."""
    cls = type(task)
    if issubclass(cls, TrackedTask) or not isinstance(task, Task):
        return
    own_request = symbol_by_name(cls.Request)
    members = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "Request": type("TrackedRequest", (request_mixin, own_request), {"__module__": own_request.__module__}),
    }
    task.__class__ = type(cls.__name__, (TrackedTask, cls), members)


def _call_through(parent: Any, task: Any, args: Any, kwargs: Any) -> Any:
    """Call what the tracer would have called without us.

    Celery's own `Task.__call__` pushes a fresh request when it is not called by the tracer itself (eager
    mode): the task would lose its id. A class of the user's with its own `__call__` is called as it is.
    """
    if parent.__call__.__func__ is Task.__call__:
        return task.run(*args, **kwargs)
    return parent.__call__(*args, **kwargs)


def _tracked(task: Any, parent: Any, ticket: Ticket, args: Any, kwargs: Any) -> Any:
    extension = task.app.batchtrack
    runner: Runner = extension.runner
    if ticket.store_id != _store_id(runner, ticket):
        _send_elsewhere(task, runner, ticket)
    options = declare.options_of(task)
    policy = declare.policy_of(task, runner.tracker.settings.max_crashes, ticket.on_crash, args, kwargs)
    runs = _local.__dict__.setdefault("runs", [])
    run = runner.claim(ticket, task.name, policy.as_option(), depth=len(runs))
    if isinstance(run, Refused):
        raise Ignore(run.reason)
    _note_attempt(task.request, run)
    current = CurrentRun(run, task, policy, declare.items_in(task, args, kwargs))
    runs.append(current)
    try:
        try:
            try:
                extension.spans.mark(run, task.request)
                result = _call_through(parent, task, *_bound(task, ticket, args, kwargs))
            finally:
                current.ended = True
            if ticket.more:
                codec.dumps(result)  # it must be JSON to be an argument of the next
                if runner.advance(run, result):
                    return result
            text = codec.dumps(result) if ticket.keep_result and options.results != "none" else None
        except BaseException as error:  # noqa: BLE001 (every end of a run is reported, SystemExit too)
            _ended_badly(task, runner, run, error)
        runner.settle(run, Ending(Status.COMPLETED, text, keep_signature=options.store_arguments))
        return result
    except Exception:
        run.page.clear()  # settled, or else lost between two lines (a soft time limit): the reconciliation looks
        raise
    finally:
        runs.remove(current)


def _store_id(runner: Runner, ticket: Ticket) -> Any:
    try:
        return runner.tracker.store_id
    except errors.DatabaseUnavailable:
        return ticket.store_id  # cannot be told yet: the claim waits for the database
    except errors.SchemaError as error:
        raise Ignore(str(error)) from error  # the row stays pending; the worker's log says what to do


def _send_elsewhere(task: Any, runner: Runner, ticket: Ticket) -> None:
    """This worker uses another tracking database: the message goes back, with a delay, never in a hot loop."""
    from .narrate import logger

    logger.error(
        "action=wrong_store %s belongs to tracking database %s, this worker uses %s (%s): the message is sent "
        "back; point batchtrack_database_url of all workers at one database",
        ticket.key, ticket.store_id, runner.tracker.store_id, runner.tracker.store.shown_url,
    )  # fmt: skip
    back = task.signature_from_request(task.request, countdown=_WRONG_STORE_DELAY)
    Task.apply_async(task, back.args, back.kwargs, **back.options)  # not the task's own: its lock is this message's
    raise Ignore("the tracking database is another")


def _note_attempt(request: Any, run: Run) -> None:
    """Celery's retry publishes the request's own headers: they must name the next stage of the row."""
    ticket = run.ticket
    header = replace(ticket, attempt=run.attempt).as_header()
    setattr(request, HEADER, header)
    if isinstance(request.headers, dict):
        request.headers[HEADER] = header
    else:
        request.headers = {HEADER: header}


def _bound(task: Any, ticket: Ticket, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """New-style Celery errbacks take (request, exception, traceback), which no message can carry."""
    header = getattr(task, "__header__", None)  # class-based tasks have none; a bound task's is a partial
    if ticket.errback is None or header is None or isinstance(header, partial) or not arity_greater(header, 1):
        return args, kwargs
    body_id, text = ticket.errback
    request = Context(id=body_id, errbacks=None, callbacks=None)
    return (request, ChordError(text), None, *args[1:]), kwargs


def _ended_badly(task: Any, runner: Runner, run: Run, error: BaseException) -> NoReturn:
    """Settle or release the row by what was raised, and raise what Celery should see."""
    if _is_shutdown(error):
        run.page.leave()
        raise error  # not the user's: the main process knows why, and judges
    if isinstance(error, Replaced):
        error = _replaced(task, runner, run, error)
        if isinstance(error, Ignore):
            raise error
    if isinstance(error, Retry):
        runner.release(run, _retry(task, runner, run, error))
        raise error
    if isinstance(error, Reject):
        _rejected(task, runner, run, error)
        raise error
    if isinstance(error, Ignore):
        runner.settle(run, _unhappy(task, runner, run, Status.CANCELLED, Cause.IGNORED, error))
        raise error
    cause = Cause.EXCEPTION
    if isinstance(error, SoftTimeLimitExceeded):
        cause = Cause.SOFT_TIME_LIMIT
    elif isinstance(error, errors.NotSerialisable):
        cause = Cause.UNSERIALISABLE
    runner.settle(run, _unhappy(task, runner, run, Status.FAILED, cause, error))
    if task.request.is_eager and isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error  # this is the caller's own process
    tamed = _tame(error)
    if tamed is error:
        raise error
    raise tamed from error


def _replaced(task: Any, runner: Runner, run: Run, error: Replaced) -> BaseException:
    """The row goes on as what replaces it; or fails, with what is wrong with that."""
    canvas = runner.tracker.canvas
    try:
        runner.replace(run, lambda row, batch: canvas.replacement(row, batch, error.signature))  # type: ignore[attr-defined]
    except (errors.BatchTrackError, TypeError, ValueError, LookupError) as wrong:
        return wrong
    return error


def _is_shutdown(error: BaseException) -> bool:
    """Billiard's SIGTERM handler raises ``SystemExit(-(256 - signal))`` in a pool process."""
    if isinstance(error, (WorkerShutdown, WorkerTerminate)):
        return True
    if not isinstance(error, SystemExit) or not isinstance(error.code, int):
        return False
    return -256 < error.code <= -192 and _in_pool_process()


def _in_pool_process() -> bool:
    from billiard.process import current_process

    return bool(getattr(current_process(), "daemon", False)) or current_process()._parent_pid is not None


def _retry(task: Any, runner: Runner, run: Run, error: Retry) -> Release:
    request, when = task.request, error.when
    seconds = float(when) if isinstance(when, (int, float)) else None
    changed, names = None, None
    if error.sig is not None and (
        list(error.sig.args or ()) != list(request.args or ())
        or dict(error.sig.kwargs or {}) != dict(request.kwargs or {})
    ):
        with contextlib.suppress(errors.NotSerialisable):
            # Immutable: its arguments are whole, what a callback was given first included.
            before = _stored_before(task, runner, run)
            rest = list(before.get("chain") or ()) if run.ticket.more else []
            changed = signatures.stored({**error.sig, "immutable": True}, rest)
            changed = capture.kept_in(changed, before.get(capture.KEY) or {})
            names = _names(task, error.sig)
    evidence = Evidence(Cause.RETRY, message=str(error.exc or error.message or "retry"))
    return Release(
        countdown=seconds, eta=when if seconds is None else None, retries=request.retries + 1,
        signature=changed, items=names, sent=True, evidence=evidence if error.exc is not None else None,
    )  # fmt: skip


def _stored_before(task: Any, runner: Runner, run: Run) -> dict[str, Any]:
    """The signature that the row has: what a retry does not change of it stays."""
    try:
        row = runner.tracker.store.child(run.ticket.key)
    except errors.DatabaseUnavailable:
        if run.ticket.more:
            raise
        return {capture.KEY: task.app.batchtrack.captures.take()}  # it runs in what it was created in
    return {} if row is None else signatures.parsed(row.signature)


def _names(task: Any, signature: Any) -> tuple[str, ...] | None:
    """Of the items that the next attempt will work on; none where they cannot be read."""
    if declare.options_of(task).items is None:
        return None
    try:
        return declare.items_of(task, tuple(signature.args or ()), dict(signature.kwargs or {}))[0]
    except errors.InvalidOption:
        return ()


def _rejected(task: Any, runner: Runner, run: Run, error: Reject) -> None:
    if error.requeue:  # not at once: Celery would redeliver in a hot loop
        runner.release(run, Release(countdown=backoff(runner.tracker.settings.retry_backoff, run.attempt)))
    elif isinstance(error.reason, OperationalError):
        # self.retry() that could not reach the broker: the row goes back, and a sweep sends it.
        runner.release(run, Release(countdown=float(task.default_retry_delay or 0), retries=task.request.retries + 1))
    else:
        runner.settle(run, _unhappy(task, runner, run, Status.FAILED, Cause.REJECTED, error))


def _unhappy(
    task: Any, runner: Runner, run: Run, status: Status, cause: Cause, error: BaseException
) -> Ending:
    told: dict[str, Any] = {}
    if cause is not Cause.IGNORED:
        text = "".join(traceback.format_exception(error))
        told = {
            "traceback": text, "exception": type(error).__name__, "error": error_json(task.app, error),
            "python_frame": application_frame(frames(text)[::-1]), "peak_memory": memory.own_peak(),
        }  # fmt: skip
    evidence = runner.worker.evidence(cause, run.slot, None, message=_message(error), **told)
    current = current_run()
    in_loop = current is not None and _was_left_by(error, current.left_at)
    return Ending(status, cause=cause, evidence=dossier.of_failure(evidence, run.page, in_loop=in_loop))


def _message(error: BaseException) -> str:
    with contextlib.suppress(Exception):
        return repr(error)
    return type(error).__name__


def _tame(error: BaseException) -> BaseException:
    """An exception that Celery can carry: `MemoryError` ends its whole worker, `SystemExit` the process."""
    if isinstance(error, Exception) and not isinstance(error, MemoryError) and _survives_pickling(error):
        return error
    return errors.ChildError(f"{type(error).__name__}: {error}")


def _survives_pickling(error: Exception) -> bool:
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), type(error))
    except Exception:  # noqa: BLE001 (whatever pickling raises: it does not survive)
        return False


__all__ = ["CurrentRun", "TrackedTask", "current_run", "ticket_of", "track"]
