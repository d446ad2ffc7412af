"""What a batch's header positions returned: one result each, also where a position was split."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from celery_batchtrack.vocabulary.aftermath import HeaderResult

from .tracker import Tracker


def of_batch(tracker: Tracker, batch_id: uuid.UUID) -> Iterator[Any]:
    """In header order. Positions of which nothing completed are left out; of a split one, the parts that completed
    are merged as its task says.

    Errors: ValueError where results cannot be merged so.
    """
    for result in tracker.store.results(batch_id):
        yield merged(result, tracker.codec.loads)


def merged(result: HeaderResult, loads: Callable[[str], Any]) -> Any:
    """The value of one position. Parts without a result (done before a crash, or results are off) add nothing."""
    values = [loads(text) for text in result.texts if text is not None]
    if result.merge == "list":
        return values
    if not result.split:
        return values[0] if values else None
    if not values:
        return None
    if result.merge is None:  # only quarantine splits what does not say how to merge: one part is left of it
        return values[0] if len(values) == 1 else values
    try:
        return _merge(result.merge)(values)
    except Exception as error:  # a callable of the application may raise anything: it must not stop the publishing
        raise ValueError(
            f"the parts of header position {result.position} cannot be merged by merge={result.merge!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _merge(how: str) -> Callable[[list[Any]], Any]:
    return _BUILT_IN.get(how) or _imported(how)


def _concat(values: list[Any]) -> list[Any]:
    strange = next((each for each in values if not isinstance(each, list)), None)
    if strange is not None:
        raise TypeError(f"merge='concat' joins lists, but a part returned {strange!r:.100}")
    return [item for each in values for item in each]


_BUILT_IN: dict[str, Callable[[list[Any]], Any]] = {"concat": _concat, "sum": sum}


def _imported(path: str) -> Callable[[list[Any]], Any]:
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = importlib.import_module(module)
        for step in name.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"merge={path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise TypeError(f"merge={path!r} is no callable")
    return found
