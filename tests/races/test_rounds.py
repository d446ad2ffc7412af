"""Races of rounds and nested batches: retries, joins, extensions and milestones against all that may come between."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack import errors
from celery_batchtrack.behaviour import dispatch, finish, rounds
from celery_batchtrack.store import Store, schema
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import BatchRow, Claimed, Ending, NewBatch, Retried, Settled
from celery_batchtrack.vocabulary.states import Cause, Status, Verdict
from tests.races.rivals import PATIENCE, Held, Rivals
from tests.store.behaviour_kit import Told, tracker_on
from tests.store.kit import ERROR, Scene, add_up, callbacks, counts, some
from tests.store.test_nesting import NESTED, NEXT, Play, Steps, completed, group, nested_in, steps

Hold = Callable[[], Held]
ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")
NOT_COMPLETED = (Status.FAILED, Status.CRASHED, Status.CANCELLED)
DONE = Ending(Status.COMPLETED, '"done"')
FAILED = Ending(Status.FAILED, None, Cause.EXCEPTION, ERROR)


def ended(scene: Scene, **more: Any) -> uuid.UUID:
    """A batch of four that ended: three failed, one completed."""
    batch_id = scene.batch(4, calls=ALL, **more)
    for position in range(4):
        (scene.complete if position == 3 else scene.fail)(scene.run(batch_id, position))
    assert scene.store.finish(batch_id) is not None
    return batch_id


def position_of(scene: Scene, batch_id: uuid.UUID, kind: str) -> int:
    return next(row.position for row in scene.store.callback_rows(batch_id) if row.kind == kind)


def callback_states(scene: Scene, batch_id: uuid.UUID) -> dict[str, str]:
    return {row.kind: row.status for row in scene.store.callback_rows(batch_id)}


@pytest.fixture
def play(scene: Scene) -> Play:
    return Play.of(scene)


def on(store: Store) -> Told:
    """A tracker over another store, with the same canvas."""
    tracker = tracker_on(store)
    tracker.canvas = Steps()
    return tracker


# -- retry and the former round's callbacks --------------------------------------------------------


@pytest.mark.parametrize("first", ["settle", "retry"])
def test_a_retry_does_not_wait_for_the_settle_of_a_callback_and_both_are_written(
    scene: Scene, rivals: Rivals, hold: Hold, first: str
) -> None:
    batch_id, held = ended(scene), hold()
    claimed = scene.run(batch_id, position_of(scene, batch_id, "on_finish"))
    settle = ("settle", claimed.key, claimed.token, DONE)
    retry = ("retry", batch_id, NOT_COMPLETED)
    (name, *args), (other, *others) = (settle, retry) if first == "settle" else (retry, settle)
    rivals.start_held(held, getattr(held, name), *args)
    getattr(scene.store, other)(*others)
    held.commit()
    rivals.join()
    assert callback_states(scene, batch_id)["on_finish"] == "completed"
    assert scene.statuses(batch_id) == ["pending"] * 3 + ["completed"] and add_up(scene, batch_id)


def test_a_retry_that_waited_for_a_callbacks_claim_lets_it_run(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, claimer = ended(scene), hold()
    position, token = position_of(scene, batch_id, "on_finish"), new_token()
    key = ChildKey(batch_id, position)
    rivals.start_held(claimer, claimer.claim, key, 0, token, scene.worker_id, scene.slot())
    retry = rivals.start_blocked(scene.store.retry, batch_id, NOT_COMPLETED)
    claimer.commit()
    assert isinstance(retry.result(), Retried)
    assert callback_states(scene, batch_id) == {
        "on_finish": "running", "on_failure": "cancelled", "on_first_failure": "cancelled",
    }  # fmt: skip
    assert scene.store.settle(key, token, DONE).written and add_up(scene, batch_id)


def test_a_callbacks_claim_that_waited_for_a_retry_is_refused(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, retrier = ended(scene), hold()
    position = position_of(scene, batch_id, "on_finish")
    rivals.start_held(retrier, retrier.retry, batch_id, NOT_COMPLETED)
    claim = rivals.start_blocked(lambda: scene.claim(ChildKey(batch_id, position)))
    retrier.commit()
    assert "cancelled" in claim.result().reason  # type: ignore[union-attr]


def test_a_retry_waits_for_callbacks_in_their_order_and_never_crosswise(scene: Scene, rivals: Rivals) -> None:
    """Somebody has the first callback and then wants the others, as `give_back` does after a failed publish."""
    batch_id, table = ended(scene), schema.child
    positions = [row.position for row in scene.store.callback_rows(batch_id)]
    scene.set_child(ChildKey(batch_id, positions[0]), queue="q")  # rewritten: now it is the last where the table stands

    def lock(connection: sa.Connection, position: int) -> None:
        here = sa.and_(table.c.batch_id == batch_id, table.c.position == position)
        connection.execute(sa.select(table.c.position).where(here).with_for_update())

    with scene.store.engine.connect() as connection:
        lock(connection, positions[0])
        retry = rivals.start_blocked(scene.store.retry, batch_id, NOT_COMPLETED)
        for position in positions[1:]:
            lock(connection, position)
        connection.commit()
    assert isinstance(retry.result(), Retried)


# -- two retries -----------------------------------------------------------------------------------


def test_of_two_retries_at_once_one_opens_the_next_round(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = ended(scene), hold()
    ids = [row.task_id for row in scene.rows(batch_id)]
    mine = rivals.start_held(first, first.retry, batch_id, NOT_COMPLETED)
    yours = rivals.start_blocked(scene.store.retry, batch_id, NOT_COMPLETED)
    first.commit()
    won, lost = mine.result(), yours.result()
    assert isinstance(won, Retried) and (won.round, won.children) == (2, 3)
    assert isinstance(lost, BatchRow) and (lost.status, lost.round) == ("running", 2)
    assert counts(scene, batch_id) == {"pending": 3, "completed": 1}
    assert len({*ids, *(row.task_id for row in scene.rows(batch_id))}) == 7, "new ids once"
    assert add_up(scene, batch_id)


def test_many_retries_of_behaviour_at_once_publish_each_child_once(scene: Scene, rivals: Rivals) -> None:
    tracker = tracker_on(scene.store)
    for _ in range(5):
        batch_id = ended(scene)

        def retry(batch_id: uuid.UUID = batch_id) -> int:
            try:
                return rounds.retry(tracker, batch_id)
            except errors.BatchStateError:
                return -1

        assert sorted(rivals.at_once(*[retry] * 4)) == [-1, -1, -1, 3]
        sent = [each.row.position for each in tracker.outbox.sent if each.row.batch_id == batch_id]
        assert sorted(sent) == [0, 1, 2]
    assert scene.violations() == {}


# -- retry and join --------------------------------------------------------------------------------


class Slow(Store):
    """A store whose `fail_waiting` stops before it begins, until `go` is set: what led to it was read before."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.there, self.go = threading.Event(), threading.Event()

    def fail_waiting(self, key: ChildKey, nested: uuid.UUID, nested_round: int, status: Status, evidence: Evidence) -> (
        Settled
    ):  # fmt: skip
        self.there.set()
        assert self.go.wait(PATIENCE), "never let go"
        return super().fail_waiting(key, nested, nested_round, status, evidence)


