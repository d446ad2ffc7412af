"""Hooks of the worker's main process: a Request mixin that sees every death, and Celery's signals for
messages that never reach a pool process.

Nothing here touches the database: each hook puts a job into the attendant's inbox. All are idempotent,
since a hard time limit is reported twice, and a cold shutdown as a retry.
"""

from __future__ import annotations

import re
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError

from celery_batchtrack.behaviour import hosts
from celery_batchtrack.behaviour.detector import Death
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.ids import HEADER, Ticket
from celery_batchtrack.vocabulary.states import Cause, Status

from . import declare

_SIGNAL = re.compile(r"signal (\d+)(?: \((\w+)\))?")  # most real-time signals have no name
_EXIT = re.compile(r"exitcode (-?\d+)")


class TrackedRequest:
    """Mixed into each task's Request class. Has no `__slots__`: Request's own would conflict."""

    _batchtrack_started: int | None = None
    _batchtrack_died = False

    @property
    def batchtrack_ticket(self: Any) -> Ticket | None:
        header = self.request_dict.get(HEADER)
        return Ticket.from_header(header) if header is not None else None

    def on_accepted(self: Any, pid: int, time_accepted: float) -> None:
        header = self.request_dict.get(HEADER)
        if header is not None:
            self._batchtrack_started = hosts.started(pid)
            _of_a_window(self, header)
        super().on_accepted(pid, time_accepted)  # type: ignore[misc]

    def on_timeout(self: Any, soft: bool, timeout: float) -> None:
        if not soft:
            _died(self, Cause.TIME_LIMIT, message=f"hard time limit of {timeout} s exceeded")
        super().on_timeout(soft, timeout)  # type: ignore[misc]

    def cancel(self: Any, pool: Any, *args: Any, **kwargs: Any) -> None:
        if self.time_start:
            _died(self, Cause.WORKER_LOST, message="cancelled by Celery: its worker shut down cold or lost its broker")
        super().cancel(pool, *args, **kwargs)  # type: ignore[misc]

    def on_failure(self: Any, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        if not return_ok:
            _lost(self, exc_info.exception)
            if self.batchtrack_ticket is not None:
                # Whether this is the child's end is for its row to say: it may run again. Then, and only then, its
                # errbacks are called and who waits in the result backend is told (`behaviour.recovery`).
                self._batchtrack_died = True
                self._context.errbacks = None
            if self.batchtrack_ticket is not None and not self._already_cancelled:
                # The row's policy decides whether it runs again. Redelivered by the broker, a message that kills
                # its process before the claim could refuse it would kill for ever.
                self.acknowledge()
        super().on_failure(  # type: ignore[misc]
            exc_info, send_failed_event=send_failed_event, return_ok=return_ok
        )

    @property
    def store_errors(self: Any) -> bool:
        return not self._batchtrack_died and super().store_errors  # type: ignore[misc]

    def _retry_worker_lost(self: Any, exc: BaseException, exc_info: Any) -> bool:
        """Celery's `retry_on_worker_lost` is part of the row's policy."""
        if self.batchtrack_ticket is not None:
            return False
        return bool(super()._retry_worker_lost(exc, exc_info))  # type: ignore[misc]


def _of_a_window(request: Any, header: Any) -> None:
    """Where children may be held back, somebody has to send them when their time comes."""
    attendant = getattr(request.app.batchtrack, "attendant", None)
    if attendant is not None and isinstance(header, dict) and header.get("refill"):
        attendant.sends_on = True


def _lost(request: Any, error: Any) -> None:
    """The process is gone, or going, without having reported the task's end."""
    if isinstance(error, ExceptionWithTraceback):
        error = error.exc
    if isinstance(error, TimeLimitExceeded):
        _died(request, Cause.TIME_LIMIT, message=f"hard time limit exceeded: {error}")
    elif request._already_revoked:
        return  # we killed it ourselves, and `task_revoked` has said so
    elif isinstance(error, WorkerLostError):
        _worker_lost(request, str(error))
    elif isinstance(error, Terminated):
        _died(request, Cause.WORKER_LOST, message=f"terminated: {error}")
    elif isinstance(error, (SystemExit, KeyboardInterrupt)) and not request._already_cancelled:
        code = getattr(error, "code", None)
        _died(request, Cause.EXIT, exit_code=code if isinstance(code, int) else None, message=repr(error))
    elif not isinstance(error, (SystemExit, KeyboardInterrupt)):
        _unread(request, error)


def _unread(request: Any, error: Any) -> None:
    """The pool process lives, but its tracer failed outside the task: the message could not be decoded there."""
    ticket, attendant = request.batchtrack_ticket, getattr(request.app.batchtrack, "attendant", None)
    if ticket is not None and attendant is not None:
        attendant.unstarted(ticket, Status.FAILED, Cause.CONTENT_REFUSED, f"{type(error).__name__}: {error}")


def _worker_lost(request: Any, text: str) -> None:
    signal, code = _SIGNAL.search(text), _EXIT.search(text)
    if signal:
        _died(request, Cause.SIGNAL, signal=signal[2] or f"signal {signal[1]}", message=text)
    else:
        _died(request, Cause.EXIT, exit_code=int(code[1]) if code else None, message=text)


def _died(
    request: Any, cause: Cause, *, signal: str | None = None, exit_code: int | None = None, message: str | None = None
) -> None:
    ticket = request.batchtrack_ticket
    extension = getattr(request.app, "batchtrack", None)
    if ticket is None or extension is None or extension.attendant is None or request.worker_pid is None:
        return
    extension.attendant.died(
        Death(
            request.worker_pid, request._batchtrack_started, cause, ticket, _policy(request, extension, ticket), signal,
            exit_code, message,
        )
    )  # fmt: skip


def _policy(request: Any, extension: Any, ticket: Ticket) -> RowPolicy:
    """For a death before the claim, of which the process itself never told."""
    args, kwargs = getattr(request, "_args", None) or (), getattr(request, "_kwargs", None) or {}
    return declare.policy_of(request.task, extension.settings.max_crashes, ticket.on_crash, args, kwargs)
