"""Batches and chords as their users hold them: eager runs on a real store."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task

from celery_batchtrack import Batch, BatchTrack, chord, errors
from celery_batchtrack.behaviour.run import Runner
from celery_batchtrack.vocabulary.records import Ending, Settled
from celery_batchtrack.vocabulary.states import BatchStatus, Status


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("eager", set_as_current=False)
    app.conf.task_always_eager = True
    app.conf.batchtrack_database_url = f"sqlite:///{tmp_path / 'eager.db'}"
    BatchTrack(app)

    @app.task(name="same", shared=False)
    def same(value: Any) -> Any:
        return value

    @app.task(name="fail", shared=False)
    def fail(text: str) -> None:
        raise ValueError(text)

    @app.task(name="total", shared=False)
    def total(values: list[int]) -> int:
        return sum(values)

    yield app
    BatchTrack.of(app).reset()


def violations(app: Celery) -> list[Any]:
    return [each for each in BatchTrack.of(app).store.verify(60.0) if each.violations]


def test_blocks_that_overlap_in_threads_do_not_end_each_others_client(app: Celery) -> None:
    same = app.tasks["same"]
    inside, leave = threading.Event(), threading.Event()
    ended: list[BatchStatus] = []

    def second() -> None:
        with Batch("second", app=app) as batch:
            batch.add(same.s(2))
            inside.set()
            assert leave.wait(20)
        ended.append(batch.status)

    with Batch("first", app=app) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert inside.wait(20)
        first.add(same.s(1))
    BatchTrack.of(app).sweep()  # would find the second batch abandoned, had the first ended the client
    leave.set()
    thread.join(20)
    assert (first.status, ended) == (BatchStatus.COMPLETED, [BatchStatus.COMPLETED])


def test_a_block_of_children_that_could_not_be_written_cancels_the_batch(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.conf.batchtrack_insert_chunk = 2
    same, store = app.tasks["same"], BatchTrack.of(app).store
    written = store.add

    def away(*args: Any) -> Any:
        monkeypatch.setattr(store, "add", written)
        raise errors.DatabaseUnavailable("gone for a moment")

    batch = Batch("holed", app=app)
    with pytest.raises(errors.BatchStateError, match="could not be written"), batch:
        monkeypatch.setattr(store, "add", away)
        with pytest.raises(errors.DatabaseUnavailable):
            batch.add(same.s(1), same.s(2))
        batch.add(same.s(3))  # a user who goes on must not lose two children without a word
    assert batch.status == BatchStatus.CANCELLED
    assert [child.status for child in batch.children()] == []


def test_an_error_in_the_middle_of_a_settle_does_not_lose_the_end(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A soft time limit may strike at any instruction; the settle is repeatable."""
    store = BatchTrack.of(app).store
    real, struck = store.settle, []

    def struck_once(key: Any, token: Any, ending: Ending) -> Settled:
        settled = real(key, token, ending)
        if not struck:
            struck.append(key)
            raise RuntimeError("in the middle of it, after the commit")
        return settled

    monkeypatch.setattr(store, "settle", struck_once)
    result = chord([app.tasks["same"].s(1), app.tasks["same"].s(2)], app=app)(app.tasks["total"].s())
    assert (result.get(timeout=5), len(struck)) == (3, 1)
    assert violations(app) == []


def test_errbacks_are_called_as_celery_calls_them(app: Celery) -> None:
    calls: dict[str, tuple[Any, ...]] = {}

    @app.task(name="immutable", shared=False)
    def immutable(*args: Any) -> None:
        calls["immutable"] = args

    @app.task(name="bound", shared=False, bind=True)
    def bound(self: Task, body_id: str, extra: str = "none") -> None:
        calls["bound"] = (body_id, extra)

    class ByClass(Task):
        name = "by_class"

        def run(self, body_id: str) -> None:
            calls["by_class"] = (body_id,)

    app.register_task(ByClass())
    body = app.tasks["total"].s()
    for errback in (immutable.si("order", "failed"), bound.s(), app.tasks["by_class"].s()):
        body.link_error(errback)
    result = chord([app.tasks["fail"].s("no")], app=app)(body)
    assert result.batch.status == BatchStatus.FAILED
    assert calls == {
        "immutable": ("order", "failed"), "bound": (result.id, "none"), "by_class": (result.id,),
    }  # fmt: skip


def test_links_and_options_may_be_set_on_the_chord(app: Celery) -> None:
    seen: list[Any] = []

    @app.task(name="see", shared=False)
    def see(value: Any) -> None:
        seen.append(value)

    linked = chord([app.tasks["same"].s(4)], app.tasks["total"].s(), app=app).set(queue="heavy")
    linked.link(see.s())
    result = linked()
    assert (result.get(), seen) == (4, [4])
    assert [child.queue for child in result.batch.children()] == ["heavy"]
    failing = chord([app.tasks["fail"].s("no")], app.tasks["total"].s(), app=app).on_error(see.si("failed"))()
    assert (failing.batch.status, seen[1:]) == (BatchStatus.FAILED, ["failed"])


