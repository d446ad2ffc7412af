"""The app of the benchmark: no-op children, tracked and not, and bodies that count."""

from __future__ import annotations

import os

from celery import Celery

from celery_batchtrack import BatchTrack, tracked
from celery_batchtrack.vocabulary.crash_policy import RowPolicy

app = Celery("tests.bench_app", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BACKEND"])
app.conf.batchtrack_database_url = os.environ["BENCH_DATABASE"]
app.conf.worker_prefetch_multiplier = 16
app.conf.worker_redirect_stdouts = False
BatchTrack(app)


POLICY = RowPolicy()


@app.task
@tracked(items="docs", item_id="id")
def by_key(docs: list[dict[str, str]]) -> None:
    """What the black box is told by."""


@app.task
@tracked(items="docs", item_id=("db", "id"))
def by_keys(docs: list[dict[str, str]]) -> None:
    """Several keys, joined."""


@app.task
@tracked(items="docs")
def by_index(docs: list[dict[str, str]]) -> None:
    """No identifier but the index."""


@app.task
def nothing(number: int) -> int:
    return number


@app.task
def count(results: list[int]) -> int:
    return len(results)
