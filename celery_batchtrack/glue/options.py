"""Options of a batch: one set of names, as keywords of `Batch` and in the ``batch={…}`` of a chord."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypedDict

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.crash_policy import CrashPolicy
from celery_batchtrack.vocabulary.policies import CrashRate, Tolerance
from celery_batchtrack.vocabulary.settings import suggestion
from celery_batchtrack.vocabulary.states import CALLBACK_KINDS, Kind


class BatchOptions(TypedDict, total=False):
    """All options of a batch.

    ``tolerance``: how many children may fail to complete: a number, or text such as ``"2%"``; inclusive.
    ``start``: ``"seal"`` (default: nothing is sent before the batch is complete) or ``"now"``.
    ``on_success`` gets the ordered results of completed children (``callback_arg="results"``, the default), the
    ``"report"``, or ``"nothing"``; ``on_failure``, ``on_first_failure`` and ``on_finish`` get the report.
    ``results``: ``"store"`` (default) or ``"none"``, for batches whose results nobody reads.
    ``on_crash`` (a name or a `CrashPolicy`) and ``max_crashes``: instead of what the children's tasks declare.
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
    max_crash_rate: str
    crash_window: float | str | timedelta
    on_success: Any
    on_failure: Any
    on_first_failure: Any
    on_finish: Any


_CHOICES = {
    "start": ("seal", "now"),
    "callback_arg": ("results", "report", "nothing"),
    "results": ("store", "none"),
}


@dataclass(frozen=True, slots=True)
class ValidOptions:
    """A batch's options, checked."""

    name: str
    start_now: bool
    stored: dict[str, Any]
    callbacks: dict[Kind, list[Any]]


def validated(options: Mapping[str, Any], default_name: str) -> ValidOptions:
    """Raises InvalidOption for unknown names and wrong values, at the call."""
    known = list(BatchOptions.__annotations__)
    for name in options:
        if name not in known:
            raise errors.InvalidOption(f"a batch has no option {name!r}{suggestion(str(name), known)}")
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
    callbacks = {kind: _several(options.get(kind.value)) for kind in CALLBACK_KINDS}
    return ValidOptions(name, options.get("start") == "now", stored, callbacks)


def _crash_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the batch keeps of its own crash policy and of its breaker."""
    kept: dict[str, Any] = {}
    declared = options.get("on_crash")
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


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, Mapping)):
        return list(value)
    return [value]


def _storable(text: str) -> bool:
    """PostgreSQL's text holds neither NUL nor lone surrogates."""
    return "\0" not in text and text.encode("utf-8", "replace").decode() == text
