"""All settings, in one frozen, validated object.

A setting is called ``batchtrack_<field>`` in ``app.conf`` (``CELERY_BATCHTRACK_<FIELD>`` under the
``CELERY`` namespace) and may be overridden by the environment variable ``BATCHTRACK_<FIELD>``.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

from celery_batchtrack.errors import ImproperlyConfigured

PREFIX = "batchtrack_"

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)?\s*")
_UNITS = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}

_OWNER = re.compile(r"[A-Za-z0-9_]{1,40}")
_COLUMN = re.compile(r"(?:[\w$-]+\.)?[\w$-]+\.[\w$-]+")


def seconds(value: Any) -> float:
    """A duration in seconds, from a number of seconds, a timedelta, or text such as ``"7d"``, ``"90s"``."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is no duration: use seconds, a timedelta, or text such as '7d'")
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise ValueError(f"{value!r} is no duration: use seconds, or text such as '90s', '15m', '7d'")
        return float(match[1]) * _UNITS[match[2]]
    return float(value)


def _positive(value: Any) -> float:
    number = seconds(value)
    if not number > 0:
        raise ValueError(f"must be more than 0 seconds, not {value!r}")
    return number


def _not_negative(value: Any) -> float:
    number = seconds(value)
    if number < 0:
        raise ValueError(f"must not be negative, but is {value!r}")
    return number


def _count(value: Any) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not number.is_integer() or number < 1:
        raise ValueError(f"must be a whole number of at least 1, not {value!r}")
    return int(number)


def _optional_count(value: Any) -> int | None:
    return None if value is None or value == "" else _count(value)


def _optional_port(value: Any) -> int | None:
    number = _optional_count(value)
    if number is not None and number > 65_535:
        raise ValueError(f"must be a port from 1 to 65535, not {value!r}")
    return number


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        lowered = value.strip().lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    raise ValueError(f"must be true or false, not {value!r}")


def _optional_boolean(value: Any) -> bool | None:
    return None if value is None else _boolean(value)


def _optional_text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _version(value: Any) -> str | None:
    text = _optional_text(value)
    if text is not None and len(text) > 64:
        raise ValueError(f"must have at most 64 characters, not {len(text)}")
    return text


def _retention(value: Any) -> Mapping[str, float]:
    if not isinstance(value, Mapping):
        return {"completed": _positive(value), "other": _positive(value)}
    unknown = set(value) - {"completed", "other"}
    if unknown:
        raise ValueError(f"knows the keys 'completed' and 'other', not {sorted(unknown)}")
    return {**_DEFAULT_RETENTION, **{key: _positive(each) for key, each in value.items()}}


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping, not {value!r}")
    return dict(value)


def _owners(value: Any) -> Mapping[str, str]:
    if isinstance(value, str):  # as an environment variable gives it
        with contextlib.suppress(ValueError):
            value = json.loads(value or "{}")
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping such as {{'upload': 'shop_upload.id'}}, or its JSON, not {value!r}")
    for name, column in value.items():
        if not isinstance(name, str) or not _OWNER.fullmatch(name):
            raise ValueError(f"names owners by letters, digits and underscores, at most 40 of them, not {name!r}")
        if not isinstance(column, str) or not _COLUMN.fullmatch(column):
            raise ValueError(f"[{name!r}] must be 'table.column' or 'schema.table.column', not {column!r}")
    if len({name.lower() for name in value}) < len(value):
        raise ValueError(f"has names that are the same but for upper case: {sorted(value)}")
    return dict(value)


_DEFAULT_RETENTION = {"completed": 7 * 86400.0, "other": 30 * 86400.0}


