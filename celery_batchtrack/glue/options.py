"""Options of a batch: one set of names, as keywords of `Batch` and in the ``batch={…}`` of a chord."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypedDict

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.crash_policy import CrashPolicy
from celery_batchtrack.vocabulary.pacing import Pace
from celery_batchtrack.vocabulary.policies import CrashRate, Tolerance
from celery_batchtrack.vocabulary.settings import seconds, suggestion
from celery_batchtrack.vocabulary.states import CALLBACK_KINDS, NOT_COMPLETED, Kind, Status

from . import codec, transaction


class BatchOptions(TypedDict, total=False):
    """All options of a batch.

    ``tolerance``: how many children may fail to complete: a number, or text such as ``"2%"``; inclusive.
    ``start``: ``"seal"`` (default: nothing is sent before the batch is complete) or ``"now"``.
    ``on_success`` gets the ordered results of completed children (``callback_arg="results"``, the default), the
    ``"report"``, or ``"nothing"``; ``on_failure``, ``on_first_failure`` and ``on_finish`` get the report.
    ``on_progress``: ``{50: half.s(), 90: nearly.s()}``: called once with the report when so many percent are settled.
    ``results``: ``"store"`` (default); ``"backend"``: also in Celery's result backend, under the children's task ids;
    or ``"none"``, for batches whose results nobody reads.
    ``deadline`` (seconds, text such as ``"2h"``, a timedelta, or a datetime): what is open then is cancelled.
    ``parent_batch`` (a `Batch` or its id): this batch is a child of that one, which ends after it.
    ``description``, ``tags`` (texts) and ``metadata`` (JSON) can be searched by.
    ``owner``: the application's own row that this batch goes with when that is deleted: ``{"upload": 4711}``, or an
    object of a model whose table is named in the setting `batchtrack_owners`.
    ``on_crash`` (a name or a `CrashPolicy`) and ``max_crashes``: instead of what the children's tasks declare.
    ``max_in_flight``: so many of its children at most are at the broker or run; each that ends lets the next one go.
    ``max_running``: so many at most run at the same time, and no more than these are sent.
    ``rate``: so many are sent in a time: ``"10/s"``, ``"100/m"``, ``"5/h"``, or a number a second.
    ``priority``: among batches that share the window `batchtrack_max_in_flight`, higher ones are served first
    (default 0); equal ones take turns. It is not the priority of messages: that is the signature's.
    ``queue``: where its children go that do not say so themselves, instead of where their task is routed.
    ``transaction``: an SQLAlchemy Session or Connection, or ``"django"`` (``"django:alias"``), on the tracking
    database: the batch is created in that transaction, commits or rolls back with it, and its children are sent after
    the commit; ``start="now"`` has no effect.
    ``max_crash_rate``: text such as ``"20%"``: if more of the runs that ended within ``crash_window`` (seconds, or
    text; default 5 minutes) died, and at least three, the batch is paused; ``batch.resume()`` goes on.
    """

    name: str
    tolerance: int | str | Tolerance
    start: str
    callback_arg: str
    results: str
    on_crash: str | CrashPolicy
    max_crashes: int
    max_in_flight: int
    max_running: int
    rate: str | float
    priority: int
    queue: str
    max_crash_rate: str
    crash_window: float | str | timedelta
    deadline: float | str | timedelta | datetime
    parent_batch: Any
    description: str
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    owner: Any
    transaction: Any
    on_success: Any
    on_failure: Any
    on_first_failure: Any
    on_finish: Any
    on_progress: Mapping[int, Any]


_CHOICES = {
    "start": ("seal", "now"),
    "callback_arg": ("results", "report", "nothing"),
    "results": ("store", "backend", "none"),
}


@dataclass(frozen=True, slots=True)
class ValidOptions:
    """A batch's options, checked."""

    name: str
    start: str | None  # as it was given
    stored: dict[str, Any]
    callbacks: dict[Kind, list[Any]]
    #: Percent of each `on_progress` callback.
    milestones: tuple[int, ...] = ()
    description: str | None = None
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] | None = None
    deadline_in: float | None = None
    deadline: datetime | None = None
    parent_batch: uuid.UUID | None = None
    owner: Any = None
    transaction: Any = None  # as `transaction.checked` gives it

    @property
    def start_now(self) -> bool:
        return self.start == "now"


