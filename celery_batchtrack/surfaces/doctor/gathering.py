"""From the application, the database, the broker and the workers to facts: each asked for a limited time, none of them
trusted to answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Generic, TypeVar

from kombu.utils.url import maybe_sanitize_url

from celery_batchtrack import __version__, errors
from celery_batchtrack.behaviour import folders
from celery_batchtrack.glue import beat, configuration, declare, django_database, publish, remote, signatures
from celery_batchtrack.glue.extension import DETECT_TASK, BatchTrack
from celery_batchtrack.vocabulary.checkup import DatabaseFacts
from celery_batchtrack.vocabulary.settings import Settings

from .facts import BrokerFacts, Facts, Reply, TaskFacts

T = TypeVar("T")

#: kombu's defaults, seconds, by transport.
_VISIBILITY = {"redis": 3600.0, "sqs": 1800.0}
_NOT_OURS = ("celery.", "celery_batchtrack.")
#: Of the whole time-out, how long workers may take to answer.
_FOR_REPLIES = 0.4


class Asked(threading.Thread, Generic[T]):
    """A question in a thread of its own: who does not answer in time is left behind."""

    def __init__(self, question: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._question = question
        self.answer: T | None = None
        self.error: str | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._question()
        except errors.BatchTrackError as error:
            self.error = str(error)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what is to be told)
            self.error = f"{type(error).__name__}: {error}"

    def within(self, deadline: float, whole: float) -> tuple[T | None, str | None]:
        """(answer, None), or (None, why there is none)."""
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            return None, f"no answer within {whole:g} s"
        return self.answer, self.error


def facts(extension: BatchTrack, timeout: float) -> Facts:
    """All that can be found out within `timeout` seconds."""
    app = extension.app
    found = _of_the_application(extension)
    deadline = time.monotonic() + timeout
    settings = found.settings
    database = None if settings is None else Asked(lambda: _database(extension, settings))
    queues = sorted({each.queue for each in found.tasks if each.queue} | {found.detector_queue or ""} - {""})
    broker = Asked(lambda: _broker(app, queues))
    replies = Asked(lambda: _replies(app, timeout * _FOR_REPLIES))
    if database is not None:
        answer, error = database.within(deadline, timeout)
        if error == f"no answer within {timeout:g} s":
            error = f"the tracking database: {error} (a lock, a full disk, or a network that swallows packets)"
        store_id = answer.tables.store_id if answer is not None and answer.tables is not None else None
        found = replace(found, database=answer, database_error=error, store_id=store_id)
    told, trouble = broker.within(deadline, timeout)
    told = told or _no_broker(app, trouble)
    answers = None if told.error is not None else replies.within(deadline, timeout)[0]
    return replace(found, broker=told, replies=answers)


# -- the application ----------------------------------------------------------------------------------


def _of_the_application(extension: BatchTrack) -> Facts:
    app = extension.app
    found = Facts(version=__version__, hostname=socket.gethostname())
    trouble = None
    try:
        app.loader.import_default_modules()
        app.finalize()
    except Exception as error:  # noqa: BLE001 (the application's own modules)
        trouble = f"{type(error).__name__}: {error}"
    found = replace(found, tasks_error=trouble, namespace=getattr(app.conf, "prefix", "") or "")
    found = _configured(extension, found)
    if trouble is None:
        found = replace(found, tasks=_tasks(app), detector_queue=_detector_queue(app))
    folder = None if found.settings is None else folders.choose_folder(found.settings.blackbox_dir)
    return replace(found, beat_disabled=beat.is_disabled(), blackbox=None if folder is None else str(folder))


def _configured(extension: BatchTrack, found: Facts) -> Facts:
    app = extension.app
    try:
        settings: Settings = configuration.load(app, warn=False)
        if django_database.alias_of(settings.database_url) is None:
            configuration.database_url(app, settings)
    except errors.ImproperlyConfigured as error:
        return replace(found, configuration_error=str(error))
    return replace(
        found, settings=settings, ignored_settings=configuration.ignored(app),
        own_settings=remote.told_settings(settings),
    )  # fmt: skip


def _tasks(app: Any) -> list[TaskFacts]:
    bare = set(remote.untracked(app))
    return [
        _task(app, name, task, wrapped=name not in bare)
        for name, task in sorted(app._tasks.items()) if not name.startswith(_NOT_OURS)
    ]  # fmt: skip


def _task(app: Any, name: str, task: Any, *, wrapped: bool) -> TaskFacts:
    limits = [each for each in (getattr(task, "time_limit", None), app.conf.task_time_limit) if each]
    return TaskFacts(
        name, acks_late=bool(getattr(task, "acks_late", False)),
        reject_on_worker_lost=bool(getattr(task, "reject_on_worker_lost", False)), tracked=declare.is_declared(task),
        wrapped=wrapped, time_limit=float(limits[0]) if limits else None,
        retry_delay=float(getattr(task, "default_retry_delay", 0) or 0),
        own_apply_async=signatures.own_apply_async(task) if wrapped else None, queue=_queue(app, name),
    )  # fmt: skip


def _queue(app: Any, name: str) -> str | None:
    try:
        return signatures.route(app, name, (), {}, {})
    except Exception:  # noqa: BLE001 (a router of the application's, asked without arguments)
        return None


def _detector_queue(app: Any) -> str | None:
    entry = beat.detector_entry(app)
    queue = ((entry or {}).get("options") or {}).get("queue")
    return str(queue) if queue else _queue(app, DETECT_TASK)


# -- the database -------------------------------------------------------------------------------------


def _database(extension: BatchTrack, settings: Settings) -> DatabaseFacts:
    return extension.store.check_up(settings.retention)


# -- the broker ---------------------------------------------------------------------------------------


def _transport(app: Any) -> tuple[str, str]:
    connection = app.connection_for_write()
    name = str(getattr(connection.transport, "driver_type", "") or connection.transport_cls)
    return name.lower(), maybe_sanitize_url(connection.as_uri())


def _no_broker(app: Any, trouble: str | None) -> BrokerFacts:
    url = maybe_sanitize_url(str(app.conf.broker_url or "the broker"))
    return BrokerFacts("broker", str(url), error=trouble or "no answer")


def _broker(app: Any, queues: Iterable[str]) -> BrokerFacts:
    transport, url = _transport(app)
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        fanout = bool(connection.supports_exchange_type("fanout"))
    publisher = publish.BrokerPublisher(app)
    options = app.conf.broker_transport_options or {}
    visibility = float(options.get("visibility_timeout") or _VISIBILITY.get(transport, 0))
    return BrokerFacts(
        transport, url, visibility_timeout=visibility if transport in _VISIBILITY else None,
        queues={each: publisher.queue_length(each, "") for each in queues}, remote_control=fanout,
    )  # fmt: skip


# -- workers ------------------------------------------------------------------------------------------


def _replies(app: Any, timeout: float) -> list[Reply]:
    before = time.time()
    answers = app.control.broadcast(remote.COMMAND, reply=True, timeout=timeout) or []
    after = time.time()
    return sorted(
        (_reply(name, told, before, after) for each in answers for name, told in each.items()),
        key=lambda each: each.name,
    )


def _reply(name: str, told: Any, before: float, after: float) -> Reply:
    if not isinstance(told, dict) or "version" not in told:
        return Reply(name, error=str(told.get("error") if isinstance(told, dict) else told))
    clock = float(told.get("time") or before)
    return Reply(name, told, ahead=clock - after if clock > after else min(0.0, clock - before))

