"""A batch's whole life, with real workers: rounds, milestones, deadlines, nesting, growing; and all under load."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import chain, group

from celery_batchtrack import Batch, chord, errors
from tests.acceptance.scene import Scene, embedded
from tests.helpers import eventually

LIFE = "tests.acceptance.apps.life"


@pytest.fixture
def scene(tmp_path: Path, redis_url: str, postgres_url: str) -> Iterator[Scene]:
    made = Scene(tmp_path, redis_url, postgres_url, module=LIFE)
    yield made
    made.close()


@pytest.fixture
def working(scene: Scene) -> Iterator[Scene]:
    """With one worker of four processes."""
    with scene.worker("--concurrency=4") as worker:
        worker.wait_ready()
        yield scene
    assert scene.violations() == []


def results_in(scene: Scene, place: str) -> list[Any]:
    return [json.loads(line) for line in scene.lines(place)]


# -- rounds ----------------------------------------------------------------------------------------


def test_after_the_cause_is_mended_only_what_crashed_runs_again_and_the_body_gets_all_results_once(
    working: Scene,
) -> None:
    tasks, mended = working.tasks, working.place("mended")
    place, count, bad = working.place("runs"), 1000, {17, 500, 999}
    header = [
        tasks.broken.s(at, mended, place) if at in bad else tasks.value.s(at, place) for at in range(count)
    ]
    result = chord(header, app=working.app)(tasks.kept.s(working.place("body")))
    batch = result.batch
    assert batch.wait(90, callbacks=True) == "failed"
    with pytest.raises(errors.BatchFailed, match=r"SIGSEGV|signal"):
        result.get(timeout=10)
    assert {child.position for child in batch.children("crashed")} == bad
    assert working.lines("body") == []

    Path(mended).touch()
    before = len(working.lines("runs"))
    assert batch.retry() == 3
    assert batch.wait(60, callbacks=True) == "completed"
    assert sorted(int(line) for line in working.lines("runs")[before:]) == sorted(bad)
    assert results_in(working, "body") == [list(range(count))]
    assert result.get(timeout=10) == count
    assert (batch.row.round, batch.progress().completed) == (2, count)
    assert batch.retry() == 0 and batch.row.round == 2


def test_a_batch_that_runs_is_not_retried(working: Scene) -> None:
    batch = working.start(working.tasks.held.s(1, working.place("held")))
    working.wait_met("held")
    with pytest.raises(errors.BatchStateError, match="retry it when it has ended"):
        batch.retry()
    working.go("held")
    assert batch.wait(20) == "completed"


def test_retry_takes_a_part_and_sends_it_elsewhere(working: Scene) -> None:
    tasks, mended = working.tasks, working.place("mended")
    batch = working.run(tasks.failing.s(0, mended), tasks.broken.s(1, mended, working.place("runs")), tasks.value.s(2))
    assert working.statuses(batch) == ["failed", "crashed", "completed"]
    Path(mended).touch()
    with working.worker("--queues=bigmem") as big:
        big.wait_ready()
        assert batch.retry(only="crashed", overrides={"queue": "bigmem"}) == 1
        batch.wait(30)
    assert working.statuses(batch) == ["failed", "completed", "completed"]
    (_, retried, _) = batch.children()
    assert retried.queue == "bigmem"
    assert batch.retry() == 1
    assert batch.wait(30) == "completed" and batch.row.round == 3


def test_a_chain_goes_on_with_the_link_that_failed_and_a_nested_chord_with_its_child(working: Scene) -> None:
    tasks, mended, place = working.tasks, working.place("mended"), working.place("runs")
    header = [
        chain(tasks.value.si(1, place), tasks.failing.si(2, mended), tasks.value.si(3, place)),
        chord([tasks.value.s(4, place), tasks.failing.s(5, mended)], tasks.kept.s(working.place("inner"))),
        group(tasks.value.s(6, place), chain(tasks.value.si(7, place), tasks.value.si(8, place))),
    ]
    result = chord(header, app=working.app)(tasks.kept.s(working.place("outer")))
    assert result.batch.wait(30, callbacks=True) == "failed"
    with pytest.raises(LookupError):
        result.get(timeout=10)
    assert sorted(map(int, working.lines("runs"))) == [1, 4, 6, 7, 8]
    Path(mended).touch()
    assert result.batch.retry() == 2
    assert result.get(timeout=30) == 4
    assert sorted(map(int, working.lines("runs"))) == [1, 3, 4, 6, 7, 8], "what had completed did not run again"
    assert results_in(working, "outer") == [[3, 2, 6, 8]]
    assert results_in(working, "inner") == [[4, 5]]


def test_a_callback_that_crashed_is_seen_as_such_and_can_be_called_again(working: Scene) -> None:
    tasks, mended = working.tasks, working.place("mended")
    called = working.place("called")
    batch = working.run(tasks.value.s(1), on_finish=tasks.broken_callback.s(mended, called))
    (row,) = batch.children(kind="callbacks")
    assert (row.kind, row.status) == ("on_finish", "crashed")
    assert [each.signal for each in batch.incidents()] == ["SIGSEGV"]
    Path(mended).touch()
    assert batch.retry_callbacks() == 1
    batch.wait(20, callbacks=True)
    (row,) = batch.children(kind="callbacks")
    assert row.status == "completed" and len(working.lines("called")) == 2
    assert batch.retry_callbacks() == 0


# -- growing ---------------------------------------------------------------------------------------


def test_a_child_adds_children_while_it_runs_and_the_body_gets_theirs_too(working: Scene) -> None:
    tasks, place = working.tasks, working.place("runs")
    header = [tasks.value.s(0, place), tasks.grow.s(30, 100, place), tasks.grow.s(30, 200, place)]
    result = chord(header, app=working.app)(tasks.kept.s(working.place("body")))
    assert result.get(timeout=60) == 63
    (got,) = results_in(working, "body")
    assert got[:3] == [0, -1, -1] and sorted(got[3:]) == [*range(100, 130), *range(200, 230)]


def test_a_callback_opens_the_next_round_and_callbacks_are_called_once_in_each(working: Scene) -> None:
    tasks, place = working.tasks, working.place("runs")
    batch = working.start(
        tasks.value.s(1, place), on_finish=tasks.next_round.s(20, 100, place),
        on_success=tasks.kept.s(working.place("body")), tolerance=0,
    )  # fmt: skip
    eventually(lambda: batch.row.round == 2 and batch.row.ended, 30, what="the second round")
    batch.wait(20, callbacks=True)
    assert working.lines("runs.rounds") == ["1", "2"]
    assert Counter((row.kind, row.round) for row in batch.children(kind="callbacks")) == Counter(
        [("on_finish", 1), ("on_success", 1), ("on_finish", 2), ("on_success", 2)]
    )
    assert results_in(working, "body")[-1] == [1, *range(100, 120)]


def test_a_sealed_batch_is_extended_from_within_only(working: Scene) -> None:
    batch = working.run(working.tasks.value.s(1))
    with pytest.raises(errors.BatchStateError, match=r"current_batch\(\)\.extend\(\)"):
        batch.extend()
    with pytest.raises(errors.BatchStateError, match="extend"):
        batch.add(working.tasks.value.s(2))


# -- milestones, weights, deadlines ----------------------------------------------------------------


def test_milestones_are_called_once_each(working: Scene) -> None:
    tasks, place = working.tasks, working.place("told")
    batch = working.run(
        *(tasks.value.s(at) for at in range(200)),
        on_progress={25: tasks.told.s(place), 50: [tasks.told.s(place)], 100: tasks.told.s(place)},
    )  # fmt: skip
    rows = [row for row in batch.children(kind="callbacks") if row.kind == "on_progress"]
    assert [(row.ordinal, row.status, row.attempt) for row in sorted(rows, key=lambda row: row.ordinal)] == [
        (0, "completed", 1), (1, "completed", 1), (2, "completed", 1),
    ]  # fmt: skip
    percents = sorted(each["percent"] for each in results_in(working, "told"))
    assert len(percents) == 3 and percents[0] >= 25 and percents[1] >= 50 and percents[2] == 100


def test_progress_is_measured_by_weight_and_rolls_up_from_nested_batches(working: Scene) -> None:
    tasks = working.tasks
    with Batch("outer", app=working.app) as outer:
        outer.add(tasks.weighty.s(60))
        outer.add(tasks.held.s(1, working.place("held")), weight=20)
        with Batch("inner", app=working.app, parent_batch=outer) as inner:
            inner.add(tasks.weighty.s(10), tasks.weighty.s(10))
    inner.wait(30)
    eventually(lambda: outer.progress().completed == 2, 20, what="the nested batch's child")
    eventually(lambda: outer.progress().running == 1, 20, what="the claim of the child that is held")
    progress = outer.progress()
    assert (progress.percent, progress.weight_done, progress.weight_total, progress.nested) == (80, 80, 100, 1)
    assert (progress.total, progress.running) == (3, 1), "counts are the batch's own"
    working.go("held")
    assert outer.wait(20) == "completed"
    assert [each.id for each in outer.nested()] == [inner.id] and inner.row.parent_batch == outer.id


def test_what_is_open_at_the_deadline_is_cancelled_and_the_outcome_says_so(working: Scene) -> None:
    tasks = working.tasks
    batch = working.start(
        tasks.value.s(1), tasks.held.s(2, working.place("held")), chain(tasks.held.s(3, working.place("held")),
        tasks.value.s()), on_finish=tasks.told.s(working.place("told")), deadline="4s",
    )  # fmt: skip
    assert batch.wait(40, callbacks=True) == "cancelled"
    assert batch.row.reason == "deadline"
    assert working.statuses(batch) == ["completed", "cancelled", "cancelled"]
    (told,) = results_in(working, "told")
    assert (told["status"], told["reason"], told["cancelled"]) == ("cancelled", "deadline", 2)


# -- cancel, pause ---------------------------------------------------------------------------------


def test_cancelling_a_batch_cancels_what_is_nested_in_it_and_ends_what_runs(working: Scene) -> None:
    tasks, place = working.tasks, working.place("held")
    inner = chord([tasks.held.s(1, place), tasks.held.s(2, place)], tasks.kept.s(working.place("inner")))
    result = chord([inner, tasks.value.s(3)], app=working.app)(tasks.kept.s(working.place("outer")))
    eventually(lambda: len(working.lines("held")) == 2, 20, what="both nested children")
    assert result.batch.cancel() and not result.batch.cancel(), "the second time there is nothing to cancel"
    (nested,) = result.batch.nested()
    assert (nested.status, nested.row.reason) == ("cancelled", "parent")
    assert working.statuses(nested) == ["cancelled", "cancelled"]
    result.batch.wait(20, callbacks=True)
    assert result.state == "REVOKED"
    again = working.start(*(tasks.value.s(at) for at in range(4)))
    assert again.wait(30) == "completed", "the processes are free again"
    assert working.lines("inner") == working.lines("outer") == []


def test_a_paused_batch_starts_nothing_nested_either_until_it_is_resumed(working: Scene) -> None:
    tasks = working.tasks
    header = [tasks.held.s(1, working.place("held")), *(tasks.value.s(at) for at in range(2, 5))]
    inner = chord(header, tasks.kept.s(""))
    result = chord([chain(inner, tasks.value.si(9, working.place("after")))], app=working.app)(tasks.kept.s(""))
    working.wait_met("held")
    (nested,) = result.batch.nested()
    working.eventually_statuses(nested, "running", "completed", "completed", "completed")
    assert result.batch.pause()
    assert nested.row.paused_at is not None
    working.go("held")
    eventually(lambda: nested.row.ended, 20, what="the nested header, which had started")
    assert result.batch.resume()
    assert result.get(timeout=30) == 1 and working.lines("after") == ["9"]


# -- labels ----------------------------------------------------------------------------------------


def test_batches_are_found_by_name_tags_and_metadata(working: Scene) -> None:
    labels: dict[str, Any] = {"tags": ["nightly", "eu"], "metadata": {"tenant": 7, "plan": "gold"}}
    one = working.run(working.tasks.value.s(1), name="invoices", description="of October", **labels)
    two = working.run(working.tasks.value.s(1), name="invoices", tags=["nightly"])

    def found(**wanted: Any) -> list[Any]:
        return [each.id for each in Batch.find(app=working.app, **wanted)]

    assert found(name="invoices") == found(tags="nightly") == [two.id, one.id]
    assert found(tags=["nightly", "eu"]) == found(metadata={"tenant": 7}) == [one.id]
    assert found(metadata={"tenant": "7"}) == found(tags="night") == found(name="invoice") == []
    assert (one.row.description, one.row.metadata) == ("of October", {"tenant": 7, "plan": "gold"})


# -- owner -----------------------------------------------------------------------------------------


def test_a_batch_goes_with_its_owners_row_also_while_its_children_run(
    tmp_path: Path, redis_url: str, postgres_url: str
) -> None:
    owners = {"upload": "shop_upload.id"}
    scene = Scene(tmp_path, redis_url, postgres_url, module=LIFE)
    with scene.batchtrack.store.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE shop_upload (id bigint PRIMARY KEY)"))
        connection.execute(sa.text("INSERT INTO shop_upload VALUES (4711), (4712)"))
    scene.close()
    scene = Scene(tmp_path, redis_url, postgres_url, module=LIFE, batchtrack_owners=owners)
    tasks, place = scene.tasks, scene.place("held")
    with scene.worker("--concurrency=4") as worker:
        worker.wait_ready()
        inner = chord([tasks.held.s(1, place)], tasks.kept.s(""))
        made = chord(
            [inner, tasks.held.s(2, place), tasks.value.s(3)], app=scene.app, batch={"owner": {"upload": 4711}}
        )
        result = made(tasks.kept.s(scene.place("body")))
        other = scene.start(tasks.held.s(4, place), owner={"upload": 4712})
        eventually(lambda: len(scene.lines("held")) == 3, 20, what="all that waits")
        with scene.batchtrack.store.engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM shop_upload WHERE id = 4711"))
        with pytest.raises(errors.BatchNotFound):
            result.batch.progress()
        scene.go("held")
        assert other.wait(30) == "completed"
        assert scene.run(*(tasks.value.s(at) for at in range(20))).status == "completed"
        assert worker.alive and scene.lines("body") == []
    with scene.batchtrack.store.engine.connect() as connection:
        for table in ("batchtrack_batch", "batchtrack_child", "batchtrack_tally", "batchtrack_incident"):
            column = "id" if table == "batchtrack_batch" else "batch_id"
            left = sa.text(f"SELECT count(*) FROM {table} WHERE {column} = :id")
            assert connection.execute(left, {"id": result.batch.id}).scalar_one() == 0, table
        nested = connection.execute(sa.text("SELECT count(*) FROM batchtrack_batch WHERE parent_batch IS NOT NULL"))
        assert nested.scalar_one() == 0
    assert scene.violations() == []
    scene.close()


# -- under load ------------------------------------------------------------------------------------


def canvases(tasks: Any, chance: random.Random, size: int, depth: int) -> list[Any]:
    """So many header elements of any shape."""
    return [_canvas(tasks, chance, at, depth) for at in range(size)]


def _canvas(tasks: Any, chance: random.Random, at: int, depth: int) -> Any:
    kind = chance.choice(["value"] * 6 + ["chain", "grow", "group", "chord"])
    if kind == "chain":
        return chain(tasks.value.si(at), tasks.value.si(at + 1), tasks.value.si(at))
    if kind == "grow":
        return tasks.grow.si(5, 1000, "")
    if kind == "group" and depth:
        return chain(tasks.value.si(at), group(canvases(tasks, chance, 3, depth - 1)))
    if kind == "chord" and depth:
        return chord(canvases(tasks, chance, 4, depth - 1), tasks.kept.s(""))
    return tasks.value.si(at)


@pytest.mark.parametrize("seed", [1, 2])
def test_cancel_pause_deadline_nesting_and_growing_under_load_leave_nothing_open_or_counted_twice(
    working: Scene, seed: int
) -> None:
    chance = random.Random(seed)
    tasks = working.tasks

    started = []
    for number in range(12):
        options: dict[str, Any] = {"on_finish": tasks.told.s(working.place("told"))}
        if number % 6 == 5:
            options["deadline"] = 1.0
        made = chord(canvases(tasks, chance, 40, 2), app=working.app, batch={"name": f"load {number}", **options})
        started.append(made(tasks.kept.s(working.place("bodies"))).batch)

    def meddle(batches: list[Batch], seed: int) -> None:
        mine = random.Random(seed)
        for batch in batches:
            what = mine.choice(["pause", "pause", "cancel", "nothing"])
            if what == "cancel":
                batch.cancel(terminate=mine.random() < 0.5)
            elif what == "pause":
                batch.pause()
                batch.resume()

    meddlers = [threading.Thread(target=meddle, args=(started[at::3], seed * 10 + at)) for at in range(3)]
    for thread in meddlers:
        thread.start()
    for thread in meddlers:
        thread.join()
    for batch in started:
        batch.wait(120, callbacks=True)
    open_ones = "SELECT count(*) FROM batchtrack_batch WHERE status IN ('open', 'running')"

    def nothing_open() -> bool:
        with working.batchtrack.store.engine.connect() as connection:
            return bool(connection.execute(sa.text(open_ones)).scalar_one() == 0)

    eventually(nothing_open, 30, what="nested batches of cancelled ones to end")
    for batch in started:
        progress = batch.progress()
        settled = progress.completed + progress.failed + progress.crashed + progress.cancelled
        assert (progress.total, progress.pending, progress.running) == (settled, 0, 0)
        called = Counter(row.kind for row in batch.children(kind="callbacks"))
        wanted = {"on_finish": 1} if progress.status == "cancelled" else {"on_finish": 1, "on_success": 1}
        assert called == wanted and all(row.attempt == 1 for row in batch.children(kind="callbacks"))
    assert len(working.lines("told")) == len(started)
    ends = Counter(str(batch.status) for batch in started)
    assert set(ends) == {"completed", "cancelled"}, ends
    assert len(working.lines("bodies")) == ends["completed"]


def test_the_embedded_default_does_the_same(tmp_path: Path) -> None:
    scene = embedded(tmp_path, module=LIFE)
    tasks, mended = scene.tasks, scene.place("mended")
    with scene.worker("--concurrency=2") as worker:
        worker.wait_ready()
        header = [
            chain(tasks.value.s(1), tasks.value.s(scene.place("link"))), tasks.grow.s(3, 10, ""),
            chord([tasks.value.s(2), tasks.failing.s(3, mended)], tasks.kept.s("")),
        ]  # fmt: skip
        result = chord(header, app=scene.app, batch={"on_finish": tasks.told.s(scene.place("told"))})(
            tasks.kept.s(scene.place("body"))
        )
        assert result.batch.wait(60, callbacks=True) == "failed"
        Path(mended).touch()
        assert result.batch.retry() == 1
        assert result.get(timeout=60) == 6
    assert results_in(scene, "body") == [[1, -1, 2, 10, 11, 12]]
    assert [each["round"] for each in results_in(scene, "told")] == [1, 2]
    assert scene.violations() == []
    scene.close()