def validated(options: Mapping[str, Any], default_name: str) -> ValidOptions:
    """Raises InvalidOption for unknown names and wrong values, at the call."""
    known = list(BatchOptions.__annotations__)
    for name in options:
        if name not in known:
            hint = CrashPolicy.hint(name) or suggestion(str(name), known)
            raise errors.InvalidOption(f"a batch has no option {name!r}{hint}")
    for name, allowed in _CHOICES.items():
        value = options.get(name, allowed[0])
        if value not in allowed:
            raise errors.InvalidOption(f"{name} must be one of {allowed}, not {value!r}")
    name = options.get("name") or default_name
    if not isinstance(name, str) or len(name) > 255 or not _storable(name):
        raise errors.InvalidOption(f"a batch's name is text of at most 255 characters, not {name!r:.300}")
    stored = {
        "tolerance": Tolerance.parse(options.get("tolerance", 0)).as_option(),
        "callback_arg": options.get("callback_arg", "results"),
        "results": options.get("results", "store"),
    }
    stored.update(_crash_options(options))
    stored.update(Pace.parse(options).as_options())
    if options.get("queue") is not None:
        stored["queue"] = _queue("queue", options["queue"])
    milestones = _milestones(options.get("on_progress"))
    callbacks: dict[Kind, list[Any]] = {Kind.ON_PROGRESS: [callback for _, callback in milestones]}
    callbacks.update((kind, several(options.get(kind.value))) for kind in CALLBACK_KINDS if kind not in callbacks)
    deadline_in, deadline = _deadline(options.get("deadline"))
    return ValidOptions(
        name, options.get("start"), stored, callbacks,
        milestones=tuple(percent for percent, _ in milestones),
        description=_text("description", options.get("description")), tags=_tags(options.get("tags")),
        metadata=_metadata(options.get("metadata")), deadline_in=deadline_in, deadline=deadline,
        parent_batch=_batch_id(options.get("parent_batch")), owner=options.get("owner"),
        transaction=transaction.checked(options.get("transaction")),
    )  # fmt: skip


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options as JSON has them, for a signature that travels. They are checked already."""
    told = dict(options)
    for name in ("tolerance", "on_crash"):
        if isinstance(told.get(name), (Tolerance, CrashPolicy)):
            told[name] = told[name].as_option()
    for name in ("deadline", "crash_window"):
        if isinstance(told.get(name), timedelta):
            told[name] = told[name].total_seconds()
    if told.get("transaction") is not None:
        told["transaction"] = transaction.kept(told["transaction"])
    if told.get("parent_batch") is not None:
        told["parent_batch"] = str(_batch_id(told["parent_batch"]))
    if told.get("on_progress") is not None:
        told["on_progress"] = {str(percent): callback for percent, callback in told["on_progress"].items()}
    return told


def _milestones(value: Any) -> list[tuple[int, Any]]:
    if value is None:
        return []
    if not isinstance(value, Mapping) or "task" in value:
        raise errors.InvalidOption(
            f"on_progress takes callbacks by percent, such as {{50: half.s()}}, not {value!r:.100}"
        )
    found = []
    for percent, callback in value.items():
        number = int(percent) if isinstance(percent, str) and percent.isdigit() else percent
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 100:
            raise errors.InvalidOption(f"on_progress: {percent!r} is no whole percent between 1 and 100")
        found += [(number, each) for each in several(callback)]
    return sorted(found, key=lambda pair: pair[0])


def _deadline(value: Any) -> tuple[float | None, datetime | None]:
    if value is None:
        return None, None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise errors.InvalidOption(f"deadline needs a time zone, which {value!r} has not")
        return None, value
    try:
        length = seconds(value)
    except ValueError as error:
        raise errors.InvalidOption(f"deadline: {error}") from None
    if not 0 < length < math.inf:
        raise errors.InvalidOption(f"deadline must be more than 0 seconds from now, not {value!r}")
    return length, None


def _text(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _storable(value):
        raise errors.InvalidOption(f"{name} must be text, not {value!r:.100}")
    return value


def _tags(value: Any) -> tuple[str, ...]:
    tags = (value,) if isinstance(value, str) else tuple(value or ())
    for tag in tags:
        if not isinstance(tag, str) or not 0 < len(tag) <= 255 or not _storable(tag):
            raise errors.InvalidOption(f"a tag is text of at most 255 characters, not {tag!r:.100}")
    return tuple(dict.fromkeys(tags))


def _queue(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 255 or not _storable(value):
        raise errors.InvalidOption(f"{name} must be a queue's name, not {value!r:.100}")
    return value


def _metadata(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        if not isinstance(value, Mapping) or not _storable(json.dumps(dict(value), ensure_ascii=False)):
            raise TypeError("no mapping")
        return dict(json.loads(json.dumps(dict(value), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidOption(f"metadata must be a mapping of JSON values: {error}") from None


def _batch_id(value: Any) -> uuid.UUID | None:
    found = getattr(value, "id", value)
    if found is None or isinstance(found, uuid.UUID):
        return found
    try:
        return uuid.UUID(str(found))
    except ValueError:
        raise errors.InvalidOption(f"parent_batch must be a Batch or its whole id, not {value!r:.100}") from None


def _crash_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the batch keeps of its own crash policy and of its breaker."""
    kept: dict[str, Any] = {}
    declared = options.get("on_crash")
    if isinstance(declared, Mapping):  # as `plain` tells it
        declared = CrashPolicy(**declared)
    if declared is not None or options.get("max_crashes") is not None:
        policy = CrashPolicy.parse("as_acks" if declared is None else declared, options.get("max_crashes"))
        told = policy.as_option()
        if not isinstance(declared, CrashPolicy):
            told = {name: told[name] for name in ("on_crash", "max_crashes") if options.get(name) is not None}
        kept["on_crash"] = told
    rate = CrashRate.parse(options.get("max_crash_rate"), options.get("crash_window"))
    if rate is not None:
        kept["crash_rate"] = rate.as_option()
    return kept


