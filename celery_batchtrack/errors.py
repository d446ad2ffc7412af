"""Every error this package raises on purpose.

::

    BatchTrackError
    ├── ImproperlyConfigured     a setting is missing, misspelt or out of range
    ├── InvalidOption            an option of `tracked`, `Batch` or `chord` is wrong (also a TypeError)
    ├── UnsupportedCanvas        a canvas shape this version cannot track (also a TypeError)
    ├── NotSerialisable          arguments or a result that are no JSON (also a ValueError)
    ├── BatchNotFound            no batch with that id (also a LookupError)
    ├── BatchStateError          the batch's life does not allow this now
    ├── BatchTimeout             `wait(timeout=…)` ran out (also a TimeoutError)
    ├── BatchFailed              `get()` of a batch that did not reach its callback
    ├── ClusterError             a LocalCluster cannot start (also a RuntimeError)
    ├── DatabaseUnavailable      the tracking database cannot be reached or written
    └── SchemaError
        ├── SchemaMissing        the tables are not there: run `batchtrack migrate`
        ├── SchemaOutdated       the database is older than the code: run `batchtrack migrate`
        └── SchemaTooNew         the database is newer than the code: upgrade the package
    ChildError                   what a child raised, where the original cannot leave its process
"""

from __future__ import annotations


class BatchTrackError(Exception):
    """Base of all errors raised on purpose."""


class ImproperlyConfigured(BatchTrackError):
    """A setting is missing, misspelt or out of range."""


class InvalidOption(BatchTrackError, TypeError):
    """An option of `tracked`, `Batch` or `chord` is unknown or has a wrong value."""


class UnsupportedCanvas(BatchTrackError, TypeError):
    """A canvas shape that cannot be a child (yet)."""


class NotSerialisable(BatchTrackError, ValueError):
    """Arguments or a result that cannot be written as JSON."""


class BatchNotFound(BatchTrackError, LookupError):
    """No batch has this id, or a shortened id fits several."""


class ChildNotFound(BatchNotFound):
    """The batch has no child at this position."""


class BatchStateError(BatchTrackError):
    """The batch is in a state that does not allow the call."""


class BatchTimeout(BatchTrackError, TimeoutError):
    """The batch had not ended when the time-out ran out. It goes on."""


class BatchFailed(BatchTrackError):
    """The batch ended without a result of its callback."""


class ClusterError(BatchTrackError, RuntimeError):
    """A LocalCluster cannot start; the message ends with the last output of the process that failed."""


class DatabaseUnavailable(BatchTrackError):
    """The tracking database cannot be reached, or refuses to be written."""


class SchemaError(BatchTrackError):
    """The database's tables do not fit this version of the package."""


class SchemaMissing(SchemaError):
    """There are no batchtrack tables in the database."""


class SchemaOutdated(SchemaError):
    """The tables are of an older version than the code."""


class SchemaTooNew(SchemaError):
    """The tables are of a newer version than the code."""


class ChildError(RuntimeError):
    """Stands for an exception that would kill a worker or cannot be pickled.

    `MemoryError` makes Celery end the whole worker, and `SystemExit` the pool process; what
    cannot be pickled loses its text on the way. This one keeps the text, and the original is
    its `__cause__` inside the process that raised it.
    """
