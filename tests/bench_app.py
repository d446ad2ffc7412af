"""The app of the benchmark: no-op children, tracked and not, and bodies that count."""

from __future__ import annotations

import os

from celery import Celery

from celery_batchtrack import BatchTrack

app = Celery("tests.bench_app", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BACKEND"])
app.conf.batchtrack_database_url = os.environ["BENCH_DATABASE"]
app.conf.worker_prefetch_multiplier = 16
app.conf.worker_redirect_stdouts = False
BatchTrack(app)


@app.task
def nothing(number: int) -> int:
    return number


@app.task
def count(results: list[int]) -> int:
    return len(results)
