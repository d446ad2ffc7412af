"""The four crash detectors, and the sweep. Each ends in the same guarded settle.

1. `process_died`: the main process saw a pool process die.
2. `sweep`, host: a worker of this host is gone; pid *and* start time say so, or its lock is free.
3. `Reconciler`: a running row that is in none of its worker's black boxes; and the reverse, zombies.
4. `sweep`, lease: a worker was silent for a lease, was suspected, and was silent for another.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from celery_batchtrack import errors
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, Ticket
from celery_batchtrack.vocabulary.records import ChildRow, HostIdentity, WorkerRow
from celery_batchtrack.vocabulary.states import Cause, Detector, EndReason, Status, Verdict

from . import blackbox, dispatch, dossier, ending, finish, folders, hosts, recovery, run
from .blackbox import PageState, Phase, slot_process
from .folders import Boxes
from .identity import WorkerIdentity
from .tracker import Tracker

# -- 1: a pool process died, its main process lives -----------------------------------------------


@dataclass(frozen=True, slots=True)
class Death:
    """What the main process knows of a pool process that died, or is being killed."""

    pid: int
    pid_started: int | None
    cause: Cause
    ticket: Ticket | None = None
    policy: RowPolicy = field(default_factory=RowPolicy)
    signal: str | None = None
    exit_code: int | None = None
    message: str | None = None
    peak_memory: int | None = None
    #: By this process's monotonic clock; only the time since then is told to the database.
    noticed: float = field(default_factory=time.monotonic)


def process_died(tracker: Tracker, worker: WorkerIdentity, boxes: Boxes, death: Death) -> int:
    """Settle everything that a dead pool process had in hand. Returns how many verdicts were written.

    Idempotent: a hard time limit is reported twice, and others may have been first.
    """
    mine = f"{death.pid}:" if death.pid_started is None else f"{death.pid}:{death.pid_started}:"
    run.deliver_spool(tracker, boxes, lambda spooled: spooled.slot.startswith(mine))
    rows = tracker.store.running_of(worker.id, mine)
    if death.pid_started is None:  # the pid may be another process's by now
        rows = [row for row in rows if _slot_gone(row.slot or mine + "0:0:0") is not False]
    written = 0
    for row in rows:
        evidence = dossier.of_run(_evidence_of(worker, death), boxes, row)
        written += recovery.run_died(tracker, row, evidence, Verdict.OBSERVED)
        boxes.drop(row.slot or "")
    if death.ticket is not None and all(row.key != death.ticket.key for row in rows):
        written += _died_before_claim(tracker, worker, boxes, death, death.ticket)
    return written


def _died_before_claim(
    tracker: Tracker, worker: WorkerIdentity, boxes: Boxes, death: Death, ticket: Ticket
) -> bool:
    row = tracker.store.child(ticket.key)
    if row is None or row.status != Status.PENDING or row.attempt != ticket.attempt:
        return False
    evidence = _evidence_of(worker, death, phase="before_claim")
    if death.cause is Cause.SIGNAL:
        evidence = dossier.of_process(evidence, boxes, death.pid, death.pid_started)
    return recovery.died_before_claim(tracker, row, dossier.of_only_item(evidence, row), death.policy)


def _evidence_of(worker: WorkerIdentity, death: Death, phase: str = "running") -> Evidence:
    return Evidence(
        death.cause, phase=phase, signal=death.signal, exit_code=death.exit_code, message=death.message,
        hostname=worker.host.hostname, boot_id=worker.host.boot_id, worker=worker.name, worker_id=worker.id,
        pid=death.pid, peak_memory=death.peak_memory, versions=worker.versions or None, detected_by=Detector.MAIN,
        noticed=death.noticed,
    )  # fmt: skip


# -- 3: rows against black boxes ------------------------------------------------------------------


@dataclass
class Reconciler:
    """Compares a living worker's running rows with its slots' pages, beat by beat.

    Whatever looks wrong must look wrong on two beats: rows and pages are read one after the other.
    """

    tracker: Tracker
    worker: WorkerIdentity
    boxes: Boxes
    kill: Callable[[int, int], None] = os.kill
    #: Seconds for which a process is gone before it is judged here: the main process sees it sooner, and knows how.
    patience: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _orphans: dict[tuple[ChildKey, uuid.UUID], float] = field(default_factory=dict)
    _zombies: dict[tuple[ChildKey, uuid.UUID], int] = field(default_factory=dict)
    _left_behind: set[Path] = field(default_factory=set)

    def beat(self) -> None:
        """One comparison: rows first, then pages."""
        run.deliver_spool(self.tracker, self.boxes)  # idempotent, where a process delivers its own
        rows = self.tracker.store.running_of(self.worker.id)
        pages = {slot: blackbox.read(path) for slot, path in self.boxes.pages()}
        self._convict_orphans(rows, pages)
        self._terminate_zombies(rows, pages)
        self._drop_what_the_dead_left(rows, pages)

    def _drop_what_the_dead_left(self, rows: list[ChildRow], pages: dict[str, PageState | None]) -> None:
        """Pages and stacks of processes that were killed while idle: nothing asks for them any more. On the second
        beat: a death may still wait to be judged, of a run that was claimed after the rows were read."""
        in_use = {row.slot for row in rows}
        processes = {slot_process(slot) for slot in in_use if slot is not None}
        dead = {
            path for slot, path in self.boxes.pages()
            if slot in pages and slot not in in_use and _slot_gone(slot) is True
        } | {
            path for pid, started, path in self.boxes.stacks()
            if (pid, started) not in processes and hosts.gone(pid, started) is True
        }  # fmt: skip
        for path in dead & self._left_behind:
            with contextlib.suppress(OSError):
                path.unlink()
        self._left_behind = dead

    def _convict_orphans(self, rows: list[ChildRow], pages: dict[str, PageState | None]) -> None:
        seen: dict[tuple[ChildKey, uuid.UUID], float] = {}
        for row in rows:
            if row.slot is None or row.run_token is None:
                continue
            why = self._why_orphan(row.slot, row.run_token, pages)
            if why is None:
                continue
            identity, moment = (row.key, row.run_token), self.clock()
            since = seen[identity] = self._orphans.get(identity, moment)
            if identity in self._orphans and (why != "gone" or moment - since >= self.patience):
                self._convict(row, why, pages)
        self._orphans = seen

    def _why_orphan(self, slot: str, token: uuid.UUID, pages: dict[str, PageState | None]) -> str | None:
        if _slot_gone(slot) is True:
            return "gone"
        page = pages.get(slot)
        if page is None:
            return None  # no page, or a torn one: that proves nothing
        if page.token != token:
            return "left"
        return "gave_up" if page.phase is Phase.GAVE_UP else None

    def _convict(self, row: ChildRow, why: str, pages: dict[str, PageState | None]) -> None:
        if why == "gave_up":
            if self.tracker.store.release_claiming(row):
                dispatch.pump(self.tracker, row.batch_id)
            return
        cause, message = Cause.SETTLE_LOST, "its process went on without having reported this child's end"
        if why == "gone":
            cause, message = Cause.EXIT, "its process is gone; how it ended was not seen"
        evidence = self.worker.evidence(cause, row.slot, Detector.RECONCILE, message=message)
        if why == "gone":
            evidence = dossier.of_run(evidence, self.boxes, row)
        recovery.run_died(self.tracker, row, evidence, Verdict.OBSERVED)
        if why == "gone":
            self.boxes.drop(row.slot or "")

    def _terminate_zombies(self, rows: list[ChildRow], pages: dict[str, PageState | None]) -> None:
        running = {(row.key, row.run_token) for row in rows}
        suspects: dict[tuple[ChildKey, uuid.UUID], str] = {}
        for slot, page in pages.items():
            if page is None or page.key is None or page.token is None or page.phase is not Phase.RUNNING:
                continue
            if (page.key, page.token) not in running and _slot_gone(slot) is False:
                suspects[page.key, page.token] = slot
        reasons = self.tracker.store.cancelled_runs(list(suspects))
        beats: dict[tuple[ChildKey, uuid.UUID], int] = {}
        for (key, token), slot in suspects.items():
            if key in reasons:
                beats[key, token] = self._zombies.get((key, token), 0) + 1
                self._terminate(key, token, slot, reasons[key], beats[key, token])
        self._zombies = beats

    def _terminate(self, key: ChildKey, token: uuid.UUID, slot: str, reason: str, beats: int) -> None:
        pid = slot_process(slot)[0]
        if beats < 2 or pid == self.worker.pid:  # a thread or solo pool: its run goes on, in vain
            return
        path = self.boxes.path(slot)
        page = None if path is None else blackbox.read(path)
        if page is None or (page.token, page.phase) != (token, Phase.RUNNING) or _slot_gone(slot) is not False:
            return  # it ended meanwhile, and its process may run another child
        # First the way Celery terminates; native code that does not listen is killed a beat later.
        self.kill(pid, signal.SIGTERM if beats == 2 else signal.SIGKILL)
        self.tracker.emit(events.ZombieTerminated(key, pid, reason))


def _slot_gone(slot: str) -> bool | None:
    return hosts.gone(*slot_process(slot))


# -- 2 and 4: the sweep ---------------------------------------------------------------------------


@dataclass(slots=True)
class Sweep:
    """What one pass did."""

    lost_workers: int = 0
    verdicts: int = 0
    abandoned: int = 0
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    dispatched: int = 0
    redispatched: int = 0
    delivered: int = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass
class Sweeper:
    """One process's view of all workers: it may judge those of its own host by evidence."""

    tracker: Tracker
    by: str
    base: Path | None  # folder of all black boxes on this host
    own: WorkerIdentity | None = None
    host: HostIdentity = field(default_factory=hosts.identity)

    def overdue(self) -> bool:
        return self.tracker.store.sweep_overdue(self.tracker.settings.detect_every)

    def sweep(self) -> Sweep:
        """One pass of the crash detector. Any number may run at once: every verdict is guarded."""
        done = Sweep()
        may_convict = self.tracker.store.begin_sweep(self.by, self.tracker.settings.detect_every)
        self._replay_spools(done)
        self._lose_by_host(done)
        self._lose_by_lease(done, may_convict=may_convict)
        self._settle_orphans(done)
        self._tend_batches(done)
        self._clear_away()
        return done

    def _clear_away(self) -> None:
        """Folders of dead workers of which nothing is left to tell."""
        if self.base is None:
            return
        kept = {worker.id for worker in self.tracker.store.live_workers()}
        kept |= {worker.id for _, worker in self.tracker.store.orphans()}
        for boxes in folders.of_dead_workers(self.base):
            if boxes.worker_id not in kept and self.tracker.store.knows_worker(boxes.worker_id):
                boxes.remove()

    def _replay_spools(self, done: Sweep) -> None:
        """Ends that processes of this host could not write, before any verdict about their runs: also those of
        workers that others have found lost already. The folder may be shared with another database's."""
        waiting = folders.with_spool(self.base)
        if waiting:
            for worker in self.tracker.store.workers(all=True, limit=10_000):
                if worker.id in waiting:
                    done.delivered += self._deliver_spool_of(worker)

    def _lose_by_host(self, done: Sweep) -> None:
        for worker in self.tracker.store.live_workers():
            if self._surely_dead(worker):
                done.delivered += self._deliver_spool_of(worker)
                self._lost(worker, Detector.HOST, done)

    def _surely_dead(self, worker: WorkerRow) -> bool:
        if self.own is not None and worker.id == self.own.id:
            return False
        if not self._same_host(worker):
            return self._lock_is_free(worker)
        own_pid = self.own is not None and self.own.kind == "worker" and worker.kind == "worker"
        if own_pid and self.own is not None and worker.pid == self.own.pid:
            return True  # another boot: SIGHUP restarts by execv (same pid, same start time), or the pid came again
        return hosts.gone(worker.pid, worker.pid_started) is True

    def _same_host(self, worker: WorkerRow) -> bool:
        readable = self.host.boot_id is not None and self.host.pid_namespace is not None
        return readable and (worker.hostname, worker.boot_id, worker.pid_namespace) == (
            self.host.hostname, self.host.boot_id, self.host.pid_namespace,
        )  # fmt: skip

    def _boxes_of(self, worker: WorkerRow) -> Boxes:
        return Boxes(self.base, worker.id)

    def _lock_is_free(self, worker: WorkerRow) -> bool:
        """A container's worker, seen from its successor over a shared folder of black boxes."""
        folder = self._boxes_of(worker).folder
        return folder is not None and folders.held(folder / "alive") is False

    def _deliver_spool_of(self, worker: WorkerRow) -> int:
        return run.deliver_spool(self.tracker, self._boxes_of(worker))

    def _lost(self, worker: WorkerRow, by: Detector, done: Sweep, beat: int | None = None) -> None:
        if self.tracker.store.lose(worker.id, by, beat) and worker.kind == "worker":
            done.lost_workers += 1
            self.tracker.emit(events.WorkerLost(worker.id, worker.name, worker.hostname, worker.pid, by))

    def _lose_by_lease(self, done: Sweep, *, may_convict: bool) -> None:
        store = self.tracker.store
        if may_convict:
            for worker in store.confirmed_stale():
                if not self._seen_alive(worker):
                    self._lost(worker, Detector.LEASE, done, worker.beat)
        store.suspect(anew=not may_convict)

    def _seen_alive(self, worker: WorkerRow) -> bool:
        """Silent, but there: stopped, swapped out, or cut off from the database."""
        if self._same_host(worker):
            return hosts.gone(worker.pid, worker.pid_started) is False
        folder = self._boxes_of(worker).folder
        return folder is not None and folders.held(folder / "alive") is True

    def _settle_orphans(self, done: Sweep) -> None:
        for row, worker in self.tracker.store.orphans():
            try:
                done.verdicts += self._settle_orphan(row, worker)
            except errors.BatchTrackError:
                raise  # the database is the trouble: so it is for all others
            except Exception as error:  # noqa: BLE001 (one row must not hold up the rest of the sweep)
                self.tracker.emit(events.VerdictFailed(row.key, f"{type(error).__name__}: {error}"))

    def _settle_orphan(self, row: ChildRow, worker: WorkerRow) -> bool:
        found = self._judge_orphan(row, worker)
        if found is None:
            return False
        evidence, verdict = found
        evidence = dossier.of_run(evidence, self._boxes_of(worker), row)
        return recovery.run_died(self.tracker, row, evidence, verdict)

    def _judge_orphan(self, row: ChildRow, worker: WorkerRow) -> tuple[Evidence, Verdict] | None:
        """A row's own process must be gone too; where that cannot be seen, the lease decides."""
        gone = self._slot_is_gone(row, worker)
        if gone is False:
            return None  # it outlived its main process and may still report
        if worker.stopped_at is not None:
            message = f"worker {worker.name} ended in order, but this child's end was never reported"
            return _worker_evidence(worker, row, Cause.SETTLE_LOST, Detector.RECONCILE, message), Verdict.OBSERVED
        if gone is True:
            message = f"worker {worker.name} (pid {worker.pid}) is gone from this host"
            return _worker_evidence(worker, row, Cause.WORKER_LOST, Detector.HOST, message), Verdict.OBSERVED
        if worker.lost_by == Detector.LEASE or self._silent_for_long(worker):
            message = f"worker {worker.name} has not beaten since {worker.beat_at:%Y-%m-%d %H:%M:%S} UTC"
            return _worker_evidence(worker, row, Cause.WORKER_LOST, Detector.LEASE, message), Verdict.LEASE
        return None

    def _slot_is_gone(self, row: ChildRow, worker: WorkerRow) -> bool | None:
        if row.slot is None:
            return None
        if self._same_host(worker):
            pid, _ = slot_process(row.slot)
            if pid == worker.pid:
                return True if self._surely_dead(worker) else hosts.gone(worker.pid, worker.pid_started)
            return _slot_gone(row.slot)
        boxes = self._boxes_of(worker)
        own_process = slot_process(row.slot)[0] == worker.pid
        # In threads and solo pools the main process reads its own pages, which drops their locks: ask for its own.
        path = boxes.folder / "alive" if own_process and boxes.folder is not None else boxes.path(row.slot)
        held = None if path is None else folders.held(path)
        return None if held is None else not held

    def _silent_for_long(self, worker: WorkerRow) -> bool:
        """Lost by its host's evidence, which we do not share: then only time tells."""
        if worker.lost_at is None:
            return False
        silence = (self.tracker.store.current_time() - worker.beat_at).total_seconds()
        return silence >= 2 * worker.lease

    def _tend_batches(self, done: Sweep) -> None:
        """What a process that died half way left undone: abandoned, unfinished, unpublished, expired."""
        tracker = self.tracker
        for batch_id in tracker.store.abandoned():
            done.abandoned += finish.cancel(tracker, batch_id, EndReason.ABANDONED) is not None
        for batch_id in tracker.store.overdue_batches():
            done.cancelled += finish.cancel(tracker, batch_id, EndReason.DEADLINE) is not None
        for batch_id in tracker.store.forsaken():
            done.cancelled += finish.cancel(tracker, batch_id, EndReason.PARENT) is not None
        for row in tracker.store.expired():
            run.expire(tracker, Ticket(tracker.store_id, row.key, row.attempt))
            done.expired += 1
        for batch_id in tracker.store.unfinished():
            done.finished += finish.look(tracker, batch_id) is not None
        finish.keep_step(tracker)
        finish.bury(tracker)
        tracker.store.drop_stale_callbacks()
        for batch_id in tracker.store.joinable():
            finish.join(tracker, batch_id)
        for batch_id in tracker.store.watched_for_progress():
            finish.milestones(tracker, batch_id)
        for batch_id in tracker.store.untold():
            ending.tell_backend(tracker, batch_id)
        tracker.store.sample_crash_rates()
        tracker.store.merge_outcomes()
        # Of one large batch not all at once: a sweep has others to look after.
        done.dispatched += dispatch.pump(tracker, limit=tracker.settings.fan_out)
        done.redispatched += dispatch.redispatch(tracker, worker_lost=done.lost_workers > 0)


def _worker_evidence(worker: WorkerRow, row: ChildRow, cause: Cause, detector: Detector, message: str) -> Evidence:
    pid = slot_process(row.slot)[0] if row.slot else worker.pid
    return Evidence(
        cause, message=message, hostname=worker.hostname, boot_id=worker.boot_id, worker=worker.name,
        worker_id=worker.id, pid=pid, versions={"celery_batchtrack": worker.version}, detected_by=detector,
        died_at=worker.stopped_at or worker.beat_at,  # the last sign of life
    )  # fmt: skip
