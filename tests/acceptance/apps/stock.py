"""A worker as it was before this package came: plain Celery, with the same tasks under the same names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery, signature

app = Celery(
    "stock",
    broker=os.environ["BATCHTRACK_TEST_BROKER_URL"],
    backend=os.environ["BATCHTRACK_TEST_RESULT_BACKEND"],
    set_as_current=False,
)
app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)


def _note(place: str, line: Any) -> None:
    if place:
        with Path(place).open("a") as file:
            file.write(f"{line}\n")


@app.task(name="life.value")
def value(number: int, place: str = "") -> int:
    _note(f"{place}.stock", number)
    return number


@app.task(name="life.kept")
def kept(results: list[Any], place: str) -> int:
    _note(f"{place}.stock", results)
    return len(results)


@app.task(name="stock.relay")
def relay(canvas: dict[str, Any]) -> str:
    """Starts what somebody else made."""
    made = signature(canvas, app=app)
    assert type(made).__module__.startswith("celery."), "this process does not know the package"
    return str(made.apply_async().id)
