"""Publishing: once, again when a message seems lost, and what callbacks are given."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from celery_batchtrack.behaviour import dispatch, finish, recovery, report, results, rounds
from celery_batchtrack.behaviour.handover import item_hash
from celery_batchtrack.store import Store
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.aftermath import Killer
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import NewBatch, NewChild
from celery_batchtrack.vocabulary.states import EndReason, Verdict
from tests.store.behaviour_kit import Told, tracker_on
from tests.store.kit import HERE, SEGFAULT, Scene, add_up, counts, refused, some, statements

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")


@pytest.fixture
def scene(sqlite_url: str) -> Iterator[Scene]:
    scene = Scene(Store(sqlite_url))
    scene.worker(HERE, id=scene.worker_id)
    yield scene
    scene.store.dispose()


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store, dispatch_chunk=2)


def test_everything_due_is_published_in_chunks_and_once(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(5)
    assert dispatch.pump(tracker, batch_id) == 5
    assert [key.position for key in tracker.outbox.published()] == [0, 1, 2, 3, 4]
    assert dispatch.pump(tracker, batch_id) == 0
    message = tracker.outbox.sent[0]
    assert message.ticket.store_id == scene.store.store_id
    assert (message.ticket.key, message.ticket.attempt, message.ticket.kind) == (ChildKey(batch_id, 0), 0, "child")


def test_a_broker_that_refuses_one_message_gets_the_others_and_the_row_stays_due(
    scene: Scene, tracker: Told
) -> None:
    batch_id = scene.batch(5)
    tracker.outbox.refuse = {1: False}
    assert dispatch.pump(tracker, batch_id) == 4
    assert [event.key.position for event in tracker.of(events.PublishFailed)] == [1]
    tracker.outbox.refuse = {}
    assert dispatch.pump(tracker, batch_id) == 1
    assert sorted(key.position for key in tracker.outbox.published()) == [0, 1, 2, 3, 4]


def test_a_broker_that_is_down_is_asked_once_and_all_rows_stay_due(scene: Scene, tracker: Told) -> None:
    batches = [scene.batch(5), scene.batch(5)]
    tracker.outbox.down = True
    assert dispatch.pump(tracker) == 0
    assert [event.count for event in tracker.of(events.PublishFailed)] == [2], "one chunk of one batch, told once"
    tracker.outbox.down = False
    assert dispatch.pump(tracker) == 10
    assert {key.batch_id for key in tracker.outbox.published()} == set(batches)


def test_a_callback_whose_arguments_cannot_be_read_back_fails_and_holds_nobody_up(
    scene: Scene, tracker: Told
) -> None:
    poisoned = scene.batch(1, calls=("on_success",))
    scene.complete(scene.run(poisoned), result="no JSON at all")
    scene.store.finish(poisoned)
    other = scene.batch(1)
    assert dispatch.pump(tracker) == 1
    assert [key.batch_id for key in tracker.outbox.published()] == [other]
    [callback] = scene.store.callback_rows(poisoned)
    assert (callback.status, callback.cause) == ("failed", "not_sent")


@pytest.mark.parametrize("calls", [(), ("on_first_failure",)])
def test_a_child_that_can_never_be_sent_fails_and_holds_nobody_up(
    scene: Scene, tracker: Told, calls: tuple[str, ...]
) -> None:
    batch_id = scene.batch(5, tolerance=1, calls=calls)
    tracker.outbox.refuse = {1: True}
    dispatch.pump(tracker, batch_id)
    row = scene.row(ChildKey(batch_id, 1))
    assert (row.status, row.cause) == ("failed", "not_sent")
    assert {key.position for key in tracker.outbox.published()} == {0, 2, 3, 4, *([5] if calls else [])}


def test_a_publisher_that_breaks_gives_the_rows_back(
    scene: Scene, tracker: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = scene.batch(2)

    def broken(messages: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracker.outbox, "publish", broken)
        dispatch.pump(tracker, batch_id)
    assert dispatch.pump(tracker, batch_id) == 2


# -- again -----------------------------------------------------------------------------------------


def _published(scene: Scene, tracker: Told, seconds_ago: float, *, dispatches: int = 1, **more: object) -> uuid.UUID:
    batch_id = scene.batch(some(1, **more))  # type: ignore[arg-type]
    dispatch.pump(tracker, batch_id)
    tracker.outbox.sent.clear()
    scene.set_child(ChildKey(batch_id, 0), dispatched_at=later(-seconds_ago), dispatches=dispatches)
    return batch_id


@pytest.mark.parametrize(
    ("length", "dispatches", "waits"),
    [
        (0, 1, 30), (0, 2, 60), (0, 3, 120), (0, 20, 3600),
        (5, 1, 600), (5, 2, 1200), (5, 3, 2400), (5, 4, 3600), (5, 500, 3600),
        (None, 1, 600), (None, 2, 1200),
    ],
)  # fmt: skip
def test_the_wait_doubles_with_every_publish_up_to_an_hour(
    scene: Scene, tracker: Told, length: int | None, dispatches: int, waits: float
) -> None:
    tracker.outbox.default_length = length
    _published(scene, tracker, waits - 5, dispatches=dispatches)
    assert dispatch.redispatch(tracker) == 0
    due = _published(scene, tracker, waits + 1, dispatches=dispatches)
    assert dispatch.redispatch(tracker) == 1
    assert tracker.outbox.published() == [ChildKey(due, 0)]


def test_a_republished_row_keeps_its_attempt_and_is_told(scene: Scene, tracker: Told) -> None:
    batch_id = _published(scene, tracker, 31)
    assert dispatch.redispatch(tracker) == 1
    (message,) = tracker.outbox.sent
    assert (message.ticket.attempt, message.row.dispatches) == (0, 2)
    assert [(event.batch_id, event.count) for event in tracker.of(events.Redispatched)] == [(batch_id, 1)]
    assert dispatch.redispatch(tracker) == 0, "a flood is not harmless"


def test_a_child_is_never_published_again_before_its_time(scene: Scene, tracker: Told) -> None:
    _published(scene, tracker, 9999, countdown=3600.0)
    assert dispatch.redispatch(tracker) == 0


def test_every_queue_is_asked_once(scene: Scene, tracker: Told) -> None:
    for queue in ("a", "a", "b", None, None):
        _published(scene, tracker, 31, queue=queue)
    tracker.outbox.lengths = {"a": 7}
    assert dispatch.redispatch(tracker) == 3
    assert sorted(tracker.outbox.asked, key=str) == [("a", ""), ("b", ""), (None, "demo.task")]


def test_tasks_without_a_queue_of_their_own_are_asked_for_where_they_are_routed(scene: Scene, tracker: Told) -> None:
    busy, idle = _published(scene, tracker, 31), _published(scene, tracker, 31)
    scene.set_child(ChildKey(busy, 0), task="busy.task")
    tracker.outbox.lengths = {"busy.task": 9}
    assert dispatch.redispatch(tracker) == 1
    assert tracker.outbox.published() == [ChildKey(idle, 0)]


def test_after_the_loss_of_a_worker_an_empty_queue_alone_says_enough(scene: Scene, tracker: Told) -> None:
    lost = _published(scene, tracker, 3)
    waiting = _published(scene, tracker, 3, queue="full")
    tracker.outbox.lengths = {"full": 5}
    assert dispatch.redispatch(tracker) == 0
    assert dispatch.redispatch(tracker, worker_lost=True) == 1
    assert tracker.outbox.published() == [ChildKey(lost, 0)] and waiting


def test_a_message_that_seems_lost_is_an_incident_but_no_death(scene: Scene, tracker: Told) -> None:
    lost, waiting = _published(scene, tracker, 31), _published(scene, tracker, 700, queue="full")
    tracker.outbox.lengths = {"full": 5}
    assert dispatch.redispatch(tracker) == 2
    (incident,) = scene.incidents(lost)
    assert (incident.cause, incident.outcome, incident.phase) == ("lost_message", "redispatched", "before_claim")
    assert scene.incidents(waiting) == [], "one that waits behind others is not lost"
    assert scene.store.incidents(crashes_only=True) == []
    scene.crash(scene.run(lost))
    (unhappy,) = report.build(tracker, lost).unhappy
    assert unhappy.signal == "SIGSEGV"


# -- the ladder, from outside ----------------------------------------------------------------------

SKIP = {
    "on_crash": "skip", "max_crashes": 3, "process": True, "worker": True, "time_limit": True, "items": ["args", 0],
    "merge": "sum",
}  # fmt: skip


def _child_with(*items: str) -> NewChild:
    call = {"args": [list(items)], "kwargs": {}}
    return NewChild("demo.task", str(uuid.uuid4()), json.dumps(call), items, len(items))


def test_quarantined_items_are_withheld_at_the_first_publish_and_again(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch([_child_with("a", "bad", "c"), _child_with("bad"), _child_with("d")], tolerance=3)
    policy = {**SKIP, "quarantine_after": 1}
    tracker.policy_of = lambda row, batch: RowPolicy.from_option(policy)
    killer = Killer("bad", item_hash("bad", "bad"), "", 1)
    first = scene.batch([_child_with("bad")])
    scene.store.crash(scene.row(scene.run(first).key), SEGFAULT, Verdict.OBSERVED, None, killer)
    dispatch.pump(tracker, batch_id)
    sent = [message.row for message in tracker.outbox.sent if message.row.batch_id == batch_id]
    assert sorted(row.items for row in sent) == [["a", "c"], ["d"]]
    assert counts(scene, batch_id) == {"pending": 2, "crashed": 2}
    assert {event.items for event in tracker.of(events.Withheld)} == {("bad",)}
    (released,) = scene.store.release_from_quarantine(items=["bad"])
    assert released.state == "released"
    assert add_up(scene, batch_id)


def test_what_is_left_of_a_quarantined_child_is_its_result_without_a_merge(scene: Scene, tracker: Told) -> None:
    """Its policy never splits otherwise, so its task need not say how parts become one."""
    policy = {"on_crash": "retry", "max_crashes": 3, "process": True, "quarantine_after": 1, "items": ["args", 0]}
    tracker.policy_of = lambda row, batch: RowPolicy.from_option(policy)
    batch_id = scene.batch([_child_with("a", "bad", "c"), _child_with("z")], tolerance=1)
    first = scene.batch([_child_with("bad")])
    killer = Killer("bad", item_hash("bad", "bad"), "", 1)
    scene.store.crash(scene.row(scene.run(first).key), SEGFAULT, Verdict.OBSERVED, None, killer)
    dispatch.pump(tracker, batch_id)
    for row in scene.rows(batch_id):
        if row.status == "pending":
            scene.complete(scene.run(batch_id, row.position), json.dumps(row.items))
    assert list(results.of_batch(tracker, batch_id)) == [["a", "c"], ["z"]]


def test_a_version_of_the_application_has_a_quarantine_of_its_own(scene: Scene, tracker: Told) -> None:
    tracker.policy_of = lambda row, batch: RowPolicy.from_option({**SKIP, "quarantine_after": 1})
    tracker.settings = replace(tracker.settings, app_version="2")
    first = scene.batch([_child_with("bad")])
    killer = Killer("bad", item_hash("bad", "bad"), "1", 1)
    scene.store.crash(scene.row(scene.run(first).key), SEGFAULT, Verdict.OBSERVED, None, killer)
    batch_id = scene.batch([_child_with("bad")])
    assert dispatch.pump(tracker, batch_id) == 1


def test_a_paused_batch_sends_nothing_until_it_is_resumed(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(2)
    dispatch.pump(tracker, batch_id)
    tracker.outbox.sent.clear()
    assert finish.pause(tracker, batch_id, "for lunch") and not finish.pause(tracker, batch_id)
    assert dispatch.pump(tracker, batch_id) == 0
    assert "paused" in refused(scene.claim(ChildKey(batch_id, 0))).reason, "and a message on its way is dropped"
    assert finish.resume(tracker, batch_id) and not finish.resume(tracker, batch_id)
    assert len(tracker.outbox.sent) == 2, "refused messages are gone: both are sent again"
    assert [event.reason for event in tracker.of(events.BatchPaused)] == ["for lunch"]
    assert len(tracker.of(events.BatchResumed)) == 1


def test_a_merge_that_raises_fails_the_body_and_holds_up_nobody(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch([_child_with("a", "bad", "c")], tolerance=3, calls=("on_success",))
    row = scene.row(scene.run(batch_id, policy={**SKIP, "merge": f"{__name__}:out_of_order"}).key)
    evidence = replace(SEGFAULT, item="bad", item_index=1)
    assert recovery.run_died(tracker, row, evidence, Verdict.OBSERVED)
    scene.complete(scene.run(batch_id, 2), "2")
    finish.look(tracker, batch_id)
    (callback,) = scene.store.callback_rows(batch_id)
    assert (callback.status, callback.cause) == ("failed", "not_sent")
    (incident,) = [each for each in scene.incidents(batch_id) if each.position == callback.position]
    assert "position 0" in (incident.message or "") and "KeyError: 'order'" in (incident.message or "")


def out_of_order(parts: list[int]) -> int:
    raise KeyError("order")


# -- what callbacks are given ----------------------------------------------------------------------


def _ended(scene: Scene, tracker: Told, **options: object) -> uuid.UUID:
    batch_id = scene.batch(2, calls=ALL, options=options)
    scene.complete(scene.run(batch_id, 0), '{"first": 1}')
    scene.complete(scene.run(batch_id, 1), "2")
    finish.look(tracker, batch_id)
    return batch_id


def test_success_gets_the_results_in_order_and_finish_the_report(scene: Scene, tracker: Told) -> None:
    batch_id = _ended(scene, tracker)
    prefixes = {each.row.kind: each.prefix for each in tracker.outbox.sent}
    assert prefixes["on_success"] == ([{"first": 1}, 2],)
    (given,) = prefixes["on_finish"]
    assert (given["batch_id"], given["status"], given["completed"]) == (str(batch_id), "completed", 2)
    json.dumps(given)


@pytest.mark.parametrize(("wanted", "given"), [("nothing", ()), ("results", ([{"first": 1}, 2],))])
def test_success_gets_what_was_asked_for(scene: Scene, tracker: Told, wanted: str, given: object) -> None:
    _ended(scene, tracker, callback_arg=wanted)
    (message,) = [each for each in tracker.outbox.sent if each.row.kind == "on_success"]
    assert message.prefix == given


def test_success_of_an_empty_batch_gets_an_empty_list(scene: Scene, tracker: Told) -> None:
    finish.started(tracker, scene.batch(0, calls=("on_success",)))
    assert [each.prefix for each in tracker.outbox.sent] == [([],)]


def test_an_errback_gets_the_bodys_id_and_celerys_words(scene: Scene, tracker: Told) -> None:
    declared = {"on_failure": [{"task": "errback", "task_id": "e", "signature": "{}", "errback": "body-id"}]}
    batch_id = uuid.uuid4()
    scene.store.create(NewBatch(batch_id, "chord", json.dumps(declared), {}), some(1), seal=True)
    scene.fail(scene.run(batch_id))
    finish.look(tracker, batch_id)
    (message,) = tracker.outbox.sent
    failed = scene.rows(batch_id)[0].task_id
    assert message.prefix == ("body-id",)
    assert message.ticket.errback == ("body-id", f"Dependency {failed} raised ValueError: no")


def test_a_cancel_terminates_what_runs_unless_told_not_to(scene: Scene, tracker: Told) -> None:
    for terminate in (True, False):
        batch_id = scene.batch(2, calls=ALL)
        task_id = scene.row(scene.run(batch_id).key).task_id
        assert finish.cancel(tracker, batch_id, EndReason.USER, terminate=terminate) is not None
        assert (task_id in tracker.outbox.terminated) is terminate
        assert tracker.outbox.kinds(batch_id) == ["on_finish"]
        assert counts(scene, batch_id) == {"cancelled": 2}
        assert finish.cancel(tracker, batch_id) is None


# -- the report ------------------------------------------------------------------------------------


def test_the_report_names_who_did_not_complete_and_why(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(some(3, items=2), tolerance=3)
    scene.complete(scene.run(batch_id, 0))
    scene.crash(scene.run(batch_id, 1))
    scene.fail(scene.run(batch_id, 2))
    finish.look(tracker, batch_id)
    found = report.build(tracker, batch_id)
    assert (found.status, found.crashed_items, found.failed_items) == (
        "partial", ["doc-1-0", "doc-1-1"], ["doc-2-0", "doc-2-1"],
    )  # fmt: skip
    assert [(each.position, each.status, each.signal) for each in found.unhappy] == [
        (1, "crashed", "SIGSEGV"), (2, "failed", None),
    ]  # fmt: skip
    assert "SIGSEGV" in str(found) and "2 crashed" in str(found)


def test_the_report_of_many_names_a_hundred_and_counts_the_others(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(103)
    scene.store.cancel(batch_id)
    found = report.build(tracker, batch_id)
    assert (len(found.unhappy), found.omitted) == (100, 3)


def test_a_late_write_does_not_hide_how_the_child_died(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.crash(claimed)
    assert scene.complete(claimed).late
    (unhappy,) = report.build(tracker, batch_id).unhappy
    assert unhappy.signal == "SIGSEGV"


# -- windows, full queues, large batches -----------------------------------------------------------


def _work(scene: Scene, tracker: Told) -> int:
    """Run what was sent, and what follows, to the end; how many were in flight at most."""
    most = 0
    while tracker.outbox.sent:
        most = max(most, len(tracker.outbox.sent))
        message = tracker.outbox.sent.pop(0)
        claimed = scene.run(message.row.batch_id, message.row.position)
        finish.after(tracker, message.row.key, scene.complete(claimed), refill=message.ticket.refill)
    return most


def test_each_end_lets_the_next_child_of_a_window_go(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(20, max_in_flight=3)
    assert dispatch.pump(tracker, batch_id) == 3
    assert all(each.ticket.refill == 1 for each in tracker.outbox.sent), "so small a window is filled up at each end"
    assert _work(scene, tracker) == 3
    assert scene.status(batch_id) == "completed" and add_up(scene, batch_id)


def test_of_a_wide_window_one_in_so_many_ends_fills_it_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracker_on(scene.store)
    batch_id = scene.batch(100, max_in_flight=64)
    dispatch.pump(tracker, batch_id)
    drawn = iter([2, 1, 0])
    monkeypatch.setattr(dispatch.random, "randrange", lambda one_in: next(drawn) if one_in == 3 else None)
    for left in (63, 62, 64):
        message = tracker.outbox.sent.pop(0)
        claimed = scene.run(batch_id, message.row.position)
        finish.after(tracker, message.row.key, scene.complete(claimed), refill=message.ticket.refill)
        assert len(tracker.outbox.sent) == left


def test_without_a_window_an_end_looks_for_nothing_to_send(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(3, shards=1)
    dispatch.pump(tracker, batch_id)
    message = tracker.outbox.sent[0]
    assert message.ticket.refill == 0 and "refill" not in message.ticket.as_header()
    settled = scene.complete(scene.run(batch_id, 0))
    with statements(scene.store.engine) as sent:
        finish.after(tracker, message.row.key, settled, milestones=False, refill=message.ticket.refill)
    assert sent == []


def test_an_end_that_somebody_else_saw_fills_the_window_up_too(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(2, max_in_flight=1, options={"tolerance": 2})
    dispatch.pump(tracker, batch_id)
    scene.run(batch_id, 0)
    row = scene.at(batch_id, 0)
    recovery.run_died(tracker, row, SEGFAULT, Verdict.OBSERVED)
    assert [each.row.position for each in tracker.outbox.sent] == [0, 1]


def test_a_sweep_fills_a_window_up_whose_places_were_forgotten(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(5, max_in_flight=2)
    dispatch.pump(tracker, batch_id)
    for position in (0, 1):  # their processes died right after the commit
        scene.complete(scene.run(batch_id, position))
    tracker.outbox.sent.clear()
    assert dispatch.pump(tracker) == 2


def test_children_that_can_never_be_sent_do_not_shut_a_window(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(5, max_in_flight=1, options={"tolerance": 5})
    tracker.outbox.refuse = {0: True, 1: True, 2: True}
    assert dispatch.pump(tracker, batch_id) == 1
    assert scene.statuses(batch_id) == ["failed", "failed", "failed", "pending", "pending"]
    assert [key.position for key in tracker.outbox.published()] == [3]


def test_a_shared_window_serves_the_small_batch_beside_the_large_one(scene: Scene) -> None:
    tracker = tracker_on(scene.store, max_in_flight=8)
    large, small = scene.batch(200), scene.batch(10)
    dispatch.pump(tracker, large)
    assert len(tracker.outbox.sent) == 8
    ended: dict[uuid.UUID, int] = {}
    for turn in range(210):
        message = tracker.outbox.sent.pop(0)
        claimed = scene.run(message.row.batch_id, message.row.position)
        finish.after(tracker, message.row.key, scene.complete(claimed), refill=message.ticket.refill)
        assert len(tracker.outbox.sent) <= 8
        for each in (large, small):
            if each not in ended and scene.status(each) == "completed":
                ended[each] = turn
    assert ended[small] < 40 and ended[large] == 209


def test_a_full_queue_gets_no_more_and_its_batch_is_looked_at_again_soon(scene: Scene) -> None:
    tracker = tracker_on(scene.store, max_queue_depth=5)
    batch_id = scene.batch(some(10, queue="slow"))
    tracker.outbox.lengths["slow"] = 3
    assert dispatch.pump(tracker, batch_id) == 2
    assert [row.dispatches for row in scene.rows(batch_id)] == [1, 1] + [0] * 8, "nothing else counts as sent"
    assert scene.store.any_held_back()
    tracker.outbox.lengths["slow"] = 0
    assert dispatch.pump(tracker, batch_id) == 0, "not at once: a full queue is not asked all the time"
    scene.set_batch(batch_id, dispatch_at=later(-1.0))
    tracker.outbox.lengths["slow"] = 1
    assert dispatch.go_on(tracker), "and the rest still waits"
    assert len(tracker.outbox.sent) == 6


def test_a_queue_whose_length_nobody_knows_is_not_full(scene: Scene) -> None:
    tracker = tracker_on(scene.store, max_queue_depth=5)
    tracker.outbox.default_length = None
    assert dispatch.pump(tracker, scene.batch(some(12, queue="fanout"))) == 12


def test_callbacks_do_not_wait_for_a_full_queue(scene: Scene) -> None:
    tracker = tracker_on(scene.store, max_queue_depth=1)
    tracker.outbox.default_length = 100
    batch_id = scene.batch(0, calls=("on_finish",))
    scene.store.finish(batch_id)
    assert dispatch.pump(tracker, batch_id) == 1


def test_what_a_rate_holds_back_is_sent_when_its_time_has_come(scene: Scene) -> None:
    tracker = tracker_on(scene.store)
    batch_id = scene.batch(30, options={"rate": 1 / 60})
    assert dispatch.pump(tracker, batch_id) == 1
    assert dispatch.go_on(tracker) and len(tracker.outbox.sent) == 1, "not yet"
    scene.set_batch(batch_id, dispatch_at=later(-1.0), paid_until=later(-61.0))
    assert dispatch.go_on(tracker)
    assert len(tracker.outbox.sent) == 2


def test_a_large_batch_is_sent_by_workers_a_small_one_by_its_parent(scene: Scene) -> None:
    tracker = tracker_on(scene.store, fan_out=20, dispatch_chunk=10)
    small, large = scene.batch(20), scene.batch(some(45, queue="docs"))
    finish.started(tracker, small)
    assert (len(tracker.outbox.sent), tracker.outbox.handed_out) == (20, [])
    finish.started(tracker, large)
    assert (len(tracker.outbox.sent), tracker.outbox.handed_out) == (20, [(large, 5, 10, "docs", "demo.task")])
    sent = sum(dispatch.pump(tracker, large, limit=10) for _ in range(5))
    assert sent == 45, "five shares are all of it"


def test_a_large_batch_is_sent_by_its_parent_where_no_worker_could_be_asked(scene: Scene) -> None:
    tracker = tracker_on(scene.store, fan_out=20)
    tracker.outbox.workers_there = False
    batch_id = scene.batch(45)
    finish.started(tracker, batch_id)
    assert len(tracker.outbox.sent) == 45


def test_a_large_batch_with_a_window_needs_no_helpers(scene: Scene) -> None:
    tracker = tracker_on(scene.store, fan_out=20)
    batch_id = scene.batch(45, max_in_flight=7)
    finish.started(tracker, batch_id)
    assert (len(tracker.outbox.sent), tracker.outbox.handed_out) == (7, [])


def test_another_round_of_one_child_of_a_large_batch_is_sent_at_once(scene: Scene) -> None:
    tracker = tracker_on(scene.store, fan_out=20)
    tracker.outbox.workers_there = False
    batch_id = scene.batch(45, options={"tolerance": 45})
    finish.started(tracker, batch_id)
    for position in range(44):
        scene.complete(scene.run(batch_id, position))
    scene.fail(scene.run(batch_id, 44))
    scene.store.finish(batch_id)
    tracker.outbox.sent.clear()
    tracker.outbox.workers_there = True
    assert rounds.retry(tracker, batch_id) == 1
    assert (len(tracker.outbox.sent), tracker.outbox.handed_out) == (1, [])


@pytest.mark.parametrize("how", [finish.cancel, finish.pause])
def test_places_of_a_batch_that_ends_or_pauses_are_taken_by_others_at_once(scene: Scene, how: Any) -> None:
    tracker = tracker_on(scene.store, max_in_flight=5)
    large, other = scene.batch(50), scene.batch(10)
    scene.store.take_undispatched(large, 5)
    assert dispatch.pump(tracker, other) == 0
    how(tracker, large)
    assert [each.row.batch_id for each in tracker.outbox.sent] == [other] * 5


def test_what_was_held_back_is_sent_in_portions(scene: Scene) -> None:
    tracker = tracker_on(scene.store, max_queue_depth=10, fan_out=20)
    batch_id = scene.batch(some(100, queue="deep"))
    tracker.outbox.lengths["deep"] = 10
    assert dispatch.pump(tracker, batch_id) == 0
    scene.set_batch(batch_id, dispatch_at=later(-1.0))
    tracker.outbox.lengths["deep"] = 0  # consumers keep up
    assert dispatch.go_on(tracker), "there is more"
    assert len(tracker.outbox.sent) == 20
