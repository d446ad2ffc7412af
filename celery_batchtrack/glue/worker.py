"""Bootsteps of a Celery worker: identity and threads before the pool forks, hooks in the consumer."""

from __future__ import annotations

import logging
from signal import Signals
from typing import Any

from billiard.pool import EX_RECYCLE
from celery import bootsteps, signals

from celery_batchtrack import errors
from celery_batchtrack.behaviour.detector import Death
from celery_batchtrack.vocabulary.ids import HEADER, Ticket
from celery_batchtrack.vocabulary.states import Cause, Status

from . import remote  # noqa: F401 (registers its command)

logger = logging.getLogger("celery_batchtrack")

#: Seconds between two looks for dead pool processes. Celery's own take up to 5 s.
_MAINTAIN_POOL_EVERY = 0.25


class AttendanceStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts the pulse and the attendant. They outlive the pool: see `BatchTrack.end_worker`."""

    label = "batchtrack"
    requires = ("celery.worker.components:Hub", "celery.worker.components:Pool")

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self.enabled = worker.app.batchtrack.wanted_in_worker()

    def create(self, worker: Any) -> None:
        """Before the pool forks: its processes inherit the identity."""
        pool = _pool_name(worker)
        if pool in ("gevent", "eventlet"):
            raise errors.ImproperlyConfigured(
                f"celery-batchtrack does not support -P {pool} yet: many greenlets share a thread, and its crash "
                "detection would mistake them. Use -P prefork, threads or solo, or leave BatchTrack(app) out"
            )
        worker.app.batchtrack.begin_worker(worker.hostname, pool)
        worker.process_task = worker.app.batchtrack.gate.guarding(worker.process_task)  # the consumer is made of it
        self._end_with(worker.blueprint, worker.app.batchtrack)

    def _end_with(self, blueprint: Any, extension: Any) -> None:
        """After every step has stopped, the pool too. `worker_shutdown` is not sent by a cold shutdown, nor by a
        worker in a thread (`celery.contrib.testing`), which no exit of the process ends either."""
        before = blueprint.on_stopped

        def on_stopped() -> None:
            if before is not None:
                before()
            extension.end_worker()

        blueprint.on_stopped = on_stopped

    def start(self, worker: Any) -> None:
        worker.app.batchtrack.attend()
        _watch_exits(getattr(worker.pool, "_pool", None), worker.app.batchtrack)

    def stop(self, worker: Any) -> None:
        """Nothing: Celery stops dependents first, and the pool's children are still running."""

    terminate = stop


def _watch_exits(pool: Any, extension: Any) -> None:
    """Tell the attendant of every pool process that dies, whatever its request hears of it.

    A process may die before the main process has read that it accepted its job: billiard then hands the job to
    another, and no request is told. Comes after the requests' own news, which know more.
    """
    join = getattr(pool, "_join_exited_workers", None)
    if join is None:
        return

    def join_and_tell(*args: Any, **kwargs: Any) -> Any:
        before = list(pool._pool)
        try:
            return join(*args, **kwargs)
        finally:
            left = set(pool._pool)
            for process in before:
                if process not in left and process.exitcode not in (None, EX_RECYCLE):
                    _exited(extension, process.pid, process.exitcode)

    pool._join_exited_workers = join_and_tell


def _exited(extension: Any, pid: int, code: int) -> None:
    attendant = extension.attendant
    if attendant is None:
        return
    if code < 0:
        names = {int(each): each.name for each in Signals}  # not of most real-time signals
        name = names.get(-code, f"signal {-code}")
        attendant.died(Death(pid, None, Cause.SIGNAL, signal=name, message=f"its process was killed by {name}"))
    else:
        attendant.died(Death(pid, None, Cause.EXIT, exit_code=code, message=f"its process exited with {code}"))


def _pool_name(worker: Any) -> str:
    return str(worker.pool_cls.__module__).rsplit(".", 1)[-1]


class UndecodableStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Hears of messages whose body cannot be decoded: Celery acknowledges them and sends no signal."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        original = type(consumer).on_decode_error

        def on_decode_error(message: Any, error: Exception) -> Any:
            refused(consumer.app, message, f"{type(error).__name__}: {error}")
            return original(consumer, message, error)

        consumer.on_decode_error = on_decode_error


class LoopStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """What is done in the worker's loop again and again, from each connection on: Celery 5.5 forgets all timers when
    it loses one. And it shows the consumer to who adds suspects' queues to it."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._entries: list[Any] = []

    def start(self, consumer: Any) -> None:
        extension, worker = consumer.app.batchtrack, consumer.controller
        extension.isolated_queues.attach(consumer)
        for entry in self._entries:
            entry.cancel()
        self._entries = []
        hub = getattr(worker, "hub", None)
        if hub is not None and hasattr(worker.pool, "maintain_pool"):
            self._entries.append(hub.call_repeatedly(_MAINTAIN_POOL_EVERY, worker.pool.maintain_pool))
        if extension.gate is not None:
            self._entries.append(worker.timer.call_repeatedly(_MAINTAIN_POOL_EVERY, extension.gate.tick))


def refused(app: Any, message: Any, text: str) -> None:
    _unstarted(app, message, Cause.CONTENT_REFUSED, text)


def _unstarted(app: Any, message: Any, cause: Cause, text: str) -> None:
    ticket = Ticket.from_header((message.headers or {}).get(HEADER))
    attendant = app.batchtrack.attendant
    if ticket is not None and attendant is not None:
        attendant.unstarted(ticket, Status.FAILED, cause, text)


def connect(extension: Any) -> None:
    """Connect the worker's signals for one app. Signals are global: each receiver filters by its app."""
    app = extension.app

    def unknown(sender: Any = None, message: Any = None, name: str = "", **_: Any) -> None:
        if sender is not None and sender.app is app:
            _unstarted(app, message, Cause.NOT_REGISTERED, f"no worker here knows the task {name!r}")

    def rejected(sender: Any = None, message: Any = None, exc: Any = None, **_: Any) -> None:
        if sender is not None and sender.app is app:
            refused(app, message, f"{type(exc).__name__}: {exc}")

    def revoked(
        sender: Any = None, request: Any = None, terminated: bool = False, expired: bool = False, **_: Any
    ) -> None:
        if getattr(sender, "app", None) is not app or extension.attendant is None:
            return
        from .tracked_task import ticket_of

        ticket = ticket_of(request)
        if ticket is None:
            return
        if terminated:
            extension.attendant.terminated(ticket, "revoked with terminate")
        else:
            cause = Cause.EXPIRED if expired else Cause.REVOKED
            text = "expired before it started" if expired else "revoked before it started"
            extension.attendant.unstarted(ticket, Status.CANCELLED, cause, text)

    def process_init(**_: Any) -> None:
        extension.begin_pool_process()

    def process_shutdown(**_: Any) -> None:
        extension.end_pool_process()

    def shutdown(sender: Any = None, **_: Any) -> None:
        if getattr(sender, "app", None) is app:
            extension.end_worker()

    def initialised(sender: Any = None, **_: Any) -> None:
        if getattr(sender, "app", None) is app:
            extension.track_tasks()

    for signal, receiver in (
        (signals.task_unknown, unknown),
        (signals.task_rejected, rejected),
        (signals.task_revoked, revoked),
        (signals.worker_process_init, process_init),
        (signals.worker_process_shutdown, process_shutdown),
        (signals.worker_shutdown, shutdown),
        (signals.worker_init, initialised),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"batchtrack-{id(app)}-{receiver.__name__}")
