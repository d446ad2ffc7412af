"""What is over goes, when its retention is: batches with all that hangs on them, then workers nobody names."""

from __future__ import annotations

from .tracker import Tracker


def prune(tracker: Tracker) -> int:
    """Delete ended batches by the settings' retention; returns how many."""
    retention = tracker.settings.retention
    deleted = tracker.store.prune(completed=retention["completed"], other=retention["other"])
    tracker.store.prune_workers(max(retention.values()))
    return deleted
