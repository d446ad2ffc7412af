"""celery-batchtrack: batches of Celery tasks in which no child can vanish.

``BatchTrack(app)`` installs it; ``chord`` and ``Batch`` start batches; ``tracked`` says what a task works on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import errors, signals
    from .glue.batch import Batch
    from .glue.chord import chord
    from .glue.current import current_batch, current_child
    from .glue.declare import tracked
    from .glue.embedded.cluster import LocalCluster
    from .glue.inhand import each_item, note
    from .glue.installed import BatchTrack
    from .glue.options import BatchOptions
    from .vocabulary.crash_policy import CrashPolicy
    from .vocabulary.policies import Tolerance
else:
    # Imported at first use: every `celery` command imports this package for its command line, also
    # where no application uses it, and SQLAlchemy alone would cost a quarter of a second.
    _HOMES = {
        "Batch": "glue.batch",
        "BatchOptions": "glue.options",
        "BatchTrack": "glue.installed",
        "CrashPolicy": "vocabulary.crash_policy",
        "LocalCluster": "glue.embedded.cluster",
        "Tolerance": "vocabulary.policies",
        "chord": "glue.chord",
        "current_batch": "glue.current",
        "current_child": "glue.current",
        "each_item": "glue.inhand",
        "errors": "errors",
        "note": "glue.inhand",
        "signals": "signals",
        "tracked": "glue.declare",
    }

    def __getattr__(name):
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{__name__}.{home}")
            value = module if home == name else getattr(module, name)
        except AttributeError as error:  # else `from … import` would say only that there is no such name
            raise ImportError(f"cannot import {name!r} from {__name__}.{home}: {error}") from error
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES})


__all__ = [
    "Batch",
    "BatchOptions",
    "BatchTrack",
    "CrashPolicy",
    "LocalCluster",
    "Tolerance",
    "chord",
    "current_batch",
    "current_child",
    "each_item",
    "errors",
    "note",
    "signals",
    "tracked",
]
