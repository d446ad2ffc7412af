"""Decisions without I/O about a batch: its outcome, and whether so many crashes are too many."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from celery_batchtrack.errors import InvalidOption

from .settings import seconds
from .states import BatchStatus

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How many children (header positions), or items, may fail to complete. Inclusive; percent rounds down."""

    children: int = 0
    percent: float | None = None
    items: int | None = None

    def __post_init__(self) -> None:
        for name in ("children", "items"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise InvalidOption(f"tolerance: {name} must be a whole number of at least 0, not {value!r}")
        if self.percent is not None and not 0 <= self.percent <= 100:
            raise InvalidOption(f"tolerance must be between 0% and 100%, but is {self.percent}%")
        if sum((self.children != 0, self.percent is not None, self.items is not None)) > 1:
            raise InvalidOption("tolerance is a number of children, a percentage, or a number of items: one of them")

    @classmethod
    def parse(cls, value: Any) -> Tolerance:
        """From an int (children), text such as ``"2%"``, or a Tolerance. Floats are refused."""
        if isinstance(value, Tolerance):
            return value
        if isinstance(value, Mapping) and set(value) == {"items"}:
            return cls(items=value["items"])
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise InvalidOption(f"tolerance must not be negative, but is {value}")
            return cls(children=value)
        match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise InvalidOption(f"tolerance must be a number of children or text such as '2%', not {value!r}")
        percent = float(match[1])
        if percent > 100:
            raise InvalidOption(f"tolerance must be at most 100%, but is {value!r}")
        return cls(percent=percent)

    def as_option(self) -> int | str | dict[str, int]:
        if self.items is not None:
            return {"items": self.items}
        return self.children if self.percent is None else f"{self.percent:.15g}%"

    def allows(self, not_completed: int, total: int, items: int = 0) -> bool:
        """Whether `not_completed` of `total` children, with so many `items` not completed, may be missing."""
        if self.items is not None:
            return items <= self.items
        if self.percent is None:
            return not_completed <= self.children
        # Exact, so that 2% of 50 is 1 and not 0.9999…
        return not_completed * 100 <= total * Fraction(repr(self.percent))


class Sample(NamedTuple):
    """A batch's counters at one moment (seconds, by the database's clock)."""

    at: float
    ended_well: int  # children that completed or failed
    deaths: int


_WINDOW = 300.0


@dataclass(frozen=True, slots=True)
class CrashRate:
    """A batch's breaker: more than `percent` of the runs that ended within the last `window` seconds died.

    It needs `MINIMUM` deaths: that one of the first two children dies proves nothing. The window slides over
    `Sample`s of the batch's counters, taken at deaths and by sweeps, at most `SAMPLES` a window.
    """

    percent: float
    window: float = _WINDOW

    MINIMUM: ClassVar[int] = 3
    SAMPLES: ClassVar[int] = 10

    @classmethod
    def parse(cls, rate: Any, window: Any = None) -> CrashRate | None:
        """From text such as ``"20%"``, and a duration. Raises InvalidOption."""
        if rate is None:
            if window is not None:
                raise InvalidOption("crash_window needs max_crash_rate: at which rate is the batch paused?")
            return None
        match = _PERCENT.fullmatch(rate) if isinstance(rate, str) else None
        if match is None or float(match[1]) >= 100:
            raise InvalidOption(f"max_crash_rate must be text such as '20%', below 100%, not {rate!r}")
        try:
            length = _WINDOW if window is None else seconds(window)
        except ValueError as error:
            raise InvalidOption(f"crash_window: {error}") from None
        if not 0 < length < math.inf:
            raise InvalidOption(f"crash_window must be more than 0 seconds, not {window!r}")
        return cls(float(match[1]), length)

    def as_option(self) -> dict[str, float]:
        return {"percent": self.percent, "window": self.window}

    @classmethod
    def from_option(cls, option: Mapping[str, Any] | None) -> CrashRate | None:
        return None if option is None else cls(float(option["percent"]), float(option["window"]))

    def with_sample(self, samples: Sequence[Sample], now: Sample) -> list[Sample]:
        """The samples that are still needed, with this one if the last is old enough."""
        begin = self._begin(samples, now)
        kept = [each for each in samples if each.at >= begin.at]
        if not kept or now.at - kept[-1].at >= self.window / self.SAMPLES:
            kept.append(now)
        return kept

    def _begin(self, samples: Sequence[Sample], now: Sample) -> Sample:
        """The window's beginning: the newest sample that is a window old, or the oldest there is."""
        old = [each for each in samples if now.at - each.at >= self.window]
        return old[-1] if old else (samples[0] if samples else now)

    def exceeded(self, samples: Sequence[Sample], now: Sample) -> str | None:
        """Why the batch is to be paused, in words; None if it is not."""
        begin = self._begin(samples, now) if samples else Sample(now.at, 0, 0)
        deaths, ended_well = now.deaths - begin.deaths, now.ended_well - begin.ended_well
        runs = deaths + ended_well
        if deaths < self.MINIMUM or deaths * 100 <= runs * Fraction(repr(self.percent)):
            return None
        return f"{deaths} of {runs} runs died within {self.window:g} s, more than max_crash_rate {self.percent:.15g}%"


def outcome(tolerance: Tolerance, completed: int, total: int, items: int = 0) -> BatchStatus:
    """The end of a batch none of whose children is open. `items`: how many are not completed."""
    if completed == total:
        return BatchStatus.COMPLETED
    return BatchStatus.PARTIAL if tolerance.allows(total - completed, total, items) else BatchStatus.FAILED
