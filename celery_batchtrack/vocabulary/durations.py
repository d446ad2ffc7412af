"""How long children ran, in classes: percentiles and histograms without reading every row."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

#: Upper bounds of the classes, in seconds. The class after the last one has no bound.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
#: The class of what ended without having started.
NEVER_RAN = -1


def bucket(seconds: float | None) -> int:
    """The class of a duration: an index into `BOUNDS`, len(BOUNDS) for more than all, `NEVER_RAN` for None."""
    return NEVER_RAN if seconds is None else bisect_left(BOUNDS, seconds)


def nearest_rank(ordered: Sequence[float], share: float) -> float | None:
    """The value that `share` (0 to 1) of the ordered values do not exceed; None of none."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


__all__ = ["BOUNDS", "NEVER_RAN", "bucket", "nearest_rank"]
