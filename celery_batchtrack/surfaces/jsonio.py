"""JSON for other programs: what is printed is always one document, safe in any terminal and encoding."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

from celery_batchtrack.vocabulary.records import isoformat


def dumps(value: Any, indent: int | None = None) -> str:
    """Pure ASCII; ids as text, times as ISO 8601 in UTC."""
    text = json.dumps(value, default=_plain, indent=indent)
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON does not escape


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return isoformat(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, Decimal):  # PostgreSQL's sums of whole numbers
        return int(value) if value == value.to_integral_value() else float(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def array(objects: Iterable[Any]) -> Iterator[str]:
    """One array in pieces, an object per line, so that memory does not grow with it."""
    before = "[\n"
    for each in objects:
        yield before + dumps(each)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"
