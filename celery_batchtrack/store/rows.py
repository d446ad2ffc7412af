"""Rows into records."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, WorkerRow

from .schema import batch, child, worker

CHILD_COLUMNS = tuple(child.c[name] for name in ChildRow.__slots__)
BATCH_COLUMNS = tuple(batch.c[name] for name in BatchRow.__slots__)
WORKER_COLUMNS = tuple(worker.c[name] for name in WorkerRow.__slots__)


def child_row(row: sa.Row[Any] | tuple[Any, ...]) -> ChildRow:
    record = ChildRow(*row)
    if record.items is None:
        object.__setattr__(record, "items", [])
    return record


def batch_row(row: sa.Row[Any] | tuple[Any, ...]) -> BatchRow:
    return BatchRow(*row)


def worker_row(row: sa.Row[Any] | tuple[Any, ...]) -> WorkerRow:
    return WorkerRow(*row)
