"""How fast children are sent, decided without I/O: windows, fair turns between batches, rates."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from celery_batchtrack.errors import InvalidOption

K = TypeVar("K")

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*([smh])\s*")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_SLOWEST = 1 / 86_400

#: What becomes due within so many seconds may be sent ahead: the worker that gets it holds it. Later children take no
#: place in a window yet.
AHEAD = 30.0
#: A window is filled up this often while it is emptied once.
_REFILLS = 32


@dataclass(frozen=True, slots=True)
class Rate:
    """So many children a second are sent, in the long run; at once never more than one second's worth and one more (so
    that nothing is lost where somebody looks once a second)."""

    per_second: float

    @classmethod
    def parse(cls, value: Any) -> Rate | None:
        """From text as Celery's `rate_limit` takes it (``"10/s"``, ``"100/m"``, ``"5/h"``), or a number of children a
        second. Raises InvalidOption."""
        if value is None or isinstance(value, Rate):
            return value
        match = _RATE.fullmatch(value) if isinstance(value, str) else None
        if match is not None:
            value = float(match[1]) / _UNITS[match[2]]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _SLOWEST <= value < math.inf:
            raise InvalidOption(
                "rate must be more than 0 children a second (at least one a day), or text such as '10/s', '100/m', "
                f"'5/h', not {value!r}"
            )
        return cls(float(value))

    @property
    def burst(self) -> int:
        """How many may be sent at once, after a pause."""
        return math.floor(self.per_second + 1)

    def allowance(self, elapsed: float | None) -> float:
        """How many children may be sent now, parts of one included.

        `elapsed`: seconds since the moment until which everything sent is paid for; None: nothing was sent yet.
        """
        most = self.per_second + 1
        return float(self.burst) if elapsed is None else max(0.0, min(most, elapsed * self.per_second))

    def paid_since(self, allowance: float, sent: int) -> float:
        """Seconds ago until which everything is paid for, after `sent` of this `allowance` were sent."""
        return (allowance - sent) / self.per_second

    def wait(self, allowance: float, sent: int) -> float:
        """Seconds until the next child may be sent."""
        return max(0.0, 1.0 - (allowance - sent)) / self.per_second


@dataclass(frozen=True, slots=True)
class Contender(Generic[K]):
    """A batch that has children to send through a window that it shares with others."""

    key: K
    priority: int
    in_flight: int
    room: int | None = None  # what it may send by its own limits; None: no such limits


def turns(free: int, contenders: Iterable[Contender[K]]) -> dict[K, int]:
    """How many of the `free` places each batch gets: higher priorities first; among equal ones each place goes to the
    batch that has the fewest children in flight, the first named if several have."""
    waiting = [
        (-each.priority, each.in_flight, order, each) for order, each in enumerate(contenders) if each.room != 0
    ]
    heapq.heapify(waiting)
    given: dict[K, int] = {}
    while free > 0 and waiting:
        priority, in_flight, order, each = heapq.heappop(waiting)
        given[each.key] = given.get(each.key, 0) + 1
        free -= 1
        if each.room is None or given[each.key] < each.room:
            heapq.heappush(waiting, (priority, in_flight + 1, order, each))
    return given


def narrowest(*windows: int | None) -> int | None:
    """The smallest of the limits that there are."""
    return min((each for each in windows if each is not None), default=None)


def refill_one_in(window: int | None) -> int:
    """One in so many settles, drawn at random, fills the window up; 0: there is none.

    To do it at each settle would cost a look at the whole window each time. As all children in flight settle, the
    chance that none of them fills it up is below e^-22, and a sweep would.
    """
    return 0 if window is None else 1 + window // _REFILLS


def whole(name: str, value: Any) -> int | None:
    """A limit on a number of children. Raises InvalidOption."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidOption(f"{name} must be a whole number of at least 1, or left out for no limit, not {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Pace:
    """What a batch declares of its sending."""

    max_in_flight: int | None = None
    max_running: int | None = None
    rate: Rate | None = None
    priority: int = 0

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Pace:
        """From a batch's options. Raises InvalidOption."""
        priority = options.get("priority", 0)
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1000:
            raise InvalidOption(f"priority must be a whole number between -1000 and 1000, not {priority!r}")
        return cls(
            whole("max_in_flight", options.get("max_in_flight")), whole("max_running", options.get("max_running")),
            Rate.parse(options.get("rate")), priority,
        )  # fmt: skip

    @property
    def window(self) -> int | None:
        """What runs is in flight: so a cap on running children is a window as well."""
        return narrowest(self.max_in_flight, self.max_running)

    def as_options(self) -> dict[str, Any]:
        """What was declared, as the batch's row keeps it."""
        told = {
            "max_in_flight": self.max_in_flight, "max_running": self.max_running,
            "rate": None if self.rate is None else self.rate.per_second, "priority": self.priority or None,
        }  # fmt: skip
        return {name: value for name, value in told.items() if value is not None}
