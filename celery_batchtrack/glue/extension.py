"""`BatchTrack(app)`: installs everything, reads no configuration, keeps its state on the app."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import celery
from celery import current_app
from celery._state import _get_active_apps

from celery_batchtrack import __version__, errors
from celery_batchtrack.behaviour import blackbox, dispatch, fatal, folders, hosts, retention
from celery_batchtrack.behaviour.detector import Sweep, Sweeper
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.behaviour.identity import WorkerIdentity
from celery_batchtrack.behaviour.run import Runner
from celery_batchtrack.behaviour.tracker import Tracker
from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow
from celery_batchtrack.vocabulary.settings import Settings

from . import codec, configuration, declare, django_database, labels, narrate, rows, signatures, worker
from .attendant import Attendant, Pulse
from .backend import AppBackend, TablesBackend
from .capture import Capture, Captures, Hook
from .embedded import alias
from .isolation import Gate, IsolatedQueues, send_back
from .publish import DISPATCH_TASK, AppPublisher
from .request import TrackedRequest
from .spans import Spans
from .tracked_task import track

logger = logging.getLogger("celery_batchtrack")

DETECT_TASK = "celery_batchtrack.detect_crashes"
PRUNE_TASK = "celery_batchtrack.prune"
DETECT_ENTRY = "batchtrack-detect-crashes"
PRUNE_ENTRY = "batchtrack-prune"

#: Celery imports it in a worker; it lies above this layer.
METRICS_STEP = "celery_batchtrack.surfaces.metrics_step:MetricsStep"

#: Seconds; longer than any test runs.
_TESTS_LEASE = 86_400.0

#: What else is to be done for each `BatchTrack(app)`, by modules that need this one.
INSTALLERS: list[Callable[[BatchTrack], None]] = []


def _current_app() -> Any:
    """Celery's current app; in a thread, where Celery may know none, the one app that has a BatchTrack."""
    if getattr(current_app, "batchtrack", None) is not None:
        return current_app
    tracked = [app for app in _get_active_apps() if getattr(app, "batchtrack", None) is not None]
    return tracked[0] if len(tracked) == 1 else current_app


@dataclass
class _Client:
    """This process as a client, shared by all that need it at the same time."""

    pid: int
    identity: WorkerIdentity
    pulse: Pulse
    holders: int = 0


