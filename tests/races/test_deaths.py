"""DESIGN.md, "The way of a child": after each step everything dies, and a sweep mends it.

A process is forked and really killed, right after the step's commit; another process then sweeps.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_batchtrack.behaviour import dispatch
from celery_batchtrack.behaviour.detector import Death, Reconciler, Sweeper, process_died
from celery_batchtrack.store import Store
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Cause, Status
from tests.store.behaviour_kit import Bench, Told, killed, tracker_on
from tests.store.kit import Scene, add_up, some

CALLS = ("on_success", "on_failure", "on_finish")
DONE = Ending(Status.COMPLETED, "1")
CHANCE = {"on_crash": "retry", "max_crashes": 3, "process": True, "worker": True}


@pytest.fixture
def scene(tables: None, database_url: str) -> Iterator[Scene]:
    scene = Scene(Store(database_url))
    assert scene.store.store_id
    yield scene
    scene.store.dispose()


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store)


@pytest.fixture
def bench(tracker: Told, tmp_path: Path) -> Bench:
    """A worker that lives on and runs whatever is published."""
    return Bench.of(tracker, tmp_path)


@pytest.fixture
def sweep(tracker: Told, bench: Bench, tmp_path: Path) -> Callable[[], object]:
    return Sweeper(tracker, "test", tmp_path, bench.worker).sweep


def _ended(scene: Scene, bench: Bench, batch_id: uuid.UUID, status: str = "completed") -> None:
    """It ended so, each of its callbacks ran once, and nothing is wrong with the data."""
    assert scene.status(batch_id) == status
    assert bench.kinds() == (["on_finish", "on_success"] if status == "completed" else ["on_failure", "on_finish"])
    assert add_up(scene, batch_id)


def test_rows_without_messages_are_dispatched(
    scene: Scene, bench: Bench, sweep: Callable[[], object]
) -> None:
    batch_id = uuid7()
    killed(lambda: _create(scene, batch_id))
    sweep()
    bench.work()
    _ended(scene, bench, batch_id)


def _create(scene: Scene, batch_id: uuid.UUID) -> None:
    from celery_batchtrack.vocabulary.records import NewBatch
    from tests.store.kit import callbacks

    scene.store.create(NewBatch(batch_id, "upload", callbacks(*CALLS), {}), some(3), seal=True)


def test_a_sealed_batch_without_messages_is_dispatched(
    scene: Scene, bench: Bench, sweep: Callable[[], object]
) -> None:
    batch_id = scene.batch(2, seal=False, calls=CALLS)
    killed(lambda: scene.store.seal(batch_id))
    assert scene.status(batch_id) == "running" and scene.rows(batch_id)[0].dispatches == 0
    sweep()
    bench.work()
    _ended(scene, bench, batch_id)


def test_an_empty_batch_sealed_by_its_dying_creator_ends(
    scene: Scene, bench: Bench, sweep: Callable[[], object]
) -> None:
    batch_id = scene.batch(0, seal=False, calls=CALLS)
    killed(lambda: scene.store.seal(batch_id))
    sweep()
    bench.work()
    _ended(scene, bench, batch_id)


def test_a_batch_left_open_by_its_dying_creator_is_cancelled_as_abandoned(
    scene: Scene, tracker: Told, bench: Bench, tmp_path: Path, sweep: Callable[[], object]
) -> None:
    batch_id = uuid7()

    def open_and_add() -> None:
        from celery_batchtrack.vocabulary.records import NewBatch
        from tests.store.kit import callbacks

        client = Bench.of(tracker, None, "client", kind="client").worker
        new = NewBatch(batch_id, "upload", callbacks(*CALLS), {}, opened_by=client.id)
        scene.store.create(new)
        scene.store.add(batch_id, some(3))

    killed(open_and_add)
    sweep()
    bench.work()
    row = scene.store.batch(batch_id)
    assert row is not None and (row.status, row.reason) == ("cancelled", "abandoned")
    assert scene.statuses(batch_id) == ["cancelled"] * 3
    assert bench.kinds() == ["on_finish"]
    assert add_up(scene, batch_id)


def test_stamped_rows_whose_messages_were_never_sent_are_published_again(
    scene: Scene, tracker: Told, bench: Bench, sweep: Callable[[], object]
) -> None:
    batch_id = scene.batch(2, calls=CALLS)
    killed(lambda: dispatch.pump(tracker, batch_id), at="dispatch.stamped")
    sweep()
    assert tracker.outbox.sent == [], "their messages may still be on their way"
    for position in range(2):
        scene.set_child(ChildKey(batch_id, position), dispatched_at=later(-31.0))
    sweep()
    bench.work()
    _ended(scene, bench, batch_id)


# -- a worker's death ------------------------------------------------------------------------------


def _worker_dies(
    scene: Scene, tracker: Told, folder: Path, batch_id: uuid.UUID, *, at: str | None, settles: bool = False,
    policy: dict | None = None,
) -> None:  # fmt: skip
    """A whole worker takes the first message there is, and is killed."""
    dispatch.pump(tracker, batch_id)
    message = tracker.outbox.sent.pop(0)
    # The others still wait: with an empty queue they would count as lost with the worker, 2 s after they were sent.
    tracker.outbox.default_length = len(tracker.outbox.sent)

    def live() -> None:
        bench = Bench.of(tracker, folder, "w2@here")
        run = bench.claim(message, policy)
        if settles:
            bench.runner.settle(run, DONE)

    killed(live, at)


@pytest.mark.parametrize("at", ["claim.committed", None], ids=["right after the claim", "while it ran"])
def test_a_run_whose_worker_died_is_settled_as_crashed(
    scene: Scene, tracker: Told, bench: Bench, tmp_path: Path, sweep: Callable[[], object], at: str | None
) -> None:
    batch_id = scene.batch(2, calls=CALLS)
    _worker_dies(scene, tracker, tmp_path, batch_id, at=at)
    assert scene.statuses(batch_id) == ["running", "pending"]
    sweep()
    bench.work()
    assert scene.statuses(batch_id) == ["crashed", "completed"]
    (incident,) = scene.incidents(batch_id)
    assert (incident.cause, incident.detected_by, incident.verdict) == ("worker_lost", "host", "observed")
    _ended(scene, bench, batch_id, "failed")


@pytest.mark.parametrize("at", ["claim.committed", None], ids=["right after the claim", "while it ran"])
def test_a_run_whose_worker_died_runs_again_where_its_policy_says_so(
    scene: Scene, tracker: Told, bench: Bench, tmp_path: Path, sweep: Callable[[], object], at: str | None
) -> None:
    batch_id = scene.batch(2, calls=CALLS)
    _worker_dies(scene, tracker, tmp_path, batch_id, at=at, policy=CHANCE)
    sweep()
    bench.work()
    assert scene.rows(batch_id)[0].attempt == 2
    _ended(scene, bench, batch_id)


def test_a_batch_whose_last_settle_died_before_its_look_is_ended(
    scene: Scene, tracker: Told, bench: Bench, tmp_path: Path, sweep: Callable[[], object]
) -> None:
    batch_id = scene.batch(1, calls=CALLS)
    _worker_dies(scene, tracker, tmp_path, batch_id, at="settle.committed", settles=True)
    assert (scene.status(batch_id), scene.statuses(batch_id)) == ("running", ["completed"])
    sweep()
    bench.work()
    _ended(scene, bench, batch_id)


def test_callbacks_that_were_inserted_and_never_published_are_dispatched(
    scene: Scene, tracker: Told, bench: Bench, tmp_path: Path, sweep: Callable[[], object]
) -> None:
    batch_id = scene.batch(1, calls=CALLS)
    _worker_dies(scene, tracker, tmp_path, batch_id, at="finish.committed", settles=True)
    assert scene.status(batch_id) == "completed" and tracker.outbox.sent == []
    sweep()
    bench.work()
    _ended(scene, bench, batch_id)


def test_a_callback_whose_worker_died_never_starts_twice_by_itself(
    scene: Scene, tracker: Told, bench: Bench, tmp_path: Path, sweep: Callable[[], object]
) -> None:
    batch_id = scene.batch(0, calls=("on_finish",))
    scene.store.finish(batch_id)
    _worker_dies(scene, tracker, tmp_path, batch_id, at=None)
    for _ in range(3):
        sweep()
        bench.work()
    assert [row.status for row in scene.store.callback_rows(batch_id)] == ["crashed"]
    assert bench.ran == []
    assert scene.violations() == {}


# -- a pool process's death ------------------------------------------------------------------------


def test_a_pool_process_that_died_is_settled_by_its_main_process_at_once(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(2, calls=CALLS)
    dispatch.pump(tracker, batch_id)
    message = tracker.outbox.sent.pop(0)
    pid = killed(lambda: bench.claim(message))
    death = Death(pid, None, Cause.SIGNAL, message.ticket, signal="SIGKILL")
    assert process_died(tracker, bench.worker, bench.boxes, death) == 1
    assert process_died(tracker, bench.worker, bench.boxes, death) == 0, "told twice, judged once"
    bench.work()
    (incident,) = scene.incidents(batch_id)
    assert (incident.signal, incident.pid, incident.detected_by) == ("SIGKILL", pid, "main")
    _ended(scene, bench, batch_id, "failed")


def test_a_pool_process_whose_death_nobody_told_is_found_on_two_beats(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(1, calls=CALLS)
    dispatch.pump(tracker, batch_id)
    message = tracker.outbox.sent.pop(0)
    killed(lambda: bench.claim(message))
    reconciler = Reconciler(tracker, bench.worker, bench.boxes)
    reconciler.beat()
    assert scene.statuses(batch_id) == ["running"]
    reconciler.beat()
    bench.work()
    (incident,) = scene.incidents(batch_id)
    assert (incident.cause, incident.detected_by) == ("exit", "reconcile")
    _ended(scene, bench, batch_id, "failed")


def test_a_claim_whose_process_died_is_not_claimed_by_its_doubled_message(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(1)
    dispatch.pump(tracker, batch_id)
    message = tracker.outbox.sent[0]  # it stays: the broker delivers it again
    killed(lambda: bench.claim(message))
    bench.work()
    assert bench.ran == [] and len(bench.refused) == 1


