"""Geometry of bars and plots, in percent of whatever width they get; templates draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

#: In the order of a bar. What is left is pending.
SHOWN = ("completed", "failed", "crashed", "cancelled", "running")
#: Drawn from the bottom of a plot.
OUTCOMES = ("completed", "cancelled", "failed", "crashed")
#: Percent of a bar that the smallest segment takes: 2 px of the 160 px that no bar is narrower than.
LEAST = 1.25
#: A plot's bars fill so much of its height, so that marks have room above them.
_HIGHEST = 88.0


@dataclass(frozen=True, slots=True)
class Segment:
    status: str
    count: int
    x: float
    width: float


def bar(counts: Mapping[str, Any], of: int | None = None) -> list[Segment]:
    """Segments of a stacked bar. None that counts anything is invisible, and together they never reach the end before
    everything is settled."""
    total = int(counts["total"] if of is None else of)
    shown = [(status, int(counts[status])) for status in SHOWN if counts[status]]
    if not total or not shown:
        return []
    widths = [max(LEAST, 100.0 * count / total) for _, count in shown]
    whole = sum(count for _, count in shown) >= total
    excess = sum(widths) - (100.0 if whole else min(100.0 - LEAST, 100.0))
    if excess > 0:
        widest = max(range(len(widths)), key=widths.__getitem__)
        widths[widest] -= excess
    segments, x = [], 0.0
    for (status, count), width in zip(shown, widths, strict=True):
        segments.append(Segment(status, count, round(x, 3), round(width, 3)))
        x += width
    return segments


@dataclass(frozen=True, slots=True)
class Block:
    status: str
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Bin:
    time: datetime
    x: float
    width: float
    counts: Mapping[str, int]
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Mark:
    """Deaths in one bin."""

    x: float
    count: int
    time: datetime


@dataclass(frozen=True, slots=True)
class Plot:
    bins: Sequence[Bin]
    marks: Sequence[Mark]
    bin_seconds: int
    highest: int
    lines: Sequence[tuple[float, int]]  # (y in percent, value)
    start: datetime
    end: datetime


def plot(throughput: Mapping[str, Any], crash_times: Sequence[datetime]) -> Plot | None:
    """Ends of children by time, stacked by outcome, with a mark over each bin in which one died."""
    rows = list(throughput["bins"])
    if not rows:
        return None
    seconds = max(1, int(throughput["bin_seconds"]))
    start = rows[0]["time"]
    slots = max(int((rows[-1]["time"] - start).total_seconds() // seconds) + 1, 12)
    highest = max(sum(row[status] for status in OUTCOMES) for row in rows) or 1
    top = _round_up(highest)
    width = 100.0 / slots
    bins = [_bin(row, start, seconds, width, top) for row in rows]
    lines = [(round(100 - _HIGHEST * part, 2), int(top * part)) for part in (0.5, 1.0) if top * part >= 1]
    marks = _marks(crash_times, start, seconds, slots)
    return Plot(bins, marks, seconds, highest, lines, start, start + timedelta(seconds=slots * seconds))


def _bin(row: Mapping[str, Any], start: datetime, seconds: int, width: float, top: int) -> Bin:
    at = int((row["time"] - start).total_seconds() // seconds)
    blocks, y = [], 100.0
    for status in OUTCOMES:
        if row[status]:
            height = max(_HIGHEST * row[status] / top, 1.5)
            y -= height
            blocks.append(Block(status, round(max(y, 0.0), 2), round(height, 2)))
    counts = {status: row[status] for status in OUTCOMES if row[status]}
    return Bin(row["time"], round(at * width, 3), round(width, 3), counts, blocks)


def _marks(times: Sequence[datetime], start: datetime, seconds: int, slots: int) -> list[Mark]:
    counts: dict[int, int] = {}
    for time in times:
        at = min(max(int((time - start).total_seconds() // seconds), 0), slots - 1)
        counts[at] = counts.get(at, 0) + 1
    return [
        Mark(round((at + 0.5) * 100.0 / slots, 3), count, start + timedelta(seconds=at * seconds))
        for at, count in sorted(counts.items())
    ]


def _round_up(value: int) -> int:
    """To a number that halves well: 1, 2, 4, 6, 8, 10, 20, 40, …"""
    step = 1
    while True:
        for factor in (1, 2, 4, 6, 8):
            if value <= factor * step:
                return factor * step
        step *= 10
