"""Decisions without I/O: the outcome of a batch, and what becomes of a crashed child."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

from celery_batchtrack.errors import InvalidOption

from .states import BatchStatus, Cause

ON_CRASH = ("as_acks", "record", "retry")
#: Rungs of the recovery ladder that need the black box; named here so that they are refused by name.
ON_CRASH_LATER = ("bisect", "skip", "resume")

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How many children (header positions) may fail to complete. Inclusive; percent rounds down."""

    children: int = 0
    percent: float | None = None

    @classmethod
    def parse(cls, value: Any) -> Tolerance:
        """From an int (children), text such as ``"2%"``, or a Tolerance. Floats are refused."""
        if isinstance(value, Tolerance):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise InvalidOption(f"tolerance must not be negative, but is {value}")
            return cls(children=value)
        match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise InvalidOption(f"tolerance must be a number of children or text such as '2%', not {value!r}")
        percent = float(match[1])
        if percent > 100:
            raise InvalidOption(f"tolerance must be at most 100%, but is {value!r}")
        return cls(percent=percent)

    def as_option(self) -> int | str:
        return self.children if self.percent is None else f"{self.percent:.15g}%"

    def allows(self, not_completed: int, total: int) -> bool:
        """Whether `not_completed` of `total` children may be missing."""
        if self.percent is None:
            return not_completed <= self.children
        # Exact, so that 2% of 50 is 1 and not 0.9999…
        return not_completed * 100 <= total * Fraction(repr(self.percent))


def outcome(tolerance: Tolerance, completed: int, total: int) -> BatchStatus:
    """The end of a batch none of whose children is open."""
    if completed == total:
        return BatchStatus.COMPLETED
    return BatchStatus.PARTIAL if tolerance.allows(total - completed, total) else BatchStatus.FAILED


@dataclass(frozen=True, slots=True)
class RerunPolicy:
    """What happens to a child whose process or worker died.

    `process` and `worker` say whether it runs again after the death of its pool process, or of
    its whole worker; `time_limit` whether after a hard time limit. `max_crashes` caps all of them:
    that death settles it as crashed.
    """

    on_crash: str = "record"
    process: bool = False
    worker: bool = False
    time_limit: bool = False
    max_crashes: int = 3

    @property
    def runs_again(self) -> bool:
        return self.process or self.worker or self.time_limit

    def as_option(self) -> dict[str, Any] | None:
        """The JSON form kept on the row; None for a policy that never runs a child again."""
        if not self.runs_again:
            return None
        flags = {name: True for name in ("process", "worker", "time_limit") if getattr(self, name)}
        return {"on_crash": self.on_crash, "max_crashes": self.max_crashes, **flags}

    @classmethod
    def from_option(cls, option: Mapping[str, Any] | None) -> RerunPolicy:
        known = {k: v for k, v in (option or {}).items() if k in cls.__slots__}
        return cls(**known)

    @classmethod
    def resolve(
        cls, on_crash: str, max_crashes: int, *, acks_late: bool, reject_on_worker_lost: bool,
        retry_on_worker_lost: bool, acks_on_timeout: bool,
    ) -> RerunPolicy:  # fmt: skip
        """The policy of a task, from its option and what it already told Celery about acknowledging."""
        if on_crash == "retry":
            return cls("retry", True, True, True, max_crashes)
        if on_crash == "record":
            return cls("record", max_crashes=max_crashes)
        process = retry_on_worker_lost or (acks_late and reject_on_worker_lost)
        return cls(
            "as_acks", process=process, worker=acks_late or retry_on_worker_lost,
            time_limit=acks_late and not acks_on_timeout, max_crashes=max_crashes,
        )  # fmt: skip


class Judgement(StrEnum):
    """What a crash leads to."""

    CRASHED = "crashed"
    RUN_AGAIN = "run_again"


def judge(policy: RerunPolicy, cause: Cause, crashes: int) -> Judgement:
    """Decide about a child that died of `cause` after `crashes` earlier deaths."""
    if crashes + 1 >= policy.max_crashes:
        return Judgement.CRASHED
    if cause is Cause.TIME_LIMIT:
        again = policy.time_limit
    elif cause is Cause.WORKER_LOST:
        again = policy.worker
    else:
        again = policy.process
    return Judgement.RUN_AGAIN if again else Judgement.CRASHED


def backoff(base: float, crashes: int, ceiling: float = 300.0) -> float:
    """Seconds before the next attempt after the `crashes`-th death (1, 2, …)."""
    return min(ceiling, base * 2.0 ** max(0, crashes - 1))