class BatchTrack:
    """Tracks the batches of one Celery app.

    Arguments:
        app: the Celery app, before or after it is configured or finalized.
        capture: what goes along with a batch's messages, whoever publishes them: callables that return headers
            (JSON-able mappings, or None) of the creator's context, such as its tenant; objects with ``capture()`` and
            ``restore(headers)``, a context manager around the publishing. Called when a batch is created, and when
            a child is added. ``"opentelemetry"``, ``"sentry"``, ``"structlog"`` and ``"tenant"`` (of
            tenant-schemas-celery) are built in and on, where the application has loaded these packages; naming some
            leaves out the others.
        replace_celery_chord: chords that are Celery's own, made by ``celery.chord`` or ``group | task``, are batches
            too, in this app and in the libraries that it uses.

    Installs hooks of the worker, the beat entry ``batchtrack-detect-crashes`` and the tracking of every task.
    Configuration (``batchtrack_*``) is read at first use.
    """

    def __init__(
        self, app: Any, *, capture: Iterable[Hook | Capture | str] = (), replace_celery_chord: bool = False
    ) -> None:
        if getattr(app, "batchtrack", None) is not None:
            raise errors.ImproperlyConfigured(f"BatchTrack({app.main or app}) was called twice")
        alias.register()
        self.app = app
        self.replace_celery_chord = replace_celery_chord
        self.captures = Captures(app, capture)
        self.spans = Spans(lambda: self.tracker)
        self.attendant: Attendant | None = None
        self._lock = threading.RLock()
        self._settings: Settings | None = None
        self._tracker: Tracker | None = None
        self._place: tuple[Any, ...] | None = None  # of a database of Django's, when the tracker was made
        self._in_test: Tracker | None = None  # the same on Django's own connection
        self._worker: tuple[WorkerIdentity, Boxes] | None = None
        self._pulse: Pulse | None = None
        self._client: _Client | None = None
        self._eager: tuple[int, WorkerIdentity] | None = None
        self._client_in_test: WorkerIdentity | None = None
        self._worker_pid: int | None = None
        self._base: tuple[Path | None] | None = None  # folder of the black boxes, once chosen
        self._told_of_stacks = False
        self.gate: Gate | None = None
        self.isolated_queues = IsolatedQueues()
        app.batchtrack = self
        self._install()

    @classmethod
    def of(cls, app: Any = None) -> BatchTrack:
        """The extension of an app (default: the current app). Raises ImproperlyConfigured without one."""
        if app is None:
            app = _current_app()
        app = getattr(app, "_get_current_object", lambda: app)()
        extension = getattr(app, "batchtrack", None)
        if not isinstance(extension, cls):
            raise errors.ImproperlyConfigured(
                f"the Celery app {getattr(app, 'main', None) or app!r} has no BatchTrack: "
                "call BatchTrack(app) where the app is made, or say which app is meant (app=…) if there are several"
            )
        return extension

    # -- installing ------------------------------------------------------------------------------

    def _install(self) -> None:
        app = self.app
        for install in INSTALLERS:
            install(self)
        # "disabled" is what Celery takes where no result backend is configured.
        app.loader.override_backends["disabled"] = f"{TablesBackend.__module__}:{TablesBackend.__name__}"
        app.steps["worker"].add(worker.AttendanceStep)
        app.steps["worker"].add(METRICS_STEP)
        app.steps["consumer"].add(worker.UndecodableStep)
        app.steps["consumer"].add(worker.LoopStep)
        worker.connect(self)
        labels.watch(self)
        self._define_tasks()
        app.on_after_configure.connect(self._schedule, weak=False)
        app.on_after_finalize.connect(self._finalized, weak=False)
        if app.configured:
            self._schedule(app)
        if app.finalized:
            self.track_tasks()
        self._watch_registrations()

    def _define_tasks(self) -> None:
        # Lazy, as any user's task: registering must not finalize the app.
        # They expire although django-celery-beat, which keeps the entries in its own table, drops the option.
        @self.app.task(name=DETECT_TASK, ignore_result=True, shared=False, expires=60.0)  # type: ignore[untyped-decorator, unused-ignore]
        def detect_crashes() -> dict[str, int]:
            """One sweep of the crash detector."""
            return self.sweep().as_dict()

        @self.app.task(name=PRUNE_TASK, ignore_result=True, shared=False, expires=3600.0)  # type: ignore[untyped-decorator, unused-ignore]
        def prune() -> int:
            """Delete batches whose retention is over."""
            return self.prune()

        @self.app.task(name=DISPATCH_TASK, ignore_result=True, shared=False)  # type: ignore[untyped-decorator, unused-ignore]
        def send(batch_id: str, rows: int) -> int:
            """Send a share of a large batch's children."""
            return dispatch.pump(self.tracker, uuid.UUID(batch_id), limit=rows)

    def _schedule(self, sender: Any = None, source: Any = None, **_: Any) -> None:
        """Put the detector into beat's schedule, unless the user's schedule has it under any name."""
        conf = source if source is not None and hasattr(source, "beat_schedule") else self.app.conf
        schedule = conf.beat_schedule
        tasks = {entry.get("task") for entry in schedule.values() if isinstance(entry, Mapping)}
        if DETECT_TASK not in tasks:
            every = self._raw("detect_every", 15.0)
            options: dict[str, Any] = {"expires": every}
            queue = self._raw("detect_queue", None)
            if queue:
                options["queue"] = queue
            schedule.setdefault(DETECT_ENTRY, {"task": DETECT_TASK, "schedule": every, "options": options})
        if PRUNE_TASK not in tasks:
            schedule.setdefault(PRUNE_ENTRY, {"task": PRUNE_TASK, "schedule": 3600.0, "options": {"expires": 3600.0}})

    def _raw(self, name: str, default: Any) -> Any:
        """A setting, while the configuration may still be loading; wrong values are reported at first use."""
        try:
            return getattr(configuration.load(self.app, warn=False), name)
        except errors.ImproperlyConfigured:
            return default

    def _finalized(self, sender: Any = None, **_: Any) -> None:
        self.track_tasks()

    def track_tasks(self) -> None:
        """Wrap every task registered so far. Idempotent; runs at finalization and at worker start."""
        for task in list(self.app._tasks.values()):
            track(task, TrackedRequest)

    def _watch_registrations(self) -> None:
        """Tasks registered after finalization (`register_task`, late imports) are wrapped as they come. Celery puts
        them straight into its registry, a dictionary."""
        registry = self.app._tasks
        kind = type(registry)

        def set_item(held: Any, name: str, task: Any) -> None:
            kind.__setitem__(held, name, task)
            track(task, TrackedRequest)

        registry.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__setitem__": set_item})

    # -- parts, made at first use ----------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """Validated settings. Raises ImproperlyConfigured."""
        if self._settings is None:
            self._settings = configuration.load(self.app)
        return self._settings

    @property
    def enabled(self) -> bool:
        return self.settings.enabled

    @property
    def tracker(self) -> Tracker:
        """Store, settings and publisher of this app."""
        alias = self.django_alias
        tracker = self._tracker
        if tracker is None or (alias is not None and self._place != django_database.place(alias)):
            tracker = self._made_tracker(alias)
        if alias is None or not django_database.in_test(alias):
            return tracker
        if self._in_test is None:
            self._in_test = replace(tracker, store=tracker.store.within(django_database.lend(alias)))
        return self._in_test

    @property
    def django_alias(self) -> str | None:
        """Which of Django's databases is the tracking database; None if it is named by a URL of its own."""
        return django_database.alias_of(self.settings.database_url)

    def _made_tracker(self, alias: str | None) -> Tracker:
        """Made once; and again when a test runner has put its own database in the place of Django's."""
        with self._lock:
            place = None if alias is None else django_database.place(alias)
            if self._tracker is None or self._place != place:
                self._forget_client()
                self._eager = self._in_test = None
                if self._tracker is not None:
                    self._tracker.store.dispose()
                self._tracker, self._place = self._make_tracker(alias), place
            return self._tracker

    def _make_tracker(self, alias: str | None) -> Tracker:
        settings = self.settings
        if alias is None:
            found = django_database.Resolved(configuration.database_url(self.app, settings))
        else:
            found = django_database.resolve(alias)
        by_django = alias is not None and settings.auto_migrate is None  # `manage.py migrate` makes the tables
        store = Store(
            found.url, auto_migrate=False if by_django else settings.auto_migrate,
            engine_options={**found.options, **settings.engine_options}, owners=settings.owners, pooled=found.pooled,
        )  # fmt: skip
        return Tracker(
            store, settings, AppPublisher(self.app, self.captures), codec, narrate.subscriber(self.app),
            self._policy_of, self._versions(settings), rows.AppCanvas(self.app, settings), AppBackend(self.app),
        )  # fmt: skip

    def _policy_of(self, row: ChildRow, batch: BatchRow) -> RowPolicy | None:
        """Of a row that was never claimed, as its task and its batch declare it; None for a task unknown here."""
        if row.policy:
            return RowPolicy.from_option(row.policy)
        task = self.app._tasks.get(row.task)
        if task is None:
            return None
        call = signatures.parsed(row.signature)
        return declare.policy_of(
            task, self.settings.max_crashes, batch.options.get("on_crash"), call.get("args") or (),
            call.get("kwargs") or {},
        )  # fmt: skip

    def _versions(self, settings: Settings) -> dict[str, str]:
        known = {
            "python": platform.python_version(), "celery": celery.__version__, "celery_batchtrack": __version__
        }  # fmt: skip
        return {**known, "app": settings.app_version} if settings.app_version else known

    @property
    def store(self) -> Store:
        return self.tracker.store

    def labels_messages(self, store_id: uuid.UUID) -> bool:
        """Whether messages of that store's batches are this app's, and are to be found in Flower."""
        tracker = self._tracker
        return tracker is not None and tracker.settings.flower_labels and tracker.store.known_store_id == store_id

    def reset(self) -> None:
        """Forget settings and connections, so that a changed configuration counts. For tests and scripts."""
        with self._lock:
            self._forget_client()
            self._eager = None
            if self._tracker is not None:
                self._tracker.store.dispose()
            self._settings = self._tracker = self._in_test = self._place = None

    # -- worker ----------------------------------------------------------------------------------

    @property
    def own_worker(self) -> tuple[WorkerIdentity, Boxes] | None:
        """Who this process is as a worker; None in any other process, and where the worker does not take part."""
        return self._worker

    def wanted_in_worker(self) -> bool:
        """Whether a worker of this app takes part; without a database only if new chords are off anyway."""
        if self.settings.enabled:
            return True
        with contextlib.suppress(errors.ImproperlyConfigured):
            configuration.database_url(self.app, self.settings)
            return True
        return False

    def begin_worker(self, name: str, pool: str) -> None:
        """In the main process, before its pool forks."""
        tracker = self.tracker
        identity = WorkerIdentity(name, "worker", pool, versions=tracker.versions)
        base = folders.choose_folder(tracker.settings.blackbox_dir)
        boxes = Boxes(base, identity.id)
        boxes.create()
        if boxes.folder is None:
            logger.warning(
                "action=no_blackbox no folder to write in (%s): crashes are known by row, not by item or stack",
                boxes.trouble or f"batchtrack_blackbox_dir = {tracker.settings.blackbox_dir!r}",
            )
        self._check_schema()
        self._worker, self._worker_pid = (identity, boxes), os.getpid()
        self.isolated_queues = IsolatedQueues()
        self._pulse = Pulse(tracker, identity)
        self.attendant = Attendant(tracker, identity, boxes, self._adopt_isolated)
        self.gate = Gate(tracker.settings.isolation_patience, self.attendant.gives_way, send_back)
        if pool != "prefork":
            self._keep_stacks()  # its children run in this very process
        elif fatal.is_the_applications_own() and tracker.settings.faulthandler is None:
            self._tell_that_stacks_are_missing()  # once, and not by each of its processes

    def begin_pool_process(self) -> None:
        """In a fresh pool process: its black box, and a file for the stack of a fatal signal."""
        if self._worker is None:
            return
        self._worker[1].page(blackbox.slot_name())
        self._keep_stacks()

    def _keep_stacks(self) -> None:
        assert self._worker is not None
        pid = os.getpid()
        path = self._worker[1].stack_path(pid, hosts.started(pid))
        if path is None:
            return
        try:
            kept = fatal.install(path, self.settings.faulthandler)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("action=no_stacks %s cannot be written: incidents have no Python stack: %s", path, error)
            return
        if not kept and self.settings.faulthandler is None and not self._told_of_stacks:
            self._tell_that_stacks_are_missing()

    def _tell_that_stacks_are_missing(self) -> None:
        self._told_of_stacks = True
        logger.warning(
            "action=no_stacks the application uses faulthandler itself, which stays as it is: incidents of fatal "
            "signals have no Python stack (batchtrack_faulthandler = True takes it over; False keeps this quiet)"
        )

    def _adopt_isolated(self) -> None:
        if self.settings.adopt_isolated:
            self.isolated_queues.adopt(self.store.isolated_queues())

    def _check_schema(self) -> None:
        """Once before the fork, so that not every pool process has to."""
        with contextlib.suppress(errors.BatchTrackError):  # `attend` says what is wrong
            self.store.store_id  # noqa: B018
        self.store.dispose()

    def attend(self) -> None:
        """Register the worker and start its threads; a database that is away does not keep it from starting."""
        assert self._pulse is not None and self.attendant is not None
        try:
            self._pulse.register()
        except errors.BatchTrackError as error:
            logger.error("action=unregistered children of batches wait until this is mended: %s", error)
        self._pulse.start()
        self.attendant.start()
        atexit.register(self.end_worker)

    def end_worker(self) -> None:
        """After the pool has joined: write what is known, then say that this worker ended. Idempotent."""
        if self._worker_pid != os.getpid() or self.attendant is None or self._pulse is None:
            return
        self._worker_pid = None
        self.attendant.close()
        self._pulse.stop()
        fatal.uninstall()
        if self._worker is not None:
            self._worker[1].close_own_pages()
            self._worker[1].remove()
        self._worker = self.attendant = self._pulse = self.gate = None

    def end_pool_process(self) -> None:
        """At a clean end of a pool process its pages go, and its file for stacks."""
        if self._worker is not None:
            fatal.uninstall()
            self._worker[1].close_own_pages()

    @property
    def runner(self) -> Runner:
        """Runs children in this process: under its worker's identity, or a client's."""
        if self._worker is not None:
            return Runner(self.tracker, *self._worker)
        tracker = self.tracker
        if self._is_a_tests(tracker):
            identity = self._tests_client(tracker)
        else:
            if self._eager is None or self._eager[0] != os.getpid():
                self._eager = (os.getpid(), self.begin_client())  # held until the process ends
            identity = self._eager[1]
        return Runner(tracker, identity, Boxes(None, identity.id))

    def _is_a_tests(self, tracker: Tracker) -> bool:
        """Whether its database is one that Django's test runner made, and drops while this process goes on."""
        return tracker is self._in_test or not tracker.store.pooled

    def _tests_client(self, tracker: Tracker) -> WorkerIdentity:
        """This process as a client: registered anew whenever the rollback or the clean-up of a test has taken it along,
        and without a pulse, which would be another connection to that database."""
        identity = self._client_in_test
        if identity is None or identity.pid != os.getpid():
            identity = self._client_in_test = self._client_identity()
        if not tracker.store.knows_worker(identity.id):
            tracker.store.register(identity.as_new_worker(_TESTS_LEASE, __version__))
        return identity

    @staticmethod
    def _client_identity() -> WorkerIdentity:
        return WorkerIdentity(f"client-{os.getpid()}@{socket.gethostname()}", "client", "client")

    # -- client ----------------------------------------------------------------------------------

    def begin_client(self) -> WorkerIdentity:
        """Register this process as a client with a pulse, so that its death is noticed; until `end_client`, which
        must be called once for each call of this."""
        with self._lock:
            if self._client is None or self._client.pid != os.getpid():
                identity = self._client_identity()
                pulse = Pulse(self.tracker, identity)
                pulse.register()
                pulse.start()
                self._client = _Client(os.getpid(), identity, pulse)
                atexit.register(self._forget_client)
            self._client.holders += 1
            return self._client.identity

    def end_client(self) -> None:
        """One holder less; with the last one the pulse ends."""
        with self._lock:
            if self._client is not None and self._client.pid == os.getpid():
                self._client.holders -= 1
                if self._client.holders <= 0:
                    self._forget_client()

    def _forget_client(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None and client.pid == os.getpid():
            client.pulse.stop()
            atexit.unregister(self._forget_client)

    @contextlib.contextmanager
    def client(self) -> Iterator[uuid.UUID]:
        """A client's identity for the length of a block. Blocks may overlap, in threads too."""
        tracker = self.tracker
        if self._is_a_tests(tracker):
            yield self._tests_client(tracker).id
            return
        identity = self.begin_client()
        try:
            yield identity.id
        finally:
            self.end_client()

    # -- detector --------------------------------------------------------------------------------

    @property
    def sweeper(self) -> Sweeper:
        if self._base is None:
            self._base = (folders.choose_folder(self.settings.blackbox_dir),)
        base = self._base[0]
        own = self._worker[0] if self._worker is not None else None
        name = own.name if own is not None else f"{os.getpid()}@{socket.gethostname()}"
        return Sweeper(self.tracker, name, base, own)

    def sweep(self) -> Sweep:
        """One pass of the crash detector, now."""
        return self.sweeper.sweep()

    def sweep_if_overdue(self) -> Sweep | None:
        """A pass if nobody has swept for an interval: what makes beat optional."""
        return self.sweep() if self.store.sweep_overdue(self.settings.detect_every) else None

    def detect_forever(self, stop: threading.Event) -> None:
        """Sweep every `batchtrack_detect_every` seconds until `stop` is set."""
        while True:
            try:
                self.sweep()
            except errors.BatchTrackError as error:
                logger.error("action=sweep_waits %s", error)
            if stop.wait(self.settings.detect_every):
                return

    def prune(self) -> int:
        """Delete batches whose retention is over; returns how many."""
        return retention.prune(self.tracker)[0]

    def migrate(self) -> None:
        """Bring the tracking database to this version's schema."""
        self.store.migrate()
