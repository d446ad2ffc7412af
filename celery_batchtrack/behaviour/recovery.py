"""What becomes of a run that died: judged by its policy, written by one guarded settle."""

from __future__ import annotations

from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.policies import Judgement, RerunPolicy, backoff, judge
from celery_batchtrack.vocabulary.records import ChildRow, Evidence, Settled
from celery_batchtrack.vocabulary.states import Verdict

from . import dispatch, finish
from .tracker import Tracker


def run_died(tracker: Tracker, row: ChildRow, evidence: Evidence, verdict: Verdict) -> bool:
    """A claimed run is over without having reported. True if this call wrote the verdict."""
    again = _again_in(tracker, RerunPolicy.from_option(row.policy), row, evidence)
    settled = tracker.store.crash(row, evidence, verdict, again)
    if settled.written:
        _tell(tracker, row, evidence, again is not None, row.attempt)
        _follow(tracker, row, settled, again)
    return settled.written


def died_before_claim(tracker: Tracker, row: ChildRow, evidence: Evidence, policy: RerunPolicy) -> bool:
    """A process died with the child's message in hand, before it could claim: an attempt like any other."""
    again = _again_in(tracker, policy, row, evidence)
    settled = tracker.store.crash_unclaimed(row, evidence, again)
    if settled.written:
        _tell(tracker, row, evidence, again is not None, row.attempt + 1)
        _follow(tracker, row, settled, again)
    return settled.written


def _again_in(tracker: Tracker, policy: RerunPolicy, row: ChildRow, evidence: Evidence) -> float | None:
    if judge(policy, evidence.cause, row.crashes) is Judgement.CRASHED:
        return None
    return backoff(tracker.settings.retry_backoff, row.crashes + 1)


def _tell(tracker: Tracker, row: ChildRow, evidence: Evidence, again: bool, attempt: int) -> None:
    tracker.emit(events.ChildCrashed(row.key, row.task, attempt, evidence, again, tuple(row.items)))


def _follow(tracker: Tracker, row: ChildRow, settled: Settled, again: float | None) -> None:
    if again is not None:
        dispatch.pump(tracker, row.batch_id)
    else:
        finish.after(tracker, row.key, settled)
