"""Races for the places of a window: never one too many, and none forgotten."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from celery_batchtrack.behaviour import dispatch, finish
from celery_batchtrack.behaviour.tracker import Message
from celery_batchtrack.store import windows
from tests.races.rivals import Held, Rivals
from tests.store.behaviour_kit import Told, tracker_on
from tests.store.kit import Scene, add_up, dispatch_all

Hold = Callable[[], Held]


def _positions(scene: Scene, batch_id: uuid.UUID) -> list[int]:
    return [row.position for row in scene.rows(batch_id) if row.dispatched_at is not None]


def test_of_two_that_fill_up_one_window_the_second_waits_and_sees_what_the_first_took(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, first = scene.batch(10, max_in_flight=3), hold()
    held = rivals.start_held(first, first.take_undispatched, batch_id, 10)
    waiting = rivals.start_blocked(scene.store.take_undispatched, batch_id, 10)
    first.commit()
    assert (len(held.result()), waiting.result()) == (3, [])
    assert scene.violations() == {}


def test_without_the_lock_the_window_would_overflow(
    scene: Scene, rivals: Rivals, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the lock is for: SKIP LOCKED alone passes by the rows, not by their count."""
    monkeypatch.setattr(windows, "is_limited", lambda row: False)
    batch_id, first = scene.batch(10, max_in_flight=3), hold()
    held = rivals.start_held(first, first.take_undispatched, batch_id, 10)
    assert len(scene.store.take_undispatched(batch_id, 10)) == 3
    first.commit()
    assert len(held.result()) == 3
    assert scene.violations() == {"window_is_kept": 1}


def test_a_settle_does_not_wait_for_who_fills_the_window_up(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch(10, max_in_flight=2), hold()
    dispatch_all(scene, batch_id)
    one, two = scene.run(batch_id, 0), scene.run(batch_id, 1)
    scene.complete(one)
    held = rivals.start_held(first, first.take_undispatched, batch_id, 10)
    assert scene.complete(two).written
    first.commit()
    assert [each.child.position for each in held.result()] == [2]
    assert dispatch_all(scene, batch_id) == [3]


def test_of_two_that_fill_up_the_shared_window_the_second_waits(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    one, two, first = scene.batch(10), scene.batch(10), hold()
    held = rivals.start_held(first, first._take_turns, 6, 100)
    waiting = rivals.start_blocked(scene.store._take_turns, 6, 100)
    first.commit()
    assert (len(held.result()), waiting.result()) == (6, [])
    assert (len(_positions(scene, one)), len(_positions(scene, two))) == (3, 3)


def test_a_rate_is_not_spent_twice(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch(50, options={"rate": 1 / 60}), hold()
    held = rivals.start_held(first, first.take_undispatched, batch_id, 100)
    waiting = rivals.start_blocked(scene.store.take_undispatched, batch_id, 100)
    first.commit()
    assert (len(held.result()), waiting.result()) == (1, [])


@pytest.mark.parametrize("shared", [None, 12])
def test_many_workers_at_once_keep_every_window_and_forget_no_child(
    scene: Scene, rivals: Rivals, shared: int | None
) -> None:
    batches = [scene.batch(60, max_in_flight=5), scene.batch(60, max_in_flight=1), scene.batch(60)]
    tracker = tracker_on(scene.store, max_in_flight=shared)
    overflowed: list[dict[str, int]] = []

    def work() -> None:
        while (message := _next(tracker)) is not None:
            claimed = scene.run(message.row.batch_id, message.row.position, slot=scene.slot())
            finish.after(tracker, message.row.key, scene.complete(claimed), refill=message.ticket.refill or 1)
            if message.row.position % 20 == 0:
                overflowed.append(scene.violations())

    for batch_id in batches:
        dispatch.pump(tracker, batch_id)
    while any(scene.status(each) == "running" for each in batches):
        for _ in range(4):
            rivals.start(work)
        rivals.join()
        dispatch.pump(tracker)  # a worker ends when it finds nothing; who fills up last may come after it
    assert [each for each in overflowed if "window_is_kept" in each] == []
    assert all(add_up(scene, each) and scene.status(each) == "completed" for each in batches)


def _next(tracker: Told) -> Message | None:
    try:
        return tracker.outbox.sent.pop(0)
    except IndexError:
        return None
