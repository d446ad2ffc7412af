"""What becomes of a run that died: judged by its policy, written by one guarded transaction, and followed up."""

from __future__ import annotations

from dataclasses import replace

from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.aftermath import Killer, Rerun
from celery_batchtrack.vocabulary.crash_policy import (
    CRASHED,
    FROM_OUTSIDE,
    ISOLATED,
    Action,
    Death,
    Judgement,
    RowPolicy,
    backoff,
    base_queue,
    judge,
)
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.records import ChildRow, Settled
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict

from . import dispatch, finish, handover
from .tracker import Tracker

#: Characters of a queue's name that a row holds.
_LONGEST_QUEUE = 255
#: Causes that an item may be blamed for.
_BLAMED = (Cause.SIGNAL, Cause.OOM, Cause.EXIT, Cause.STALLED)


def run_died(tracker: Tracker, row: ChildRow, evidence: Evidence, verdict: Verdict) -> bool:
    """A claimed run is over without having reported. True if this call wrote the verdict."""
    return _died(tracker, row, evidence, verdict, RowPolicy.from_option(row.policy), claimed=True)


def died_before_claim(tracker: Tracker, row: ChildRow, evidence: Evidence, policy: RowPolicy) -> bool:
    """A process died with the child's message in hand, before it could claim: an attempt like any other."""
    return _died(tracker, row, evidence, Verdict.OBSERVED, policy, claimed=False)


def _died(
    tracker: Tracker, row: ChildRow, evidence: Evidence, verdict: Verdict, policy: RowPolicy, *, claimed: bool
) -> bool:
    judgement = _judge(tracker, row, evidence, verdict, policy)
    settled = None
    if judgement.action not in (Action.CRASHED, Action.RUN_AGAIN):
        settled = _split(tracker, row, evidence, policy, judgement, claimed=claimed)
        if settled is None:
            evidence = replace(evidence, message=f"{evidence.message or ''}; its items could not be taken apart")
            judgement = _as_a_whole(row, policy)
    if settled is None:
        settled = _end_or_rerun(tracker, row, evidence, verdict, policy, judgement, claimed=claimed)
    if settled.written:
        _tell(tracker, row, evidence, settled, judgement, row.attempt + (not claimed))
        _follow(tracker, row, settled, judgement)
    return settled.written


def _judge(tracker: Tracker, row: ChildRow, evidence: Evidence, verdict: Verdict, policy: RowPolicy) -> Judgement:
    # What the worker itself ended (a cold shutdown, a lost connection) is nobody's crash.
    shared = policy.isolate and evidence.detected_by in (Detector.HOST, Detector.LEASE)
    return judge(
        policy,
        Death(
            evidence.cause, row.crashes, verdict, evidence.signal,
            others=tracker.store.others_lost_with(row) if shared else 0, queue=row.queue, items=row.item_count,
            item=evidence.item_index if row.items else None, promised=evidence.promised,
            isolated=row.isolated,
            splits=tracker.store.splits_of(row) if policy.splits and row.origin is not None else 0,
        ),
    )  # fmt: skip


def _as_a_whole(row: ChildRow, policy: RowPolicy) -> Judgement:
    """Of a child that should be split and cannot be: its arguments are others by now, or no list."""
    return CRASHED if row.crashes + 1 >= policy.max_crashes else Judgement(Action.RUN_AGAIN, isolated=row.isolated)


def _split(
    tracker: Tracker, row: ChildRow, evidence: Evidence, policy: RowPolicy, judgement: Judgement, *, claimed: bool
) -> Settled | None:
    """None where the items cannot be taken apart."""
    cut = handover.cut(
        row, policy, judgement.action, evidence, tracker.codec, isolated=judgement.isolated,
        queue=_isolation_queue(row) if judgement.isolated else None,
    )  # fmt: skip
    if cut is None:
        return None
    killer = _killer(tracker, row, policy, evidence)
    return tracker.store.split(
        row, cut.parts, cut.own, killer=killer, claimed=claimed, policy=policy.as_option()
    )


def _end_or_rerun(
    tracker: Tracker, row: ChildRow, evidence: Evidence, verdict: Verdict, policy: RowPolicy, judgement: Judgement,
    *, claimed: bool,
) -> Settled:  # fmt: skip
    again = _rerun(tracker, row, policy, judgement) if judgement.runs_again else None
    killer = _killer(tracker, row, policy, evidence) if verdict is Verdict.OBSERVED else None
    if claimed:
        return tracker.store.crash(row, evidence, verdict, again, killer)
    return tracker.store.crash_unclaimed(row, evidence, again, killer)


def _killer(tracker: Tracker, row: ChildRow, policy: RowPolicy, evidence: Evidence) -> Killer | None:
    if evidence.cause not in _BLAMED or evidence.signal in FROM_OUTSIDE:
        return None
    return handover.killer_of(row, policy, evidence, tracker.settings.app_version, tracker.codec)


def _rerun(tracker: Tracker, row: ChildRow, policy: RowPolicy, judgement: Judgement) -> Rerun:
    base = tracker.settings.retry_backoff if policy.backoff is None else policy.backoff
    crashes = row.crashes + judgement.strike
    queue = judgement.queue or (_isolation_queue(row) if judgement.isolated else None)
    return Rerun(backoff(base, crashes) if crashes else 0.0, judgement.strike, judgement.isolated, queue)


def _isolation_queue(row: ChildRow) -> str | None:
    """Of its own, where the row knows its queue; where not, the worker still runs it alone."""
    queue = f"{base_queue(row.queue)}{ISOLATED}"
    return queue if row.queue and len(queue) <= _LONGEST_QUEUE else None


def _tell(
    tracker: Tracker, row: ChildRow, evidence: Evidence, settled: Settled, judgement: Judgement, attempt: int
) -> None:
    tracker.emit(
        events.ChildCrashed(
            row.key, row.task, attempt, evidence, judgement.runs_again, tuple(row.items), settled.successors,
            isolated=judgement.isolated and judgement.runs_again, started_at=row.started_at,
        )
    )  # fmt: skip
    if settled.quarantined:
        tracker.emit(events.Quarantined(row.key, row.task, evidence.item or ", ".join(row.items)))
    if settled.paused:
        tracker.emit(events.BatchPaused(row.batch_id, settled.paused))


def _follow(tracker: Tracker, row: ChildRow, settled: Settled, judgement: Judgement) -> None:
    if judgement.runs_again or settled.successors:
        dispatch.pump(tracker, row.batch_id)
        return
    _call_errbacks(tracker, row)
    finish.after(tracker, row.key, settled)


def _call_errbacks(tracker: Tracker, row: ChildRow) -> None:
    """A run that fails calls them itself; one that died cannot."""
    if tracker.backend is None or row.signature is None or '"link_error"' not in row.signature:
        return
    try:
        tracker.backend.died(row, tracker.store.failure(replace(row, status=Status.CRASHED)))
    except Exception as error:  # noqa: BLE001 (an errback may raise anything)
        tracker.emit(events.FollowUpFailed(row.key, f"{type(error).__name__}: {error}"))
