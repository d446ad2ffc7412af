"""What happened, as values. Behaviour emits them after the commit; one subscriber logs, another counts."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from .evidence import Evidence
from .ids import ChildKey
from .states import Status


@dataclass(frozen=True, slots=True)
class ChildSettled:
    key: ChildKey
    task: str
    status: Status
    attempt: int


@dataclass(frozen=True, slots=True)
class ChildCrashed:
    """A death was recorded. `runs_again` says that the child gets another attempt."""

    key: ChildKey
    task: str
    attempt: int
    evidence: Evidence
    runs_again: bool
    items: tuple[str, ...] = ()
    #: So many children got its items, where they were handed on.
    successors: int = 0
    #: Its next attempt runs alone.
    isolated: bool = False
    #: When this attempt began; None: it was not claimed yet.
    started_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class VerdictOverturned:
    """A child that was taken for dead by its lease alone reported its end after all."""

    key: ChildKey
    status: Status


@dataclass(frozen=True, slots=True)
class LateWrite:
    key: ChildKey
    status: Status


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """All its children are there, and it is being sent; once in each round."""

    batch_id: uuid.UUID
    name: str
    round: int
    parent_batch: uuid.UUID | None


@dataclass(frozen=True, slots=True)
class BatchEnded:
    batch_id: uuid.UUID
    name: str
    status: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class BackendAway:
    """Celery's result backend did not take the end of a batch; a sweep tells it again."""

    batch_id: uuid.UUID
    error: str


@dataclass(frozen=True, slots=True)
class BatchRetried:
    """An ended batch runs again."""

    batch_id: uuid.UUID
    round: int
    children: int


@dataclass(frozen=True, slots=True)
class Redispatched:
    """Rows that were still pending after a long wait were published again."""

    batch_id: uuid.UUID
    count: int


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """`count` messages, that of `key` first, were not sent for the same reason."""

    key: ChildKey
    error: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class WorkerLost:
    worker_id: uuid.UUID
    name: str
    hostname: str
    pid: int
    detected_by: str


@dataclass(frozen=True, slots=True)
class ClaimRefused:
    key: ChildKey
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class DatabaseAway:
    """A write had to wait for the database. `spooled` says that it is safe on disk meanwhile."""

    key: ChildKey
    doing: str
    error: str
    spooled: bool = False


@dataclass(frozen=True, slots=True)
class FollowUpFailed:
    """What follows a settle (finish check, publishing) failed here; a sweep does it."""

    key: ChildKey
    error: str


@dataclass(frozen=True, slots=True)
class VerdictFailed:
    """The verdict about a dead child's run could not be written, for a reason of its own."""

    key: ChildKey
    error: str


@dataclass(frozen=True, slots=True)
class SpoolDelivered:
    key: ChildKey
    written: bool


@dataclass(frozen=True, slots=True)
class ZombieTerminated:
    key: ChildKey
    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class BatchPaused:
    """`by_hand`, or by its breaker."""

    batch_id: uuid.UUID
    reason: str
    by_hand: bool = False


@dataclass(frozen=True, slots=True)
class BatchResumed:
    batch_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An item has killed often enough."""

    key: ChildKey
    task: str
    item: str


@dataclass(frozen=True, slots=True)
class Withheld:
    """Items in quarantine were not sent, and are counted as crashed."""

    key: ChildKey
    task: str
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stalled:
    """A run made no progress for its `stall_timeout`. `killed`: its process is ended; threads cannot be."""

    key: ChildKey
    pid: int
    seconds: float
    killed: bool


@dataclass(frozen=True, slots=True)
class BlackBoxMissing:
    """A slot has no black box: what it has in hand will not be known."""

    slot: str
    error: str


@dataclass(frozen=True, slots=True)
class StacksMissing:
    """The application switched faulthandler off in this process: a fatal signal will leave no Python stack."""

    pid: int


Event = (
    ChildSettled | ChildCrashed | VerdictOverturned | LateWrite | BatchEnded | Redispatched | PublishFailed
    | WorkerLost | ClaimRefused | DatabaseAway | FollowUpFailed | SpoolDelivered | ZombieTerminated | BatchPaused
    | BatchResumed | Quarantined | Withheld | Stalled | BlackBoxMissing | StacksMissing | VerdictFailed
    | BackendAway | BatchRetried | BatchStarted
)  # fmt: skip
