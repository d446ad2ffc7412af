"""What is known of an attempt that did not complete. Only the unhappy path makes evidence."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import PurePath
from typing import Any

from .states import Cause, Detector


@dataclass(frozen=True, slots=True)
class Evidence:
    """The dossier of one attempt, before it is written. What could not be known is None."""

    cause: Cause
    phase: str = "running"  # before_claim | running
    signal: str | None = None
    exit_code: int | None = None
    message: str | None = None
    #: Name of the exception's type, and its traceback.
    exception: str | None = None
    traceback: str | None = None
    #: JSON of the exception as Celery's result backends keep it: exc_type, exc_module, exc_message.
    error: str | None = None
    #: Python stack at a fatal signal, the thread that died first.
    stack: str | None = None
    #: The innermost frame that is the application's: ``annotate.py:88 in annotate_one``.
    python_frame: str | None = None
    #: Identifier of the item in hand, its index among the items of the run that died, and how many were done before.
    item: str | None = None
    item_index: int | None = None
    items_done: int | None = None
    #: The task promised that the items done before it are durable.
    promised: bool = False
    note: str | None = None
    peak_memory: int | None = None  # bytes, resident
    hostname: str | None = None
    boot_id: str | None = None
    worker: str | None = None
    worker_id: uuid.UUID | None = None
    pid: int | None = None
    versions: Mapping[str, str] | None = None
    detected_by: Detector | None = None
    #: When it died, where the database knows; otherwise it was noticed now.
    died_at: datetime | None = None
    #: By this process's monotonic clock; only the time since then is told to the database.
    noticed: float = field(default_factory=time.monotonic, compare=False)

    def as_json(self) -> dict[str, Any]:
        """What can be told on disk, to another process: everything but clocks."""
        told = {name: getattr(self, name) for name in _TOLD if getattr(self, name) is not None}
        if self.worker_id is not None:
            told["worker_id"] = str(self.worker_id)
        return told

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evidence:
        """Raises LookupError, ValueError or TypeError for what `as_json` never wrote."""
        known = {name: value[name] for name in _TOLD if name in value}
        known["cause"] = Cause(known["cause"])
        if "worker_id" in known:
            known["worker_id"] = uuid.UUID(str(known["worker_id"]))
        if "detected_by" in known:
            known["detected_by"] = Detector(known["detected_by"])
        return cls(**known)


_TOLD = tuple(each.name for each in fields(Evidence) if each.name not in ("died_at", "noticed"))


@dataclass(frozen=True, slots=True)
class IncidentRow:
    """A row of ``batchtrack_incident``, with its child's identifiers."""

    id: uuid.UUID
    batch_id: uuid.UUID
    position: int
    task: str
    task_id: str
    attempt: int
    outcome: str  # what became of the row: its status, `retried`, `redispatched`, or `late_write`
    cause: str
    phase: str
    items: list[str]
    item: str | None
    item_index: int | None
    items_done: int | None
    note: str | None
    signal: str | None
    exit_code: int | None
    message: str | None
    exception: str | None
    traceback: str | None
    stack: str | None
    python_frame: str | None
    fingerprint: str | None
    peak_memory: int | None
    hostname: str | None
    boot_id: str | None
    worker: str | None
    worker_id: uuid.UUID | None
    pid: int | None
    queue: str | None
    versions: dict[str, str] | None
    detected_by: str | None
    verdict: str | None
    died_at: datetime | None
    detected_at: datetime
    overturned_at: datetime | None


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a Python stack."""

    path: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{PurePath(self.path).name}:{self.line} in {self.function}"

    @property
    def is_library(self) -> bool:
        """The standard library, an installed package, Celery or this package: not the application."""
        return bool(_LIBRARY.search(self.path))


_LIBRARY = re.compile(r"^<|/(?:site|dist)-packages/|/lib/python3[^/]*/|/(?:celery|billiard|celery_batchtrack)/")
#: Linear in any text, and within what `int` takes: messages with anything in them are searched too.
_FRAME = re.compile(
    r'^ *File "(?P<path>[^"\n]*)", line (?P<line>\d{1,9}),? in (?P<function>[^\n]*\S) *$', re.MULTILINE
)


def frames(text: str) -> list[Frame]:
    """The frames of a traceback or of a stack by faulthandler, in the order of the text."""
    return [Frame(each["path"], int(each["line"]), each["function"]) for each in _FRAME.finditer(text)]


def innermost_frames(stack: str) -> list[Frame]:
    """Of the thread that comes first in a stack by faulthandler."""
    blocks = (frames(block) for block in stack.split("\n\n"))
    return next((found for found in blocks if found), [])


def application_frame(innermost_first: Sequence[Frame]) -> str | None:
    """The innermost frame that is not a library's; the innermost of all where there is none."""
    for frame in innermost_first:
        if not frame.is_library:
            return str(frame)[:255]
    return str(innermost_first[0])[:255] if innermost_first else None


#: So many innermost frames, by file and function, tell one root cause from another; lines move with every edit.
_TELLING = 3


def fingerprint(task: str, evidence: Evidence) -> str:
    """Groups incidents of one root cause across batches: task, cause, and where it was.

    16 hexadecimal digits. Line numbers, hosts, items and messages are left out.
    """
    if evidence.stack is not None:
        where = innermost_frames(evidence.stack)[:_TELLING]
    else:
        where = frames(evidence.traceback or "")[::-1][:_TELLING]
    how = evidence.signal or ("" if evidence.exit_code is None else str(evidence.exit_code))
    parts = [task, evidence.cause.value, evidence.phase, how, evidence.exception or ""]
    parts += [f"{PurePath(each.path).name}:{each.function}" for each in where]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()[:16]
