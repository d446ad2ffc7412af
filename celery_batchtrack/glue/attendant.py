"""The threads of a worker's main process: the pulse, and the attendant that does everything else.

Both are native threads: Celery's timers stop in a broker outage, and the hub must never wait for a
database. The pulse only beats, so that nothing slow can make a living worker look dead.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from celery.worker import state

from celery_batchtrack import __version__, errors
from celery_batchtrack.behaviour import blackbox, detector, dispatch, finish, hosts, retention, run
from celery_batchtrack.behaviour.detector import Death, Reconciler, Sweeper
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.behaviour.identity import WorkerIdentity
from celery_batchtrack.behaviour.memory import KernelKills, Kill, Peaks
from celery_batchtrack.behaviour.stalls import StallWatch
from celery_batchtrack.behaviour.tracker import Tracker
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import Ticket
from celery_batchtrack.vocabulary.states import Cause, Status

logger = logging.getLogger("celery_batchtrack")

Job = Callable[[], object]

#: Seconds between two looks for batches whose retention is over.
_PRUNE_EVERY = 3600.0
#: Seconds within which the main process has heard of the death of a pool process, and how it was.
_OWN_NEWS = 2.0
#: A wait that took so many seconds too long says that this process stood still (SIGSTOP, a suspended laptop).
_OVERSLEPT = 2.0
#: Deaths by SIGKILL that are told twice are explained once; of so many the answer is remembered.
_REMEMBERED = 64


class Pulse:
    """Beats every `heartbeat` seconds until stopped; registers the worker's row first, as often as needed."""

    def __init__(self, tracker: Tracker, worker: WorkerIdentity) -> None:
        settings = tracker.settings
        shared = worker.kind == "client" or worker.pool != "prefork"
        self.tracker, self.worker = tracker, worker
        self.lease = settings.lease_shared_gil if shared else settings.lease
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._away = False

    def register(self) -> None:
        """Insert the worker's row. Raises where the database cannot be used."""
        self.tracker.store.register(self.worker.as_new_worker(self.lease, __version__))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="batchtrack-pulse", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.tracker.settings.heartbeat):
            self.beat()

    def beat(self) -> None:
        """One beat. A database that is away is reported once, and once when it is back."""
        try:
            if not self.tracker.store.beat(self.worker.id):
                self.register()
        except errors.BatchTrackError as error:
            if not self._away:
                logger.error("action=pulse_lost %s cannot beat: %s", self.worker.name, error)
            self._away = True
        except Exception:
            logger.exception("action=pulse_failed %s", self.worker.name)
        else:
            if self._away:
                logger.warning("action=pulse_back %s beats again", self.worker.name)
            self._away = False

    def stop(self, *, write: bool = True) -> None:
        """End the pulse; with `write`, say in the database that this worker ended in order."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
        if write:
            try:
                self.tracker.store.stop(self.worker.id)
            except errors.BatchTrackError as error:
                logger.error("action=stop_unwritten %s: %s (its host or its lease will tell)", self.worker.name, error)


class Attendant:
    """Delivers verdicts, reconciles rows with black boxes, and sweeps when a sweep is overdue."""

    def __init__(
        self, tracker: Tracker, worker: WorkerIdentity, boxes: Boxes, on_beat: Job = lambda: None
    ) -> None:
        self.tracker, self.worker, self.boxes, self._on_beat = tracker, worker, boxes, on_beat
        self.stalls = StallWatch(tracker, worker, boxes)
        self._kernel, self._peaks = KernelKills(), Peaks()
        self._explained: collections.OrderedDict[int, Kill | None] = collections.OrderedDict()
        self.reconciler = Reconciler(tracker, worker, boxes, patience=_OWN_NEWS)
        self.sweeper = Sweeper(tracker, worker.name, boxes.base, worker)
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: collections.deque[Job] = collections.deque()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._overslept = self._told_of_beat = False
        #: Children of some batch may be held back for a moment: to be sent when that is over.
        self.sends_on = True
        self._explained_before: set[int] = set()

    # -- hooks: called on the hub, so they only queue ---------------------------------------------

    def died(self, death: Death) -> None:
        """A pool process died, or is being killed."""
        self._inbox.put(lambda: self._judge(death))

    def _judge(self, death: Death) -> None:
        """Kept and tried again while the database is away: what the kernel says is asked once."""
        killed = self._killed_for_memory(death)
        if killed is not None:
            death = replace(death, cause=Cause.OOM, message=f"out of memory: {killed.why}")
        peak = self._peaks.of_the_dead(death.pid, killed)
        detector.process_died(self.tracker, self.worker, self.boxes, replace(death, peak_memory=peak))

    def _killed_for_memory(self, death: Death) -> Kill | None:
        if death.signal != "SIGKILL" or death.cause is not Cause.SIGNAL:
            return None
        if death.pid not in self._explained:
            self._explained[death.pid] = self._kernel.was(death.pid)
            while len(self._explained) > _REMEMBERED:
                self._explained.popitem(last=False)
        return self._explained[death.pid]

    def unstarted(self, ticket: Ticket, status: Status, cause: Cause, message: str) -> None:
        """A message was consumed without reaching its task."""
        self._inbox.put(lambda: self._settle_unstarted(ticket, status, cause, message))

    def _settle_unstarted(self, ticket: Ticket, status: Status, cause: Cause, message: str) -> None:
        evidence = self._evidence(cause, "before_claim", message)
        finish.never_ran(self.tracker, ticket.key, ticket.attempt, status, evidence)

    def gives_way(self, request: Any) -> None:
        """A suspect for which this worker was not free in time: its message goes, its row is sent again later."""
        ticket = request.batchtrack_ticket
        request.acknowledge()
        state.task_ready(request)
        if ticket is not None:
            self._inbox.put(lambda: self._postpone(ticket))

    def _postpone(self, ticket: Ticket) -> None:
        if self.tracker.store.postpone(ticket.key, ticket.attempt, self._patience):
            dispatch.refill(self.tracker, ticket.key.batch_id, ticket.refill)  # its place is free meanwhile

    @property
    def _patience(self) -> float:
        return self.tracker.settings.isolation_patience

    def terminated(self, ticket: Ticket, message: str) -> None:
        """A task was revoked with `terminate`, running or not."""
        self._inbox.put(lambda: self._settle_terminated(ticket, message))

    def _settle_terminated(self, ticket: Ticket, message: str) -> None:
        row = self.tracker.store.child(ticket.key)
        if row is not None and row.status == Status.RUNNING and row.worker_id == self.worker.id:
            evidence = self._evidence(Cause.TERMINATED, "running", message)
            settled = self.tracker.store.settle_terminated(row, evidence)
            if settled.written:
                self.tracker.emit(events.ChildSettled(row.key, row.task, Status.CANCELLED, row.attempt))
            finish.after(self.tracker, ticket.key, settled)
        elif row is not None and row.status == Status.PENDING:
            evidence = self._evidence(Cause.TERMINATED, "before_claim", message)
            finish.never_ran(self.tracker, ticket.key, ticket.attempt, Status.CANCELLED, evidence)

    def _evidence(self, cause: Cause, phase: str, message: str) -> Evidence:
        return Evidence(
            cause, phase=phase, message=message, hostname=self.worker.host.hostname, worker=self.worker.name
        )

    # -- the thread ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="batchtrack-attendant", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._guarded(self._boot)
        heartbeat = min(self.tracker.settings.heartbeat, self.tracker.settings.detect_every)
        due = time.monotonic() + heartbeat
        prune_at = time.monotonic() + _PRUNE_EVERY
        while not self._closing.is_set():
            pause = min(0.5, due - time.monotonic()) if self._waiting else due - time.monotonic()
            self._take(max(0.0, min(pause, self.stalls.interval)))
            self._guarded(self._look_at_runs)
            if self.sends_on:
                self._guarded(self._send_on)
            if time.monotonic() >= due:
                due = time.monotonic() + heartbeat
                self._guarded(self._look_at_processes)
                self._guarded(self.reconciler.beat)
                self._guarded(self._on_beat)
                self.sends_on = True
                self._guarded(self._sweep_if_overdue)
            if time.monotonic() >= prune_at:
                prune_at = time.monotonic() + _PRUNE_EVERY
                self._guarded(lambda: retention.prune(self.tracker))  # as beat does, where it has our entry

    def _boot(self) -> None:
        """At start: what a predecessor on this host left is settled before anything else."""
        for other in self.tracker.store.live_workers():
            if other.name == self.worker.name and other.id != self.worker.id and other.kind == "worker":
                self.tracker.store.suspect_now(other.id)  # the name proves nothing: two may share it
        self.sweeper.sweep()

    def _look_at_runs(self) -> None:
        """Each second: who takes how much memory, and who stands still."""
        self._peaks.sample(self._pids())
        for death in self.stalls.look(anew=self._overslept):  # before the pool's own news, which know but the signal
            self._waiting.append(partial(self._judge, death))
            self._work_off()

    def _send_on(self) -> None:
        """Each second while something is held back, else with each heartbeat."""
        self.sends_on = False  # before the look: who sets it meanwhile may have seen more
        if dispatch.go_on(self.tracker):
            self.sends_on = True

    def _look_at_processes(self) -> None:
        """What can be asked only while they live."""
        self._kernel.look(self._pids(), forget=not self._waiting)
        if not self._waiting:  # explained, told twice, and judged: the pid may come again
            for pid in self._explained_before:
                self._explained.pop(pid, None)
            self._explained_before = set(self._explained)

    def _pids(self) -> set[int]:
        """Of the processes that have a page."""
        return {blackbox.slot_process(slot)[0] for slot, _ in self.boxes.pages()}

    def _sweep_if_overdue(self) -> None:
        if not self.sweeper.overdue():
            return
        if not self._told_of_beat:
            self._told_of_beat = True
            logger.info(
                "action=sweeps_itself nobody has swept for %g s, so this worker does: beat does not run, or the "
                "detector's entry in it is disabled", self.tracker.settings.detect_every,
            )  # fmt: skip
        self.sweeper.sweep()

    def _take(self, timeout: float) -> None:
        """Wait for a job, then do all there are, in order. What the database refuses now waits."""
        began = time.monotonic()
        try:
            job = self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait()
            if job is not None:
                self._waiting.append(job)
        except queue.Empty:
            pass
        self._overslept = time.monotonic() - began > timeout + _OVERSLEPT
        self._drain_inbox()
        self._work_off()

    def _drain_inbox(self) -> None:
        while True:
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                self._waiting.append(job)

    def _work_off(self) -> None:
        while self._waiting:
            try:
                self._waiting[0]()
            except (errors.DatabaseUnavailable, errors.SchemaError) as error:
                logger.error("action=verdict_waits %d to write: %s", len(self._waiting), error)
                return
            except Exception:
                logger.exception("action=verdict_failed (the reconciliation or a sweep will find its child)")
            self._waiting.popleft()

    def _guarded(self, step: Job) -> None:
        """A step that fails must not end the thread: the next beat tries again."""
        try:
            step()
        except errors.BatchTrackError as error:
            logger.error("action=attendance_waits %s: %s", self.worker.name, error)
        except Exception:
            logger.exception("action=attendance_failed %s", self.worker.name)

    def close(self, timeout: float = 10.0) -> None:
        """Write what is known, then end the thread. For the time after the pool has joined."""
        self._closing.set()
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join(timeout=timeout)
            if self._thread.is_alive():
                return
        self._drain_inbox()
        self._guarded(self._work_off)
        self._guarded(lambda: run.deliver_spool(self.tracker, self.boxes))
        self._guarded(self._settle_what_the_pool_left)
        self._kernel.close()

    def _settle_what_the_pool_left(self) -> None:
        """A cold shutdown kills pool processes; what they had in hand is lost with this worker."""
        for row in self.tracker.store.running_of(self.worker.id):
            pid, started = blackbox.slot_process(row.slot or "0:0")
            if pid != self.worker.pid and hosts.gone(pid, started) is True:
                message = "its process ended with its worker, before it reported"
                death = Death(pid, started, Cause.WORKER_LOST, message=message)
                detector.process_died(self.tracker, self.worker, self.boxes, death)


__all__ = ["Attendant", "Pulse"]
