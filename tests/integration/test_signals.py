"""Celery signals: what each tells, and that no receiver harms what it hears of."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, group

from celery_batchtrack import Batch, BatchTrack, signals
from celery_batchtrack.behaviour import finish, hosts, recovery
from celery_batchtrack.glue import announce
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.states import Status, Verdict
from tests.integration.cli_kit import Seeds, death, make_app

ALL = {name: getattr(signals, name) for name in signals.__all__ if name != "batch_ended"}
Told = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def app(database_url: str) -> Iterator[Celery]:
    app = make_app(database_url, task_always_eager=True)
    BatchTrack.of(app).migrate()

    @app.task(name="shop.parse", shared=False)
    def parse(number: int) -> int:
        if number == 13:
            raise ValueError("13 is not parsed")
        return number

    @app.task(name="shop.done", shared=False)
    def done(report: Any) -> None:
        return None

    yield app
    BatchTrack.of(app).reset()


@pytest.fixture
def told(app: Celery) -> Iterator[Told]:
    """Every signal, in order; and before each of these receivers one that raises."""
    heard: Told = []
    receivers = []
    for name, signal in ALL.items():

        def broken(**_: Any) -> None:
            raise RuntimeError("a receiver's own trouble")

        def hear(sender: Any, signal: Any, name: str | None = None, *, of: str = name, **more: Any) -> None:
            assert sender is app
            named = {} if name is None else {"name": name}
            heard.append((of, {**named, **more}))

        for receiver in (broken, hear):
            signal.connect(receiver, weak=False)
            receivers.append((signal, receiver))
    yield heard
    for signal, receiver in receivers:
        signal.disconnect(receiver)


def names(told: Told) -> list[str]:
    return [name for name, _ in told]


def of(told: Told, name: str) -> list[dict[str, Any]]:
    return [each for kind, each in told if kind == name]


def test_a_batch_tells_of_its_start_its_children_and_its_end_whatever_receivers_raise(app: Celery, told: Told) -> None:
    parse, done = app.tasks["shop.parse"], app.tasks["shop.done"]
    batch = Batch.create("parsing", [parse.si(1), parse.si(13)], app=app, on_finish=done.s())
    assert batch.status == "failed"
    ((begun,), (ended,)) = of(told, "batch_started"), of(told, "batch_finished")
    assert begun == {"batch_id": batch.id, "name": "parsing", "round": 1, "parent_batch": None}
    assert ended == {"batch_id": batch.id, "name": "parsing", "status": "failed", "reason": None}
    child = {"batch_id": batch.id, "task": "shop.parse", "attempt": 1}
    assert of(told, "child_settled") == [
        {**child, "position": 0, "status": "completed"}, {**child, "position": 1, "status": "failed"},
        {**child, "position": 2, "task": "shop.done", "status": "completed"},
    ]  # fmt: skip
    assert names(told)[0] == "batch_started"
    told.clear()
    assert batch.retry() == 1
    assert of(told, "batch_retried") == [{"batch_id": batch.id, "round": 2, "children": 1}]
    assert [each["round"] for each in of(told, "batch_started")] == [2]
    assert len(of(told, "batch_finished")) == 1
    assert signals.batch_ended is signals.batch_finished, "its former name"


def test_children_that_never_run_and_nested_batches_are_told_of(app: Celery, told: Told) -> None:
    parse = app.tasks["shop.parse"]
    batch = Batch.create("outer", [group(parse.si(1), parse.si(13))], app=app)
    outer, inner = of(told, "batch_started")
    assert (outer["batch_id"], inner["parent_batch"]) == (batch.id, batch.id)
    assert [each["status"] for each in of(told, "child_settled") if each["batch_id"] == batch.id] == ["failed"]
    assert [each["batch_id"] for each in of(told, "batch_finished")] == [inner["batch_id"], batch.id]


def test_a_pause_a_resume_and_a_cancelled_batch_are_told_of(app: Celery, told: Told) -> None:
    tracker = BatchTrack.of(app).tracker
    batch_id = Seeds(tracker.store).batch()
    assert finish.pause(tracker, batch_id, "too hot")
    assert of(told, "batch_paused") == [{"batch_id": batch_id, "reason": "too hot", "by_hand": True}]
    tracker.store.resume(batch_id)  # nothing is sent
    assert finish.pause(tracker, batch_id)
    assert not finish.pause(tracker, batch_id), "and is told of once"
    assert len(of(told, "batch_paused")) == 2
    assert finish.cancel(tracker, batch_id) is not None
    assert of(told, "batch_finished")[0]["reason"] == "user"


def test_a_death_is_told_of_with_its_evidence_and_the_childs_end_only_if_it_is_one(app: Celery, told: Told) -> None:
    tracker = BatchTrack.of(app).tracker
    seeds = Seeds(tracker.store)
    worker, batch_id = seeds.worker(), seeds.batch()
    row = seeds.run(batch_id, 0, worker)
    assert recovery.run_died(tracker, row, death(item="PMC:0"), Verdict.OBSERVED)
    (crash,) = of(told, "child_crashed")
    assert (crash["batch_id"], crash["position"], crash["attempt"]) == (batch_id, 0, 1)
    assert (crash["evidence"].signal, crash["evidence"].item, crash["runs_again"]) == ("SIGSEGV", "PMC:0", False)
    assert [each["status"] for each in of(told, "child_settled") if each["position"] == 0] == ["crashed"]
    told.clear()
    key = ChildKey(batch_id, 1)
    again = events.ChildCrashed(key, "shop.parse", 1, death(), runs_again=True)
    announce.send(app, again)
    assert names(told) == ["child_crashed"]


def test_a_lost_worker_a_quarantine_and_a_verdict_overturned_are_told_of(app: Celery, told: Told) -> None:
    extension = BatchTrack.of(app)
    seeds = Seeds(extension.store)
    host = hosts.identity()
    gone = seeds.worker("w9@here", pid=2**22 + 1, host=host)
    extension.sweep()
    (lost,) = of(told, "worker_lost")
    assert lost == {
        "worker_id": gone, "name": "w9@here", "hostname": host.hostname, "pid": 2**22 + 1, "detected_by": "host"
    }  # fmt: skip
    key = ChildKey(uuid.uuid4(), 4)
    announce.send(app, events.Quarantined(key, "shop.parse", "PMC:4"))
    announce.send(app, events.VerdictOverturned(key, Status.COMPLETED))
    announce.send(app, events.BatchResumed(key.batch_id))
    place = {"batch_id": key.batch_id, "position": 4}
    assert of(told, "item_quarantined") == [{**place, "task": "shop.parse", "item": "PMC:4"}]
    assert of(told, "verdict_overturned") == [{**place, "status": "completed"}]
    assert of(told, "batch_resumed") == [{"batch_id": key.batch_id}]


def test_every_signal_names_its_arguments_in_the_modules_table() -> None:
    text = signals.__doc__ or ""
    for name, signal in ALL.items():
        row = text.partition(f"`{name}`")[2].partition("\n`")[0]
        assert row, f"{name} is not in the table"
        missing = [argument for argument in signal.providing_args if f"``{argument}``" not in row]
        assert not missing, f"{name} does not explain {missing}"
