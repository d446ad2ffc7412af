"""celery-batchtrack: batches of Celery tasks in which no child can vanish.

``BatchTrack(app)`` installs it; ``chord`` and ``Batch`` start batches; ``tracked`` says what a task works on.
"""

from __future__ import annotations

__version__ = "0.1.0"

from . import errors, signals
from .glue.batch import Batch
from .glue.chord import chord
from .glue.cluster import LocalCluster
from .glue.current import current_batch, current_child
from .glue.declare import tracked
from .glue.extension import BatchTrack
from .glue.options import BatchOptions
from .vocabulary.policies import Tolerance

__all__ = [
    "Batch",
    "BatchOptions",
    "BatchTrack",
    "LocalCluster",
    "Tolerance",
    "chord",
    "current_batch",
    "current_child",
    "errors",
    "signals",
    "tracked",
]
