"""Identifiers: time-ordered batch ids, run tokens, and the ticket a message carries."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Name of the message header that carries a `Ticket`.
HEADER = "batchtrack"
#: Digits of an id that a search takes for its beginning: fewer may be any word.
SHORTEST_ID = 4


def uuid7() -> uuid.UUID:
    """A time-ordered UUID (RFC 9562, version 7): 48 bits of Unix milliseconds, 74 random bits.

    Only the order and uniqueness of ids rest on this clock; it is never compared with a time stamp.
    """
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (1 << 48) - 1) << 80
    value |= 0x7 << 76 | (random >> 68 & 0xFFF) << 64
    value |= 0b10 << 62 | random & (1 << 62) - 1
    return uuid.UUID(int=value)


def digits_of(text: str) -> str:
    """The hexadecimal digits of an id, or of its beginning, with or without hyphens; none if it is no such thing."""
    digits = text.lower().replace("-", "")
    return digits if len(digits) <= 32 and not set(digits) - set("0123456789abcdef") else ""


def new_token() -> uuid.UUID:
    """A run token: unique per claim, the fence of every later write of that run."""
    return uuid.uuid4()


_INDEX = re.compile(r"\[\d+\]")


def name_of_index(index: int) -> str:
    """How an item is called that has no name of its own."""
    return f"[{index}]"


def is_name_of_index(name: str) -> bool:
    """Whether this says no more than where the item stands in its list."""
    return _INDEX.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, order=True)
class ChildKey:
    """Primary key of a child: its batch, and its 0-based position in it."""

    batch_id: uuid.UUID
    position: int

    def __str__(self) -> str:
        return f"{self.batch_id}#{self.position}"


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a message says of the row it belongs to.

    `attempt` is the row's at the time of publishing: a message belongs to one stage of its
    row's life, so that a delayed, doubled or stale one no longer fits and is dropped.
    """

    store_id: uuid.UUID
    key: ChildKey
    attempt: int
    #: Kind of the row (`child` or a callback's), so that a worker can bind an errback's arguments.
    kind: str = "child"
    #: For Celery errbacks: id of the body, and the text of the error that kept it from running.
    errback: tuple[str, str] | None = None
    #: Whether the result is to be stored (`results="none"` says no).
    keep_result: bool = True
    #: The batch's own crash policy (`CrashPolicy.overridden`), stronger than the task's.
    on_crash: Mapping[str, Any] | None = None
    #: It is to run alone in its worker.
    isolated: bool = False
    #: Other tasks follow within the same child (a chain): its end is not the child's.
    more: bool = False
    #: The batch has `on_progress` callbacks.
    milestones: bool = False
    #: One in so many settles fills up the window that it was sent through; 0: there is none.
    refill: int = 0

    def as_header(self) -> dict[str, Any]:
        """The JSON form that travels in the message header `HEADER`."""
        header: dict[str, Any] = {
            "store": str(self.store_id),
            "batch": str(self.key.batch_id),
            "position": self.key.position,
            "attempt": self.attempt,
        }
        if self.kind != "child":
            header["kind"] = self.kind
        if self.errback:
            header["errback"] = list(self.errback)
        if not self.keep_result:
            header["results"] = "none"
        if self.on_crash:
            header["on_crash"] = dict(self.on_crash)
        if self.isolated:
            header["isolated"] = True
        if self.more:
            header["more"] = True
        if self.milestones:
            header["milestones"] = True
        if self.refill:
            header["refill"] = self.refill
        return header

    @classmethod
    def from_header(cls, header: Any) -> Ticket | None:
        """The ticket in a message's header, or None where there is none or it is not ours."""
        if not isinstance(header, Mapping):
            return None
        try:
            errback = header.get("errback")
            return cls(
                store_id=uuid.UUID(header["store"]),
                key=ChildKey(uuid.UUID(header["batch"]), int(header["position"])),
                attempt=int(header["attempt"]),
                kind=str(header.get("kind", "child")),
                errback=(str(errback[0]), str(errback[1])) if errback else None,
                keep_result=header.get("results") != "none",
                on_crash=dict(header["on_crash"]) if header.get("on_crash") else None,
                isolated=header.get("isolated") is True,
                more=header.get("more") is True,
                milestones=header.get("milestones") is True,
                refill=max(0, int(header.get("refill", 0))),
            )
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError):
            return None
