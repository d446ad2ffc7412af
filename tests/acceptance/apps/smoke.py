"""The smallest application for a worker: one task, services from the environment."""

import os

from celery import Celery

app = Celery(
    "smoke",
    broker=os.environ["BATCHTRACK_TEST_BROKER_URL"],
    backend=os.environ.get("BATCHTRACK_TEST_RESULT_BACKEND"),
)


@app.task(name="smoke.add")
def add(left: int, right: int) -> int:
    print(f"adding {left} and {right}")
    return left + right
