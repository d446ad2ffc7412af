"""The report of a batch: small JSON, also for a million children."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.records import ChildRow, Progress
from celery_batchtrack.vocabulary.states import Cause, Status

from .tracker import Tracker

#: At most so many children are named; the counts are always whole.
NAMED = 100
#: Incidents that say nothing of how a child ended.
_BESIDE = (Cause.LATE_WRITE, Cause.LOST_MESSAGE)


@dataclass(frozen=True, slots=True)
class Unhappy:
    """A child that did not complete."""

    position: int
    status: str
    cause: str | None
    task: str
    items: list[str]
    signal: str | None = None
    exit_code: int | None = None
    message: str | None = None
    item: str | None = None  # in hand
    python_frame: str | None = None
    hostname: str | None = None
    pid: int | None = None
    detected_by: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        who = ", ".join(self.items[:5]) + (", …" if len(self.items) > 5 else "")
        how = (self.signal if self.cause == Cause.SIGNAL else self.cause) or self.status
        held = f" with {self.item} in hand" if self.item and len(self.items) > 1 else ""
        frame = f" in {self.python_frame}" if self.python_frame and self.status == Status.CRASHED else ""
        where = f"{held}{frame}"
        if self.pid and self.status == Status.CRASHED:
            where += f" on {self.hostname} pid {self.pid}"
        said = f": {self.message:.200}" if self.message and self.status == Status.FAILED else ""
        return f"#{self.position} {who or self.task} {how}{where}{said}"


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a batch. `unhappy` names at most 100 children; `omitted` counts the others."""

    progress: Progress
    reason: str | None
    unhappy: list[Unhappy] = field(default_factory=list)
    omitted: int = 0

    @property
    def status(self) -> str:
        return self.progress.status

    def items_of(self, status: Status) -> list[str]:
        """Identifiers of the named children that ended so."""
        return [item for each in self.unhappy if each.status == status for item in each.items]

    @property
    def crashed_items(self) -> list[str]:
        return self.items_of(Status.CRASHED)

    @property
    def failed_items(self) -> list[str]:
        return self.items_of(Status.FAILED)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the counts, times, and the children that did not complete."""
        values = self.progress.as_dict()
        values.update(
            reason=self.reason,
            crashed_items=self.crashed_items,
            failed_items=self.failed_items,
            unhappy=[each.as_dict() for each in self.unhappy],
            omitted=self.omitted,
        )
        return values

    def __str__(self) -> str:
        counts = self.progress
        by_items = counts.items_total != counts.total
        prefix, noun = ("items_", "items") if by_items else ("", "children")
        parts = [
            f"{getattr(counts, prefix + name)} {name}"
            for name in ("completed", "failed", "crashed", "cancelled")
            if getattr(counts, prefix + name)
        ]
        left = counts.items_total - counts.items_settled if by_items else counts.pending + counts.running
        if left:
            parts.append(f"{left} open")
        total = counts.items_total if by_items else counts.total
        text = f"{counts.name}: {counts.status}, {total} {noun}{': ' if parts else ''}{', '.join(parts)}"
        named = "; ".join(str(each) for each in self.unhappy[:10])
        more = len(self.unhappy) - 10 + self.omitted
        return text + (f" ({named}{f'; and {more} more' if more > 0 else ''})" if named else "")


def build(tracker: Tracker, batch_id: uuid.UUID) -> Report:
    """Read the report. Costs the tally's shards and at most 100 children with their incidents."""
    store = tracker.store
    progress = store.progress(batch_id)
    row = store.batch(batch_id)
    unhappy_count = progress.failed + progress.crashed + progress.cancelled
    named: list[Unhappy] = []
    if unhappy_count:
        children = []
        for child in store.children(batch_id, statuses=(Status.CRASHED, Status.FAILED, Status.CANCELLED)):
            children.append(child)
            if len(children) == NAMED:
                break
        incidents = {
            each.position: each
            for each in store.incidents(batch_id, limit=10 * NAMED, stacks=False)
            if each.cause not in _BESIDE and each.outcome not in _BESIDE
        }
        named = [_unhappy(child, incidents.get(child.position)) for child in children]
    return Report(progress, row.reason if row else None, named, unhappy_count - len(named))


def _unhappy(child: ChildRow, incident: IncidentRow | None) -> Unhappy:
    base = (child.position, child.status, child.cause, child.task, list(child.items))
    if incident is None:
        return Unhappy(*base)
    return Unhappy(
        *base, incident.signal, incident.exit_code, incident.message, incident.item, incident.python_frame,
        incident.hostname, incident.pid, incident.detected_by,
    )  # fmt: skip
