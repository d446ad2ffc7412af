"""Items that killed too often are not sent again: looked up before a row is published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.aftermath import QuarantinedItem
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.records import Outgoing, Settled
from celery_batchtrack.vocabulary.states import Cause, Kind

from . import ending
from .handover import Items, item_hash, items_of, set_aside
from .tracker import Tracker

_Register = Mapping[tuple[str, str], QuarantinedItem]


def sendable(tracker: Tracker, taken: Sequence[Outgoing]) -> tuple[list[Outgoing], bool]:
    """The rows that may be sent, and whether others were settled or split instead: then more may be due.

    Costs one small query a chunk, and nothing else where no item of these tasks is in quarantine.
    """
    tasks = {each.child.task for each in taken if each.child.kind == Kind.CHILD}
    register = tracker.store.quarantined(sorted(tasks), tracker.settings.app_version or "")
    if not register:
        return list(taken), False
    concerned = {task for task, _ in register}
    free = [each for each in taken if each.child.task not in concerned or not _withheld(tracker, each, register)]
    return free, len(free) < len(taken)


def _withheld(tracker: Tracker, out: Outgoing, register: _Register) -> bool:
    row = out.child
    policy = tracker.policy_of(row, out.batch)
    if row.kind != Kind.CHILD or policy is None or policy.quarantine_after is None:
        return False
    items = items_of(row, policy.items, tracker.codec)
    condemned = {} if items is None else dict(_condemned(row.task, items, register))
    if items is None or not condemned:
        return False
    told = [_evidence(entry, at) for at, entry in condemned.items()]
    if row.item_count == 1:
        settled = tracker.store.quarantine(row, told[0])
    else:
        settled = tracker.store.split(
            row, set_aside(items, list(condemned), told, tracker.codec), None, claimed=False, death=False,
            policy=policy.as_option(),
        )  # fmt: skip
    _follow(tracker, out, settled, [items.names[at] for at in condemned])
    return True


def _condemned(task: str, items: Items, register: _Register) -> Iterable[tuple[int, QuarantinedItem]]:
    for at, (name, value) in enumerate(zip(items.names, items.values, strict=True)):
        entry = register.get((task, item_hash(name, value)))
        if entry is not None:
            yield at, entry


def _evidence(entry: QuarantinedItem, index: int) -> Evidence:
    return Evidence(
        Cause.QUARANTINED, phase="before_claim", item=entry.item, item_index=index, python_frame=entry.python_frame,
        message=f"not sent: it killed {entry.deaths} times ({entry.signal or entry.cause}), last in batch "
        f"{entry.batch_id}#{entry.position}; `batchtrack quarantine release` lets it go",
    )  # fmt: skip


def _follow(tracker: Tracker, out: Outgoing, settled: Settled, items: list[str]) -> None:
    if settled.written:
        tracker.emit(events.Withheld(out.child.key, out.child.task, tuple(items)))
    if settled.look:
        ending.conclude(tracker, out.batch.id)
