"""Which rows are published, once or again, on every database."""

from __future__ import annotations

import pytest

from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Release
from tests.store.kit import Scene, dispatch_all, some


def test_a_row_is_taken_once_and_stamped(scene: Scene) -> None:
    batch_id = scene.batch(3)
    taken = scene.store.take_undispatched(batch_id, 2)
    assert [each.child.position for each in taken] == [0, 1]
    assert all(each.child.dispatched_at is not None and each.child.dispatches == 1 for each in taken)
    assert all(each.batch.id == batch_id for each in taken)
    assert dispatch_all(scene, batch_id) == [2]
    assert dispatch_all(scene, batch_id) == []


def test_rows_of_any_batch_are_taken_where_none_is_named(scene: Scene) -> None:
    first, second = scene.batch(1), scene.batch(1)
    assert [each.child.batch_id for each in scene.store.take_undispatched(None, 10)] == [first, second]


def test_nothing_is_dispatched_before_the_seal_unless_it_starts_at_once(scene: Scene) -> None:
    waiting, eager = scene.batch(1, seal=False), scene.batch(1, seal=False, start_now=True)
    assert dispatch_all(scene, waiting) == []
    assert dispatch_all(scene, eager) == [0]
    scene.store.seal(waiting)
    assert dispatch_all(scene, waiting) == [0]


@pytest.mark.parametrize("state", ["paused", "cancelled"])
def test_nothing_is_dispatched_of_a_batch_that_is_paused_or_over(scene: Scene, state: str) -> None:
    batch_id = scene.batch(1)
    if state == "paused":
        scene.set_batch(batch_id, paused_at=later(0.0))
    else:
        scene.store.cancel(batch_id)
    assert dispatch_all(scene) == []


def test_callbacks_are_dispatched_after_the_end_and_only_of_the_present_round(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=("on_success", "on_finish"))
    scene.store.finish(batch_id)
    scene.set_batch(batch_id, round=2)
    assert dispatch_all(scene) == []
    scene.set_batch(batch_id, round=1)
    assert dispatch_all(scene) == [0, 1]


def test_a_row_that_waits_on_a_nested_batch_is_never_dispatched(scene: Scene) -> None:
    batch_id = scene.batch(1)
    scene.set_child(ChildKey(batch_id, 0), waits_on_batch=batch_id)
    assert dispatch_all(scene) == []


def test_running_and_settled_rows_are_not_dispatched(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.complete(scene.run(batch_id, 0))
    scene.run(batch_id, 1)
    assert dispatch_all(scene) == []


def test_what_could_not_be_published_is_given_back(scene: Scene) -> None:
    batch_id = scene.batch(2)
    taken = scene.store.take_undispatched(batch_id, 10)
    scene.store.give_back([each.child for each in taken])
    assert dispatch_all(scene) == [0, 1]


def test_giving_back_does_not_touch_a_row_that_was_claimed_meanwhile(scene: Scene) -> None:
    batch_id = scene.batch(2)
    taken = scene.store.take_undispatched(batch_id, 10)
    scene.run(batch_id, 0)
    claimed = scene.run(batch_id, 1)
    scene.store.release(claimed.key, claimed.token, Release(countdown=60.0, sent=True))
    scene.store.give_back([each.child for each in taken])
    assert dispatch_all(scene) == [], "the first runs; the second's next message is on its way"


def test_old_publishes_are_overdue_oldest_first(scene: Scene) -> None:
    batch_id = scene.batch(some(3, queue="slow"))
    scene.store.take_undispatched(batch_id, 10)
    scene.set_child(ChildKey(batch_id, 1), dispatched_at=later(-40.0))
    scene.set_child(ChildKey(batch_id, 2), dispatched_at=later(-90.0))
    assert scene.store.overdue_queues(30) == [("slow", "")]
    found = scene.store.overdue(("slow", ""), 30)
    assert [(dispatches, key.position) for _, dispatches, key in found] == [(1, 2), (1, 1)]
    assert [waited for waited, _, _ in found] == pytest.approx([90, 40], abs=5)


def test_a_busy_queue_does_not_hide_the_overdue_rows_of_another(scene: Scene) -> None:
    busy, quiet = scene.batch(some(3, queue="busy")), scene.batch(some(1, queue="quiet"))
    for batch_id, age in ((busy, 500.0), (quiet, 40.0)):
        scene.store.take_undispatched(batch_id, 10)
        for position in range(3 if batch_id == busy else 1):
            scene.set_child(ChildKey(batch_id, position), dispatched_at=later(-age))
    assert sorted(scene.store.overdue_queues(30)) == [("busy", ""), ("quiet", "")]
    assert [key for *_, key in scene.store.overdue(("quiet", ""), 30, limit=3)] == [ChildKey(quiet, 0)]


def test_a_row_whose_time_has_not_come_is_not_overdue(scene: Scene) -> None:
    batch_id = scene.batch(some(2, countdown=3600.0))
    scene.store.take_undispatched(batch_id, 10)
    for position in (0, 1):
        scene.set_child(ChildKey(batch_id, position), dispatched_at=later(-4000.0))
    scene.set_child(ChildKey(batch_id, 1), not_before=later(-60.0))
    assert scene.store.overdue_queues(30) == [(None, "demo.task")]
    assert [key.position for *_, key in scene.store.overdue((None, "demo.task"), 30)] == [1]
    assert scene.store.overdue((None, "demo.task"), 600) == [], "it counts from the moment it could run"


def test_what_was_sent_and_has_not_begun_is_counted_by_queue(scene: Scene) -> None:
    batch_id, late = scene.batch(some(6, queue="ocr"), max_in_flight=5), scene.batch(some(2, queue="late"))
    over = scene.batch(0, calls=("on_success", "on_finish"))
    scene.store.finish(over)
    for each in (batch_id, late, over):
        scene.store.take_undispatched(each, 5)
    scene.run(batch_id, 0)
    scene.set_child(ChildKey(batch_id, 1), waits_on_batch=late)
    scene.set_child(ChildKey(over, 0), queue="called")
    scene.set_child(ChildKey(over, 1), queue="called", round=2)
    scene.store.cancel(late)

    def sent() -> dict[str, int]:
        tables = scene.store.check_up({"completed": 60.0, "other": 60.0}).tables
        assert tables is not None
        return dict(tables.sent)

    assert sent() == {"ocr": 3, "called": 1}, "one runs, one became a batch, one was not sent"
    scene.store.pause(batch_id, "by hand")
    assert sent() == {"ocr": 3, "called": 1}, "they are in the queue all the same"


def test_rows_are_taken_again_only_if_nobody_did_meanwhile(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.store.take_undispatched(batch_id, 10)
    for position in (0, 1):
        scene.set_child(ChildKey(batch_id, position), dispatched_at=later(-40.0))
    keys = [ChildKey(batch_id, position) for position in (0, 1)]
    again = scene.store.take_again(keys, 30)
    assert [(each.child.position, each.child.dispatches, each.child.attempt) for each in again] == [
        (0, 2, 0), (1, 2, 0),
    ]  # fmt: skip
    assert scene.store.take_again(keys, 30) == []


def test_only_pending_rows_expire(scene: Scene) -> None:
    batch_id = scene.batch(some(3, expires_in=60.0))
    scene.run(batch_id, 0)
    scene.complete(scene.run(batch_id, 1))
    for position in range(3):
        scene.set_child(ChildKey(batch_id, position), expires_at=later(-1.0))
    assert [row.position for row in scene.store.expired()] == [2]
