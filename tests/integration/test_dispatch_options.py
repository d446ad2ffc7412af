"""Options of dispatching as a user writes them: in `Batch`, in a chord, in what is nested in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, group

from celery_batchtrack import Batch, BatchTrack, chord, errors
from celery_batchtrack.surfaces import pages, views
from celery_batchtrack.surfaces.render import Screen


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    made = Celery("options", broker="memory://", set_as_current=False)
    made.conf.update(task_always_eager=True, batchtrack_database_url=f"sqlite:///{tmp_path / 'options.db'}")
    BatchTrack(made)

    @made.task(name="options.value", shared=False)
    def value(number: int) -> int:
        return number

    @made.task(name="options.total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    yield made
    made.batchtrack.reset()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_in_flight": 0}, "max_in_flight must be a whole number of at least 1"),
        ({"max_in_flight": -5}, "not -5"),
        ({"max_running": 0}, "max_running must be a whole number"),
        ({"rate": "fast"}, "'100/m'"),
        ({"rate": "0/s"}, "more than 0 children a second"),
        ({"priority": "high"}, "priority must be a whole number"),
        ({"queue": ""}, "queue must be a queue's name"),
        ({"queue": 5}, "queue must be a queue's name"),
        ({"max_inflight": 5}, "did you mean 'max_in_flight'"),
    ],
)
def test_a_limit_that_is_none_is_an_error_at_the_call(app: Celery, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.InvalidOption, match=said):
        Batch("wrong", app=app, **wrong)
    with pytest.raises(errors.InvalidOption, match=said):
        chord([app.tasks["options.value"].s(1)], batch=wrong)
    assert app.batchtrack.store.list_batches() == []


@pytest.mark.parametrize(
    ("setting", "wrong"), [("max_in_flight", 0), ("max_queue_depth", -1), ("fan_out", 0), ("max_in_flight", "many")]
)
def test_a_setting_that_lets_nothing_through_is_an_error_that_names_it(app: Celery, setting: str, wrong: Any) -> None:
    app.conf[f"batchtrack_{setting}"] = wrong
    with pytest.raises(errors.ImproperlyConfigured, match=f"batchtrack_{setting} must be a whole number"):
        Batch.create("wrong", [], app=app)


def test_where_tasks_are_always_eager_no_limit_makes_anybody_wait(app: Celery) -> None:
    app.conf.batchtrack_max_in_flight = 1
    value = app.tasks["options.value"]
    with Batch("eager", app=app, max_in_flight=1, rate="1/h") as batch:
        batch.add_many(value.s(at) for at in range(20))
    assert (batch.status, list(batch.results())) == ("completed", list(range(20)))


def test_a_batchs_queue_is_that_of_every_task_in_it_that_names_none(app: Celery) -> None:
    value, total = app.tasks["options.value"], app.tasks["options.total"]
    header = [
        value.s(1), value.s(2).set(queue="mine"), chain(value.s(3), value.si(4)),
        chain(value.s(5), group(value.si(6), value.si(7))),
    ]  # fmt: skip
    result = chord(header, batch={"queue": "bulk", "max_in_flight": 2, "priority": 3})(total.si([7]))
    batch = result.batch
    assert result.get() == 7
    assert [child.queue for child in batch.children()][:3] == ["bulk", "mine", "bulk"]
    (nested,) = batch.nested()
    assert [child.queue for child in nested.children()] == ["bulk", "bulk"]
    assert (nested.row.max_in_flight, nested.row.priority) == (2, 3), "so that it cannot flood the broker either"
    (body,) = batch.children(kind="callbacks")
    assert body.queue == "celery", "the body goes where it is routed"


def test_max_running_is_a_window_and_the_narrower_counts(app: Celery) -> None:
    batch = Batch.create("narrow", [], app=app, max_in_flight=100, max_running=4, rate="90/m")
    row = batch.row
    assert (row.max_in_flight, row.options["max_in_flight"], row.options["max_running"]) == (4, 100, 4)
    assert row.options["rate"] == 1.5


@pytest.mark.parametrize(("rate", "shown"), [("10/s", "10/s"), ("90/m", "1.5/s"), ("30/m", "30/m"), ("5/h", "5/h")])
def test_show_says_how_a_batch_is_sent(app: Celery, rate: str, shown: str) -> None:
    batch = Batch.create("slow", [], app=app, max_in_flight=1000, max_running=4, rate=rate, queue="bulk", priority=2)
    screen = Screen("utf-8", None, colour=False)
    lines = pages.batch_page(screen, views.batch_in_full(app.batchtrack.store, batch.id), str(batch.id), "shop")
    (line,) = [line for line in lines if line.startswith("sending")]
    assert line == f"sending    max_in_flight 1 000, max_running 4, rate {shown}, queue bulk, priority 2"


def test_show_says_nothing_of_sending_where_nothing_was_said(app: Celery) -> None:
    batch = Batch.create("plain", [], app=app)
    found = views.batch_in_full(app.batchtrack.store, batch.id)
    lines = pages.batch_page(Screen("utf-8", None, colour=False), found, "x", "shop")
    assert not [line for line in lines if line.startswith("sending")]
