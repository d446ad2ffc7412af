"""A run in its own process: claim → (the user's function) → settle or release → finish check."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from celery_batchtrack import errors
from celery_batchtrack.store import SlotTaken
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import Ticket, new_token
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, Claimed, Ending, Refused, Release, Settled, Step
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict

from . import blackbox, dispatch, failpoints, fatal, finish, recovery, spool
from .blackbox import Page, Phase
from .folders import Boxes
from .identity import WorkerIdentity
from .tracker import Tracker

T = TypeVar("T")


@dataclass
class Run:
    """One claimed attempt in this process."""

    ticket: Ticket
    claimed: Claimed
    slot: str
    page: Page
    task: str
    pid: int = field(default_factory=os.getpid)

    @property
    def is_of_this_process(self) -> bool:
        """Not so in a process that the user's function has forked, and that comes back or raises through it."""
        return self.pid == os.getpid()

    @property
    def attempt(self) -> int:
        return self.claimed.attempt


@dataclass
class Runner:
    """Runs children in the slots of this process, for one worker (or client) identity."""

    tracker: Tracker
    worker: WorkerIdentity
    boxes: Boxes
    pause: Callable[[float], None] = time.sleep

    # -- claim -----------------------------------------------------------------------------------

    def claim(self, ticket: Ticket, task: str, policy: dict[str, Any] | None, depth: int = 0) -> Run | Refused:
        """Try to make the message's row this slot's own. Waits for a database that is away, for
        `claim_timeout` at most; the row is pending all the while."""
        slot = blackbox.slot_name(depth)
        page = self.boxes.page(slot)
        token = new_token()
        self._check_evidence(slot, page)
        page.enter(ticket.key, token, stall_timeout=(policy or {}).get("stall_timeout") or 0.0)
        try:
            answer = self._answered(ticket, token, slot, policy)
        except BaseException:  # a time limit, or the end of the process, while it waited
            page.give_up(token)
            raise
        if isinstance(answer, Refused):
            if answer.wait:
                page.give_up(token)
            return self._refused(ticket, page, answer)
        failpoints.reach("claim.committed")
        page.phase(Phase.RUNNING)
        page.given_up.clear()  # the slot was free: none of them holds a row
        return Run(ticket, answer, slot, page, task)

    def _check_evidence(self, slot: str, page: Page) -> None:
        """What will be missing in a dossier is said once, before it is missed."""
        fatal.cover_thread()
        if fatal.just_lost():
            self.tracker.emit(events.StacksMissing(os.getpid()))
        if page.trouble is not None:
            self.tracker.emit(events.BlackBoxMissing(slot, page.trouble))
            page.trouble = None

    def _answered(
        self, ticket: Ticket, token: uuid.UUID, slot: str, policy: dict[str, Any] | None
    ) -> Claimed | Refused:
        waits = _delays(self.tracker.settings.claim_timeout)
        while True:
            try:
                answer = self._try(ticket, token, slot, policy)
            except errors.DatabaseUnavailable as error:
                answer = Refused(str(error), wait=True)
            delay = next(waits, None) if isinstance(answer, Refused) and answer.wait else None
            if delay is None or isinstance(answer, Claimed):
                return answer
            self.tracker.emit(events.DatabaseAway(ticket.key, "claim", answer.reason))
            self.pause(delay)

    def _try(self, ticket: Ticket, token: Any, slot: str, policy: Any) -> Claimed | Refused:
        store = self.tracker.store
        for _ in range(3):
            try:
                return store.claim(ticket.key, ticket.attempt, token, self.worker.id, slot, policy)
            except SlotTaken:
                self._vacate(slot)
        return Refused(f"slot {slot} could not be vacated", wait=True)

    def _vacate(self, slot: str) -> None:
        """This slot claims anew, so its former child is over: what it spooled is its end, or none was kept."""
        deliver_spool(self.tracker, self.boxes, lambda spooled: spooled.slot == slot)
        for row in self.tracker.store.running_of(self.worker.id, slot):
            if row.slot != slot:
                continue
            if row.run_token in self.boxes.page(slot).given_up:
                if self.tracker.store.release_claiming(row):  # it never ran: no strike
                    dispatch.pump(self.tracker, row.batch_id)
            else:
                evidence = self.worker.evidence(
                    Cause.SETTLE_LOST, slot, Detector.RECONCILE,
                    message="its process took the next child without having reported this one's end",
                )  # fmt: skip
                recovery.run_died(self.tracker, row, evidence, Verdict.OBSERVED)

    def _refused(self, ticket: Ticket, page: Page, answer: Refused) -> Refused:
        if not answer.wait:
            page.clear()
        if answer.expired:
            with contextlib.suppress(errors.DatabaseUnavailable):  # then a sweep withdraws it
                expire(self.tracker, ticket)
        self.tracker.emit(events.ClaimRefused(ticket.key, ticket.attempt, answer.reason))
        return answer

    # -- the end ---------------------------------------------------------------------------------

    def settle(self, run: Run, ending: Ending) -> Settled:
        """Write the run's end, its count included, before the task is over."""
        if not run.is_of_this_process:
            return Settled(False)
        run.page.phase(Phase.SETTLING)
        settled = self._surely_delivered(run, ending)
        failpoints.reach("settle.committed")
        run.page.clear()
        tracker, key = self.tracker, run.ticket.key
        if settled.overturned:
            tracker.emit(events.VerdictOverturned(key, ending.status))
        if settled.late:
            tracker.emit(events.LateWrite(key, ending.status))
        elif settled.written:
            tracker.emit(events.ChildSettled(key, run.task, ending.status, run.attempt))
        ticket = run.ticket
        _best_effort(
            tracker, run,
            lambda: finish.after(tracker, key, settled, milestones=ticket.milestones, refill=ticket.refill),
        )  # fmt: skip
        return settled

    def _surely_delivered(self, run: Run, ending: Ending) -> Settled:
        """A soft time limit, or an error nobody thought of, may strike in the middle of it: once more, then spool."""
        try:
            return self._delivered(run, ending)
        except Exception:  # noqa: BLE001 (a settle may be repeated)
            try:
                return self._delivered(run, ending)
            except Exception:
                self._spool(run, ending)
                run.page.clear()  # a row that is still running now is a lost settle, for others to find
                raise

    def _spool(self, run: Run, ending: Ending) -> Path | None:
        """Keep an outcome on disk; None where that cannot be done: then only this process knows it."""
        if self.boxes.folder is not None:
            with contextlib.suppress(OSError):
                return spool.write(
                    self.boxes.folder, spool.Spooled(run.ticket.key, run.claimed.token, run.slot, ending)
                )
        return None

    def _delivered(self, run: Run, ending: Ending) -> Settled:
        """Settle; while the database is away the outcome lies on disk, and the slot waits."""
        key, token = run.ticket.key, run.claimed.token
        path = None
        waits = _delays(None)
        while True:
            try:
                settled = self.tracker.store.settle(key, token, ending)
            except errors.DatabaseUnavailable as error:
                if path is None:
                    path = self._spool(run, ending)
                    self.tracker.emit(events.DatabaseAway(key, "settle", str(error), spooled=path is not None))
                self.pause(next(waits) or 0.0)
            else:
                if path is not None:
                    path.unlink(missing_ok=True)
                return settled

    def release(self, run: Run, how: Release) -> None:
        """Give the row back for another attempt (Celery's retry, `Reject(requeue=True)`)."""
        store, key, token = self.tracker.store, run.ticket.key, run.claimed.token
        self._give_back(run, "release", lambda: store.release(key, token, how))

    def advance(self, run: Run, result: Any) -> bool:
        """One of the child's tasks is done: the next one gets its result. False if it was the last."""
        step = self._next(run, lambda row, batch: self.tracker.canvas.next_step(row, batch, result))
        if step is not None:
            self._go_to(run, step)
        return step is not None

    def replace(self, run: Run, make: Callable[[ChildRow, BatchRow], Step]) -> None:
        """Something else is the child's present task from now on."""
        step = self._next(run, make)
        if step is not None:
            self._go_to(run, step)

    def _next(self, run: Run, make: Callable[[ChildRow, BatchRow], Step | None]) -> Step | None:
        store, key = self.tracker.store, run.ticket.key
        row, batch = self._patiently(run, "advance", lambda: (store.child(key), store.batch(key.batch_id)))
        return None if row is None or batch is None else make(row, batch)

    def _go_to(self, run: Run, step: Step) -> None:
        store, key, token = self.tracker.store, run.ticket.key, run.claimed.token
        self._give_back(run, "advance", lambda: store.advance(key, token, step))

    def _give_back(self, run: Run, what: str, write: Callable[[], object]) -> None:
        if not run.is_of_this_process:
            return
        run.page.phase(Phase.SETTLING)
        self._patiently(run, what, write)
        failpoints.reach(f"{what}.committed")
        run.page.clear()
        _best_effort(self.tracker, run, lambda: dispatch.pump(self.tracker, run.ticket.key.batch_id))

    def _patiently(self, run: Run, what: str, ask: Callable[[], T]) -> T:
        """Wait for a database that is away, however long."""
        waits = _delays(None)
        while True:
            try:
                return ask()
            except errors.DatabaseUnavailable as error:
                self.tracker.emit(events.DatabaseAway(run.ticket.key, what, str(error)))
                self.pause(next(waits) or 0.0)


