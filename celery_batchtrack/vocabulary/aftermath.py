"""What follows a death, as values: another attempt, parts of a split child, one result of several, items that kill."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from .evidence import Evidence
from .states import Status


@dataclass(frozen=True, slots=True)
class Rerun:
    """How a child that died is to run again."""

    delay: float = 0.0  # seconds
    strike: bool = True  # the death counts
    isolated: bool = False  # alone in its worker
    queue: str | None = None  # elsewhere than its task is routed


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a split child's items: a successor. With evidence it is settled at once, and that is its incident."""

    items: tuple[str, ...]
    item_count: int
    signature: str | None  # JSON
    task_id: str
    status: Status = Status.PENDING
    evidence: Evidence | None = None
    isolated: bool = False
    queue: str | None = None  # where it runs if that is elsewhere than its task is routed


@dataclass(frozen=True, slots=True)
class HeaderResult:
    """What one header position returned: JSON of its completed parts, in the order of their items.

    `split` says that there are parts; a position that was never split has one text.
    """

    position: int
    texts: tuple[str | None, ...]
    split: bool = False
    merge: str | None = None


@dataclass(frozen=True, slots=True)
class QuarantinedItem:
    """A row of ``batchtrack_quarantine``: an item that killed, of one task, under one version of the application."""

    task: str
    item_hash: str
    version: str
    item: str
    deaths: int
    quarantine_after: int
    cause: str
    signal: str | None
    python_frame: str | None
    batch_id: uuid.UUID | None
    position: int | None
    first_at: datetime
    last_at: datetime
    quarantined_at: datetime | None
    released_at: datetime | None

    @property
    def state(self) -> str:
        """quarantined | released | counted (it has not killed often enough)."""
        if self.quarantined_at is not None:
            return "quarantined"
        return "released" if self.released_at is not None else "counted"


@dataclass(frozen=True, slots=True)
class CrashGroup:
    """Deaths that have something in common (`key`), and what is typical of them."""

    key: str
    task: str
    deaths: int
    batches: int
    items: int  # how many different items were in hand
    cause: str
    signal: str | None
    python_frame: str | None
    item: str | None
    first_at: datetime
    last_at: datetime
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Killer:
    """The item that a death is blamed on, for the count of quarantine."""

    item: str
    item_hash: str
    version: str
    quarantine_after: int
