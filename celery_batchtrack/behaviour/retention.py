"""What is over goes, when its retention is: batches with all that hangs on them, then what nobody names any more."""

from __future__ import annotations

from collections.abc import Mapping

from .tracker import Tracker


def prune(tracker: Tracker, keep: Mapping[str, float] | None = None) -> tuple[int, int]:
    """Delete what ended longer ago than `keep` (seconds by outcome; default: the settings' retention).

    Returns how many batches and how many workers.
    """
    keep = tracker.settings.retention if keep is None else keep
    batches = tracker.store.prune(completed=keep["completed"], other=keep["other"])
    tracker.store.keep_outcomes()
    tracker.store.prune_quarantine(keep["other"])
    return batches, tracker.store.prune_workers(max(keep.values()))
