"""Create, add, seal, finish, cancel: the life of a batch, on every database."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest

from celery_batchtrack import errors
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.aftermath import HeaderResult
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Cause, EndReason, Status, Verdict
from tests.store.kit import Scene, add_up, counts, some

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")


def test_a_created_batch_has_all_its_children_pending_and_counted(scene: Scene) -> None:
    batch_id = scene.batch(some(20, items=3), seal=False, shards=4)
    progress = scene.store.progress(batch_id)
    assert scene.status(batch_id) == "open"
    assert (progress.total, progress.pending, progress.items_total) == (20, 20, 60)
    assert [row.position for row in scene.rows(batch_id)] == list(range(20))
    assert scene.rows(batch_id)[7].items == ["doc-7-0", "doc-7-1", "doc-7-2"]
    assert add_up(scene, batch_id)


def test_children_added_later_get_the_next_positions(scene: Scene) -> None:
    batch_id = scene.batch(2, seal=False)
    assert scene.store.add(batch_id, some(3)) == 2
    assert scene.store.add(batch_id, some(1)) == 5
    assert [row.position for row in scene.rows(batch_id)] == [0, 1, 2, 3, 4, 5]
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("how", ["sealed", "cancelled", "gone"])
def test_a_batch_that_is_open_no_more_takes_no_children(scene: Scene, how: str) -> None:
    batch_id = scene.batch(1, seal=how == "sealed")
    if how == "cancelled":
        scene.store.cancel(batch_id)
    assert scene.store.add(uuid7() if how == "gone" else batch_id, some(1)) is None
    assert scene.store.progress(batch_id).total == 1


def test_the_seal_starts_the_batch_once(scene: Scene) -> None:
    batch_id = scene.batch(1, seal=False)
    assert scene.store.seal(batch_id)
    row = scene.store.batch(batch_id)
    assert row is not None and row.status == "running"
    assert row.sealed_at is not None and row.started_at == row.sealed_at
    assert not scene.store.seal(batch_id)


def test_sealing_forgets_the_opener_so_that_its_end_cancels_nothing(scene: Scene) -> None:
    client = scene.worker(kind="client")
    batch_id = scene.batch(1, seal=False, opened_by=client)
    scene.store.seal(batch_id)
    scene.store.stop(client)
    assert scene.store.abandoned() == []


def test_an_open_batch_whose_opener_ended_is_abandoned(scene: Scene) -> None:
    client, other = scene.worker(kind="client"), scene.worker(kind="client")
    batch_id = scene.batch(1, seal=False, opened_by=client)
    scene.batch(1, seal=False, opened_by=other)
    assert scene.store.abandoned() == []
    scene.store.stop(client)
    assert scene.store.abandoned() == [batch_id]


def test_a_batch_without_children_completes_with_its_callbacks(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=ALL)
    finished = scene.store.finish(batch_id)
    assert finished is not None and (finished.status, finished.callbacks) == ("completed", 2)
    assert scene.called(batch_id) == ["on_finish", "on_success"]
    assert scene.store.progress(batch_id).percent == 100
    assert add_up(scene, batch_id)


def test_an_unsealed_batch_does_not_finish_however_many_children_are_settled(scene: Scene) -> None:
    batch_id = scene.batch(1, seal=False, start_now=True)
    scene.complete(scene.run(batch_id))
    assert scene.store.finish(batch_id) is None
    scene.store.seal(batch_id)
    assert scene.store.finish(batch_id) is not None


def test_a_batch_with_an_open_child_does_not_finish(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.complete(scene.run(batch_id, 0))
    assert scene.store.finish(batch_id) is None
    claimed = scene.run(batch_id, 1)
    assert scene.store.finish(batch_id) is None
    scene.complete(claimed)
    assert scene.store.finish(batch_id) is not None
    assert scene.store.finish(batch_id) is None, "it ended a second time"


@pytest.mark.parametrize(
    ("tolerance", "failing", "ends", "calls"),
    [
        (0, 0, "completed", ["on_finish", "on_success"]),
        (0, 1, "failed", ["on_failure", "on_finish", "on_first_failure"]),
        (2, 2, "partial", ["on_finish", "on_first_failure", "on_success"]),
        (2, 3, "failed", ["on_failure", "on_finish", "on_first_failure"]),
        ("50%", 2, "partial", ["on_finish", "on_first_failure", "on_success"]),
        ("50%", 3, "failed", ["on_failure", "on_finish", "on_first_failure"]),
        ("100%", 5, "partial", ["on_finish", "on_first_failure", "on_success"]),
    ],
)
def test_the_outcome_follows_the_tolerance_and_calls_what_belongs_to_it(
    scene: Scene, tolerance: int | str, failing: int, ends: str, calls: list[str]
) -> None:
    batch_id = scene.batch(5, tolerance=tolerance, calls=ALL)
    for position in range(5):
        claimed = scene.run(batch_id, position)
        if position < failing:
            scene.crash(claimed) if position else scene.fail(claimed)
        else:
            scene.complete(claimed)
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == ends
    assert scene.called(batch_id) == calls
    assert add_up(scene, batch_id)


def test_a_cancelled_child_counts_against_the_tolerance_without_cancelling_the_batch(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=ALL)
    claimed = scene.run(batch_id, 0)
    scene.store.settle(claimed.key, claimed.token, Ending(Status.CANCELLED, cause=Cause.IGNORED))
    scene.complete(scene.run(batch_id, 1))
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "failed"
    assert "on_first_failure" not in scene.called(batch_id), "nothing failed or crashed"


@pytest.mark.parametrize("evidence", ["with evidence", "without"])
def test_the_first_failure_is_called_at_once_and_only_once(scene: Scene, evidence: str) -> None:
    batch_id = scene.batch(3, tolerance=3, calls=ALL)
    more = {} if evidence == "with evidence" else {"evidence": None}
    first = scene.fail(scene.run(batch_id, 0), **more)
    assert first.callbacks and scene.called(batch_id) == ["on_first_failure"]
    assert not scene.fail(scene.run(batch_id, 1), **more).callbacks
    assert not scene.crash(scene.run(batch_id, 2)).callbacks
    scene.store.finish(batch_id)
    assert scene.called(batch_id) == ["on_finish", "on_first_failure", "on_success"]


def test_a_failure_known_by_its_lease_alone_is_announced_at_the_end_only(scene: Scene) -> None:
    batch_id = scene.batch(2, tolerance=1, calls=ALL)
    assert not scene.crash(scene.run(batch_id, 0), Verdict.LEASE).callbacks
    assert scene.called(batch_id) == []
    scene.complete(scene.run(batch_id, 1))
    scene.store.finish(batch_id)
    assert scene.called(batch_id) == ["on_finish", "on_first_failure", "on_success"]


def test_a_lease_verdict_that_was_overturned_is_never_announced(scene: Scene) -> None:
    batch_id = scene.batch(1, calls=ALL)
    claimed = scene.run(batch_id)
    scene.crash(claimed, Verdict.LEASE)
    assert scene.complete(claimed).overturned
    scene.store.finish(batch_id)
    assert scene.called(batch_id) == ["on_finish", "on_success"]


def test_several_callbacks_of_a_kind_are_told_apart_by_their_ordinal(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=("on_success", "on_success", "on_finish"))
    scene.store.finish(batch_id)
    rows = scene.store.callback_rows(batch_id)
    assert [(row.kind, row.ordinal) for row in rows] == [("on_success", 0), ("on_success", 1), ("on_finish", 0)]
    assert [row.position for row in rows] == [0, 1, 2]


def test_callback_rows_follow_the_children_and_count_nowhere(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=("on_success",))
    for position in (0, 1):
        scene.complete(scene.run(batch_id, position))
    scene.store.finish(batch_id)
    (row,) = scene.store.callback_rows(batch_id)
    assert row.position == 2
    before = scene.store.progress(batch_id)
    assert scene.complete(scene.run(batch_id, 2)).written, "a callback runs after its batch's end"
    after = scene.store.progress(batch_id)
    assert (after.total, after.completed, after.items_total) == (2, 2, 2) == (
        before.total, before.completed, before.items_total,
    )  # fmt: skip
    assert add_up(scene, batch_id)


def test_a_paused_batch_finishes_all_the_same(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.set_batch(batch_id, paused_at=later(0.0))
    scene.complete(claimed)
    assert scene.store.finish(batch_id) is not None


def test_cancelling_ends_the_batch_and_every_open_child_with_the_reason(scene: Scene) -> None:
    batch_id = scene.batch(4, calls=ALL)
    scene.complete(scene.run(batch_id, 0))
    scene.fail(scene.run(batch_id, 1))
    running = scene.run(batch_id, 2)
    finished = scene.store.cancel(batch_id, EndReason.DEADLINE)
    assert finished is not None and (finished.status, finished.reason) == ("cancelled", "deadline")
    assert scene.statuses(batch_id) == ["completed", "failed", "cancelled", "cancelled"]
    assert [row.cause for row in scene.rows(batch_id)[2:]] == ["cancelled", "cancelled"]
    assert [(run.key.position, run.token, run.worker_id) for run in finished.cancelled_runs] == [
        (2, running.token, scene.worker_id)
    ]
    assert scene.called(batch_id) == ["on_finish", "on_first_failure"], "after a cancel: on_finish only"
    assert add_up(scene, batch_id)


def test_an_open_batch_can_be_cancelled(scene: Scene) -> None:
    batch_id = scene.batch(2, seal=False)
    finished = scene.store.cancel(batch_id, EndReason.ABANDONED)
    assert finished is not None and finished.reason == "abandoned"
    assert not scene.store.seal(batch_id)
    assert add_up(scene, batch_id)


def test_an_ended_batch_cannot_be_cancelled_nor_cancelled_twice(scene: Scene) -> None:
    batch_id = scene.batch(0)
    scene.store.finish(batch_id)
    assert scene.store.cancel(batch_id) is None
    assert scene.status(batch_id) == "completed"
    other = scene.batch(1)
    assert scene.store.cancel(other) is not None
    assert scene.store.cancel(other) is None
    assert scene.store.finish(other) is None


def test_cancelling_leaves_the_callbacks_that_already_wait(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=ALL)
    scene.fail(scene.run(batch_id, 0))
    scene.store.cancel(batch_id)
    assert {row.kind: row.status for row in scene.store.callback_rows(batch_id)} == {
        "on_first_failure": "pending", "on_finish": "pending",
    }  # fmt: skip


def test_a_batch_that_lost_its_finish_check_is_found(scene: Scene) -> None:
    forgotten, busy, opened = scene.batch(1), scene.batch(1), scene.batch(0, seal=False)
    scene.complete(scene.run(forgotten))
    assert scene.store.unfinished() == [forgotten]
    assert busy != opened


def test_times_of_a_batch_are_the_databases(scene: Scene) -> None:
    before = scene.store.current_time()
    batch_id = scene.batch(0)
    scene.store.finish(batch_id)
    row = scene.store.batch(batch_id)
    assert row is not None and row.started_at and row.sealed_at and row.finished_at
    assert before <= row.created_at <= row.started_at <= row.finished_at <= scene.store.current_time()


def test_a_childs_time_to_start_is_kept_whether_relative_or_absolute(scene: Scene) -> None:
    moment = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    children = [
        *some(2), *some(1, countdown=60.0, expires_in=120.0), *some(1, eta=moment, expires_at=moment + timedelta(1)),
    ]  # fmt: skip
    rows = scene.rows(scene.batch(children))
    now = scene.store.current_time()
    assert rows[0].not_before is None and rows[0].expires_at is None
    assert rows[2].not_before is not None and 50 < (rows[2].not_before - now).total_seconds() <= 60
    assert rows[2].expires_at is not None and 110 < (rows[2].expires_at - now).total_seconds() <= 120
    assert (rows[3].not_before, rows[3].expires_at) == (moment, moment + timedelta(1))


# -- reading ---------------------------------------------------------------------------------------


def test_progress_adds_up_after_every_single_step(scene: Scene) -> None:
    batch_id = scene.batch(some(6, items=2), shards=4, tolerance=6)
    assert counts(scene, batch_id) == {"pending": 6}
    runs = [scene.run(batch_id, position) for position in range(5)]
    assert counts(scene, batch_id) == {"pending": 1, "running": 5}
    scene.complete(runs[0])
    assert counts(scene, batch_id) == {"pending": 1, "running": 4, "completed": 1}
    scene.fail(runs[1])
    assert counts(scene, batch_id) == {"pending": 1, "running": 3, "completed": 1, "failed": 1}
    scene.crash(runs[2], Verdict.LEASE)
    assert counts(scene, batch_id) == {"pending": 1, "running": 2, "completed": 1, "failed": 1, "crashed": 1}
    scene.crash(runs[3], again=0.0)
    assert counts(scene, batch_id) == {"pending": 2, "running": 1, "completed": 1, "failed": 1, "crashed": 1}
    scene.complete(runs[2])
    assert counts(scene, batch_id) == {"pending": 2, "running": 1, "completed": 2, "failed": 1}
    scene.store.cancel(batch_id)
    assert counts(scene, batch_id) == {"completed": 2, "failed": 1, "cancelled": 3}
    progress = scene.store.progress(batch_id)
    assert (progress.items_completed, progress.items_failed, progress.items_cancelled) == (4, 2, 6)
    assert add_up(scene, batch_id)


def test_percent_is_rounded_down_and_never_100_before_the_end(scene: Scene) -> None:
    batch_id = scene.batch(some(3))
    assert scene.store.progress(batch_id).percent == 0
    scene.complete(scene.run(batch_id, 0))
    assert scene.store.progress(batch_id).percent == 33
    for position in (1, 2):
        scene.complete(scene.run(batch_id, position))
    assert scene.store.progress(batch_id).percent == 99, "settled, but its end is not written yet"
    scene.store.finish(batch_id)
    assert scene.store.progress(batch_id).percent == 100


def test_percent_goes_by_items_not_by_children(scene: Scene) -> None:
    batch_id = scene.batch([*some(1, items=9), *some(1, items=1)])
    scene.complete(scene.run(batch_id, 0))
    assert scene.store.progress(batch_id).percent == 90


def test_rate_and_eta_are_unknown_until_something_is_settled(scene: Scene) -> None:
    batch_id = scene.batch(4)
    progress = scene.store.progress(batch_id)
    assert progress.rate is None and progress.eta is None
    scene.set_batch(batch_id, started_at=later(-10.0))
    scene.complete(scene.run(batch_id, 0))
    progress = scene.store.progress(batch_id)
    assert progress.rate == pytest.approx(0.1, rel=0.2) and progress.eta == pytest.approx(30, rel=0.2)


def test_progress_of_several_batches_comes_in_the_order_asked_for(scene: Scene) -> None:
    first, second, gone = scene.batch(1), scene.batch(2), uuid7()
    found = scene.store.progress_of([second, gone, first])
    assert [each.batch_id for each in found] == [second, first]
    assert [each.total for each in found] == [2, 1]


def test_results_come_in_header_order_whatever_the_order_of_their_ends(scene: Scene) -> None:
    batch_id = scene.batch(4)
    for position in (3, 0, 2):
        scene.complete(scene.run(batch_id, position), result=f'"result {position}"')
    assert list(scene.store.results(batch_id)) == [
        HeaderResult(0, ('"result 0"',)), HeaderResult(2, ('"result 2"',)), HeaderResult(3, ('"result 3"',)),
    ]  # fmt: skip


def test_children_and_results_are_whole_across_pages(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_batchtrack.store.queries._PAGE", 2)
    batch_id = scene.batch(5)
    for position in range(5):
        scene.complete(scene.run(batch_id, position), result=str(position))
    assert list(scene.store.results(batch_id)) == [HeaderResult(each, (str(each),)) for each in range(5)]
    assert [row.position for row in scene.store.children(batch_id)] == [0, 1, 2, 3, 4]
    assert [row.position for row in scene.store.children(batch_id, statuses=("pending",))] == []


def test_a_batch_is_found_by_a_prefix_of_its_id(scene: Scene) -> None:
    batch_id = scene.batch(0)
    text = str(batch_id)
    for prefix in (text, text.upper(), text.replace("-", ""), text[:9], text[:20], text[:35], text[:1]):
        assert scene.store.resolve(prefix) == batch_id, prefix


def test_a_prefix_that_fits_several_or_none_is_an_error(scene: Scene) -> None:
    same = "01900000-0000-7000-8000-00000000000"
    for last in "12":
        _with_id(scene, uuid.UUID(same + last))
    assert scene.store.resolve(same + "2") == uuid.UUID(same + "2")
    with pytest.raises(errors.BatchNotFound, match="several"):
        scene.store.resolve(same)
    for wrong in ("ffff", "", "%", "0_9", "nonsense", same + "9", same + "22"):
        with pytest.raises(errors.BatchNotFound):
            scene.store.resolve(wrong)


def _with_id(scene: Scene, batch_id: uuid.UUID) -> None:
    from celery_batchtrack.vocabulary.records import NewBatch

    scene.store.create(NewBatch(batch_id, "named", "{}", {}))


def test_batches_are_listed_newest_first_by_status_and_name(scene: Scene) -> None:
    older, newer = scene.batch(0), scene.batch(1)
    scene.store.finish(older)
    assert scene.store.list_batches() == [newer, older]
    assert scene.store.list_batches(statuses=["running"]) == [newer]
    assert scene.store.list_batches(name="another") == []
    assert scene.store.list_batches(limit=1) == [newer]


# -- retention -------------------------------------------------------------------------------------


def test_pruning_takes_what_ended_long_ago_with_everything_that_belongs_to_it(scene: Scene) -> None:
    old, fresh, running = scene.batch(1, tolerance=1), scene.batch(0), scene.batch(1)
    scene.crash(scene.run(old))
    scene.store.finish(old)
    scene.store.finish(fresh)
    scene.set_batch(old, finished_at=later(-100.0))
    assert scene.store.prune(completed=3600, other=3600) == 0
    assert scene.store.prune(completed=3600, other=99) == 1
    assert scene.store.batch(old) is None and scene.store.child(ChildKey(old, 0)) is None
    assert scene.store.incidents() == []
    assert scene.store.batch(fresh) is not None and scene.store.batch(running) is not None


def test_completed_batches_and_others_have_retentions_of_their_own(scene: Scene) -> None:
    good, bad = scene.batch(0), scene.batch(1)
    scene.store.finish(good)
    scene.store.cancel(bad)
    for batch_id in (good, bad):
        scene.set_batch(batch_id, finished_at=later(-100.0))
    assert scene.store.prune(completed=50, other=500) == 1
    assert scene.store.batch(good) is None and scene.store.batch(bad) is not None


def test_pruning_keeps_a_batch_until_its_callbacks_are_over(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=("on_finish",))
    scene.store.finish(batch_id)
    scene.set_batch(batch_id, finished_at=later(-100.0))
    assert scene.store.prune(completed=1, other=1) == 0
    claimed = scene.run(batch_id, 0)
    assert scene.store.prune(completed=1, other=1) == 0
    scene.complete(claimed)
    assert scene.store.prune(completed=1, other=1) == 1


def test_pruning_workers_keeps_those_that_live_or_are_named_by_what_runs(scene: Scene) -> None:
    idle, busy = scene.worker(), scene.worker()
    scene.run(scene.batch(1), worker=busy)
    for worker_id in (idle, busy):
        scene.set_worker(worker_id, stopped_at=later(-100.0))
    assert scene.store.prune_workers(50) == 1
    assert {row.id for row in scene.store.workers(all=True)} == {scene.worker_id, busy}
