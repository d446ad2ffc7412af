"""Claim, settle, release, crash: every write to one child, guarded."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from celery_batchtrack.vocabulary.aftermath import Killer, Rerun
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import ChildRow, Claimed, Ending, Refused, Release, Settled
from celery_batchtrack.vocabulary.states import (
    BATCH_ALIVE,
    CRASH,
    CRASH_UNCLAIMED,
    ENDINGS,
    OVERTURNS,
    QUARANTINE,
    REFUSE,
    RELEASE,
    STRIKE,
    WITHDRAW,
    BatchStatus,
    Cause,
    Kind,
    Status,
    Transition,
    Verdict,
)

from . import breaker, callbacks, hot
from .clock import Moment, later, moment, now
from .engine import Connected
from .incidents import TOLD, Attempt, record
from .quarantine import count_kill
from .rows import CHILD_COLUMNS, child_row
from .schema import WITH_ITS_WORKER, Json, batch, child, incident
from .transitions import MOVED, change, move


def at(key: ChildKey) -> sa.ColumnElement[bool]:
    return sa.and_(child.c.batch_id == key.batch_id, child.c.position == key.position)


class ChildWrites(Connected):
    """Guarded writes to one child. Losing a guard is an answer, not an error."""

    # -- claim -----------------------------------------------------------------------------------

    def claim(
        self, key: ChildKey, attempt: int, token: uuid.UUID, worker_id: uuid.UUID, slot: str,
        policy: Mapping[str, Any] | None = None,
    ) -> Claimed | Refused:  # fmt: skip
        """``pending → running`` for the message published at `attempt`; repeatable with the same token.

        One statement. Raises `SlotTaken` where the slot still holds another running row.
        """
        values = {
            "the_batch": key.batch_id, "the_position": key.position, "the_attempt": attempt, "the_token": token,
            "the_worker": worker_id, "the_slot": slot, "the_policy": policy,
        }  # fmt: skip
        try:
            with self.single() as connection:
                row = connection.execute(hot.claim(), values).one_or_none()
        except exc.IntegrityError as error:
            raise SlotTaken(slot) from error
        if row is not None:
            return Claimed(key, row.attempt, token, row.kind)
        return self._why_refused(key, attempt, token, worker_id)

    def _why_refused(self, key: ChildKey, attempt: int, token: uuid.UUID, worker_id: uuid.UUID) -> Claimed | Refused:
        query = (
            sa.select(
                *CHILD_COLUMNS,
                batch.c.status.label("batch_status"), batch.c.paused_at, batch.c.round.label("now_round"),
                (child.c.expires_at <= now()).label("expired"), hot.worker_lives(worker_id).label("known"),
            )
            .join(batch, batch.c.id == child.c.batch_id)
            .where(at(key))
        )  # fmt: skip
        with self.read() as connection:
            found = connection.execute(query).one_or_none()
        if found is None:
            return Refused("its row is gone")
        row = child_row(found[: len(CHILD_COLUMNS)])
        if row.run_token == token and row.status == Status.RUNNING:
            return Claimed(key, row.attempt, token, row.kind)  # the commit was ours, its answer was lost
        if row.attempt != attempt:
            return Refused(f"the message is of attempt {attempt}, the row is at {row.attempt}")
        if row.status != Status.PENDING:
            return Refused(f"the row is {row.status}")
        if found.expired:
            return Refused("it has expired", expired=True)
        if found.batch_status not in BATCH_ALIVE and row.kind == Kind.CHILD:
            return Refused(f"its batch is {found.batch_status}")
        if found.paused_at is not None:
            return Refused("its batch is paused")
        if row.kind != Kind.CHILD and row.round != found.now_round:
            return Refused(f"its batch is in round {found.now_round}")
        if not found.known:
            return Refused("this worker is not registered yet", wait=True)
        return Refused("the row was about to change", wait=True)

    # -- the run's own end -----------------------------------------------------------------------

    def settle(self, key: ChildKey, token: uuid.UUID, ending: Ending) -> Settled:
        """Write a run's end and its count. Repeatable: the same token may ask twice."""
        if ending.status is Status.COMPLETED and not self.sqlite:
            answer = self._settle_at_once(key, token, ending)
        else:
            answer = self._settle_in_steps(key, token, ending)
        return answer or self._settle_late(key, token, ending)

    def _settle_at_once(self, key: ChildKey, token: uuid.UUID, ending: Ending) -> Settled | None:
        values = {
            "the_batch": key.batch_id, "the_position": key.position, "the_token": token, "the_result": ending.result
        }  # fmt: skip
        with self.single() as connection:
            row = connection.execute(hot.complete(ending.keep_signature), values).one_or_none()
        return None if row is None else Settled(True, look=row.open == 0, body=row.kind == Kind.ON_SUCCESS)

    def _settle_in_steps(self, key: ChildKey, token: uuid.UUID, ending: Ending) -> Settled | None:
        with self.write() as connection:
            first = callbacks.lock_for_first_failure(connection, key.batch_id, ending.status)
            rows = connection.execute(_end(key, token, ending).returning(*MOVED, *TOLD)).all()
            if not rows:
                return None
            if ending.evidence is not None:
                told = Attempt.told(key, rows[0], token)
                record(connection, told, ending.status, ending.evidence)
            look = move(connection, key.batch_id, rows, None, ending.status)
            called = callbacks.insert_first_failure(connection, first, rows[0].kind)
            return Settled(True, look=look, callbacks=called, body=rows[0].kind == Kind.ON_SUCCESS)

    def _settle_late(self, key: ChildKey, token: uuid.UUID, ending: Ending) -> Settled:
        """The guard lost: an earlier answer was lost, a mere suspicion is overturned, or it is too late."""
        with self.write() as connection:
            row = self._locked_for_overturn(connection, key)
            if row is None:
                return Settled(False)  # the application deleted the batch: nothing is left to write to
            if row.run_token == token and row.status == ending.status:
                body = row.kind == Kind.ON_SUCCESS
                return Settled(True, look=True, callbacks=True, body=body)  # what the lost answer may have said
            if self._may_overturn(connection, row, token, ending):
                return self._overturn(connection, row, token, ending)
            evidence = ending.evidence or Evidence(ending.cause or Cause.LATE_WRITE)
            record(connection, replace(Attempt.of(row), token=token), "late_write", evidence)
            return Settled(False, late=True)

    def _locked_for_overturn(self, connection: sa.Connection, key: ChildKey) -> ChildRow | None:
        connection.execute(sa.select(batch.c.id).where(batch.c.id == key.batch_id).with_for_update(read=True))
        found = connection.execute(sa.select(*CHILD_COLUMNS).where(at(key)).with_for_update()).one_or_none()
        return None if found is None else child_row(found)

    def _may_overturn(self, connection: sa.Connection, row: ChildRow, token: uuid.UUID, ending: Ending) -> bool:
        if row.run_token != token or row.verdict != Verdict.LEASE or ending.status not in OVERTURNS:
            return False
        if row.status not in OVERTURNS[ending.status].sources:
            return False
        if row.kind != Kind.CHILD:
            return True  # fenced by its token alone
        status = connection.execute(sa.select(batch.c.status).where(batch.c.id == row.batch_id)).scalar_one()
        return bool(status == BatchStatus.RUNNING or status == BatchStatus.OPEN)

    def _overturn(self, connection: sa.Connection, row: ChildRow, token: uuid.UUID, ending: Ending) -> Settled:
        source = Status(row.status)
        rows = connection.execute(
            change(
                OVERTURNS[ending.status], at(row.key), child.c.run_token == token,
                verdict=None, **_end_values(ending),
            ).returning(*MOVED)
        ).all()  # fmt: skip
        if ending.evidence is not None:
            record(connection, Attempt.of(row), ending.status, ending.evidence)
        move(connection, row.batch_id, rows, source, ending.status)
        connection.execute(
            sa.update(incident)
            .where(
                incident.c.batch_id == row.batch_id, incident.c.position == row.position,
                incident.c.run_token == token, incident.c.verdict == Verdict.LEASE.value,
            )
            .values(overturned_at=now())
        )  # fmt: skip
        return Settled(True, look=True, overturned=True, body=row.kind == Kind.ON_SUCCESS)

    def release(self, key: ChildKey, token: uuid.UUID, how: Release) -> bool:
        """``running → pending``: the run gives its row back for another attempt."""
        due = moment(how.countdown, how.eta)
        values: dict[str, Any] = {"not_before": due, "dispatched_at": None}
        if how.sent and due is not None:
            # Celery publishes its retry before we get here: one that is due now was refused already.
            values["dispatched_at"] = sa.case((sa.type_coerce(due, Moment) > now(), now()), else_=None)
        if how.retries is not None:
            values["retries"] = how.retries
        if how.signature is not None:
            values["signature"] = how.signature
        if how.items is not None:
            # Others than before: then nobody can tell them apart any more, but how many they are stays counted.
            as_many = child.c.item_count == len(how.items)
            values["items"] = sa.case((as_many, sa.literal(list(how.items), Json)), else_=sa.null())
        statement = change(RELEASE, at(key), child.c.run_token == token, **values)
        with self.write() as connection:
            row = connection.execute(statement.returning(*TOLD)).one_or_none()
            if row is not None and how.evidence is not None:
                record(connection, Attempt.told(key, row, token), "retried", how.evidence)
            return row is not None

    # -- ends that others write ------------------------------------------------------------------

    def crash(
        self, row: ChildRow, evidence: Evidence, verdict: Verdict, again: Rerun | None, killer: Killer | None = None
    ) -> Settled:
        """A run died: it is pending once more as `again` says, or crashed. `killer`: the item to blame.

        Fenced by the run token that `row` was read with.
        """
        guard = (at(row.key), child.c.run_token == row.run_token)
        return self._died(row, CRASH, RELEASE, guard, evidence, verdict, again, killer)

    def crash_unclaimed(
        self, row: ChildRow, evidence: Evidence, again: Rerun | None, killer: Killer | None = None
    ) -> Settled:
        """A process died with the message in hand, before the claim: that uses up an attempt too."""
        guard = (at(row.key), child.c.attempt == row.attempt)
        return self._died(
            row, CRASH_UNCLAIMED, STRIKE, guard, evidence, Verdict.OBSERVED, again, killer,
            attempt=child.c.attempt + 1,
        )  # fmt: skip

    def quarantine(self, row: ChildRow, evidence: Evidence) -> Settled:
        """``pending → crashed`` without having been sent: its only item killed too often."""
        guard = (at(row.key), child.c.attempt == row.attempt)
        return self._died(row, QUARANTINE, STRIKE, guard, evidence, Verdict.OBSERVED, None, None, death=False)

    def _died(
        self, row: ChildRow, settle: Transition, rerun: Transition, guard: Any, evidence: Evidence,
        verdict: Verdict, again: Rerun | None, killer: Killer | None, *, death: bool = True, **values: Any,
    ) -> Settled:  # fmt: skip
        transition = settle if again is None else rerun
        strike = death and (again is None or again.strike)
        values.update(crashes=child.c.crashes + int(strike), verdict=verdict.value)
        if again is None:
            values["cause"] = evidence.cause.value
        else:
            values.update(_rerun(again))
        with self.write() as connection:
            watched = transition.target if verdict is Verdict.OBSERVED else Status.PENDING
            first = callbacks.lock_for_first_failure(connection, row.batch_id, watched)
            counted = strike and row.kind == Kind.CHILD
            rate = breaker.lock(connection, row.batch_id) if counted else None
            found = connection.execute(change(transition, *guard, **values).returning(*MOVED, *TOLD)).all()
            if not found:
                return Settled(False)
            told = Attempt.told(row.key, found[0], row.run_token)
            told = replace(told, queue=row.queue)  # where it was, not where it goes
            record(connection, told, "retried" if again is not None else transition.target, evidence, verdict)
            quarantined = count_kill(connection, row.task, killer, row.key, evidence)
            paused = breaker.count_death(connection, rate)
            if again is not None:
                return Settled(True, paused=paused, quarantined=quarantined)
            look = move(connection, row.batch_id, found, None, transition.target)
            called = callbacks.insert_first_failure(connection, first, found[0].kind)
            body = found[0].kind == Kind.ON_SUCCESS
            return Settled(True, look=look, callbacks=called, paused=paused, quarantined=quarantined, body=body)

    def others_lost_with(self, row: ChildRow) -> int:
        """How many runs went down with this row's worker beside its own: those still to be judged, and those that
        were. Runs within one process and thread are one."""
        running = sa.select(child.c.slot).where(
            child.c.worker_id == row.worker_id, child.c.status == Status.RUNNING.value
        )
        judged = sa.select(sa.func.count(incident.c.run_token.distinct())).where(
            incident.c.worker_id == row.worker_id, incident.c.run_token != row.run_token,
            sa.or_(incident.c.batch_id != row.batch_id, incident.c.position != row.position),
            incident.c.overturned_at.is_(None), sa.text(f"({WITH_ITS_WORKER})"),
        )  # fmt: skip
        with self.read() as connection:
            slots = {slot.rpartition(":")[0] for slot in connection.execute(running).scalars()}
            before: int = connection.execute(judged).scalar_one()
        return len(slots - {(row.slot or "").rpartition(":")[0]}) + before

    def release_claiming(self, row: ChildRow) -> bool:
        """A claim that committed after its process had given up: back to pending, without a strike."""
        statement = change(RELEASE, at(row.key), child.c.run_token == row.run_token, dispatched_at=None)
        with self.write() as connection:
            return connection.execute(statement).rowcount == 1

    def settle_unstarted(self, key: ChildKey, attempt: int, status: Status, evidence: Evidence) -> Settled:
        """A message that never reached its task (unknown name, revoked, expired, refused content)."""
        transition = WITHDRAW if status is Status.CANCELLED else REFUSE
        with self.write() as connection:
            first = callbacks.lock_for_first_failure(connection, key.batch_id, status)
            rows = connection.execute(
                change(transition, at(key), child.c.attempt == attempt, cause=evidence.cause.value)
                .returning(*MOVED, *TOLD)
            ).all()  # fmt: skip
            if not rows:
                return Settled(False)
            record(connection, Attempt.told(key, rows[0], None), transition.target, evidence)
            look = move(connection, key.batch_id, rows, None, transition.target)
            called = callbacks.insert_first_failure(connection, first, rows[0].kind)
            return Settled(True, look=look, callbacks=called, body=rows[0].kind == Kind.ON_SUCCESS)

    def settle_terminated(self, row: ChildRow, evidence: Evidence) -> Settled:
        """A running child whose task was revoked with `terminate`."""
        ending = Ending(Status.CANCELLED, cause=evidence.cause, evidence=evidence)
        assert row.run_token is not None
        return self._settle_in_steps(row.key, row.run_token, ending) or Settled(False)

    # -- reading one -----------------------------------------------------------------------------

    def child(self, key: ChildKey) -> ChildRow | None:
        with self.read() as connection:
            found = connection.execute(sa.select(*CHILD_COLUMNS).where(at(key))).one_or_none()
        return None if found is None else child_row(found)

    def running_of(self, worker_id: uuid.UUID, slot_prefix: str = "") -> list[ChildRow]:
        """Running rows of one worker, or of one of its processes (``pid:start``) or slots."""
        query = sa.select(*CHILD_COLUMNS).where(child.c.worker_id == worker_id, child.c.status == Status.RUNNING.value)
        if slot_prefix:
            query = query.where(child.c.slot.startswith(slot_prefix, autoescape=True))
        with self.read() as connection:
            return [child_row(row) for row in connection.execute(query)]

    def cancelled_runs(self, keys: Sequence[tuple[ChildKey, uuid.UUID]]) -> dict[ChildKey, str]:
        """Of the runs (key, token) that black boxes show: those whose row says that they are zombies, and why."""
        zombies: dict[ChildKey, str] = {}
        for key, token in keys:
            with self.read() as connection:
                found = connection.execute(
                    sa.select(*CHILD_COLUMNS, batch.c.status.label("batch_status"), batch.c.options)
                    .join(batch, batch.c.id == child.c.batch_id)
                    .where(at(key))
                ).one_or_none()
            reason = _zombie(found, token)
            if reason:
                zombies[key] = reason
        return zombies