@pytest.fixture
def slow(postgres_url: str, rivals: Rivals) -> Iterator[Slow]:
    store = Slow(postgres_url)
    assert store.store_id
    yield store
    store.go.set()
    rivals.join()
    store.dispose()


@pytest.mark.parametrize("what", ["a child", "a child, and it ended anew", "the body"])
def test_a_sweep_that_read_the_old_end_of_a_nested_batch_does_not_fail_who_waits_for_its_new_one(
    scene: Scene, rivals: Rivals, slow: Slow, play: Play, what: str
) -> None:
    """It read the end, then another one joined it, the parent ended and was retried, and only then it writes."""
    if what != "the body":
        batch_id, fails = play.start(steps(group("fails", "works"))), "fails"
    else:
        batch_id, fails = play.start(steps(group("works", body="body"))), "body"
        play.work(only=1)
    nested = play.only_nested(batch_id)
    for message in list(play.tracker.outbox.sent):
        claimed = scene.run(nested, message.row.position)
        scene.fail(claimed) if message.row.task == fails else scene.complete(claimed, "1")
    play.tracker.outbox.sent.clear()
    scene.store.finish(nested)
    assert scene.store.joinable() == [nested]
    late = rivals.start(finish.join, on(slow), nested)
    assert slow.there.wait(PATIENCE)
    finish.join(play.tracker, nested)
    assert scene.status(batch_id) == "failed"
    assert rounds.retry(play.tracker, batch_id) == 1
    if "anew" in what:
        scene.complete(scene.run(nested, 0), "1")
        assert scene.store.finish(nested) is not None
    slow.go.set()
    late.result()
    assert scene.statuses(batch_id) == ["pending"], "it waits for the new end"
    play.sweep()
    play.work()
    assert scene.status(batch_id) == "completed" and add_up(scene, batch_id)


