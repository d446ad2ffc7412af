"""Options of a batch: one set of names, as keywords of `Batch` and in the ``batch={…}`` of a chord."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.policies import Tolerance
from celery_batchtrack.vocabulary.settings import suggestion
from celery_batchtrack.vocabulary.states import CALLBACK_KINDS, Kind


class BatchOptions(TypedDict, total=False):
    """All options of a batch.

    ``tolerance``: how many children may fail to complete: a number, or text such as ``"2%"``; inclusive.
    ``start``: ``"seal"`` (default: nothing is sent before the batch is complete) or ``"now"``.
    ``on_success`` gets the ordered results of completed children (``callback_arg="results"``, the default), the
    ``"report"``, or ``"nothing"``; ``on_failure``, ``on_first_failure`` and ``on_finish`` get the report.
    ``results``: ``"store"`` (default) or ``"none"``, for batches whose results nobody reads.
    """

    name: str
    tolerance: int | str | Tolerance
    start: str
    callback_arg: str
    results: str
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
    callbacks = {kind: _several(options.get(kind.value)) for kind in CALLBACK_KINDS}
    return ValidOptions(name, options.get("start") == "now", stored, callbacks)


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, Mapping)):
        return list(value)
    return [value]


def _storable(text: str) -> bool:
    """PostgreSQL's text holds neither NUL nor lone surrogates."""
    return "\0" not in text and text.encode("utf-8", "replace").decode() == text