class SlotTaken(Exception):
    """The slot still runs another row: its former child is over, and nobody has said so."""


def _zombie(found: Any, token: uuid.UUID) -> str | None:
    if found is None:
        return "its row is gone"
    row = child_row(found[: len(CHILD_COLUMNS)])
    if row.run_token != token:
        return "its row was claimed anew"
    batch_lives = row.kind != Kind.CHILD or found.batch_status in BATCH_ALIVE
    if row.status == Status.RUNNING or (row.verdict == Verdict.LEASE and batch_lives):
        return None  # alive, or taken for dead by its lease alone: that may still be overturned
    if row.status == Status.CANCELLED and found.options.get("terminate") is False:
        return None  # cancelled with terminate=False: it may run on, in vain
    if row.status in (Status.CANCELLED, Status.CRASHED):
        return f"its row is {row.status} ({row.cause})"
    return "its row is split: others run its items" if row.status == Status.SPLIT else None


def _rerun(again: Rerun) -> dict[str, Any]:
    values: dict[str, Any] = {"dispatched_at": None, "not_before": later(again.delay)}
    if again.isolated:
        values["isolated"] = True
    if again.queue is not None:
        values.update(queue=again.queue, rerouted=True)
    return values


def _end(key: ChildKey, token: uuid.UUID, ending: Ending) -> sa.Update:
    return change(ENDINGS[ending.status], at(key), child.c.run_token == token, **_end_values(ending))


def _end_values(ending: Ending) -> dict[str, Any]:
    values: dict[str, Any] = {"result": ending.result, "cause": ending.cause}
    if ending.status is Status.COMPLETED and not ending.keep_signature:
        values["signature"] = None  # arguments are customers' data: gone when no longer needed
    return values


__all__ = ["ChildWrites", "SlotTaken", "at"]