def test_a_join_beside_a_retry_in_flight_changes_nothing(
    scene: Scene, rivals: Rivals, hold: Hold, play: Play
) -> None:
    batch_id, retrier = play.start(steps(group("fails", "works"))), hold()
    play.work("fails")
    nested, key = play.only_nested(batch_id), ChildKey(batch_id, 0)
    rivals.start_held(retrier, retrier.retry, batch_id, NOT_COMPLETED)
    assert not scene.store.fail_waiting(key, nested, 1, Status.FAILED, NESTED).written
    assert scene.store.joinable() == []
    retrier.commit()
    rivals.join()
    assert not scene.store.fail_waiting(key, nested, 1, Status.FAILED, NESTED).written
    assert not scene.store.join(key, nested, 1, None, keep=False).written
    assert scene.statuses(batch_id) == ["pending"] and add_up(scene, batch_id)


# -- nest, join and cancel, pause ------------------------------------------------------------------


@pytest.mark.parametrize("first", ["nest", "cancel"])
def test_nothing_of_a_batch_that_was_nested_while_its_parent_was_cancelled_stays_alive(
    scene: Scene, rivals: Rivals, hold: Hold, first: str
) -> None:
    batch_id, held = scene.batch([steps(group("one", "two"))]), hold()
    nester, canceller = (on(held), on(scene.store)) if first == "nest" else (on(scene.store), on(held))
    if first == "nest":
        (out,) = scene.store.take_undispatched(batch_id, 1)
        new, children = Steps().expand(out.child, out.batch, ())
        rivals.start_held(held, held.nest, out.child, new, children)
        cancel = rivals.start_blocked(finish.cancel, canceller, batch_id)
        held.commit()
        assert cancel.result() is not None
    else:
        rivals.start_held(held, finish.cancel, canceller, batch_id)
        (out,) = scene.store.take_undispatched(batch_id, 1) or [None]
        assert out is None, "its row is locked, and skipped"
        new, children = Steps().expand(scene.at(batch_id, 0), scene.store.batch(batch_id), ())  # type: ignore[arg-type]
        lost = rivals.start_blocked(scene.store.nest, scene.at(batch_id, 0), new, children)
        held.commit()
        assert lost.result() is False
        assert scene.store.batch(new.id) is None
    rivals.join()
    assert not any(alive for _, alive in scene.store.nested_in(batch_id)) and scene.store.forsaken() == []
    row = scene.store.batch(new.id)
    assert row is None or (row.status, row.reason) == ("cancelled", "parent")
    dispatch.pump(nester)
    assert scene.statuses(batch_id) == ["cancelled"] and add_up(scene, batch_id)


