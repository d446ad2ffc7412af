"""Where a suspect, and what died of memory, is sent: stronger than any route; and what the worker's loop does."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue

from celery_batchtrack import Batch, BatchTrack, errors, tracked
from celery_batchtrack.glue.publish import BrokerPublisher
from celery_batchtrack.glue.worker import LoopStep
from celery_batchtrack.vocabulary.aftermath import Rerun
from celery_batchtrack.vocabulary.states import Verdict
from tests.store.kit import SEGFAULT


@pytest.fixture
def app(sqlite_url: str) -> Iterator[Celery]:
    app = Celery("rerouting", broker=f"memory://{uuid.uuid4().hex}", set_as_current=False)
    app.conf.update(
        batchtrack_database_url=sqlite_url,
        task_queues=[
            Queue("docs", Exchange("docs", type="topic"), "docs.#"), Queue("bigmem", Exchange("bigmem"), "bigmem"),
            Queue("celery", Exchange("celery"), "celery"),
        ],
        task_routes={"demo.*": {"exchange": "docs", "exchange_type": "topic", "routing_key": "docs.parse"}},
    )  # fmt: skip
    BatchTrack(app)

    @app.task(name="demo.parse", shared=False)
    @tracked(items="docs", on_crash="skip", merge="sum")
    def parse(docs: Any = (1, 2)) -> int:
        return len(docs)

    app.finalize()
    yield app
    app.batchtrack.reset()


def lengths(app: Celery) -> dict[str, int]:
    publisher = BrokerPublisher(app)
    return {name: length for name in ("docs", "bigmem", "celery", "docs.isolated")
            if (length := publisher.queue_length(name, ""))}  # fmt: skip


def empty(app: Celery) -> None:
    """Kombu's broker in memory is one for the whole process."""
    with app.connection_for_write() as connection, connection.channel() as channel:
        for queue in app.amqp.queues.values():
            queue(channel).declare()
        for name in ("docs", "bigmem", "celery", "docs.isolated"):
            channel.queue_purge(name)


def died(app: Celery, queue: str) -> Batch:
    """A batch of one child whose next attempt goes to that queue."""
    batch = Batch.create("b", [app.tasks["demo.parse"].s([1, 2])], app=app)
    empty(app)
    extension: BatchTrack = app.batchtrack
    worker = extension.begin_client()
    row = next(iter(batch.children())).row
    extension.store.claim(row.key, 0, uuid.uuid4(), worker.id, "1:1:1:0")
    row = next(iter(batch.children())).row
    extension.store.crash(row, SEGFAULT, Verdict.OBSERVED, Rerun(queue=queue, isolated=queue.endswith(".isolated")))
    extension.end_client()
    return batch


@pytest.mark.parametrize("queue", ["bigmem", "docs.isolated"])
def test_a_rerouted_child_goes_there_whatever_its_tasks_route_says(app: Celery, queue: str) -> None:
    from celery_batchtrack.behaviour import dispatch

    batch = died(app, queue)
    assert dispatch.pump(app.batchtrack.tracker, batch.id) == 1
    assert lengths(app) == {queue: 1}


def test_a_queue_that_may_not_be_made_is_no_reason_to_fail_a_child(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    from celery_batchtrack.behaviour import dispatch

    app.conf.task_create_missing_queues = False
    batch = died(app, "docs.isolated")
    with caplog.at_level(logging.WARNING):
        assert dispatch.pump(app.batchtrack.tracker, batch.id) == 1
    assert "action=queue_missing" in caplog.text
    assert lengths(app) == {"docs": 1}
    assert [child.status for child in batch.children()] == ["pending"]


def test_items_that_cannot_be_taken_apart_are_refused_at_the_call(app: Celery) -> None:
    parse = app.tasks["demo.parse"]
    for signature in (parse.s({"a": 1, "b": 2}), parse.s()):
        with pytest.raises(errors.InvalidOption, match="given in the call, as a list"):
            Batch.create("b", [signature], app=app)
    Batch.create("b", [parse.s({"a": 1}), parse.s([1, 2])], app=app)  # one item cannot be split anyway


def test_who_waits_for_a_paused_batch_is_told(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    batch = Batch.create("b", [app.tasks["demo.parse"].s([1, 2])], app=app)
    assert batch.pause()
    progress = batch.progress()
    assert progress.paused_at is not None and progress.as_dict()["pause_reason"] == "by hand"
    app.batchtrack.settings
    with caplog.at_level(logging.WARNING), pytest.raises(errors.BatchTimeout, match=r"paused \(by hand\): resume"):
        batch.wait(0.6)
    assert caplog.text.count("action=wait_paused") == 1
    assert batch.resume() and batch.progress().paused_at is None


# -- the worker's loop ------------------------------------------------------------------------------


class Timers:
    """Celery's timer, and its hub: what is to be called again and again."""

    def __init__(self) -> None:
        self.entries: list[SimpleNamespace] = []

    def call_repeatedly(self, seconds: float, act: Any) -> SimpleNamespace:
        entry = SimpleNamespace(act=act, cancelled=False)
        entry.cancel = lambda: setattr(entry, "cancelled", True)
        self.entries.append(entry)
        return entry

    @property
    def acts(self) -> list[Any]:
        return [each.act for each in self.entries if not each.cancelled]


@pytest.mark.parametrize("forgetful", [False, True], ids=["Celery 5.7", "Celery 5.5"])
def test_the_loop_looks_at_pool_and_gate_once_after_each_connection(app: Celery, forgetful: bool) -> None:
    extension: BatchTrack = app.batchtrack
    extension.gate = SimpleNamespace(tick="tick")  # type: ignore[assignment]
    timers = Timers()
    worker = SimpleNamespace(hub=timers, timer=timers, pool=SimpleNamespace(maintain_pool="maintain"))
    consumer = SimpleNamespace(app=app, controller=worker)
    step = LoopStep(consumer)
    for _ in range(3):
        if forgetful:  # Consumer.on_close: self.timer.clear()
            timers.entries.clear()
        step.start(consumer)
        assert timers.acts == ["maintain", "tick"]