def expire(tracker: Tracker, ticket: Ticket) -> None:
    """Withdraw a row whose time to start is over."""
    evidence = Evidence(Cause.EXPIRED, phase="before_claim", message="expired before it started")
    finish.never_ran(tracker, ticket.key, ticket.attempt, Status.CANCELLED, evidence)


def deliver_spool(
    tracker: Tracker, boxes: Boxes, wanted: Callable[[spool.Spooled], bool] = lambda spooled: True
) -> int:
    """Write spooled ends of this worker boot's runs. Returns how many were delivered."""
    delivered = 0
    if boxes.folder is None:
        return 0
    for path, spooled in spool.read_all(boxes.folder):
        if not wanted(spooled):
            continue
        settled = tracker.store.settle(spooled.key, spooled.token, spooled.ending)
        path.unlink(missing_ok=True)
        tracker.emit(events.SpoolDelivered(spooled.key, settled.written))
        if not (settled.late or settled.overturned):
            finish.tell_settled(tracker, spooled.key, settled, spooled.ending.status)
        finish.after(tracker, spooled.key, settled)
        delivered += 1
    return delivered


def _best_effort(tracker: Tracker, run: Run, follow: Callable[[], object]) -> None:
    """What follows a commit is also done by every sweep: trouble here must not turn a settled child into a
    failed task."""
    try:
        follow()
    except Exception as error:  # noqa: BLE001
        tracker.emit(events.FollowUpFailed(run.ticket.key, f"{type(error).__name__}: {error}"))


def _delays(limit: float | None) -> Iterator[float]:
    """Pauses of 0.05 s, doubling up to 2 s, until their sum passes `limit` seconds (None: for ever)."""
    delay, total = 0.05, 0.0
    while limit is None or total < limit:
        yield delay
        total += delay
        delay = min(2.0, delay * 2)
