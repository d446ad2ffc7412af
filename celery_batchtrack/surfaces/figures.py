"""What is measured, under the names that Prometheus has for it: read from the store as plain values."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from celery_batchtrack.store.outcomes import DIED
from celery_batchtrack.vocabulary.durations import BOUNDS, NEVER_RAN
from celery_batchtrack.vocabulary.states import OPEN, SETTLED, BatchStatus

if TYPE_CHECKING:
    from celery_batchtrack.store import Store

PREFIX = "celery_batchtrack_"

_DONE = tuple(each.value for each in SETTLED)
_STATES = (*(each.value for each in OPEN), *_DONE)
_WORKER_STATES = ("alive", "suspected", "lost", "stopped")
#: Told as 0 where nobody died of them, so that the first death is an increase.
_DEADLY = (
    "SIGSEGV", "SIGKILL", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTERM", "exit", "oom", "time_limit", "stalled",
    "worker_lost", "settle_lost",
)  # fmt: skip
#: Of the view `stuck_batch`.
_STUCK = (
    "never_sealed", "deadline_passed", "worker_gone", "no_worker", "callback_waiting", "no_progress", "paused"
)  # fmt: skip
#: Seconds since their last beat for which workers that are gone count.
_GONE_FOR = 3600.0


@dataclass(frozen=True, slots=True)
class Metric:
    """A name, without the prefix, and what is told under it. `labels`: their names."""

    name: str
    kind: str  # gauge | counter | histogram
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a histogram: how many took at most so long, for each of `BOUNDS` and for all; and their sum, in seconds."""

    upto: tuple[int, ...]
    sum: float


#: Values by those of the labels.
Values = dict[tuple[str, ...], Any]
Family = tuple[Metric, Values]

UP = Metric("up", "gauge", "1 if the tracking database was read at the last refresh. At 0 nothing else is told")
SNAPSHOT = Metric("snapshot_timestamp_seconds", "gauge", "When the values were read")
CHILDREN = Metric("children", "gauge", "Children of live batches", ("state",))
FINISHED = Metric("children_finished_total", "counter", "Children that ended, by task", ("name", "state"))
ITEMS = Metric("items_finished_total", "counter", "Items of children that ended, by task", ("name", "state"))
CRASHES = Metric(
    "crashes_total", "counter", "Runs that died, by task and by signal or else cause, also where the child ran again",
    ("name", "signal"),
)  # fmt: skip
DURATION = Metric(
    "child_duration_seconds", "histogram", "How long children ran, from their last start", ("name", "state")
)  # fmt: skip
BATCHES = Metric("batches", "gauge", "Batches in the database, those that were pruned left out", ("status",))
PAUSED = Metric("paused_batches", "gauge", "Live batches that are paused, by hand or by their breaker")
STUCK = Metric(
    "stuck_batches", "gauge", "Batches that do not go on; the view batchtrack_stuck_batch says which", ("reason",)
)  # fmt: skip
OLDEST = Metric("oldest_open_batch_age_seconds", "gauge", "Age of the live batch that began first; 0: there is none")
WORKERS = Metric(
    "workers", "gauge", "Workers; lost and stopped are those whose last beat is less than an hour old", ("state",)
)  # fmt: skip
SWEEP = Metric(
    "detector_last_sweep_age_seconds", "gauge", "Seconds since the last sweep of the crash detector; +Inf: never"
)  # fmt: skip
VIOLATIONS = Metric(
    "invariant_violations", "gauge", "Rows that break a promise, looked for every few minutes, and only by "
    "`batchtrack metrics`; structural ones are always 0, liveness ones return to 0 within the time that detection "
    "takes", ("check", "kind"),
)  # fmt: skip

ALL = (
    UP, SNAPSHOT, CHILDREN, FINISHED, ITEMS, CRASHES, DURATION, BATCHES, PAUSED, STUCK, OLDEST, WORKERS, SWEEP,
    VIOLATIONS,
)  # fmt: skip


def buckets(value: Distribution) -> list[tuple[str, float]]:
    """With their upper bounds, as Prometheus writes them."""
    return list(zip((*map(str, BOUNDS), "+Inf"), value.upto, strict=True))


def read(store: Store) -> list[Family]:
    """Everything but invariants. Errors: DatabaseUnavailable, SchemaError."""
    return [*_now(store), *_outcomes(store.outcome_totals())]


def read_invariants(store: Store) -> list[Family]:
    """A scan of all rows: for once in a few minutes."""
    return [(VIOLATIONS, {(row["check_name"], row["kind"]): row["violations"] for row in store.view("invariant")})]


def _now(store: Store) -> Iterator[Family]:
    figures = store.figures()
    yield CHILDREN, _by(_STATES, figures.children)
    yield PAUSED, {(): figures.paused}
    yield OLDEST, {(): figures.oldest_age or 0.0}
    yield SWEEP, {(): float("inf") if figures.sweep_age is None else figures.sweep_age}
    yield BATCHES, _by(tuple(each.value for each in BatchStatus), store.batch_counts())
    yield STUCK, _by(_STUCK, Counter(row["reason"] for row in store.view("stuck_batch")))
    workers = store.view("worker_liveness", {"kind": "worker"}, since=("beat_at", _GONE_FOR))
    yield WORKERS, _by(_WORKER_STATES, Counter(row["state"] for row in workers))


def _outcomes(totals: Iterable[Any]) -> Iterator[Family]:
    totals = list(totals)
    names = sorted({each.task for each in totals})
    ends = [each for each in totals if each.status != DIED]
    yield FINISHED, _sums(ends, names, _DONE, lambda each: (each.task, each.status), lambda each: each.children)
    yield ITEMS, _sums(ends, names, _DONE, lambda each: (each.task, each.status), lambda each: each.items)
    deaths = [each for each in totals if each.status == DIED]
    yield CRASHES, _sums(deaths, names, _DEADLY, lambda each: (each.task, each.detail), lambda each: each.children)
    yield DURATION, _durations(ends, names)


def _sums(
    rows: Iterable[Any], names: Iterable[str], known: Iterable[str], key: Callable[[Any], tuple[str, str]],
    value: Callable[[Any], int],
) -> Values:  # fmt: skip
    """Each of `known` for each name, 0 included."""
    found: Values = {(name, each): 0 for name in names for each in known}
    for row in rows:
        found[key(row)] = found.get(key(row), 0) + value(row)
    return found


def _durations(ends: Iterable[Any], names: Iterable[str]) -> Values:
    counts: dict[tuple[str, ...], list[int]] = {
        (name, state): [0] * (len(BOUNDS) + 1) for name in names for state in _DONE
    }
    seconds: dict[tuple[str, ...], float] = defaultdict(float)
    for each in ends:
        if each.bucket != NEVER_RAN:
            counts[each.task, each.status][each.bucket] += each.children
            seconds[each.task, each.status] += each.seconds
    return {key: Distribution(tuple(accumulate(each)), seconds[key]) for key, each in counts.items()}


def _by(known: tuple[str, ...], found: Mapping[str, int]) -> Values:
    return {(each,): found.get(each, 0) for each in (*known, *(set(found) - set(known)))}


__all__ = [
    "ALL",
    "PREFIX",
    "SNAPSHOT",
    "UP",
    "Distribution",
    "Family",
    "Metric",
    "Values",
    "buckets",
    "read",
    "read_invariants",
]