def _setting(default: Any, read: Callable[[Any], Any], unit: str, doc: str) -> Any:
    metadata = {"read": read, "unit": unit, "doc": doc}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its default. Durations are seconds, or text such as ``"15s"``, ``"7d"``."""

    enabled: bool = _setting(True, _boolean, "boolean", "off: new chords go through Celery's own chord")
    database_url: str | None = _setting(
        None,
        _optional_text,
        "SQLAlchemy URL",
        "the tracking database; must be set unless the broker is the embedded one or tasks are always eager",
    )
    auto_migrate: bool | None = _setting(
        None,
        _optional_boolean,
        "boolean",
        "create the tables in an empty database at first use; by default only on SQLite",
    )
    engine_options: Mapping[str, Any] = _setting({}, _mapping, "mapping", "passed to sqlalchemy.create_engine")
    heartbeat: float = _setting(5.0, _positive, "seconds", "a worker's main process writes its pulse this often")
    lease: float = _setting(15.0, _positive, "seconds", "a prefork worker silent for longer is suspected")
    lease_shared_gil: float = _setting(
        60.0,
        _positive,
        "seconds",
        "the lease of threads and solo pools and of client processes, whose work can hold the GIL",
    )
    detect_every: float = _setting(15.0, _positive, "seconds", "time between two sweeps of the crash detector")
    detect_queue: str | None = _setting(
        None, _optional_text, "queue name", "queue of the detector's beat entry; by default where it is routed"
    )
    claim_timeout: float = _setting(
        30.0,
        _not_negative,
        "seconds",
        "a claim that cannot reach the database gives up after this; the row stays pending",
    )
    redispatch_after: float = _setting(
        30.0, _positive, "seconds", "a pending child whose queue is empty is published again after this"
    )
    redispatch_wait: float = _setting(
        600.0, _positive, "seconds", "a pending child whose queue is not empty is published again after this, doubling"
    )
    dispatch_chunk: int = _setting(500, _count, "children", "children taken for publishing in one transaction")
    max_in_flight: int | None = _setting(
        None,
        _optional_count,
        "children",
        "the window that all batches share: so many children at most are at the broker or run; by default no limit. "
        "Batches take turns, those of higher `priority` first. The same in every process",
    )
    max_queue_depth: int | None = _setting(
        None,
        _optional_count,
        "messages",
        "no child is sent to a queue in which so many messages lie; by default no limit",
    )
    fan_out: int = _setting(
        10_000,
        _count,
        "children",
        "a batch with more children than this, and without a window, is sent by the workers instead of by its parent",
    )
    insert_chunk: int = _setting(1000, _count, "children", "children inserted in one block while streaming")
    max_crashes: int = _setting(3, _count, "deaths", "the death that ends a child under a policy that runs it again")
    retry_backoff: float = _setting(
        1.0,
        _not_negative,
        "seconds",
        "pause before a crashed child runs again, doubling with each crash, at most 5 minutes",
    )
    app_version: str | None = _setting(
        None,
        _version,
        "text",
        "the application's version: told by every incident, and an item's quarantine is over when it changes",
    )
    faulthandler: bool | None = _setting(
        None,
        _optional_boolean,
        "boolean",
        "Python stacks of fatal signals go into incidents; by default unless the application enabled faulthandler "
        "itself; true takes it over",
    )
    adopt_isolated: bool = _setting(
        True,
        _boolean,
        "boolean",
        "a worker also consumes the `.isolated` queues of its queues when a suspect waits there; off where a worker "
        "of their own does",
    )
    isolation_patience: float = _setting(
        60.0,
        _positive,
        "seconds",
        "a suspect waits so long for its worker to be free of all other tasks, then as long for another chance",
    )
    shards: int = _setting(16, _count, "rows", "tally rows of a batch; more lets more children settle at once")
    wait_poll: float = _setting(0.5, _positive, "seconds", "how often wait() and iter_progress() look")
    retention: Mapping[str, float] = _setting(
        _DEFAULT_RETENTION,
        _retention,
        "seconds by outcome",
        "how long ended batches are kept; keys completed and other",
    )
    owners: Mapping[str, str] = _setting(
        {},
        _owners,
        "columns by name",
        "the application's own tables that `owner=` may name, as `{'upload': 'shop_upload.id'}`: deleting the row "
        "deletes its batches; `batchtrack migrate` makes the columns",
    )
    metrics_port: int | None = _setting(
        None,
        _optional_port,
        "port",
        "a worker's main process serves metrics for Prometheus here, at `/metrics`; by default it does not",
    )
    metrics_address: str = _setting(
        "0.0.0.0", str, "address", "of the interface on which `batchtrack_metrics_port` listens; by default all"
    )
    otel: bool = _setting(
        True,
        _boolean,
        "boolean",
        "where the application has loaded OpenTelemetry: spans of batches and deaths, attributes of children's spans",
    )
    flower_labels: bool = _setting(
        True,
        _boolean,
        "boolean",
        "messages name their batch and child in what Flower's Tasks tab shows of their keyword arguments, so that it "
        "finds them; the task itself sees nothing of it",
    )
    flower_require_auth: bool = _setting(
        False,
        _boolean,
        "boolean",
        "the pages in Flower are refused where Flower has neither `--basic-auth` nor `--auth`",
    )
    blackbox_dir: str | None = _setting(
        None,
        _optional_text,
        "folder",
        "black boxes and spooled outcomes; by default the first writable of /dev/shm, XDG_RUNTIME_DIR, the temp folder",
    )

    @classmethod
    def names(cls) -> list[str]:
        return [each.name for each in fields(cls)]

    @classmethod
    def validated(cls, values: Mapping[str, Any], spelling: Callable[[str], str] = str) -> Settings:
        """Read `values` (field name → raw value); errors name the setting by `spelling(name)`."""
        read: dict[str, Any] = {}
        for each in fields(cls):
            if each.name not in values:
                continue
            try:
                read[each.name] = each.metadata["read"](values[each.name])
            except (ValueError, TypeError) as error:
                raise ImproperlyConfigured(f"{spelling(each.name)} {error}") from None
        settings = cls(**read)
        settings._check_together(spelling)
        return settings

    def _check_together(self, spelling: Callable[[str], str]) -> None:
        if self.lease < 2 * self.heartbeat:
            raise ImproperlyConfigured(
                f"{spelling('lease')} ({self.lease:g} s) must be at least twice {spelling('heartbeat')} "
                f"({self.heartbeat:g} s), or one late beat makes a healthy worker a suspect"
            )


def suggestion(key: str, known: list[str]) -> str:
    """``": did you mean 'x'?"`` for a misspelt key, or an empty string."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else ""
