"""JSON as Celery's messages have it (kombu's): datetime, Decimal and UUID survive."""

from __future__ import annotations

from typing import Any

from kombu.utils import json

from celery_batchtrack import errors


def dumps(value: Any) -> str:
    """Raises `errors.NotSerialisable`, naming the part that is no JSON."""
    try:
        return str(json.dumps(value))
    except errors.InvalidOption:  # what refuses to be JSON says why
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.NotSerialisable(f"{type(value).__name__} is no JSON: {error}") from error


def loads(text: str) -> Any:
    return json.loads(text)