def test_a_body_that_retries_with_other_arguments_gets_its_results_once(app: Celery) -> None:
    pages: list[tuple[list[int], int]] = []

    @app.task(name="body", shared=False, bind=True, max_retries=3)
    def body(self: Task, results: list[int], page: int = 0) -> int:
        pages.append((results, page))
        if page < 2:
            raise self.retry(args=(results,), kwargs={"page": page + 1}, countdown=0)
        return page

    result = chord([app.tasks["same"].s(7)], app=app)(body.s())
    assert (result.get(timeout=5), pages) == (2, [([7], 0), ([7], 1), ([7], 2)])
    assert violations(app) == []


def test_times_of_a_callback_are_kept(app: Celery) -> None:
    later = app.tasks["total"].s().set(countdown=3600, expires=7200)
    batch = Batch.create("later", [app.tasks["same"].s(1)], app=app, on_success=later)
    [callback] = batch.children(kind="callbacks")
    assert 3500 < (callback.not_before - callback.created_at).total_seconds() < 3700
    assert 7100 < (callback.expires_at - callback.created_at).total_seconds() < 7300


def test_a_chords_result_is_read_without_a_backend(app: Celery) -> None:
    done = chord([app.tasks["same"].s(n) for n in (1, 2)], app=app)(app.tasks["total"].s())
    assert (done.state, done.result, done.ready(), done.successful()) == ("SUCCESS", 3, True, True)
    failed = chord([app.tasks["fail"].s("bad luck")], app=app)(app.tasks["total"].s())
    assert failed.state == "FAILURE" and isinstance(failed.result, errors.BatchFailed)
    with pytest.raises(errors.BatchFailed, match="bad luck"):
        failed.get()
    assert failed.get(propagate=False).args == failed.result.args


def test_the_same_chord_may_be_started_twice_though_its_header_was_a_generator(app: Celery) -> None:
    started = chord((app.tasks["same"].s(n) for n in range(3)), app.tasks["total"].s(), app=app)
    assert [started().get(), started().get()] == [3, 3]


def test_an_interrupt_ends_an_eager_batch_and_its_caller_hears_of_it(app: Celery) -> None:
    @app.task(name="interrupted", shared=False)
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Batch.create("interrupted", [interrupted.s(), app.tasks["same"].s(1)], app=app)


def test_a_task_defined_after_the_first_batch_is_tracked_too(app: Celery) -> None:
    Batch.create("first", [app.tasks["same"].s(1)], app=app)

    @app.task(name="late", shared=False)
    def late(value: int) -> int:
        return value

    assert list(Batch.create("second", [late.s(5)], app=app).results()) == [5]


def test_a_cancel_without_termination_is_remembered(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    @app.task(name="cancelling", shared=False)
    def cancelling() -> None:
        batch = Batch.get(kept[0], app=app)
        assert batch.cancel(terminate=False)
        [child] = batch.children()
        runs = [(child.row.key, child.row.run_token)]
        assert BatchTrack.of(app).store.cancelled_runs(runs) == {}, "it may run on, in vain"

    batch = Batch("kept", app=app)
    kept.append(batch.id)
    with batch:
        batch.add(cancelling.s())
    assert batch.status == BatchStatus.CANCELLED
    assert [incident.outcome for incident in batch.incidents()] == ["late_write"]


def test_results_that_nobody_reads_need_not_be_json(app: Celery) -> None:
    batch = Batch.create("none", [app.tasks["same"].s(1)], app=app, results="none")
    assert (batch.status, list(batch.results())) == (BatchStatus.COMPLETED, [None])

    @app.task(name="opaque", shared=False)
    def opaque() -> object:
        return object()

    assert Batch.create("opaque", [opaque.s()], app=app, results="none").status == BatchStatus.COMPLETED
    assert Batch.create("kept", [opaque.s()], app=app).status == BatchStatus.FAILED


def test_records_can_be_copied(app: Celery) -> None:
    [child] = Batch.create("copied", [app.tasks["same"].s(1)], app=app).children()
    assert copy.copy(child).status == child.status == Status.COMPLETED


def test_options_of_the_wrong_kind_are_named(app: Celery) -> None:
    with pytest.raises(errors.InvalidOption, match="batch= takes a mapping"):
        chord([], batch="x", app=app)
    with pytest.raises(errors.InvalidOption, match="at most 255 characters"):
        Batch.create("long", [app.tasks["same"].s(1).set(task_id="x" * 300)], app=app)


def test_every_process_runs_under_one_identity(app: Celery) -> None:
    runner: Runner = BatchTrack.of(app).runner
    assert BatchTrack.of(app).runner.worker.id == runner.worker.id
