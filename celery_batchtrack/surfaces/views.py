"""What surfaces show of the store's records: plain mappings under the tables' column names."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.aftermath import CrashGroup, QuarantinedItem
from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, Progress, Violation, WorkerRow
from celery_batchtrack.vocabulary.states import Status

if TYPE_CHECKING:
    import uuid

    from celery_batchtrack.store import Store
    from celery_batchtrack.vocabulary.settings import Settings

#: The time stamp of a time-ordered id: shorter, and batches of the same minute look alike.
SHORT_ID = 13
#: A batch may have a million incidents; `show` has the newest.
SHOWN_INCIDENTS = 1000
_PAGE = 500
#: On top of what detection may take: a statement that waits, a busy machine. Seconds.
_MARGIN = 10.0

_OF_BATCH = (
    "reason", "parent_batch", "parent_position", "parent_task_id", "parent_task", "root_id", "description", "tags",
    "metadata", "created_at", "sealed_at", "paused_at", "pause_reason", "deadline_at", "started_at", "finished_at",
    "priority", "dispatch_at",
)  # fmt: skip
#: Of its options: how its children are sent.
_LIMITS = ("max_in_flight", "max_running", "rate", "queue")
#: Not shown: `signature` and `result` are customers' data, `run_token` is a fence, `shard` a detail.
_OF_CHILD = (
    "batch_id", "position", "kind", "ordinal", "round", "task", "task_id", "status", "cause", "verdict", "attempt",
    "crashes", "retries", "dispatches", "link", "waits_on_batch", "split_from", "origin", "isolated", "rerouted",
    "items", "item_count", "weight", "queue", "worker_id", "slot", "created_at", "dispatched_at", "not_before",
    "expires_at", "started_at", "finished_at",
)  # fmt: skip
_OF_CALLBACK = (
    "kind", "ordinal", "round", "position", "task", "task_id", "status", "cause", "attempt", "crashes", "started_at",
    "finished_at",
)  # fmt: skip


def _chosen(record: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def batch(progress: Progress, row: BatchRow) -> dict[str, Any]:
    """A batch with its counts."""
    limits = {name: row.options[name] for name in _LIMITS if row.options.get(name) is not None}
    return {**progress.as_dict(), **_chosen(row, _OF_BATCH), "limits": limits}


def batches(store: Store, ids: Sequence[uuid.UUID]) -> Iterator[dict[str, Any]]:
    """The batches in that order, without those that are gone by now."""
    for start in range(0, len(ids), _PAGE):
        page = ids[start : start + _PAGE]
        rows = store.batches(page)
        for progress in store.progress_of(page):
            if progress.batch_id in rows:
                yield batch(progress, rows[progress.batch_id])


def batch_in_full(store: Store, batch_id: uuid.UUID, *, stacks: bool = True) -> dict[str, Any]:
    """A batch with its callbacks, its newest incidents (with their stacks or not), and its children by status."""
    found = next(batches(store, [batch_id]), None)
    if found is None:
        raise errors.BatchNotFound(f"batch {batch_id} is gone from {store.shown_url}")
    incidents = store.incidents(batch_id, limit=SHOWN_INCIDENTS + 1, stacks=stacks)
    return {
        **found,
        "split": store.split_count(batch_id),
        "children": {status.value: found[status] for status in Status if status != Status.SPLIT},
        "callbacks": [callback(each) for each in store.callback_rows(batch_id)],
        "incidents": [incident(each) for each in incidents[-SHOWN_INCIDENTS:]],
        "incidents_complete": len(incidents) <= SHOWN_INCIDENTS,
    }


def short_id(store: Store, batch_id: uuid.UUID | str) -> str:
    """A beginning of the id that names this batch alone."""
    whole = str(batch_id)
    for length in (SHORT_ID, 18, 23):
        try:
            store.resolve(whole[:length])
        except errors.BatchNotFound:
            continue
        return whole[:length]
    return whole


def child(row: ChildRow) -> dict[str, Any]:
    """A child, or a callback's row."""
    return _chosen(row, _OF_CHILD)


def callback(row: ChildRow) -> dict[str, Any]:
    """The row of a callback."""
    return _chosen(row, _OF_CALLBACK)


def incident(row: IncidentRow) -> dict[str, Any]:
    """Evidence of one attempt that did not complete."""
    return _chosen(row, IncidentRow.__slots__)


def crash_group(by: str, group: CrashGroup, quarantined: Container[tuple[str, str]]) -> dict[str, Any]:
    """Deaths that have `by` in common. `quarantined`: (task, item) of what is not sent now."""
    values = {"by": by, **_chosen(group, CrashGroup.__slots__)}
    if by == "item":
        values["state"] = "quarantined" if (group.task, group.key) in quarantined else None
    return values


def quarantined_item(row: QuarantinedItem, version: str) -> dict[str, Any]:
    """An item that killed. `version`: of the application as it is now, for which others' quarantine is over."""
    over = row.state == "quarantined" and row.version != version
    return {**_chosen(row, QuarantinedItem.__slots__), "state": "another version" if over else row.state}


def worker_state(row: WorkerRow, now: datetime) -> str:
    """alive | suspected (silent for longer than its lease) | lost | stopped. `now`: the database's clock."""
    if row.stopped_at is not None:
        return "stopped"
    if row.lost_at is not None:
        return "lost"
    stamped = row.suspected_beat is not None and row.suspected_beat == row.beat
    return "suspected" if stamped or (now - row.beat_at).total_seconds() > row.lease else "alive"


def worker(row: WorkerRow, now: datetime) -> dict[str, Any]:
    """A worker's or client's row, and its state."""
    return {"state": worker_state(row, now), **_chosen(row, WorkerRow.__slots__)}


def violation(found: Violation) -> dict[str, Any]:
    return {"check": found.check, "violations": found.violations, "examples": list(found.examples)}


def grace(settings: Settings) -> float:
    """Seconds that detection may take: a lease (the longest of all pools) until the suspicion, another until the
    verdict, and two sweeps."""
    return 2 * max(settings.lease, settings.lease_shared_gil) + 2 * settings.detect_every + _MARGIN
