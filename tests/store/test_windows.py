"""Windows, turns and rates in the tables, on every database."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import windows
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.records import NewBatch, Outgoing, Release
from tests.store.kit import Scene, dispatch_all, some, statements


def _of(taken: list[Outgoing], batch_id: uuid.UUID) -> list[int]:
    return [each.child.position for each in taken if each.child.batch_id == batch_id]


def _share(scene: Scene, window: int, limit: int = 1000) -> list[Outgoing]:
    return scene.store.take_undispatched(None, limit, shared=window)


# -- a batch's own window --------------------------------------------------------------------------


def test_no_more_are_taken_than_the_window_holds_and_each_end_makes_room_for_one(scene: Scene) -> None:
    batch_id = scene.batch(5, max_in_flight=2)
    assert dispatch_all(scene, batch_id) == [0, 1]
    assert dispatch_all(scene, batch_id) == []
    first = scene.run(batch_id, 0)
    assert dispatch_all(scene, batch_id) == [], "what runs keeps its place"
    scene.complete(first)
    assert dispatch_all(scene, batch_id) == [2]
    scene.fail(scene.run(batch_id, 1))
    scene.crash(scene.run(batch_id, 2))
    assert dispatch_all(scene, batch_id) == [3, 4]
    assert scene.violations() == {}


def test_a_window_counts_its_own_batch_only(scene: Scene) -> None:
    other = scene.batch(5)
    dispatch_all(scene, other)
    assert dispatch_all(scene, scene.batch(5, max_in_flight=2)) == [0, 1]


def test_a_child_that_waits_for_its_retry_keeps_its_place(scene: Scene) -> None:
    batch_id = scene.batch(3, max_in_flight=1)
    dispatch_all(scene, batch_id)
    claimed = scene.run(batch_id, 0)
    scene.store.release(claimed.key, claimed.token, Release(countdown=60.0, sent=True))
    assert dispatch_all(scene, batch_id) == []
    assert scene.violations() == {}


def test_a_child_that_is_due_again_is_taken_before_those_behind_it(scene: Scene) -> None:
    batch_id = scene.batch(3, max_in_flight=1)
    dispatch_all(scene, batch_id)
    claimed = scene.run(batch_id, 0)
    scene.store.release(claimed.key, claimed.token, Release())
    assert dispatch_all(scene, batch_id) == [0]


def test_what_is_due_much_later_takes_no_place_yet(scene: Scene) -> None:
    batch_id = scene.batch([*some(1, countdown=3600.0), *some(1, countdown=5.0), *some(2)], max_in_flight=2)
    assert dispatch_all(scene, batch_id) == [1, 2], "the first not yet; the second soon: its worker holds it"
    for position in (1, 2):
        scene.complete(scene.run(batch_id, position))
    scene.set_child(ChildKey(batch_id, 0), not_before=later(-1.0))
    assert dispatch_all(scene, batch_id) == [0, 3]


def test_without_a_window_what_is_due_later_is_sent_at_once(scene: Scene) -> None:
    assert dispatch_all(scene, scene.batch(some(1, countdown=3600.0))) == [0]


def test_callbacks_need_no_place(scene: Scene) -> None:
    batch_id = scene.batch(3, max_in_flight=1, calls=("on_first_failure",), tolerance=3)
    dispatch_all(scene, batch_id)
    scene.fail(scene.run(batch_id, 0))
    taken = scene.store.take_undispatched(batch_id, 10)
    assert [each.child.kind for each in taken] == ["on_first_failure", "child"]


def test_a_child_that_became_a_batch_keeps_its_place_until_that_has_ended(scene: Scene) -> None:
    outer = scene.batch(3, max_in_flight=1)
    (out,) = scene.store.take_undispatched(outer, 10)
    inner = NewBatch(uuid7(), "inner", "{}", {}, parent_batch=outer, parent_position=0)
    assert scene.store.nest(out.child, inner, some(1))
    assert dispatch_all(scene, outer) == [] and scene.violations() == {}
    scene.complete(scene.run(inner.id))
    scene.store.finish(inner.id)
    scene.store.join(ChildKey(outer, 0), inner.id, 1, None, keep=False)
    assert dispatch_all(scene, outer) == [1]


def test_a_batch_that_was_made_within_another_takes_no_place_there(scene: Scene) -> None:
    outer = scene.batch(2, max_in_flight=1)
    waiting = some(1)[0]
    assert scene.store.create_nested(NewBatch(uuid7(), "inner", "{}", {}, parent_batch=outer), waiting) == 2
    assert dispatch_all(scene, outer) == [0], "nobody sent the child that waits for it"


def test_what_is_published_again_has_its_place_already(scene: Scene) -> None:
    batch_id = scene.batch(3, max_in_flight=2)
    dispatch_all(scene, batch_id)
    scene.set_child(ChildKey(batch_id, 0), dispatched_at=later(-90.0))
    assert [each.child.position for each in scene.store.take_again([ChildKey(batch_id, 0)], 30)] == [0]
    assert dispatch_all(scene, batch_id) == []


def test_where_children_run_at_once_no_limit_counts(scene: Scene) -> None:
    batch_id = scene.batch(3, max_in_flight=1, options={"rate": 0.001})
    assert len(scene.store.take_undispatched(batch_id, 10, shared=1, paced=False)) == 3


def test_a_window_is_filled_up_over_indexes_of_its_own_whatever_the_planner_knows(scene: Scene) -> None:
    """Its statistics may be older than the batch: then all indexes that begin with the batch look alike, and some of
    them hold every child that waits or is done."""
    batch_id = scene.batch(some(3000), max_in_flight=20)
    with statements(scene.store.engine, parameters := []) as sent:
        assert len(dispatch_all(scene, batch_id)) == 20
    looked = [each for each in zip(sent, parameters, strict=True) if "batchtrack_child" in each[0]]
    with scene.store.engine.begin() as connection:
        callbacks, flying, children = (_plan(connection, query, values) for query, values in looked)
    assert re.search("batchtrack_child_(undispatched|callback)", callbacks)
    assert "batchtrack_child_undispatched" in children
    assert "batchtrack_child_on_its_way" in flying and re.search("batchtrack_child_(open|slot)", flying)
    assert "SCAN batchtrack_child" not in callbacks + flying + children, "of the whole table (SQLite)"
    assert "Sort" not in children and "TEMP B-TREE" not in children, "its index is in order"


def _plan(connection: sa.Connection, query: str, values: Any) -> str:
    how = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # so small a table it would rather read whole
    return "\n".join(str(row[-1]) for row in connection.exec_driver_sql(f"{how} {query}", values))


# -- a window that all share -----------------------------------------------------------------------


def test_batches_take_turns_in_a_shared_window(scene: Scene) -> None:
    large, small = scene.batch(50), scene.batch(3)
    taken = _share(scene, 10)
    assert (_of(taken, large), _of(taken, small)) == ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2]), "what one leaves, others get"
    assert _share(scene, 10) == []
    for position in (0, 1):
        scene.complete(scene.run(small, position))
    assert _of(_share(scene, 10), large) == [7, 8]


def test_a_batch_that_comes_late_gets_the_places_that_get_free(scene: Scene) -> None:
    large = scene.batch(50)
    assert len(_share(scene, 10)) == 10
    small = scene.batch(20)
    for position in range(5):
        scene.complete(scene.run(large, position))
    taken = _share(scene, 10)
    assert (_of(taken, large), _of(taken, small)) == ([], [0, 1, 2, 3, 4]), "until both have as many"


def test_a_higher_priority_goes_first(scene: Scene) -> None:
    low, high = scene.batch(10), scene.batch(10, priority=1)
    taken = _share(scene, 12)
    assert (len(_of(taken, low)), len(_of(taken, high))) == (2, 10)


def test_a_batch_has_both_its_own_window_and_the_shared_one(scene: Scene) -> None:
    narrow, wide = scene.batch(10, max_in_flight=2), scene.batch(10)
    taken = _share(scene, 9)
    assert (len(_of(taken, narrow)), len(_of(taken, wide))) == (2, 7)
    assert scene.violations() == {}


@pytest.mark.parametrize("state", ["paused", "cancelled", "open"])
def test_who_may_not_run_takes_no_turn(scene: Scene, state: str) -> None:
    idle, other = scene.batch(5, seal=state != "open"), scene.batch(5)
    if state == "paused":
        scene.store.pause(idle, "by hand")
    elif state == "cancelled":
        scene.store.cancel(idle)
    taken = _share(scene, 8)
    assert (_of(taken, idle), len(_of(taken, other))) == ([], 5)


def test_callbacks_pass_by_the_shared_window(scene: Scene) -> None:
    busy, ended = scene.batch(5), scene.batch(0, calls=("on_finish",))
    scene.store.finish(ended)
    taken = _share(scene, 1)
    assert len(_of(taken, busy)) == 1 and [each.child.kind for each in taken if each.child.batch_id == ended]


def test_a_batch_at_its_own_limit_does_not_keep_places_from_others(scene: Scene) -> None:
    narrow, other = scene.batch(10, max_in_flight=1, priority=10), scene.batch(50)
    taken = _share(scene, 20)
    assert (len(_of(taken, narrow)), len(_of(taken, other))) == (1, 19)
    for position in range(5):
        scene.complete(scene.run(other, position))
    assert len(_of(_share(scene, 20), other)) == 5


def test_many_batches_at_their_limits_do_not_hide_one_that_has_room(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_CONTENDERS", 3)
    full = [scene.batch(2, max_in_flight=1) for _ in range(4)]
    while _share(scene, 100):
        pass
    late = scene.batch(5)
    assert len(_of(_share(scene, 100), late)) == 5 and len(full) == 4


def test_what_a_paused_batch_had_sent_takes_no_place(scene: Scene) -> None:
    """Its messages are refused, and nobody knows when they are gone."""
    idle, other = scene.batch(10), scene.batch(10)
    assert len(_of(scene.store.take_undispatched(idle, 5), idle)) == 5
    running = scene.run(idle, 0)
    assert _share(scene, 5) == []
    scene.store.pause(idle, "by hand")
    assert len(_of(_share(scene, 5), other)) == 4, "but what runs keeps its place"
    scene.complete(running)
    assert len(_of(_share(scene, 5), other)) == 1


def test_what_is_due_much_later_takes_no_place_in_a_shared_window(scene: Scene) -> None:
    later_on, other = scene.batch([*some(20, countdown=3600.0), *some(1)]), scene.batch(10)
    taken = _share(scene, 5)
    assert (_of(taken, later_on), len(_of(taken, other))) == ([20], 4)


def test_a_batch_whose_children_became_batches_lets_these_go_first(scene: Scene) -> None:
    outer = scene.batch(10)
    (out,) = _share(scene, 1)
    inner = NewBatch(uuid7(), "inner", "{}", {}, parent_batch=outer, parent_position=0)
    assert scene.store.nest(out.child, inner, some(5))
    assert [each.child.batch_id for each in _share(scene, 1)] == [inner.id]


# -- rates -----------------------------------------------------------------------------------------


def test_a_rate_lets_its_burst_go_at_once(scene: Scene) -> None:
    assert dispatch_all(scene, scene.batch(30, options={"rate": 10.0})) == list(range(11))


def test_a_rate_holds_the_batch_until_the_next_may_go(scene: Scene) -> None:
    batch_id = scene.batch(30, options={"rate": 1 / 60})
    assert dispatch_all(scene, batch_id) == [0]
    assert dispatch_all(scene, batch_id) == [] == scene.store.held_back() and scene.store.any_held_back()
    scene.set_batch(batch_id, dispatch_at=later(-1.0), paid_until=later(-61.0))
    assert scene.store.held_back() == [batch_id]
    assert dispatch_all(scene, batch_id) == [1]
    assert scene.store.held_back() == [] and scene.store.any_held_back()


def test_a_rate_saves_up_no_more_than_a_second(scene: Scene) -> None:
    batch_id = scene.batch(100, options={"rate": 10.0})
    dispatch_all(scene, batch_id)
    scene.set_batch(batch_id, dispatch_at=later(-500.0), paid_until=later(-500.0))
    assert len(dispatch_all(scene, batch_id)) == 11


def test_a_rate_that_lets_more_go_than_there_is_holds_nothing_back(scene: Scene) -> None:
    batch_id = scene.batch(3, options={"rate": 10.0})
    assert dispatch_all(scene, batch_id) == [0, 1, 2]
    assert not scene.store.any_held_back()


def test_what_a_rate_let_go_and_nobody_sent_may_go_again(scene: Scene) -> None:
    batch_id = scene.batch(5, options={"rate": 1 / 3600})
    for give in (scene.store.give_back, lambda rows: scene.store.hold_back(rows, -1.0)):
        (out,) = scene.store.take_undispatched(batch_id, 10)
        give([out.child])
    assert dispatch_all(scene, batch_id) == [0], "an hour is not lost for each try"
    assert dispatch_all(scene, batch_id) == []


def test_a_batch_that_has_nothing_more_to_send_is_held_back_no_more(scene: Scene) -> None:
    batch_id = scene.batch(6, options={"rate": 5.0})
    assert len(dispatch_all(scene, batch_id)) == 6
    scene.set_batch(batch_id, dispatch_at=later(-5.0))
    assert scene.store.held_back() == [] and not scene.store.any_held_back()


def test_a_held_batch_does_not_hold_others_in_the_shared_window(scene: Scene) -> None:
    slow, other = scene.batch(10, options={"rate": 0.5}), scene.batch(10)
    taken = _share(scene, 8)
    assert (_of(taken, slow), len(_of(taken, other))) == ([0], 7)


def test_an_ended_batch_is_held_back_no_more(scene: Scene) -> None:
    batch_id = scene.batch(5, options={"rate": 1.0})
    dispatch_all(scene, batch_id)
    scene.store.cancel(batch_id)
    assert not scene.store.any_held_back()


# -- taken for nothing -----------------------------------------------------------------------------


def test_what_a_full_queue_has_no_room_for_is_as_if_it_had_not_been_taken(scene: Scene) -> None:
    batch_id = scene.batch(3)
    taken = scene.store.take_undispatched(batch_id, 10)
    scene.store.hold_back([each.child for each in taken[1:]], 60.0)
    rows = scene.rows(batch_id)
    assert [(row.dispatched_at is None, row.dispatches) for row in rows] == [(False, 1), (True, 0), (True, 0)]
    assert dispatch_all(scene, batch_id) == []
    scene.set_batch(batch_id, dispatch_at=later(-1.0))
    assert dispatch_all(scene, batch_id) == [1, 2]
    assert not scene.store.any_held_back(), "what is let go is held no more"