def test_a_batch_that_was_nested_while_its_parent_was_paused_does_not_run(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, held = scene.batch([steps(group("one", "two"))]), hold()
    (out,) = scene.store.take_undispatched(batch_id, 1)
    new, children = Steps().expand(out.child, out.batch, ())
    nesting = rivals.start_held(held, held.nest, out.child, new, children)
    pausing = rivals.start(finish.pause, on(scene.store), batch_id)
    with contextlib.suppress(TimeoutError):  # it may as well wait for what is in flight
        pausing.result(1.0)
    held.commit()
    assert pausing.result() is True
    if nesting.result():
        row = scene.store.batch(new.id)
        assert row is not None and row.paused_at is not None
    assert scene.store.take_undispatched(None, 10) == []


@pytest.mark.parametrize("first", ["join", "cancel"])
@pytest.mark.parametrize("how", ["join", "join_advance", "fail_waiting"])
def test_of_a_join_and_a_cancel_the_first_decides(
    scene: Scene, rivals: Rivals, hold: Hold, first: str, how: str
) -> None:
    batch_id, held = scene.batch(1, calls=ALL), hold()
    nested, key = nested_in(scene, batch_id), ChildKey(batch_id, 0)
    completed(scene, nested)
    args = {
        "join": ('"all"', False), "join_advance": (NEXT,), "fail_waiting": (Status.FAILED, NESTED),
    }[how]  # fmt: skip
    if first == "join":
        joined = rivals.start_held(held, getattr(held, how), key, nested, 1, *args)
        cancel = rivals.start_blocked(scene.store.cancel, batch_id)
    else:
        cancel = rivals.start_held(held, held.cancel, batch_id)
        joined = rivals.start_blocked(getattr(scene.store, how), key, nested, 1, *args)
    held.commit()
    assert cancel.result() is not None
    answer = joined.result()
    written = answer if isinstance(answer, bool) else answer.written
    assert written is (first == "join")
    ends = {"join": "completed", "join_advance": "cancelled", "fail_waiting": "failed"}[how]
    assert scene.statuses(batch_id) == [ends if first == "join" else "cancelled"]
    assert scene.status(batch_id) == "cancelled" and add_up(scene, batch_id)


def test_of_two_joins_at_once_one_is_written_and_the_parent_ends_once(
    scene: Scene, rivals: Rivals, play: Play
) -> None:
    for _ in range(8):
        batch_id = play.start(steps(group("one")), calls=callbacks("on_success"))
        nested = play.only_nested(batch_id)
        scene.complete(scene.run(nested, 0), '"one"')
        scene.store.finish(nested)
        trackers = [on(scene.store) for _ in range(3)]
        rivals.at_once(*[
            lambda tracker=tracker, nested=nested: finish.join(tracker, nested) for tracker in trackers
        ])  # fmt: skip
        assert scene.status(batch_id) == "completed"
        sent = [kind for tracker in trackers for kind in tracker.outbox.kinds(batch_id)]
        assert sent == ["on_success"]
    assert scene.violations() == {}


# -- extend ----------------------------------------------------------------------------------------


def test_a_batch_does_not_end_under_the_child_that_extends_it(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, extender = scene.batch(1, calls=ALL), hold()
    claimed = scene.run(batch_id)
    added = rivals.start_held(extender, extender.extend, claimed.key, claimed.token, some(2))

    def settle_and_look() -> Any:
        assert scene.complete(claimed).written
        return scene.store.finish(batch_id)

    ending = rivals.start_blocked(settle_and_look)
    extender.commit()
    assert added.result() == 1 and ending.result() is None
    assert counts(scene, batch_id) == {"pending": 2, "completed": 1} and add_up(scene, batch_id)


@pytest.mark.parametrize("other", ["settle", "cancel", "crash"])
def test_an_extension_that_waited_for_the_end_of_its_run_adds_nothing(
    scene: Scene, rivals: Rivals, hold: Hold, other: str
) -> None:
    batch_id, held = scene.batch(1, calls=ALL), hold()
    claimed = scene.run(batch_id)
    if other == "settle":
        rivals.start_held(held, held.settle, claimed.key, claimed.token, DONE)
    elif other == "cancel":
        rivals.start_held(held, held.cancel, batch_id)
    else:
        rivals.start_held(held, held.crash, scene.row(claimed.key), ERROR, Verdict.OBSERVED, None)
    extension = rivals.start_blocked(scene.store.extend, claimed.key, claimed.token, some(2))
    held.commit()
    assert extension.result() is None
    scene.store.finish(batch_id)
    assert scene.store.progress(batch_id).total == 1 and add_up(scene, batch_id)


def test_an_extension_that_waited_for_a_finish_check_adds_to_the_batch_that_goes_on(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, ender = scene.batch(1, calls=ALL), hold()
    claimed = scene.run(batch_id)
    ending = rivals.start_held(ender, ender.finish, batch_id)
    extension = rivals.start_blocked(scene.store.extend, claimed.key, claimed.token, some(1))
    ender.commit()
    assert ending.result() is None and extension.result() == 1
    assert scene.complete(claimed).written and scene.store.finish(batch_id) is None and add_up(scene, batch_id)


def test_of_two_callbacks_that_reopen_at_once_one_opens_the_next_round(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, first = ended(scene), hold()
    one, two = (scene.run(batch_id, position_of(scene, batch_id, kind)) for kind in ("on_failure", "on_finish"))
    client = scene.worker(kind="client")
    mine = rivals.start_held(first, first.reopen, one.key, one.token, client)
    yours = rivals.start_blocked(scene.store.reopen, two.key, two.token, client)
    first.commit()
    assert mine.result() is True and yours.result() is False
    row = scene.store.batch(batch_id)
    assert row is not None and (row.status, row.round) == ("open", 2)


@pytest.mark.parametrize("first", ["reopen", "retry"])
def test_of_a_retry_and_a_callback_that_reopens_one_opens_the_next_round(
    scene: Scene, rivals: Rivals, hold: Hold, first: str
) -> None:
    batch_id, held = ended(scene), hold()
    claimed = scene.run(batch_id, position_of(scene, batch_id, "on_finish"))
    client = scene.worker(kind="client")
    acts: dict[str, tuple[Any, ...]] = {
        "reopen": (claimed.key, claimed.token, client), "retry": (batch_id, NOT_COMPLETED),
    }  # fmt: skip
    other = "retry" if first == "reopen" else "reopen"
    rivals.start_held(held, getattr(held, first), *acts[first])
    lost = rivals.start_blocked(getattr(scene.store, other), *acts[other])
    held.commit()
    answer = lost.result()
    assert answer is False or (isinstance(answer, BatchRow) and not answer.ended)
    row = scene.store.batch(batch_id)
    assert row is not None and row.round == 2 and add_up(scene, batch_id)


# -- milestones ------------------------------------------------------------------------------------


def watched(scene: Scene, *percents: int, children: int = 4) -> uuid.UUID:
    batch_id = uuid7()
    entries = [
        {"task": f"at_{each}", "task_id": str(uuid.uuid4()), "signature": "{}", "percent": each} for each in percents
    ]
    scene.store.create(
        NewBatch(batch_id, "upload", json.dumps({"on_progress": entries}), {"tolerance": 0}), some(children), seal=True
    )
    return batch_id


@pytest.mark.parametrize("other", ["reach_milestones", "finish"])
def test_two_that_reach_the_same_milestone_at_once_call_it_once(
    scene: Scene, rivals: Rivals, hold: Hold, other: str
) -> None:
    batch_id, first = watched(scene, 50, 75, children=2), hold()
    for position in range(2 if other == "finish" else 1):
        scene.complete(scene.run(batch_id, position))
    mine = rivals.start_held(first, first.reach_milestones, batch_id)
    yours = rivals.start_blocked(getattr(scene.store, other), batch_id)
    first.commit()
    assert mine.result() == (2 if other == "finish" else 1)
    assert yours.result() is not None if other == "finish" else yours.result() == 0
    rows = scene.store.callback_rows(batch_id)
    assert sorted(row.task for row in rows) == (["at_50", "at_75"] if other == "finish" else ["at_50"])
    assert add_up(scene, batch_id)


def test_settlers_of_a_whole_batch_at_once_call_each_milestone_once(scene: Scene, rivals: Rivals) -> None:
    for _ in range(5):
        batch_id, tracker = watched(scene, 10, 50, 90, children=8), tracker_on(scene.store)
        runs = [scene.run(batch_id, position) for position in range(8)]
        rivals.at_once(*[
            lambda run=run, tracker=tracker: finish.after(tracker, run.key, scene.complete(run)) for run in runs
        ])  # fmt: skip
        assert scene.status(batch_id) == "completed"
        assert sorted(row.task for row in scene.store.callback_rows(batch_id)) == ["at_10", "at_50", "at_90"]
        assert tracker.outbox.kinds(batch_id) == ["on_progress"] * 3
    assert scene.violations() == {}


# -- all of them -----------------------------------------------------------------------------------


def failed_tree(scene: Scene, play: Play) -> tuple[uuid.UUID, list[uuid.UUID]]:
    """Ended: a child whose nested batch's body failed, one whose batch's nested batch did, and one that failed. Its
    own callbacks wait. With the batches nested in it."""
    batch_id = play.start(
        steps(group("works", "works", body="body")), steps(group("works", group("fails"))), steps("fails"),
        calls=callbacks(*ALL), shards=1,
    )  # fmt: skip
    sent = play.tracker.outbox.sent
    while at := [n for n, each in enumerate(sent) if each.row.kind == "child" or each.row.batch_id != batch_id]:
        sent.insert(0, sent.pop(at[0]))
        play.work("fails", "body", only=1)
    sent.clear()
    assert scene.status(batch_id) == "failed"
    nested = play.nested(batch_id)
    return batch_id, [*nested, *(below for each in nested for below in play.nested(each))]


def test_retries_with_nested_batches_beside_claims_and_settles_never_deadlock(
    scene: Scene, rivals: Rivals, play: Play
) -> None:
    for _ in range(10):
        batch_id, nested = failed_tree(scene, play)
        finishing = scene.run(batch_id, position_of(scene, batch_id, "on_finish"))
        warning = scene.run(batch_id, position_of(scene, batch_id, "on_first_failure"))
        failing = ChildKey(batch_id, position_of(scene, batch_id, "on_failure"))
        rows = [row for each in (*nested, batch_id) for row in scene.rows(each)]
        trackers = [on(scene.store) for _ in range(4)]
        slots = [scene.slot() for _ in range(3)]

        def run_what_is_pending(slot: str, tracker: Told, rows: list[Any] = rows) -> None:
            for row in rows * 3:
                claimed = scene.store.claim(row.key, row.attempt, new_token(), scene.worker_id, slot)
                if isinstance(claimed, Claimed):
                    finish.after(tracker, row.key, scene.complete(claimed, "1"))

        rivals.at_once(
            lambda batch_id=batch_id, tracker=trackers[0]: rounds.retry(tracker, batch_id),
            lambda slot=slots[0], tracker=trackers[1]: run_what_is_pending(slot, tracker),
            lambda slot=slots[1], tracker=trackers[2]: run_what_is_pending(slot, tracker),
            lambda run=finishing: scene.complete(run),
            lambda run=warning: scene.fail(run),
            lambda slot=slots[2], key=failing: scene.store.claim(key, 0, new_token(), scene.worker_id, slot),
            lambda nested=nested, tracker=trackers[3]: [finish.join(tracker, each) for each in nested],
            lambda nested=nested: [scene.store.finish(each) for each in nested],
            lambda: scene.store.take_undispatched(None, 1),
        )
        for tracker in trackers:
            play.tracker.outbox.sent += tracker.outbox.sent
        play.work()
        for each in (batch_id, *nested):  # whose message was taken along, and what may have been left
            for row in [*scene.rows(each), *scene.store.callback_rows(each)]:
                if row.status == "pending" and row.waits_on_batch is None:
                    scene.set_child(row.key, dispatched_at=None)
        play.sweep()
        play.work()
        assert [scene.status(each) for each in (batch_id, *nested)] == ["completed"] * 4
        assert sum(row.kind == "on_success" for row in scene.store.callback_rows(batch_id)) == 1
    assert scene.violations() == {}
