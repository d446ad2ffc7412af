"""What the store hands out and takes in: plain values, formatted only at the surfaces."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from .evidence import Evidence
from .ids import ChildKey
from .pacing import Rate
from .states import BATCH_ENDED, Cause, Status


@dataclass(frozen=True, slots=True)
class NewChild:
    """A child to be inserted, with its position assigned by the store."""

    task: str
    task_id: str
    signature: str  # JSON
    items: tuple[str, ...] = ()
    item_count: int = 1  # a child without items is one item
    weight: int | None = None  # share of the batch's progress; None: as many as its items
    result_id: str | None = None  # by which its outcome is asked for, where that is not `task_id`
    queue: str | None = None
    #: Seconds from now (database clock) before which it is not to run, or an absolute time.
    countdown: float | None = None
    eta: datetime | None = None
    #: Seconds from now after which it is not to start, or an absolute time.
    expires_in: float | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch to be inserted."""

    id: uuid.UUID
    name: str
    callbacks: str  # JSON: {kind: [{"task_id", "signature", "errback"}, …]}
    options: dict[str, Any]
    headers: str | None = None  # JSON: captured headers, the same for all children
    start_now: bool = False
    shards: int = 16
    parent_batch: uuid.UUID | None = None
    parent_position: int | None = None
    parent_task_id: str | None = None
    parent_task: str | None = None
    root_id: str | None = None
    opened_by: uuid.UUID | None = None
    result_id: str | None = None  # by which its body's outcome is asked for
    description: str | None = None
    tags: list[str] | None = None
    metadata: dict[str, Any] | None = None
    #: Seconds from now (database clock) after which what is open is cancelled, or an absolute time.
    deadline_in: float | None = None
    deadline: datetime | None = None
    max_in_flight: int | None = None  # its window
    priority: int = 0
    #: (name of the owner as configured, its primary key).
    owner: tuple[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of ``batchtrack_batch``."""

    id: uuid.UUID
    name: str
    status: str
    reason: str | None
    round: int
    parent_batch: uuid.UUID | None
    parent_position: int | None
    parent_task_id: str | None
    parent_task: str | None
    root_id: str | None
    options: dict[str, Any]
    callbacks: str
    headers: str | None
    start_now: bool
    shards: int
    opened_by: uuid.UUID | None
    next_position: int
    watch_progress: bool
    max_in_flight: int | None
    priority: int
    dispatch_at: datetime | None
    result_id: str | None
    description: str | None
    tags: list[str] | None
    metadata: dict[str, Any] | None
    deadline_at: datetime | None
    created_at: datetime
    sealed_at: datetime | None
    paused_at: datetime | None
    pause_reason: str | None
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def ended(self) -> bool:
        return self.status in BATCH_ENDED

    @property
    def rate(self) -> Rate | None:
        """How fast its children are sent; None: as fast as they can."""
        return Rate.parse(self.options.get("rate"))


@dataclass(frozen=True, slots=True)
class ChildRow:
    """A row of ``batchtrack_child``. `items` are the identifiers; `signature` and `result` are JSON."""

    batch_id: uuid.UUID
    position: int
    kind: str
    ordinal: int
    round: int
    shard: int
    task: str
    task_id: str
    status: str
    cause: str | None
    verdict: str | None
    attempt: int
    run_token: uuid.UUID | None
    crashes: int
    retries: int
    dispatches: int
    link: int  # which of a chain's tasks it is at
    waits_on_batch: uuid.UUID | None
    split_from: int | None
    origin: int | None  # the header position whose items these are, for what was split off it
    isolated: bool
    rerouted: bool
    policy: dict[str, Any] | None
    items: list[str]
    item_count: int
    weight: int
    result_id: str | None
    signature: str | None
    result: str | None
    worker_id: uuid.UUID | None
    slot: str | None
    queue: str | None
    dispatched_at: datetime | None
    not_before: datetime | None
    expires_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def key(self) -> ChildKey:
        return ChildKey(self.batch_id, self.position)


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Which kernel and pid namespace a process lives in; None where it cannot be read."""

    hostname: str
    boot_id: str | None
    pid_namespace: str | None


@dataclass(frozen=True, slots=True)
class NewWorker:
    """One boot of a worker's main process (`worker`), or of a client process (`client`)."""

    id: uuid.UUID
    kind: str
    name: str
    host: HostIdentity
    pid: int
    pid_started: int | None
    pool: str
    lease: float  # seconds
    version: str


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A row of ``batchtrack_worker``."""

    id: uuid.UUID
    kind: str
    name: str
    hostname: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    pid_started: int | None
    pool: str
    lease: float
    version: str
    beat: int
    beat_at: datetime
    suspected_beat: int | None
    suspected_at: datetime | None
    started_at: datetime
    stopped_at: datetime | None
    lost_at: datetime | None
    lost_by: str | None


@dataclass(frozen=True, slots=True)
class Claimed:
    """A won claim. `attempt` is the new one."""

    key: ChildKey
    attempt: int
    token: uuid.UUID
    kind: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A lost claim, with the reason in words. `expired` means the row may be withdrawn."""

    reason: str
    expired: bool = False
    wait: bool = False  # not lost: the worker is not registered (yet)


@dataclass(frozen=True, slots=True)
class Settled:
    """Answer of a settle. `look` says that the batch may be over: run the finish check."""

    written: bool
    look: bool = False
    late: bool = False
    overturned: bool = False
    callbacks: bool = False  # a callback row was inserted: dispatch
    successors: int = 0  # so many rows were split off: dispatch
    paused: str | None = None  # this death opened the batch's breaker, and why
    quarantined: bool = False  # this death put its item into quarantine
    body: bool = False  # it was an `on_success` callback: who waits for its batch may go on


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended, as the run itself reports it. `result` is JSON."""

    status: Status
    result: str | None = None
    cause: Cause | None = None
    evidence: Evidence | None = None
    keep_signature: bool = False  # of a completed child; arguments go otherwise, for they may be customers' data


@dataclass(frozen=True, slots=True)
class Release:
    """A run that gives its row back: Celery's retry, or `Reject(requeue=True)`.

    `sent`: Celery has already published the message for the next attempt.
    """

    countdown: float | None = None
    eta: datetime | None = None
    retries: int | None = None
    signature: str | None = None
    #: Identifiers of the changed signature's items: they count only if they are as many as before.
    items: tuple[str, ...] | None = None
    sent: bool = False
    evidence: Evidence | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The next of a child's tasks, with what came before bound into its arguments."""

    task: str
    task_id: str
    signature: str  # JSON
    queue: str | None = None
    countdown: float | None = None
    eta: datetime | None = None
    expires_in: float | None = None
    expires_at: datetime | None = None
    #: Identifiers of its items, where it declares them; None: those of the child stay.
    items: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A row that was taken for publishing."""

    child: ChildRow
    batch: BatchRow


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of a batch at one moment, by children and by items. Always adds up to `total`.

    `percent` is whole: floor(100 * settled weight / weight), at most 99 before the end, 100 after. A child weighs as
    many as its items, unless its task declares a `weight`; one that waits for a nested batch weighs what that does:
    percent and `eta` roll up from nested batches, the counts are the batch's own.
    `rate` is settled items per second of database time since `started_at`; `eta` is seconds,
    linear; both None while nothing is settled.
    """

    batch_id: uuid.UUID
    name: str
    status: str
    round: int
    total: int
    pending: int
    running: int
    completed: int
    failed: int
    crashed: int
    cancelled: int
    items_total: int
    items_completed: int
    items_failed: int
    items_crashed: int
    items_cancelled: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    seconds: float | None  # database time since started_at, until finished_at
    paused_at: datetime | None = None
    pause_reason: str | None = None
    weight_total: int = 0  # nested batches included
    weight_done: int = 0
    nested: int = 0  # batches nested in it, at any depth

    @property
    def ended(self) -> bool:
        return self.status in BATCH_ENDED

    @property
    def items_settled(self) -> int:
        return self.items_completed + self.items_failed + self.items_crashed + self.items_cancelled

    @property
    def percent(self) -> int:
        if self.ended:
            return 100
        if not self.weight_total:
            return 0 if not self.items_total else min(99, 100 * self.items_settled // self.items_total)
        return min(99, 100 * self.weight_done // self.weight_total)

    @property
    def rate(self) -> float | None:
        if not self.items_settled or not self.seconds:
            return None
        return self.items_settled / self.seconds

    @property
    def eta(self) -> float | None:
        if self.ended:
            return 0.0
        if self.weight_total:
            left = self.weight_total - self.weight_done
            return left * self.seconds / self.weight_done if self.weight_done and self.seconds else None
        return None if self.rate is None else (self.items_total - self.items_settled) / self.rate

    def as_dict(self) -> dict[str, Any]:
        """All fields and derived figures, JSON-able (ids and times as strings)."""
        values = asdict(self)
        values.update(
            id=str(self.batch_id), batch_id=str(self.batch_id),
            progress_percent=self.percent, percent=self.percent, rate=self.rate, eta=self.eta,
        )  # fmt: skip
        for name in ("created_at", "started_at", "finished_at", "paused_at"):
            values[name] = isoformat(values[name])
        return values


@dataclass(frozen=True, slots=True)
class CancelledRun:
    """A run that a cancel took its row from; its process may be terminated."""

    key: ChildKey
    worker_id: uuid.UUID
    slot: str
    token: uuid.UUID
    task_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch that ended in this very call."""

    batch_id: uuid.UUID
    name: str
    status: str
    reason: str | None
    callbacks: int
    cancelled_runs: tuple[CancelledRun, ...] = ()
    parent_batch: uuid.UUID | None = None  # whose child waited for it
    untold: bool = False  # its end is to be told to Celery's result backend


@dataclass(frozen=True, slots=True)
class FirstFailure:
    """The child that kept a batch from succeeding. `error` is JSON, as Celery's result backends keep an exception."""

    position: int
    task_id: str
    status: str
    cause: str | None
    message: str | None
    exception: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Retried:
    """An ended batch that runs again."""

    batch_id: uuid.UUID
    round: int
    children: int
    batches: tuple[uuid.UUID, ...]  # it, and nested ones that go on with it


@dataclass(frozen=True, slots=True)
class Violation:
    """One invariant and how many rows break it; 0 is the promise."""

    check: str
    violations: int
    examples: Sequence[str] = field(default=())


def storable(text: str) -> str:
    """Text as every database takes it: without NUL characters and lone surrogates, which are spelt out."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def isoformat(moment: datetime | None) -> str | None:
    """ISO 8601 in UTC with a trailing Z, microseconds always there; None stays None."""
    if moment is None:
        return None
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