def several(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, Mapping)):
        return list(value)
    return [value]


def _storable(text: str) -> bool:
    """PostgreSQL's text holds neither NUL nor lone surrogates."""
    return "\0" not in text and text.encode("utf-8", "replace").decode() == text


# -- another round ----------------------------------------------------------------------------------

def retried(only: str | Status | Sequence[str] | None) -> tuple[Status, ...]:
    wanted = NOT_COMPLETED if only is None else (only,) if isinstance(only, str) else tuple(only)
    for each in wanted:
        if each not in NOT_COMPLETED:
            raise errors.InvalidOption(
                f"retry(only=…) takes {', '.join(NOT_COMPLETED)}, not {each!r}: only such children are retried"
            )
    return tuple(dict.fromkeys(Status(each) for each in wanted))


def overridden(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise errors.InvalidOption(f"overrides takes a mapping of options, not {overrides!r:.100}")
    for name in overrides:
        if name not in _OVERRIDES:
            raise errors.InvalidOption(f"overrides knows no {name!r}{suggestion(str(name), list(_OVERRIDES))}")
    kwargs = overrides.get("kwargs", {})
    if "queue" in overrides:
        _queue("overrides: queue", overrides["queue"])
    if not isinstance(kwargs, Mapping):
        raise errors.InvalidOption(f"overrides: kwargs must be a mapping, not {kwargs!r:.100}")
    codec.dumps(dict(overrides))
    return dict(overrides)


_OVERRIDES = (
    "queue", "kwargs", "priority", "time_limit", "soft_time_limit", "headers", "serializer", "compression",
)  # fmt: skip
