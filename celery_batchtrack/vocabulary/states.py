"""States of children and batches, and every way from one to another, as data.

The store turns a `Transition` into one guarded UPDATE; nothing else writes a status.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Life of a child: ``pending → running → completed | failed | crashed | cancelled``."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CRASHED = "crashed"
    CANCELLED = "cancelled"
    SPLIT = "split"  # its items were handed on to successors; counts nowhere


OPEN = (Status.PENDING, Status.RUNNING)
#: Ends other than a good one: what `retry()` takes.
NOT_COMPLETED = (Status.FAILED, Status.CRASHED, Status.CANCELLED)
SETTLED = (Status.COMPLETED, *NOT_COMPLETED)


class BatchStatus(StrEnum):
    """Life of a batch: ``open → running → completed | partial | failed | cancelled``."""

    OPEN = "open"
    RUNNING = "running"
    COMPLETED = "completed"
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"


BATCH_ALIVE = (BatchStatus.OPEN, BatchStatus.RUNNING)
BATCH_ENDED = (BatchStatus.COMPLETED, BatchStatus.PARTIAL, BatchStatus.FAILED, BatchStatus.CANCELLED)


class Kind(StrEnum):
    """What a row is: a header child, or one of the batch's callbacks."""

    CHILD = "child"
    ON_SUCCESS = "on_success"
    ON_FAILURE = "on_failure"
    ON_FIRST_FAILURE = "on_first_failure"
    ON_FINISH = "on_finish"
    ON_PROGRESS = "on_progress"


CALLBACK_KINDS = (
    Kind.ON_SUCCESS, Kind.ON_FAILURE, Kind.ON_FIRST_FAILURE, Kind.ON_FINISH, Kind.ON_PROGRESS
)  # fmt: skip


class Cause(StrEnum):
    """Why a child did not complete, or why one of its attempts did not."""

    # failed
    EXCEPTION = "exception"
    SOFT_TIME_LIMIT = "soft_time_limit"
    REJECTED = "rejected"
    NOT_REGISTERED = "not_registered"
    CONTENT_REFUSED = "content_refused"
    NOT_SENT = "not_sent"
    UNSERIALISABLE = "unserialisable"
    NESTED = "nested"  # the batch that it waited for did not succeed
    # crashed
    SIGNAL = "signal"
    EXIT = "exit"
    OOM = "oom"
    TIME_LIMIT = "time_limit"
    STALLED = "stalled"
    WORKER_LOST = "worker_lost"
    SETTLE_LOST = "settle_lost"
    QUARANTINED = "quarantined"
    # cancelled
    IGNORED = "ignored"
    REVOKED = "revoked"
    TERMINATED = "terminated"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    # recorded beside a row, never the reason of its end
    RETRY = "retry"
    LATE_WRITE = "late_write"
    LOST_MESSAGE = "lost_message"


class Verdict(StrEnum):
    """How sure a crash is: seen, or concluded from a silent lease (which may be overturned)."""

    OBSERVED = "observed"
    LEASE = "lease"


class Detector(StrEnum):
    """Who noticed a crash."""

    MAIN = "main"
    HOST = "host"
    RECONCILE = "reconcile"
    LEASE = "lease"


class EndReason(StrEnum):
    """Why a batch was cancelled."""

    USER = "user"
    EXCEPTION = "exception"
    ABANDONED = "abandoned"
    DEADLINE = "deadline"
    PARENT = "parent"  # the batch that waited for it does so no more


@dataclass(frozen=True, slots=True)
class Transition:
    """One way from some states to another. `name` is the action's key in logs."""

    name: str
    sources: tuple[Status, ...]
    target: Status

    @property
    def settles(self) -> bool:
        return self.target not in OPEN


CLAIM = Transition("claim", (Status.PENDING,), Status.RUNNING)
COMPLETE = Transition("complete", (Status.RUNNING,), Status.COMPLETED)
FAIL = Transition("fail", (Status.RUNNING,), Status.FAILED)
CRASH = Transition("crash", (Status.RUNNING,), Status.CRASHED)
IGNORE = Transition("ignore", (Status.RUNNING,), Status.CANCELLED)
RELEASE = Transition("release", (Status.RUNNING,), Status.PENDING)
STRIKE = Transition("strike", (Status.PENDING,), Status.PENDING)  # died before the claim, may run again
CRASH_UNCLAIMED = Transition("crash_unclaimed", (Status.PENDING,), Status.CRASHED)
QUARANTINE = Transition("quarantine", (Status.PENDING,), Status.CRASHED)  # never sent
SPLIT = Transition("split", (Status.RUNNING,), Status.SPLIT)
SPLIT_UNCLAIMED = Transition("split_unclaimed", (Status.PENDING,), Status.SPLIT)
REFUSE = Transition("refuse", (Status.PENDING,), Status.FAILED)
WITHDRAW = Transition("withdraw", (Status.PENDING,), Status.CANCELLED)  # revoked or expired before its start
CANCEL = Transition("cancel", OPEN, Status.CANCELLED)
ADVANCE = Transition("advance", (Status.RUNNING,), Status.PENDING)  # a link is done, or replaced: the next one waits
JOIN = Transition("join", (Status.PENDING,), Status.COMPLETED)  # the nested batch's result is its own
JOIN_ADVANCE = Transition("join_advance", (Status.PENDING,), Status.PENDING)  # … and goes to the next link
RETRY = Transition("retry", (Status.FAILED, Status.CRASHED, Status.CANCELLED), Status.PENDING)  # next round
OVERTURN_COMPLETE = Transition("overturn_complete", (Status.CRASHED, Status.PENDING), Status.COMPLETED)
OVERTURN_FAIL = Transition("overturn_fail", (Status.CRASHED, Status.PENDING), Status.FAILED)

TRANSITIONS = (
    CLAIM, COMPLETE, FAIL, CRASH, IGNORE, RELEASE, STRIKE, CRASH_UNCLAIMED, QUARANTINE, SPLIT, SPLIT_UNCLAIMED,
    REFUSE, WITHDRAW, CANCEL, ADVANCE, JOIN, JOIN_ADVANCE, RETRY, OVERTURN_COMPLETE, OVERTURN_FAIL,
)  # fmt: skip

#: A settle from outside the run (main process, sweep) or from within, by its target.
ENDINGS = {t.target: t for t in (COMPLETE, FAIL, CRASH, IGNORE)}
OVERTURNS = {Status.COMPLETED: OVERTURN_COMPLETE, Status.FAILED: OVERTURN_FAIL}


@dataclass(frozen=True, slots=True)
class BatchTransition:
    """One way of a batch from some states to one or more others."""

    name: str
    sources: tuple[BatchStatus, ...]
    targets: tuple[BatchStatus, ...]


SEAL = BatchTransition("seal", (BatchStatus.OPEN,), (BatchStatus.RUNNING,))
FINISH = BatchTransition(
    "finish", (BatchStatus.RUNNING,), (BatchStatus.COMPLETED, BatchStatus.PARTIAL, BatchStatus.FAILED)
)
CANCEL_BATCH = BatchTransition("cancel", BATCH_ALIVE, (BatchStatus.CANCELLED,))
RETRY_BATCH = BatchTransition("retry", BATCH_ENDED, (BatchStatus.RUNNING,))
REOPEN = BatchTransition("reopen", BATCH_ENDED, (BatchStatus.OPEN,))
BATCH_TRANSITIONS = (SEAL, FINISH, CANCEL_BATCH, RETRY_BATCH, REOPEN)
