"""The recovery ladder, decided without I/O: what becomes of a child whose process or worker died.

`CrashPolicy` is what a task or a batch declares, `RowPolicy` what it comes to for one child and is kept on its row,
so that any sweep can judge. `judge` turns a `Death` under a `RowPolicy` into a `Judgement`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from celery_batchtrack.errors import InvalidOption

from .settings import seconds, suggestion
from .states import Cause, Verdict

#: Those that hand a child's items on to successors.
SPLITTING = ("bisect", "skip", "resume")
ON_CRASH = ("as_acks", "record", "retry", *SPLITTING)

#: Signals that somebody sends, rather than that a program dies of by itself.
FROM_OUTSIDE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
#: A suspect's queue is called like the one its task is routed to, with this behind it.
ISOLATED = ".isolated"


def base_queue(queue: str | None) -> str | None:
    """The queue that a suspect came from."""
    return queue.removesuffix(ISOLATED) if queue else queue


@dataclass(frozen=True, slots=True)
class CrashPolicy:
    """What happens to a child whose process or worker dies: ``@tracked(on_crash=CrashPolicy(…))``, or in a batch.

    Arguments:
        on_crash: ``"as_acks"``, ``"record"``, ``"retry"``, ``"bisect"``, ``"skip"`` or ``"resume"``.
        max_crashes: the death that ends a child under policies that run it again; default `batchtrack_max_crashes`.
        backoff: seconds before it runs again, doubling with each death, at most 5 minutes; default
            `batchtrack_retry_backoff`.
        isolate: a child whose whole worker died together with others is nobody's culprit: whatever `on_crash` says, it
            runs again without a strike, alone in its worker, from a queue of its own (its queue's name and
            ``.isolated``). "Alone" is said of tracked children.
        oom_queue: a child that died of memory goes on in this queue, once.
        quarantine_after: an item that killed so many times, over all batches, is not sent again. Its identifier must
            name it over all batches, whatever the other arguments are.
        max_splits: how many deaths the items of one header position may spend on bisection.

    Errors: InvalidOption for wrong values.
    """

    on_crash: str = "as_acks"
    max_crashes: int | None = None
    backoff: float | None = None
    isolate: bool = False
    oom_queue: str | None = None
    quarantine_after: int | None = None
    max_splits: int = 64

    def __post_init__(self) -> None:
        if self.on_crash not in ON_CRASH:
            hint = suggestion(str(self.on_crash), list(ON_CRASH))
            raise InvalidOption(f"on_crash must be one of {ON_CRASH} or a CrashPolicy, not {self.on_crash!r}{hint}")
        for name in ("max_crashes", "quarantine_after", "max_splits"):
            _check_count(name, getattr(self, name), optional=name != "max_splits")
        if not isinstance(self.isolate, bool):
            raise InvalidOption(f"isolate must be True or False, not {self.isolate!r}")
        if self.oom_queue is not None and not (isinstance(self.oom_queue, str) and 0 < len(self.oom_queue) <= 200):
            raise InvalidOption(f"oom_queue must be a queue's name (at most 200 characters), not {self.oom_queue!r}")
        if self.oom_queue is not None and self.oom_queue.endswith(ISOLATED):
            raise InvalidOption(f"oom_queue must not end with {ISOLATED!r}: such queues are those of suspects")
        if self.backoff is not None:
            object.__setattr__(self, "backoff", _check_backoff(self.backoff))

    @classmethod
    def parse(cls, value: Any, max_crashes: int | None = None) -> CrashPolicy:
        """From a name of the ladder or a CrashPolicy; `max_crashes` is the option beside it."""
        if isinstance(value, cls):
            if max_crashes is not None and value.max_crashes is not None:
                raise InvalidOption("max_crashes is given twice: beside the CrashPolicy, and in it")
            return value if max_crashes is None else cls(**{**_values(value), "max_crashes": max_crashes})
        return cls(on_crash=value, max_crashes=max_crashes)

    @classmethod
    def hint(cls, name: object) -> str:
        """Where one of its fields goes that was given as an option of its own; empty for any other name."""
        if name not in {each.name for each in fields(cls)}:
            return ""
        return f": it belongs to a policy, on_crash=CrashPolicy(…, {name}=…)"

    @property
    def splits(self) -> bool:
        return self.on_crash in SPLITTING

    def as_option(self) -> dict[str, Any]:
        """The JSON form, all fields."""
        return _values(self)

    def overridden(self, option: Mapping[str, Any] | None) -> CrashPolicy:
        """This policy with a batch's own: of a CrashPolicy all fields, of a name only that."""
        known = {name: value for name, value in (option or {}).items() if name in _values(self)}
        return CrashPolicy(**{**_values(self), **known}) if known else self


