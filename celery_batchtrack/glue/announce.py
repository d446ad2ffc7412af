"""Events as Celery signals, for what applications most often wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from celery.utils.dispatch import Signal

from celery_batchtrack import signals
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.states import Status

Sent = tuple[Signal, dict[str, Any]]


def _settled(key: Any, task: str, status: str, attempt: int) -> Sent:
    told = {"batch_id": key.batch_id, "position": key.position, "task": task, "status": status, "attempt": attempt}
    return signals.child_settled, told


def _crashed(event: events.ChildCrashed) -> Iterator[Sent]:
    key, task, attempt = event.key, event.task, event.attempt
    yield signals.child_crashed, {
        "batch_id": key.batch_id, "position": key.position, "task": task, "attempt": attempt,
        "evidence": event.evidence, "runs_again": event.runs_again, "items": event.items,
    }  # fmt: skip
    if not event.runs_again and not event.successors:
        yield _settled(key, task, Status.CRASHED, attempt)


_SIGNALS: dict[type, Callable[[Any], Iterator[Sent] | tuple[Sent, ...]]] = {
    events.BatchStarted: lambda e: ((
        signals.batch_started,
        {"batch_id": e.batch_id, "name": e.name, "round": e.round, "parent_batch": e.parent_batch},
    ),),
    events.BatchEnded: lambda e: ((
        signals.batch_finished,
        {"batch_id": e.batch_id, "name": e.name, "status": e.status, "reason": e.reason},
    ),),
    events.BatchRetried: lambda e: ((
        signals.batch_retried, {"batch_id": e.batch_id, "round": e.round, "children": e.children},
    ),),
    events.BatchPaused: lambda e: ((
        signals.batch_paused, {"batch_id": e.batch_id, "reason": e.reason, "by_hand": e.by_hand},
    ),),
    events.BatchResumed: lambda e: ((signals.batch_resumed, {"batch_id": e.batch_id}),),
    events.ChildSettled: lambda e: (_settled(e.key, e.task, e.status, e.attempt),),
    events.ChildCrashed: _crashed,
    events.VerdictOverturned: lambda e: ((
        signals.verdict_overturned,
        {"batch_id": e.key.batch_id, "position": e.key.position, "status": e.status},
    ),),
    events.Quarantined: lambda e: ((
        signals.item_quarantined,
        {"batch_id": e.key.batch_id, "position": e.key.position, "task": e.task, "item": e.item},
    ),),
    events.WorkerLost: lambda e: ((
        signals.worker_lost,
        {
            "worker_id": e.worker_id, "name": e.name, "hostname": e.hostname, "pid": e.pid,
            "detected_by": e.detected_by,
        },
    ),),
}  # fmt: skip


def send(app: Any, event: events.Event) -> None:
    """What a receiver raises is logged by `Signal.send`, and goes no further."""
    made = _SIGNALS.get(type(event))
    if made is None:
        return
    for signal, told in made(event):
        if signal.receivers:
            signal.send(sender=app, **told)


__all__ = ["send"]
