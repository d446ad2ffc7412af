"""What behaviour emits, told: as log lines, for someone at 3 a.m.; and to the other subscribers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery_batchtrack.behaviour import fatal
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.states import Cause

from . import announce

logger = logging.getLogger("celery_batchtrack")


def how_it_died(evidence: Evidence) -> str:
    """Signal, exit code or cause, in a few words."""
    if evidence.signal and evidence.cause is Cause.SIGNAL:
        return evidence.signal
    if evidence.exit_code is not None:
        return f"exit code {evidence.exit_code}"
    return evidence.cause.value.replace("_", " ")


def _crashed(event: events.ChildCrashed) -> tuple[int, str, tuple[Any, ...]]:
    evidence = event.evidence
    items = ", ".join(event.items[:5]) + (f", … ({len(event.items)} items)" if len(event.items) > 5 else "")
    return logging.ERROR, (
        "action=child_crashed %s %s died of %s in attempt %d%s%s (%s, host %s, pid %s, noticed by %s): %s; items: %s"
    ), (
        event.key, event.task, how_it_died(evidence), event.attempt,
        f" in {evidence.python_frame}" if evidence.python_frame else "",
        f" with {evidence.item} in hand" if evidence.item else "",
        evidence.phase.replace("_", " "), evidence.hostname, evidence.pid, evidence.detected_by, _what_next(event),
        items or "none declared",
    )  # fmt: skip


def _what_next(event: events.ChildCrashed) -> str:
    if event.successors:
        return f"its items go on in {event.successors} other {'child' if event.successors == 1 else 'children'}"
    if event.runs_again:
        return "it runs again, alone" if event.isolated else "it runs again"
    return "it is recorded as crashed"


def _away(event: events.DatabaseAway) -> tuple[int, str, tuple[Any, ...]]:
    kept = "the outcome is kept on disk and delivered later" if event.spooled else "trying again"
    return logging.WARNING, "action=database_away %s: %s waits: %s (%s)", (
        event.key, event.doing, event.error, kept,
    )  # fmt: skip


_LINES: dict[type, Callable[[Any], tuple[int, str, tuple[Any, ...]]]] = {
    events.ChildSettled: lambda e: (
        logging.DEBUG, "action=child_settled %s %s %s in attempt %d", (e.key, e.task, e.status, e.attempt),
    ),
    events.ChildCrashed: _crashed,
    events.VerdictOverturned: lambda e: (
        logging.WARNING,
        "action=verdict_overturned %s was taken for dead by its worker's lease, but reported %s", (e.key, e.status),
    ),
    events.LateWrite: lambda e: (
        logging.WARNING, "action=late_write %s reported %s too late; its row was settled otherwise (see its incidents)",
        (e.key, e.status),
    ),
    events.BatchStarted: lambda e: (
        logging.DEBUG, "action=batch_started %s %r in round %d", (e.batch_id, e.name, e.round),
    ),
    events.BatchEnded: lambda e: (
        logging.INFO, "action=batch_ended %s %r %s%s",
        (e.batch_id, e.name, e.status, f" ({e.reason})" if e.reason else ""),
    ),
    events.BackendAway: lambda e: (
        logging.WARNING, "action=backend_away the result backend did not take the end of %s: %s (a sweep tells it)",
        (e.batch_id, e.error),
    ),
    events.BatchRetried: lambda e: (
        logging.INFO, "action=batch_retried %s: %d children run again in round %d", (e.batch_id, e.children, e.round),
    ),
    events.Redispatched: lambda e: (
        logging.WARNING, "action=redispatched batch %s: %d children were published again, since nobody claimed them",
        (e.batch_id, e.count),
    ),
    events.PublishFailed: lambda e: (
        logging.WARNING, "action=publish_failed %s%s could not be sent: %s",
        (e.key, f" and {e.count - 1} more" if e.count > 1 else "", e.error),
    ),
    events.WorkerLost: lambda e: (
        logging.ERROR, "action=worker_lost %s (host %s, pid %s) is gone, noticed by %s",
        (e.name, e.hostname, e.pid, e.detected_by),
    ),
    events.ClaimRefused: lambda e: (
        logging.INFO, "action=claim_refused %s attempt %d: %s; the message is dropped", (e.key, e.attempt, e.reason),
    ),
    events.DatabaseAway: _away,
    events.FollowUpFailed: lambda e: (
        logging.ERROR, "action=follow_up_failed %s is settled, but what follows failed: %s (a sweep does it)",
        (e.key, e.error),
    ),
    events.VerdictFailed: lambda e: (
        logging.ERROR, "action=verdict_failed %s: %s (it stays running; the next sweep tries again)", (e.key, e.error),
    ),
    events.SpoolDelivered: lambda e: (
        logging.INFO, "action=spool_delivered %s: an outcome kept on disk was %s",
        (e.key, "written" if e.written else "already settled otherwise"),
    ),
    events.ZombieTerminated: lambda e: (
        logging.WARNING, "action=zombie_terminated pid %d still ran %s, but %s", (e.pid, e.key, e.reason),
    ),
    events.BatchPaused: lambda e: (
        logging.WARNING if e.by_hand else logging.ERROR,
        "action=batch_paused %s: %s; `batchtrack resume %s` goes on", (e.batch_id, e.reason, e.batch_id),
    ),
    events.BatchResumed: lambda e: (logging.WARNING, "action=batch_resumed %s", (e.batch_id,)),
    events.Quarantined: lambda e: (
        logging.ERROR, "action=quarantined %s of %s has killed often enough (last in %s) and is not sent again; "
        "`batchtrack quarantine release` lets it go", (e.item, e.task, e.key),
    ),
    events.Withheld: lambda e: (
        logging.WARNING, "action=withheld %s %s: in quarantine, so counted as crashed and not sent: %s",
        (e.key, e.task, ", ".join(e.items[:5]) + (", …" if len(e.items) > 5 else "")),
    ),
    events.Stalled: lambda e: (
        logging.ERROR, "action=stalled %s made no progress for %g s in pid %d: %s",
        (e.key, e.seconds, e.pid, "its process is killed" if e.killed else "it runs on: a thread cannot be ended"),
    ),
    events.BlackBoxMissing: lambda e: (
        logging.WARNING, "action=no_blackbox slot %s has none (%s): its children are tracked, but not the item in hand",
        (e.slot, e.error),
    ),
    events.StacksMissing: lambda e: (
        logging.WARNING, "action=no_stacks faulthandler was switched off by the application in pid %d: a fatal signal "
        "there will leave no Python stack", (e.pid,),
    ),
}  # fmt: skip


def log(event: events.Event) -> None:
    level, text, arguments = _LINES[type(event)](event)
    logger.log(level, text, *arguments)
    if isinstance(event, events.ChildCrashed) and event.evidence.stack and fatal.echoed():
        logger.error("action=fatal_stack of %s, which faulthandler was asked to write here:\n%s",
                     event.key, event.evidence.stack)  # fmt: skip


def subscriber(app: Any) -> Callable[[events.Event], None]:
    def tell(event: events.Event) -> None:
        log(event)
        announce.send(app, event)
        app.batchtrack.spans.hear(event)

    return tell
