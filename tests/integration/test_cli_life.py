"""Commands about a batch's life: another round, labels, nesting, and the end of everything."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from celery import Celery

from celery_batchtrack import Batch, BatchTrack
from celery_batchtrack.vocabulary.ids import ChildKey
from tests.integration.cli_kit import HOSTILE, Run, Seeds, invoke, make_app


@pytest.fixture
def eager(database_url: str) -> Iterator[Celery]:
    """Runs everything in this process."""
    app = make_app(database_url, task_always_eager=True)
    BatchTrack.of(app).migrate()
    mended: list[int] = []

    @app.task(name="shop.index", shared=False)
    def index(number: int) -> int:
        if number == 13 and not mended:
            raise ValueError("13 is not indexed")
        return number

    @app.task(name="shop.merge", shared=False)
    def merge(results: list[int]) -> int:
        if mended == [1]:
            mended.append(2)
            raise LookupError("nowhere to merge to")
        return sum(results)

    app.mended = mended
    yield app
    BatchTrack.of(app).reset()


def test_retry_runs_what_did_not_complete_and_then_the_callbacks(eager: Celery) -> None:
    index, merge = eager.tasks["shop.index"], eager.tasks["shop.merge"]
    batch = Batch.create("invoices", [index.s(12), index.s(13)], app=eager, on_success=merge.s())
    assert batch.status == "failed"
    said = invoke(eager, "retry", batch.id, "--only", "crashed").stdout
    assert "no children to run again; it stays failed" in said
    eager.mended.append(1)
    assert f"invoices {batch.id}: 1 children run again, in round 2" in invoke(eager, "retry", batch.id).stdout
    assert (batch.status, batch.row.round) == ("completed", 2)
    [callback] = batch.children(kind="callbacks")
    assert callback.status == "failed"
    assert "1 callbacks run again, in round 2" in invoke(eager, "retry", str(batch.id)[:13], "--callbacks").stdout
    [callback] = batch.children(kind="callbacks")
    assert (callback.status, callback.result) == ("completed", 25)


def test_retry_as_json_and_into_another_queue(seeds: Seeds, data: Run) -> None:
    batch_id = seeds.ended()
    assert data("retry", batch_id, "--queue", "bigmem") == [
        {"id": str(batch_id), "name": "upload", "status": "running", "round": 2, "retried": 1}
    ]
    row = seeds.child(ChildKey(batch_id, 1))
    assert (row.status, row.queue, row.rerouted, row.dispatches) == ("pending", "bigmem", True, 1)


def test_retry_refuses_what_runs_and_what_makes_no_sense(seeds: Seeds, app: Celery) -> None:
    batch_id = seeds.batch()
    assert "is running: retry it when it has ended" in invoke(app, "retry", batch_id, code=1).stderr
    invoke(app, "retry", batch_id, "--only", "completed", code=2)
    invoke(app, "retry", batch_id, "--callbacks", "--queue", "x", code=2)
    invoke(app, "retry", uuid.uuid4(), code=66)


def test_drain_waits_for_batches_and_their_callbacks(seeds: Seeds, app: Celery, data: Run) -> None:
    assert "nothing is open" in invoke(app, "drain").stdout
    ended, worker = seeds.batch(children=1), seeds.worker()
    seeds.complete(seeds.run(ended, 0, worker))
    assert seeds.store.finish(ended) is not None
    running = seeds.batch("running")
    found = data("drain", "--timeout", "0s", code=1)
    assert [each["id"] for each in found] == [str(ended), str(running)], "the first one's callback is open"
    done = invoke(app, "drain", "--timeout", "0s", code=1)
    assert "batchtrack_enabled = False" in done.stderr and "running" in done.stdout
    seeds.complete(seeds.run(ended, 1, worker))
    seeds.store.cancel(running)
    seeds.complete(seeds.run(running, 2, worker))
    assert data("drain") == []


def test_list_finds_by_tag_metadata_and_parent(seeds: Seeds, text: Run, data: Run, app: Celery) -> None:
    index = app.task(name="shop.late", shared=False)(lambda_free)
    with Batch("outer", app=app, tags=["nightly", HOSTILE.replace("\x00", "")], metadata={"tenant": 7}) as outer:
        outer.add(index.s())
        with Batch("inner", app=app, parent_batch=outer) as inner:
            inner.add(index.s())

    def ids(*args: object) -> list[str]:
        return [each["id"] for each in data("list", *args)]

    assert ids("--tag", "nightly") == ids("--meta", "tenant=7") == [str(outer.id)]
    assert ids("--meta", 'tenant="7"') == ids("--tag", "night") == []
    assert ids("--parent", str(outer.id)) == [str(inner.id)]
    shown = text("show", outer.id)
    assert "tenant=7" in shown and "\x1b" not in shown and "1 batches in it" in shown
    assert f"in {outer.id} #1" in text("show", inner.id)
    [told] = [each for each in data("list") if each["id"] == str(outer.id)]
    assert (told["metadata"], told["nested"], told["tags"][0]) == ({"tenant": 7}, 1, "nightly")
    invoke(app, "list", "--meta", "tenant", code=2)


def lambda_free() -> None:
    """A task that nobody runs here."""
