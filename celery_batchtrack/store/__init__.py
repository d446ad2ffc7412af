"""The tracking database: the only part that imports SQLAlchemy."""

from __future__ import annotations

from .batches import BatchWrites
from .children import ChildWrites, SlotTaken
from .dispatching import Dispatching
from .pruning import Pruning
from .queries import Queries
from .verify import Verifying
from .workers import WorkerWrites


class Store(BatchWrites, ChildWrites, WorkerWrites, Dispatching, Queries, Pruning, Verifying):
    """Everything the tracking database is asked, by topic."""


__all__ = ["SlotTaken", "Store"]
