"""Tasks of the tests of a batch's whole life. Broker and settings come from the environment, as in `crashes`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from celery import Celery

from celery_batchtrack import BatchTrack, current_batch, tracked
from tests.acceptance.apps.crashes import note, segfault
from tests.helpers import eventually

app = Celery("life", broker=os.environ.get("BATCHTRACK_TEST_BROKER_URL", "memory://"), set_as_current=False)
app.conf.update(json.loads(os.environ.get("BATCHTRACK_TEST_CONF", "{}")))
app.conf.update(worker_prefetch_multiplier=4, broker_connection_retry_on_startup=True)
BatchTrack(app)


@app.task(shared=False, name="life.value")
def value(number: int, place: str = "") -> int:
    note(place, number)
    return number


@app.task(shared=False, name="life.weighty")
@tracked(weight="pages")
def weighty(pages: int, place: str = "") -> int:
    note(place, pages)
    return pages


@app.task(shared=False, name="life.held")
def held(number: int, place: str) -> int:
    """Runs until the test lets it go on."""
    note(place, number)
    eventually(lambda: Path(f"{place}.go").exists(), 120, what="the test to let it go")
    return number


@app.task(shared=False, name="life.broken")
def broken(number: int, mended: str, place: str) -> int:
    """Kills its process until the cause is mended."""
    note(place, number)
    if not Path(mended).exists():
        segfault()
    return number


@app.task(shared=False, name="life.failing")
def failing(number: int, mended: str) -> int:
    if not Path(mended).exists():
        raise LookupError(f"number {number}")
    return number


@app.task(shared=False, name="life.kept")
def kept(results: list[Any], place: str) -> int:
    """A body that writes down what it got."""
    note(place, json.dumps(results))
    return len(results)


@app.task(shared=False, name="life.told")
def told(report: dict[str, Any], place: str) -> None:
    """A callback that writes down its report."""
    names = ("status", "reason", "round", "percent", "total", "completed", "failed", "crashed", "cancelled")
    note(place, json.dumps({name: report[name] for name in names}))


@app.task(shared=False, name="life.grow")
def grow(count: int, first: int, place: str) -> int:
    """Adds children to its batch."""
    batch = current_batch()
    assert batch is not None
    with batch.extend() as more:
        more.add_many(value.s(first + at, place) for at in range(count))
    return -1


@app.task(shared=False, name="life.next_round")
def next_round(report: dict[str, Any], count: int, first: int, place: str) -> None:
    """A callback that starts one more round, once."""
    note(f"{place}.rounds", report["round"])
    batch = current_batch()
    assert batch is not None
    if report["round"] == 1:
        with batch.extend() as more:
            more.add_many(value.s(first + at, place) for at in range(count))


@app.task(shared=False, name="life.broken_callback")
def broken_callback(report: Any, mended: str, place: str) -> None:
    note(place, "called")
    if not Path(mended).exists():
        segfault()


tasks = SimpleNamespace(
    value=value, weighty=weighty, held=held, broken=broken, failing=failing, kept=kept, told=told, grow=grow,
    next_round=next_round, broken_callback=broken_callback,
)  # fmt: skip
