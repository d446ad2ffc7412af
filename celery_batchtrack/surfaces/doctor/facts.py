"""What `doctor` judges by, and what it says: plain values, gathered by `gathering` and made up by tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from celery_batchtrack.vocabulary.checkup import DatabaseFacts, Tables
from celery_batchtrack.vocabulary.settings import PREFIX, Settings

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. `advice`: what to do about it; empty if nothing is to be done, or the message says it."""

    check: str
    level: Level
    message: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """A task as its application declares it."""

    name: str
    acks_late: bool = False
    reject_on_worker_lost: bool = False
    tracked: bool = False  # by @tracked, or annotations
    wrapped: bool = True  # has our wrapper in its class
    time_limit: float | None = None  # seconds; its own, or else task_time_limit
    retry_delay: float = 0.0  # seconds
    own_apply_async: str | None = None  # whose, if not Celery's
    queue: str | None = None


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """The broker, as this process sees it. `error`: why it does not answer."""

    transport: str  # "redis", "amqp", "sqs", …
    url: str = ""  # without password
    error: str | None = None
    visibility_timeout: float | None = None  # seconds, where the transport has one
    #: Messages by queue; None: the broker does not tell.
    queues: Mapping[str, int | None] = field(default_factory=dict)
    remote_control: bool = True


@dataclass(frozen=True, slots=True)
class Reply:
    """What one worker tells of itself; see `glue.remote`."""

    name: str
    told: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None  # it answered, but knows no such command
    #: Seconds that its clock is ahead of this host's (negative: behind), as far as that is certain.
    ahead: float = 0.0


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it. None: it could not be found out, and another fact says why."""

    settings: Settings | None = None
    configuration_error: str | None = None
    ignored_settings: Mapping[str, str] = field(default_factory=dict)  # spelling → how to write it
    namespace: str = ""  # of the configuration, e.g. "CELERY_"
    database: DatabaseFacts | None = None
    database_error: str | None = None
    broker: BrokerFacts | None = None
    tasks: Sequence[TaskFacts] = ()
    tasks_error: str | None = None
    detector_queue: str | None = None
    beat_disabled: bool = False  # the detector's entry, in django-celery-beat
    replies: Sequence[Reply] | None = None
    store_id: str | None = None
    version: str = ""
    own_settings: Mapping[str, Any] = field(default_factory=dict)  # as workers tell theirs
    hostname: str = ""
    blackbox: str | None = None  # folder on this host

    def spelt(self, name: str) -> str:
        """A setting as this application writes it."""
        key = self.namespace + PREFIX + name
        return key.upper() if self.namespace else key

    def spelt_celery(self, name: str) -> str:
        """One of Celery's own."""
        return (self.namespace + name).upper() if self.namespace else name

    @property
    def tables(self) -> Tables | None:
        return self.database.tables if self.database is not None else None


Check = Callable[[Facts], Iterator[Finding]]


def some(names: Sequence[str], first: int = 3) -> str:
    """A few names, and how many more there are."""
    more = len(names) - first
    return ", ".join(names[:first]) + (f" and {more} more" if more > 0 else "")


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def warn(check: str, message: str, advice: str = "") -> Finding:
    return Finding(check, "warn", message, advice)


def fail(check: str, message: str, advice: str = "") -> Finding:
    return Finding(check, "fail", message, advice)
