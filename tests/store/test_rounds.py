"""Rounds, milestones, deadlines, labels, weights: what a batch's whole life needs, on every database."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack import errors
from celery_batchtrack.behaviour import ending, finish, rounds
from celery_batchtrack.store import schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.policies import CrashRate, Tolerance
from celery_batchtrack.vocabulary.records import BatchRow, Ending, FirstFailure, NewBatch, NewChild, Release, Retried
from celery_batchtrack.vocabulary.states import Cause, EndReason, Status, Verdict
from tests.store.behaviour_kit import Told, tracker_on
from tests.store.kit import (
    Scene,
    add_up,
    callbacks,
    counts,
    dispatch_all,
    documents,
    items_by_status,
    killed,
    part,
    refused,
    some,
)
from tests.store.test_nesting import NESTED, Play, group, steps

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")
NOT_COMPLETED = (Status.FAILED, Status.CRASHED, Status.CANCELLED)


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store)


@pytest.fixture
def play(scene: Scene) -> Play:
    return Play.of(scene)


def mixed(scene: Scene, **more: Any) -> uuid.UUID:
    """Ended, with two shards: completed, failed, crashed, cancelled, completed; two items each, of other weights."""
    children = [child for weight in (2, 3, 5, 7, 11) for child in some(1, items=2, weight=weight)]
    batch_id = scene.batch(children, shards=2, calls=ALL, **more)
    runs = [scene.run(batch_id, position) for position in range(5)]
    scene.complete(runs[0])
    scene.fail(runs[1])
    scene.crash(runs[2])
    scene.store.settle(runs[3].key, runs[3].token, Ending(Status.CANCELLED, cause=Cause.IGNORED))
    scene.complete(runs[4])
    assert scene.store.finish(batch_id) is not None
    return batch_id


def retried(scene: Scene, batch_id: uuid.UUID, statuses: Sequence[Status] = NOT_COMPLETED, **more: Any) -> Retried:
    done = scene.store.retry(batch_id, statuses, **more)
    assert isinstance(done, Retried), done
    return done


def callback_ids(scene: Scene, batch_id: uuid.UUID, kind: str) -> list[str]:
    return [row.task_id for row in scene.store.callback_rows(batch_id) if row.kind == kind]


def declared_id(scene: Scene, batch_id: uuid.UUID, kind: str) -> str:
    row = scene.store.batch(batch_id)
    assert row is not None
    return str(json.loads(row.callbacks)[kind][0]["task_id"])


def complete_all(scene: Scene, batch_id: uuid.UUID) -> None:
    for row in scene.rows(batch_id):
        if row.status == "pending":
            scene.complete(scene.run(batch_id, row.position))


# -- retry -----------------------------------------------------------------------------------------


def test_what_did_not_complete_runs_again_with_all_but_its_attempts_anew(scene: Scene) -> None:
    batch_id = mixed(scene)
    before = scene.rows(batch_id)
    done = retried(scene, batch_id)
    assert (done.batch_id, done.round, done.children, done.batches) == (batch_id, 2, 3, (batch_id,))
    row = scene.store.batch(batch_id)
    assert row is not None and (row.status, row.round, row.finished_at, row.reason) == ("running", 2, None, None)
    assert scene.statuses(batch_id) == ["completed", "pending", "pending", "pending", "completed"]
    for old, new in zip(before, scene.rows(batch_id), strict=True):
        if old.status == "completed":
            assert new == old
            continue
        assert new.attempt == old.attempt == 1 and new.signature == old.signature and new.items == old.items
        assert (new.crashes, new.retries, new.dispatches, new.verdict, new.cause) == (0, 0, 0, None, None)
        assert (new.finished_at, new.dispatched_at, new.worker_id, new.slot) == (None,) * 4
    ids = {each.task_id for each in (*before, *scene.rows(batch_id))}
    assert len(ids) == 5 + 3, "each that runs again has another id, and one of its own"
    assert dispatch_all(scene, batch_id) == [1, 2, 3]


@pytest.mark.parametrize("statuses", [NOT_COMPLETED, (Status.CRASHED,), (Status.CANCELLED, Status.FAILED)])
def test_after_a_retry_the_tally_is_exact_by_children_items_and_weight(
    scene: Scene, statuses: tuple[Status, ...]
) -> None:
    batch_id = mixed(scene)
    retried(scene, batch_id, statuses)
    names = ("failed", "crashed", "cancelled")
    progress = scene.store.progress(batch_id)
    assert progress.pending == len(statuses) and progress.completed == 2
    assert progress.items_settled == 2 * (5 - len(statuses))
    weights = dict(zip(names, (3, 5, 7), strict=True))
    assert (progress.weight_total, progress.weight_done) == (28, 28 - sum(weights[each.value] for each in statuses))
    for name in names:
        assert getattr(progress, name) == (Status(name) not in statuses)
    assert add_up(scene, batch_id)
    complete_all(scene, batch_id)
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == ("completed" if len(statuses) == 3 else "failed")
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("state", ["open", "running", "paused"])
def test_a_batch_that_has_not_ended_is_not_retried(scene: Scene, tracker: Told, state: str) -> None:
    batch_id = scene.batch(2, seal=state != "open")
    if state != "open":
        scene.fail(scene.run(batch_id))
    if state == "paused":
        scene.store.pause(batch_id, "by hand")
    before = scene.rows(batch_id)
    answer = scene.store.retry(batch_id, NOT_COMPLETED)
    assert isinstance(answer, BatchRow) and not answer.ended
    with pytest.raises(errors.BatchStateError, match="retry it when it has ended"):
        rounds.retry(tracker, batch_id)
    assert scene.rows(batch_id) == before and answer.round == 1


def test_where_nothing_is_to_be_retried_the_batch_stays_as_it_is(scene: Scene, tracker: Told) -> None:
    good, bad = scene.batch(1, calls=ALL), mixed(scene)
    complete_all(scene, good)
    scene.store.finish(good)
    for batch_id, statuses in ((good, NOT_COMPLETED), (bad, ())):
        before = scene.store.batch(batch_id)
        assert scene.store.retry(batch_id, statuses) == before
        assert rounds.retry(tracker, batch_id, statuses) == 0
        assert scene.store.batch(batch_id) == before
        assert {row.status for row in scene.store.callback_rows(batch_id)} == {"pending"}
    assert scene.store.retry(uuid7(), NOT_COMPLETED) is None
    with pytest.raises(errors.BatchNotFound):
        rounds.retry(tracker, uuid7())
    assert tracker.heard == []


def test_the_former_rounds_callbacks_that_wait_are_cancelled_and_what_runs_may_settle(scene: Scene) -> None:
    batch_id = mixed(scene)
    rows = {row.kind: row for row in scene.store.callback_rows(batch_id)}
    assert set(rows) == {"on_failure", "on_finish", "on_first_failure"}
    running = scene.run(batch_id, rows["on_failure"].position)
    scene.complete(scene.run(batch_id, rows["on_first_failure"].position))
    retried(scene, batch_id)
    states = {row.kind: (row.status, row.cause) for row in scene.store.callback_rows(batch_id)}
    assert states == {
        "on_failure": ("running", None), "on_finish": ("cancelled", "cancelled"),
        "on_first_failure": ("completed", None),
    }  # fmt: skip
    assert refused(scene.claim(rows["on_finish"].key)).reason == "the row is cancelled"
    assert scene.complete(running).written
    assert add_up(scene, batch_id)


def test_callbacks_are_called_once_a_round_and_by_the_declared_id_the_first_time(scene: Scene) -> None:
    batch_id = mixed(scene)
    retried(scene, batch_id)
    complete_all(scene, batch_id)
    scene.store.finish(batch_id)
    rows = scene.store.callback_rows(batch_id)
    assert sorted((row.round, row.kind) for row in rows) == [
        (1, "on_failure"), (1, "on_finish"), (1, "on_first_failure"), (2, "on_finish"), (2, "on_success"),
    ]  # fmt: skip
    assert callback_ids(scene, batch_id, "on_success") == [declared_id(scene, batch_id, "on_success")]
    first, second = callback_ids(scene, batch_id, "on_finish")
    assert first == declared_id(scene, batch_id, "on_finish") != second
    assert len({row.position for row in rows} | {row.position for row in scene.rows(batch_id)}) == len(rows) + 5
    found = scene.store.by_result_id(first)
    assert found is not None and (found.round, found.task_id) == (2, second), "asked for by its old id"
    assert add_up(scene, batch_id)


def test_on_first_failure_is_called_again_in_the_next_round(scene: Scene) -> None:
    batch_id = mixed(scene)
    retried(scene, batch_id)
    assert scene.fail(scene.run(batch_id, 2)).callbacks
    assert not scene.fail(scene.run(batch_id, 1)).callbacks
    rows = [row for row in scene.store.callback_rows(batch_id) if row.kind == "on_first_failure"]
    assert [row.round for row in rows] == [1, 2] and add_up(scene, batch_id)


def test_what_runs_again_may_go_to_another_queue_and_with_other_options(scene: Scene, tracker: Told) -> None:
    batch_id = mixed(scene)
    assert rounds.retry(tracker, batch_id, overrides={"queue": "big", "priority": 3, "kwargs": {"slow": True}}) == 3
    assert [row.queue for row in scene.rows(batch_id)] == [None, "big", "big", "big", None]
    assert [row.rerouted for row in scene.rows(batch_id)] == [False, True, True, True, False]
    for position in (1, 2, 3):
        stored = json.loads(scene.at(batch_id, position).signature or "")
        assert stored == {"task": "demo.task", "options": {"priority": 3}, "kwargs": {"slow": True}}
    assert [message.row.queue for message in tracker.outbox.sent] == ["big"] * 3
    assert [(each.round, each.children) for each in tracker.of(events.BatchRetried)] == [(2, 3)]


def test_of_a_split_child_the_parts_run_again(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b", "c"), documents("x")])
    scene.split(scene.run(batch_id), killed("a"), part("b", "c"))
    complete_all(scene, batch_id)
    scene.store.finish(batch_id)
    assert retried(scene, batch_id).children == 1
    assert scene.statuses(batch_id) == ["split", "completed", "pending", "completed"]
    assert items_by_status(scene, batch_id) == {"completed": ["b", "c", "x"], "pending": ["a"]}
    complete_all(scene, batch_id)
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "completed" and add_up(scene, batch_id)


def test_a_late_end_of_the_former_round_changes_nothing(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.crash(claimed, Verdict.LEASE)
    scene.store.finish(batch_id)
    retried(scene, batch_id)
    assert scene.complete(claimed).late and not scene.store.release(claimed.key, claimed.token, Release())
    assert scene.statuses(batch_id) == ["pending"]
    again = scene.run(batch_id)
    assert scene.complete(claimed).late and scene.complete(again).written
    assert add_up(scene, batch_id)


def test_a_cancelled_batch_runs_on_after_a_retry(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(3, calls=ALL, deadline_in=3600.0)
    scene.complete(scene.run(batch_id))
    scene.store.pause(batch_id, "by hand")
    finish.cancel(tracker, batch_id, EndReason.DEADLINE)
    assert rounds.retry(tracker, batch_id) == 2
    row = scene.store.batch(batch_id)
    assert row is not None and (row.reason, row.paused_at, row.deadline_at) == (None, None, None)
    complete_all(scene, batch_id)
    assert finish.look(tracker, batch_id) is not None and scene.status(batch_id) == "completed"
    assert add_up(scene, batch_id)


def test_a_breaker_counts_a_new_round_from_its_beginning(scene: Scene) -> None:
    """What failed before is open again: it must not be missing among the runs that ended well."""
    batch_id = scene.batch(40, options={"crash_rate": CrashRate(50.0).as_option()})
    for position in range(20):
        scene.fail(scene.run(batch_id, position))
    begin = scene.store.current_time().timestamp() - 100
    scene.set_batch(batch_id, crash_samples=[[begin, 20, 0]])  # the window has slid on to after those ends
    scene.store.cancel(batch_id)
    retried(scene, batch_id)
    for position in range(10):
        scene.complete(scene.run(batch_id, position))
    paused = [scene.crash(scene.run(batch_id, position)).paused for position in (10, 11, 12)]
    assert paused == [None, None, None], "three of thirteen died"


def test_a_former_rounds_callback_that_gives_its_row_back_is_not_in_the_way_of_pruning(scene: Scene) -> None:
    """It ran when its batch was retried, and its worker died: in that round it can never run again."""
    batch_id = scene.batch(1, calls=("on_finish",))
    scene.fail(scene.run(batch_id))
    scene.store.finish(batch_id)
    running = scene.run(batch_id, 1)
    retried(scene, batch_id)
    scene.crash(running, again=0.0)
    complete_all(scene, batch_id)
    scene.store.finish(batch_id)
    scene.complete(scene.run(batch_id, 2))
    assert dispatch_all(scene, batch_id) == []
    scene.set_batch(batch_id, finished_at=later(-100.0))
    assert scene.store.prune(completed=1, other=1) == 1


# -- retry of nested batches -----------------------------------------------------------------------


def test_nested_batches_go_on_with_what_did_not_complete_in_them(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("works", group("works", "fails")), "after"), steps("other"))
    play.work("fails")
    line = play.line(batch_id)
    assert [scene.status(each) for each in line] == ["failed"] * 3
    done = retried(scene, batch_id)
    assert (done.children, done.batches) == (1, tuple(line))
    assert [row.round for row in map(scene.store.batch, line) if row is not None] == [2, 2, 2]
    assert scene.store.joinable() == [], "their old ends are not the new ones"
    assert [scene.statuses(each) for each in line] == [
        ["pending", "completed"], ["completed", "pending"], ["completed", "pending"],
    ]  # fmt: skip
    assert scene.at(batch_id, 0).waits_on_batch == line[1]
    play.ran.clear()
    for each in done.batches:
        finish.started(play.tracker, each)
    play.work()
    assert play.ran == ["fails", "after"] and [scene.status(each) for each in line] == ["completed"] * 3
    assert add_up(scene, batch_id)


def test_a_nested_batch_whose_body_alone_failed_calls_it_again(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one", "two", body="body"), "after"))
    play.work("body")
    nested = play.only_nested(batch_id)
    play.ran.clear()
    assert rounds.retry(play.tracker, batch_id) == 1
    assert scene.store.joinable() == []
    play.work()
    assert play.ran == ["body", "after"] and scene.status(batch_id) == scene.status(nested) == "completed"
    assert scene.store.batch(nested).round == 1  # type: ignore[union-attr]
    assert add_up(scene, batch_id)


def test_the_old_end_of_a_body_does_not_fail_who_waits_for_its_new_one(scene: Scene, play: Play) -> None:
    """A sweep read it before the retry, and writes after it."""
    batch_id = play.start(steps(group("one", body="body")))
    play.work("body")
    nested = play.only_nested(batch_id)
    retried(scene, batch_id)
    answer = scene.store.fail_waiting(ChildKey(batch_id, 0), nested, 1, Status.FAILED, NESTED)
    assert not answer.written
    assert scene.statuses(batch_id) == ["pending"]


def test_a_body_that_was_a_batch_goes_on_with_what_did_not_complete_in_it(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one", body=group("works", "fails"))))
    play.work("fails")
    assert scene.status(batch_id) == "failed"
    play.ran.clear()
    assert rounds.retry(play.tracker, batch_id) == 1
    play.sweep()
    play.work()
    assert "fails" in play.ran and scene.status(batch_id) == "completed"


def test_what_completed_in_a_nested_batch_does_not_run_again(scene: Scene, play: Play) -> None:
    """Its parent was cancelled between its end and the join."""
    batch_id = play.start(steps(group("one", "two"), "after"))
    nested = play.only_nested(batch_id)
    complete_all(scene, nested)
    scene.store.finish(nested)
    finish.cancel(play.tracker, batch_id)
    assert scene.statuses(batch_id) == ["cancelled"] and scene.status(nested) == "completed"
    assert rounds.retry(play.tracker, batch_id) == 1
    play.sweep()
    play.work()
    assert play.ran == ["after"], "the others completed"
    assert scene.status(batch_id) == "completed"


def test_a_nested_batch_that_is_gone_is_made_anew(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one")))
    finish.cancel(play.tracker, batch_id)
    nested = play.only_nested(batch_id)
    scene.execute(sa.delete(schema.batch).where(schema.batch.c.id == nested))
    assert rounds.retry(play.tracker, batch_id) == 1
    play.work()
    assert play.ran == ["one"] and scene.status(batch_id) == "completed" and add_up(scene, batch_id)


def test_a_nested_batch_alone_is_not_retried_when_its_parent_has_gone_on(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("fails")))
    play.work("fails")
    nested = play.only_nested(batch_id)
    with pytest.raises(errors.BatchStateError, match="retry that one"):
        rounds.retry(play.tracker, nested)
    assert scene.status(nested) == "failed"


# -- reopen and extend -----------------------------------------------------------------------------


def ended_with_running_callback(scene: Scene) -> tuple[uuid.UUID, Any]:
    batch_id = scene.batch(1, calls=("on_success", "on_finish"))
    complete_all(scene, batch_id)
    scene.store.finish(batch_id)
    return batch_id, scene.run(batch_id, 1)


def test_a_running_callback_opens_the_next_round_and_its_seal_starts_it(scene: Scene) -> None:
    batch_id, claimed = ended_with_running_callback(scene)
    client = scene.worker(kind="client")
    assert scene.store.reopen(claimed.key, claimed.token, client)
    row = scene.store.batch(batch_id)
    assert row is not None and (row.status, row.round, row.sealed_at, row.opened_by) == ("open", 2, None, client)
    assert {each.kind: each.status for each in scene.store.callback_rows(batch_id)} == {
        "on_success": "running", "on_finish": "cancelled",
    }  # fmt: skip
    assert not scene.store.reopen(claimed.key, claimed.token, client), "twice"
    assert scene.store.add(batch_id, some(2)) == 3 and dispatch_all(scene, batch_id) == []
    assert scene.complete(claimed).written and scene.store.finish(batch_id) is None
    assert scene.store.seal(batch_id) and dispatch_all(scene, batch_id) == [3, 4]
    complete_all(scene, batch_id)
    assert scene.store.finish(batch_id) is not None
    assert [each.round for each in scene.store.callback_rows(batch_id)] == [1, 1, 2, 2]
    assert add_up(scene, batch_id)


def test_only_a_callback_of_the_present_round_that_still_runs_reopens(scene: Scene) -> None:
    batch_id, claimed = ended_with_running_callback(scene)
    client, store = scene.worker(kind="client"), scene.store
    assert not store.reopen(claimed.key, uuid.uuid4(), client), "another run"
    assert not store.reopen(ChildKey(batch_id, 0), claimed.token, client), "another row"
    scene.set_batch(batch_id, round=2)
    assert not store.reopen(claimed.key, claimed.token, client), "of a former round"
    scene.set_batch(batch_id, round=1)
    scene.complete(claimed)
    assert not store.reopen(claimed.key, claimed.token, client), "it is over"
    child_of_running = scene.run(scene.batch(1))
    assert not store.reopen(child_of_running.key, child_of_running.token, client), "its batch runs"
    assert scene.status(batch_id) == "completed" and add_up(scene, batch_id)


def test_a_reopened_batch_whose_openers_worker_is_lost_is_abandoned(scene: Scene, tracker: Told) -> None:
    batch_id, claimed = ended_with_running_callback(scene)
    client = scene.worker(kind="client")
    scene.store.reopen(claimed.key, claimed.token, client)
    scene.store.add(batch_id, some(1))
    assert scene.store.abandoned() == []
    scene.set_worker(client, lost_at=later(0.0), lost_by="host")
    assert scene.store.abandoned() == [batch_id]
    finish.cancel(tracker, batch_id, EndReason.ABANDONED)
    assert scene.statuses(batch_id) == ["completed", "cancelled"] and add_up(scene, batch_id)


def test_a_nested_batch_is_reopened_only_while_somebody_waits_for_it(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one", body="body")))
    play.work(only=1)
    nested = play.only_nested(batch_id)
    claimed = scene.run(nested, play.tracker.outbox.sent.pop().row.position)
    client = scene.worker(kind="client")
    assert scene.store.reopen(claimed.key, claimed.token, client)
    play.end(claimed.key, claimed)
    assert scene.statuses(batch_id) == ["pending"], "it waits for the next round's body"
    scene.store.add(nested, [steps("more")])
    scene.store.seal(nested)
    finish.started(play.tracker, nested)
    play.work()
    assert play.ran == ["one", "more", "body"] and scene.status(batch_id) == "completed"
    assert add_up(scene, batch_id)


def test_a_running_child_adds_others_to_its_batch(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    assert scene.store.extend(claimed.key, claimed.token, some(2, items=3)) == 1
    assert scene.store.extend(claimed.key, uuid.uuid4(), some(1)) is None, "another run"
    scene.complete(claimed)
    assert scene.store.extend(claimed.key, claimed.token, some(1)) is None, "it is over"
    assert scene.store.finish(batch_id) is None
    assert dispatch_all(scene, batch_id) == [1, 2]
    other = scene.run(batch_id, 1)
    scene.store.cancel(batch_id)
    assert scene.store.extend(other.key, other.token, some(1)) is None, "its batch is over"
    assert scene.store.progress(batch_id).items_total == 7 and add_up(scene, batch_id)


def test_a_callback_that_runs_while_its_batch_does_adds_children_too(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=("on_first_failure",))
    scene.fail(scene.run(batch_id))
    claimed = scene.run(batch_id, 2)
    assert scene.store.extend(claimed.key, claimed.token, some(1)) == 3
    assert counts(scene, batch_id) == {"pending": 2, "failed": 1} and add_up(scene, batch_id)


# -- callbacks -------------------------------------------------------------------------------------


def test_callbacks_that_did_not_complete_are_called_again(scene: Scene, tracker: Told) -> None:
    batch_id = scene.batch(0, calls=("on_success", "on_finish", "on_success"))
    scene.store.finish(batch_id)
    scene.complete(scene.run(batch_id, 0))
    failed = scene.run(batch_id, 1)
    scene.fail(failed)
    before = scene.row(failed.key)
    assert rounds.retry_callbacks(tracker, batch_id) == 1
    row = scene.row(failed.key)
    assert (row.status, row.cause, row.attempt, row.result_id) == ("pending", None, 1, before.result_id)
    assert row.task_id != before.task_id
    assert sorted(message.row.position for message in tracker.outbox.sent) == [1, 2]
    scene.complete(scene.run(batch_id, 1))
    assert rounds.retry_callbacks(tracker, batch_id) == 0 and rounds.retry_callbacks(tracker, uuid7()) == 0
    assert scene.status(batch_id) == "completed" and add_up(scene, batch_id)


def test_callbacks_of_a_former_round_are_not_called_again(scene: Scene) -> None:
    batch_id = scene.batch(1, calls=("on_failure", "on_finish"))
    scene.fail(scene.run(batch_id))
    scene.store.finish(batch_id)
    scene.fail(scene.run(batch_id, 1))
    retried(scene, batch_id)
    done = scene.store.retry_callbacks(batch_id, NOT_COMPLETED)
    assert done is not None and done.children == 0
    assert {row.status for row in scene.store.callback_rows(batch_id)} == {"failed", "cancelled"}


# -- milestones ------------------------------------------------------------------------------------


def milestones(*percents: int, **kinds: Any) -> str:
    entries = [
        {"task": f"demo.at_{each}", "task_id": str(uuid.uuid4()), "signature": "{}", "percent": each}
        for each in percents
    ]
    return json.dumps({**json.loads(callbacks(*kinds.get("calls", ()))), "on_progress": entries})


def with_milestones(scene: Scene, *percents: int, children: Sequence[NewChild] = (), **more: Any) -> uuid.UUID:
    batch_id = uuid7()
    calls = milestones(*percents, calls=more.pop("calls", ()))
    scene.store.create(
        NewBatch(batch_id, "upload", calls, {"tolerance": 0, **more.pop("options", {})}, **more),
        children or some(4), seal=True,
    )  # fmt: skip
    return batch_id


def reached(scene: Scene, batch_id: uuid.UUID) -> list[tuple[int, str]]:
    rows = scene.store.callback_rows(batch_id)
    return sorted((row.round, row.task.partition("_")[2]) for row in rows if row.kind == "on_progress")


def test_milestones_are_called_once_when_they_are_reached(scene: Scene) -> None:
    batch_id = with_milestones(scene, 25, 50, 75)
    assert scene.store.watched_for_progress() == [batch_id]
    assert scene.store.reach_milestones(batch_id) == 0
    scene.complete(scene.run(batch_id, 0))
    assert scene.store.reach_milestones(batch_id) == 1 and scene.store.reach_milestones(batch_id) == 0
    scene.fail(scene.run(batch_id, 1))
    scene.crash(scene.run(batch_id, 2))
    assert scene.store.reach_milestones(batch_id) == 2, "it counts what is settled, however"
    assert reached(scene, batch_id) == [(1, "25"), (1, "50"), (1, "75")]
    assert add_up(scene, batch_id)


def test_milestones_go_by_weight(scene: Scene) -> None:
    batch_id = with_milestones(scene, 50, children=[*some(1, weight=49), *some(1, weight=51)])
    scene.complete(scene.run(batch_id, 0))
    assert scene.store.reach_milestones(batch_id) == 0
    scene.complete(scene.run(batch_id, 1))
    assert scene.store.reach_milestones(batch_id) == 1


def test_the_end_calls_the_milestones_that_are_left_but_none_of_a_cancelled_batch(scene: Scene) -> None:
    done, none, cancelled = (with_milestones(scene, 25, 75, calls=("on_finish",)) for _ in range(3))
    scene.complete(scene.run(done, 0))
    scene.store.reach_milestones(done)
    complete_all(scene, done)
    complete_all(scene, none)
    for batch_id in (done, none):
        scene.store.finish(batch_id)
        assert reached(scene, batch_id) == [(1, "25"), (1, "75")]
        assert scene.store.reach_milestones(batch_id) == 0 and add_up(scene, batch_id)
    scene.store.cancel(cancelled)
    assert reached(scene, cancelled) == [] and scene.store.watched_for_progress() == []


def test_milestones_are_called_in_each_round(scene: Scene) -> None:
    batch_id = with_milestones(scene, 50, 100)
    for position in range(4):
        (scene.complete if position else scene.fail)(scene.run(batch_id, position))
    scene.store.finish(batch_id)
    ids = callback_ids(scene, batch_id, "on_progress")
    retried(scene, batch_id)
    assert scene.store.reach_milestones(batch_id) == 1, "three quarters are done already"
    complete_all(scene, batch_id)
    scene.store.finish(batch_id)
    assert reached(scene, batch_id) == [(1, "100"), (1, "50"), (2, "100"), (2, "50")]
    assert len({*ids, *callback_ids(scene, batch_id, "on_progress")}) == 4
    assert add_up(scene, batch_id)


def test_a_settle_publishes_the_milestone_that_it_reaches(scene: Scene, tracker: Told) -> None:
    batch_id = with_milestones(scene, 50)
    for position in range(3):
        claimed = scene.run(batch_id, position)
        finish.after(tracker, claimed.key, scene.complete(claimed))
    assert tracker.outbox.kinds(batch_id) == ["on_progress"]


# -- deadlines -------------------------------------------------------------------------------------


def test_batches_are_overdue_after_their_deadline_until_they_end(scene: Scene, play: Play) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    late, absolute = scene.batch(2, deadline_in=-1.0, calls=ALL), scene.batch(1, deadline=past, seal=False)
    scene.batch(1, deadline_in=3600.0)
    scene.batch(1)
    over = scene.batch(0, deadline_in=-1.0)
    scene.store.finish(over)
    assert set(scene.store.overdue_batches()) == {late, absolute}
    play.sweep()
    for batch_id in (late, absolute):
        row = scene.store.batch(batch_id)
        assert row is not None and (row.status, row.reason) == ("cancelled", "deadline")
    assert scene.called(late) == ["on_finish"] and scene.store.overdue_batches() == []
    assert add_up(scene, late)


# -- labels ----------------------------------------------------------------------------------------


def test_batches_are_listed_by_tags_metadata_name_and_parent(scene: Scene) -> None:
    both = scene.batch(0, tags=["nightly", "eu"], metadata={"customer": 7, "plan": "gold", "trial": False})
    one = scene.batch(1, tags=["nightly"], metadata={"customer": "7", "ratio": 1.5, "none": None})
    bare = scene.batch(0)
    assert scene.store.list_batches(tags=["nightly"]) == [one, both]
    assert scene.store.list_batches(tags=["nightly", "eu"]) == [both]
    assert scene.store.list_batches(tags=["night"]) == []
    for metadata, found in [
        ({"customer": 7}, [both]), ({"customer": "7"}, [one]), ({"plan": "gold", "customer": 7}, [both]),
        ({"plan": "gold", "customer": "7"}, []), ({"trial": False}, [both]), ({"ratio": 1.5}, [one]),
        ({"none": None}, [one]), ({"customer": 8}, []), ({"absent": None}, []),
    ]:  # fmt: skip
        assert scene.store.list_batches(metadata=metadata) == found, metadata
    nested = uuid7()
    waiting = NewChild("celery.group", "an-id", "{}", weight=0)
    scene.store.create_nested(NewBatch(nested, "inner", "{}", {}, parent_batch=one), waiting)
    assert scene.store.list_batches(parent=one) == [nested] and scene.store.list_batches(parent=bare) == []
    assert scene.store.list_batches(name="inner", tags=[], parent=one) == [nested]
    assert scene.store.list_batches(name="upload", tags=["eu"], statuses=["running"], metadata={"plan": "gold"}) == [
        both
    ]


def test_metadata_that_is_a_list_or_a_mapping_is_found_too(scene: Scene) -> None:
    batch_id = scene.batch(0, metadata={"pages": [1, 2], "site": {"city": "Bern", "floor": 2}})
    for metadata in ({"pages": [1, 2]}, {"site": {"city": "Bern", "floor": 2}}):
        assert scene.store.list_batches(metadata=metadata) == [batch_id], metadata
    assert scene.store.list_batches(metadata={"site": {"city": "Basel"}}) == []


def test_true_is_not_one(scene: Scene) -> None:
    one, true = scene.batch(0, metadata={"final": 1}), scene.batch(0, metadata={"final": True})
    assert scene.store.list_batches(metadata={"final": True}) == [true]
    assert scene.store.list_batches(metadata={"final": 1}) == [one]


# -- weights ---------------------------------------------------------------------------------------


def test_weights_add_up_through_settle_split_overturn_and_retry(scene: Scene) -> None:
    batch_id = scene.batch(
        [documents("a", "b", "c", weight=10), documents("x", weight=7), documents("y", weight=3)], tolerance=3
    )

    def weights() -> tuple[int, int]:
        assert add_up(scene, batch_id)
        progress = scene.store.progress(batch_id)
        return progress.weight_done, progress.weight_total

    assert weights() == (0, 20)
    scene.split(scene.run(batch_id, 0), killed("a"), part("b", "c"))
    assert weights() == (3, 20), "a third, rounded down; the rest goes with the others"
    assert [scene.at(batch_id, position).weight for position in (3, 4)] == [3, 7]
    overturned = scene.run(batch_id, 1)
    scene.crash(overturned, Verdict.LEASE)
    assert weights() == (10, 20)
    assert scene.complete(overturned).overturned and weights() == (10, 20)
    scene.fail(scene.run(batch_id, 2))
    assert weights() == (13, 20) and scene.store.progress(batch_id).percent == 65
    complete_all(scene, batch_id)
    assert weights() == (20, 20)
    scene.store.finish(batch_id)
    retried(scene, batch_id)
    assert weights() == (14, 20)
    complete_all(scene, batch_id)
    assert weights() == (20, 20)


# -- tolerance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "ends"), [(4, "failed"), (5, "partial"), (6, "partial")])
def test_a_tolerance_of_items_counts_items_of_children_and_parts(scene: Scene, allowed: int, ends: str) -> None:
    option = Tolerance(items=allowed).as_option()
    batch_id = scene.batch([documents("a", "b", "c"), *some(2, items=4), *some(1, items=9)], tolerance=option)
    scene.split(scene.run(batch_id, 0), killed("a"), part("b", "c"))
    scene.fail(scene.run(batch_id, 1))
    complete_all(scene, batch_id)
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == ends
    assert add_up(scene, batch_id)


# -- telling Celery's result backend ---------------------------------------------------------------


class Board:
    """A result backend: what it was told, unless it is away."""

    def __init__(self) -> None:
        self.told: list[uuid.UUID] = []
        self.away = False

    def tell(self, batch: BatchRow, why: Sequence[FirstFailure]) -> None:
        if self.away:
            raise ConnectionError("away")
        self.told.append(batch.id)

    def died(self, row: Any, why: FirstFailure) -> None:
        raise AssertionError("nobody asked for that")


def test_an_end_without_a_body_is_told_until_the_backend_has_heard_it(scene: Scene, play: Play) -> None:
    board = Board()
    play.tracker.backend = board
    told = {"tolerance": 0, "tell": ["body-id"]}
    bad, good = scene.batch(1, options=told), scene.batch(1, options=told)
    cancelled, silent = scene.batch(1, options=told), scene.batch(1)
    for batch_id in (bad, silent):
        scene.fail(scene.run(batch_id))
    complete_all(scene, good)
    board.away = True
    for batch_id in (bad, good, silent):
        finish.look(play.tracker, batch_id)
    finish.cancel(play.tracker, cancelled)
    assert board.told == [] and len(play.tracker.of(events.BackendAway)) == 2
    assert set(scene.store.untold()) == {bad, cancelled}
    board.away = False
    play.sweep()
    assert set(board.told) == {bad, cancelled} and scene.store.untold() == []
    play.sweep()
    assert len(board.told) == 2, "once"


def test_a_retry_takes_back_what_was_not_told_yet(scene: Scene) -> None:
    batch_id = scene.batch(1, options={"tell": ["body-id"]})
    scene.fail(scene.run(batch_id))
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.untold and scene.store.untold() == [batch_id]
    retried(scene, batch_id)
    assert scene.store.untold() == []
    complete_all(scene, batch_id)
    scene.store.finish(batch_id)
    assert scene.store.untold() == []


def test_a_body_that_did_not_complete_is_told_until_the_backend_has_heard_it(scene: Scene, play: Play) -> None:
    board = Board()
    play.tracker.backend = board
    batch_id = scene.batch(0, calls=("on_success",), options={"tell": ["body-id"]})
    finish.started(play.tracker, batch_id)
    board.away = True
    claimed = scene.run(batch_id, 0)
    finish.after(play.tracker, claimed.key, scene.crash(claimed))
    assert board.told == []
    board.away = False
    play.sweep()
    assert board.told == [batch_id]


def test_what_a_body_came_to_is_that_of_the_present_round(scene: Scene, play: Play) -> None:
    batch_id = scene.batch(1, calls=("on_success",), tolerance=1)
    scene.fail(scene.run(batch_id))
    scene.store.finish(batch_id)
    row = scene.store.batch(batch_id)
    assert row is not None
    first = ending.body_of(play.tracker, row)
    retried(scene, batch_id)
    row = scene.store.batch(batch_id)
    assert row is not None and ending.body_of(play.tracker, row) is None
    complete_all(scene, batch_id)
    scene.store.finish(batch_id)
    row = scene.store.batch(batch_id)
    assert row is not None
    second = ending.body_of(play.tracker, row)
    assert first is not None and second is not None and (first.round, second.round) == (1, 2)