def _check_count(name: str, value: Any, *, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidOption(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_backoff(value: Any) -> float:
    try:
        pause = seconds(value)
    except ValueError as error:
        raise InvalidOption(f"backoff: {error}") from None
    if not 0 <= pause < math.inf:
        raise InvalidOption(f"backoff must be 0 seconds or more, not {value!r}")
    return pause


def _values(policy: CrashPolicy) -> dict[str, Any]:
    return {each.name: getattr(policy, each.name) for each in fields(policy)}


@dataclass(frozen=True, slots=True)
class RowPolicy:
    """What a policy comes to for one child; kept on its row.

    `process` and `worker` say whether it runs again after the death of its pool process, or of its whole worker;
    `time_limit` whether after a hard time limit. `max_crashes` caps all of them: that death settles it as crashed.
    """

    on_crash: str = "record"
    process: bool = False
    worker: bool = False
    time_limit: bool = False
    max_crashes: int = 3
    backoff: float | None = None
    isolate: bool = False
    oom_queue: str | None = None
    quarantine_after: int | None = None
    max_splits: int = 64
    #: Where the items are in the stored signature, such as ("args", 0) or ("kwargs", "docs").
    items: tuple[str | int, ...] | None = None
    merge: str | None = None
    stall_timeout: float | None = None

    @property
    def runs_again(self) -> bool:
        return self.process or self.worker or self.time_limit

    @property
    def splits(self) -> bool:
        return self.on_crash in SPLITTING

    def as_option(self) -> dict[str, Any] | None:
        """The JSON form kept on the row; None for a policy that does nothing but record."""
        told = {name: value for name, value in self._told().items() if value != _ROW_DEFAULTS[name]}
        if not set(told) - {"on_crash", "max_crashes"} and not self.splits:
            return None
        return {"on_crash": self.on_crash, "max_crashes": self.max_crashes, **told}

    def _told(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "items": list(self.items) if self.items else None}

    @classmethod
    def from_option(cls, option: Mapping[str, Any] | None) -> RowPolicy:
        known = {k: v for k, v in (option or {}).items() if k in cls.__slots__}
        if known.get("items"):
            known["items"] = tuple(known["items"])
        return cls(**known)

    @classmethod
    def resolve(
        cls, declared: CrashPolicy, max_crashes: int, *, acks_late: bool, reject_on_worker_lost: bool,
        retry_on_worker_lost: bool, acks_on_timeout: bool, **more: Any,
    ) -> RowPolicy:  # fmt: skip
        """The policy of a task, from what it declares and what it already told Celery about acknowledging.

        `max_crashes` is the default where none is declared; `more` are other fields of the row's policy.
        """
        more = {
            "max_crashes": declared.max_crashes or max_crashes, "backoff": declared.backoff,
            "isolate": declared.isolate, "oom_queue": declared.oom_queue,
            "quarantine_after": declared.quarantine_after, "max_splits": declared.max_splits, **more,
        }  # fmt: skip
        if declared.on_crash == "record":
            return cls("record", **more)
        if declared.on_crash != "as_acks":
            return cls(declared.on_crash, True, True, True, **more)
        return cls(
            "as_acks", process=retry_on_worker_lost or (acks_late and reject_on_worker_lost),
            worker=acks_late or retry_on_worker_lost, time_limit=acks_late and not acks_on_timeout, **more,
        )  # fmt: skip


_ROW_DEFAULTS = {each.name: each.default for each in fields(RowPolicy)}


@dataclass(frozen=True, slots=True)
class Death:
    """What a judgement needs to know of a death."""

    cause: Cause
    #: Earlier deaths that count.
    crashes: int = 0
    verdict: Verdict = Verdict.OBSERVED
    signal: str | None = None
    #: Other runs that went down with the same worker, so that any of them may be the culprit.
    others: int = 0
    #: It ran alone, since it was a suspect before.
    isolated: bool = False
    queue: str | None = None
    items: int = 1
    #: Index of the item in hand among the child's items; None where it is not known.
    item: int | None = None
    #: The task promised that what it did for earlier items is durable (``done="on_next"``).
    promised: bool = False
    #: How often the items of this header position were halved before.
    splits: int = 0


class Action(StrEnum):
    """What a death leads to."""

    CRASHED = "crashed"
    RUN_AGAIN = "run_again"
    BISECT = "bisect"  # its items go to two successors
    SKIP = "skip"  # the item in hand alone is crashed, all others go to one successor
    RESUME = "resume"  # those before it are done, it is crashed, those after it go to a successor
    GO_ON = "go_on"  # those before it are done, it and those after it go to a successor


@dataclass(frozen=True, slots=True)
class Judgement:
    """An action, and how a run-again is to be: counted, alone, elsewhere."""

    action: Action
    strike: bool = True
    isolated: bool = False
    queue: str | None = None

    @property
    def runs_again(self) -> bool:
        return self.action is Action.RUN_AGAIN


CRASHED = Judgement(Action.CRASHED)


def judge(policy: RowPolicy, death: Death) -> Judgement:
    """Decide about a child that died."""
    oom_queue = policy.oom_queue if death.cause is Cause.OOM else None
    if oom_queue is not None and base_queue(death.queue) != oom_queue:
        return Judgement(Action.RUN_AGAIN, queue=oom_queue)
    if policy.isolate and death.others and death.cause is Cause.WORKER_LOST:
        return Judgement(Action.RUN_AGAIN, strike=False, isolated=True)
    isolated = policy.isolate and (death.isolated or death.cause is Cause.WORKER_LOST)
    again = Judgement(Action.RUN_AGAIN, isolated=isolated)
    last = death.crashes + 1 >= policy.max_crashes
    if policy.splits:
        if not _is_its_own(death) and not last:
            return again
        return _split(policy, death, isolated=isolated)
    return again if not last and _allows(policy, death.cause) else CRASHED


def _allows(policy: RowPolicy, cause: Cause) -> bool:
    if cause is Cause.TIME_LIMIT:
        return policy.time_limit
    if cause is Cause.WORKER_LOST:
        return policy.worker
    return policy.process


def _is_its_own(death: Death) -> bool:
    """The run's own doing: not a worker that was lost with it, a signal somebody sent, or a lost report."""
    if death.cause is Cause.SIGNAL:
        return death.signal not in FROM_OUTSIDE
    return death.cause in (Cause.OOM, Cause.EXIT, Cause.TIME_LIMIT, Cause.STALLED)


def _split(policy: RowPolicy, death: Death, *, isolated: bool) -> Judgement:
    """Nothing is split on a lease verdict alone, nor for a report that was lost."""
    shared = death.verdict is Verdict.LEASE or death.cause is Cause.SETTLE_LOST
    if shared or death.items <= 1 or policy.items is None:
        return CRASHED
    action = _how_to_split(policy.on_crash, death)
    if action is Action.BISECT and death.splits >= policy.max_splits:
        return CRASHED
    return Judgement(action, isolated=isolated)


def _how_to_split(on_crash: str, death: Death) -> Action:
    if on_crash == "bisect" or death.item is None:
        return Action.BISECT
    promised = on_crash == "resume" and death.promised
    if death.cause is Cause.TIME_LIMIT:  # the time of all items together is over: that convicts none of them
        return Action.GO_ON if promised and death.item > 0 else Action.BISECT
    return Action.RESUME if promised else Action.SKIP


def backoff(base: float, crashes: int, ceiling: float = 300.0) -> float:
    """Seconds before the next attempt after the `crashes`-th death (1, 2, …)."""
    return min(ceiling, base * 2.0 ** max(0, crashes - 1))
