"""A run in its own process: claim, settle, release; and a database that is away meanwhile."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_batchtrack import errors
from celery_batchtrack.behaviour import blackbox, dispatch, finish, spool
from celery_batchtrack.behaviour.blackbox import Phase
from celery_batchtrack.behaviour.detector import Reconciler
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.behaviour.run import Run, deliver_spool
from celery_batchtrack.behaviour.tracker import Message
from celery_batchtrack.store import Store
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Ending, Refused, Release
from celery_batchtrack.vocabulary.states import Cause, Status
from tests.store.behaviour_kit import Bench, Told, killed, tracker_on
from tests.store.kit import ERROR, Scene, add_up, some

CALLS = ("on_success", "on_failure", "on_first_failure", "on_finish")
DONE = Ending(Status.COMPLETED, '"done"')


class Moody(Store):
    """A store that may lose the answer of its next single statement, after its commit."""

    loses_answers = 0

    @contextlib.contextmanager
    def single(self) -> Iterator[sa.Connection]:
        with super().single() as connection:
            yield connection
        if self.loses_answers:
            self.loses_answers -= 1
            raise errors.DatabaseUnavailable("the connection broke after the commit")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "batchtrack.db"


@pytest.fixture
def scene(path: Path) -> Iterator[Scene]:
    scene = Scene(Moody(f"sqlite:///{path}", engine_options={"connect_args": {"timeout": 0.01}}))
    assert scene.store.store_id
    yield scene
    scene.store.dispose()


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store)


@pytest.fixture
def bench(tracker: Told, tmp_path: Path) -> Bench:
    return Bench.of(tracker, tmp_path / "boxes")


def messages(tracker: Told, batch_id: uuid.UUID) -> list[Message]:
    """Publish what is due, and take it from the broker."""
    dispatch.pump(tracker, batch_id)
    sent, tracker.outbox.sent = tracker.outbox.sent, []
    return sent


@contextlib.contextmanager
def away(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody holds the database's write lock; `rollback` lets it go."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


def page_of(run: Run) -> blackbox.PageState | None:
    assert run.page.path is not None
    return blackbox.read(run.page.path)


# -- the way of a child ----------------------------------------------------------------------------


def test_a_child_runs_settles_and_ends_its_batch_with_its_callbacks(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(3, calls=CALLS)
    finish.started(tracker, batch_id)
    bench.work()
    assert [key.position for key, kind in bench.ran if kind == "child"] == [0, 1, 2]
    assert bench.kinds() == ["on_finish", "on_success"]
    assert [event.status for event in tracker.of(events.BatchEnded)] == ["completed"]
    assert len(tracker.of(events.ChildSettled)) == 5
    assert add_up(scene, batch_id)


def test_the_page_names_the_run_until_its_end_is_written(scene: Scene, tracker: Told, bench: Bench) -> None:
    (message,) = messages(tracker, scene.batch(1))
    run = bench.claim(message)
    state = page_of(run)
    assert state is not None
    assert (state.phase, state.key, state.token) == (Phase.RUNNING, message.row.key, run.claimed.token)
    assert scene.row(message.row.key).slot == run.slot == blackbox.slot_name()
    bench.runner.settle(run, DONE)
    assert page_of(run) == blackbox.PageState(Phase.IDLE, None, None)


def test_a_doubled_message_is_refused_and_leaves_no_trace_in_the_page(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1))
    bench.runner.settle(bench.claim(message), DONE)
    answer = bench.runner.claim(message.ticket, "demo.task", None)
    assert isinstance(answer, Refused) and not answer.wait
    page = bench.boxes.page(blackbox.slot_name())
    assert page.path is not None and blackbox.read(page.path) == blackbox.PageState(Phase.IDLE, None, None)
    assert [event.key for event in tracker.of(events.ClaimRefused)] == [message.row.key]


def test_an_eager_child_inside_another_has_a_slot_one_deeper(scene: Scene, tracker: Told, bench: Bench) -> None:
    outer, inner = messages(tracker, scene.batch(2))
    first = bench.claim(outer)
    second = bench.runner.claim(inner.ticket, "demo.task", None, depth=1)
    assert isinstance(second, Run) and second.slot != first.slot
    bench.runner.settle(second, DONE)
    bench.runner.settle(first, DONE)
    assert scene.statuses(outer.row.batch_id) == ["completed", "completed"]


def test_a_message_that_came_too_late_to_start_withdraws_its_child(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(some(1, expires_in=60.0), calls=CALLS)
    (message,) = messages(tracker, batch_id)
    scene.set_child(message.row.key, expires_at=later(-1.0))
    assert isinstance(bench.runner.claim(message.ticket, "demo.task", None), Refused)
    assert (scene.row(message.row.key).status, scene.row(message.row.key).cause) == ("cancelled", "expired")
    assert scene.status(batch_id) == "failed"


def test_a_first_failure_that_is_also_the_last_child_is_called_at_once(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(1, calls=("on_first_failure",))
    (message,) = messages(tracker, batch_id)
    bench.runner.settle(bench.claim(message), Ending(Status.FAILED, None, Cause.EXCEPTION, ERROR))
    assert scene.status(batch_id) == "failed"
    assert tracker.outbox.kinds(batch_id) == ["on_first_failure"]


def test_a_released_child_is_published_for_its_next_attempt(scene: Scene, tracker: Told, bench: Bench) -> None:
    (message,) = messages(tracker, scene.batch(1))
    run = bench.claim(message)
    bench.runner.release(run, Release(retries=1))
    (again,) = tracker.outbox.sent
    assert (again.ticket.attempt, again.row.retries) == (1, 1)
    assert page_of(run) == blackbox.PageState(Phase.IDLE, None, None)
    bench.work()
    assert scene.row(message.row.key).attempt == 2 and scene.status(message.row.batch_id) == "completed"


def test_trouble_after_the_settle_does_not_turn_it_into_a_failure(
    scene: Scene, tracker: Told, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = scene.batch(1, calls=CALLS)
    (message,) = messages(tracker, batch_id)
    run = bench.claim(message)

    def broken(batch_id: uuid.UUID) -> None:
        raise errors.DatabaseUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(scene.store, "finish", broken)
        assert bench.runner.settle(run, DONE).written
    assert scene.status(batch_id) == "running" and tracker.of(events.FollowUpFailed)
    assert scene.store.unfinished() == [batch_id]


def test_a_process_that_the_users_function_forks_does_not_report_its_parents_end(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    """It may come back through the task, or raise: its parent is still at work."""
    (message,) = messages(tracker, scene.batch(1))
    run = bench.claim(message)

    def forked() -> None:
        assert not bench.runner.settle(run, Ending(Status.FAILED, None, Cause.EXCEPTION, ERROR)).written
        bench.runner.release(run, Release())

    killed(forked)
    assert scene.statuses(message.row.batch_id) == ["running"] and page_of(run) is not None
    assert bench.runner.settle(run, DONE).written
    assert scene.statuses(message.row.batch_id) == ["completed"] and scene.incidents(message.row.batch_id) == []


# -- a slot that claims anew -----------------------------------------------------------------------


def test_a_slot_that_claims_anew_settles_its_former_child(scene: Scene, tracker: Told, bench: Bench) -> None:
    batch_id = scene.batch(2, tolerance=2)
    first, second = messages(tracker, batch_id)
    bench.claim(first)
    bench.claim(second)
    assert scene.statuses(batch_id) == ["crashed", "running"]
    (incident,) = scene.incidents(batch_id)
    assert (incident.cause, incident.detected_by) == ("settle_lost", "reconcile")


def test_a_slot_that_claims_anew_delivers_what_its_former_child_left_on_disk(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(2)
    first, second = messages(tracker, batch_id)
    run = bench.claim(first)
    assert bench.boxes.folder is not None
    spool.write(bench.boxes.folder, spool.Spooled(run.ticket.key, run.claimed.token, run.slot, DONE))
    bench.claim(second)
    assert scene.statuses(batch_id) == ["completed", "running"]
    assert scene.incidents(batch_id) == []


def test_a_slot_that_claims_anew_gives_back_a_claim_that_never_ran(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    """Its commit had succeeded, the answer was lost, and the slot gave up: no crash, no strike."""
    bench.runner.tracker = replace(tracker, settings=replace(tracker.settings, claim_timeout=0.0))
    batch_id = scene.batch(2)
    first, second = messages(tracker, batch_id)
    scene.store.loses_answers = 1  # type: ignore[attr-defined]
    answer = bench.runner.claim(first.ticket, "demo.task", None)
    assert isinstance(answer, Refused) and scene.statuses(batch_id) == ["running", "pending"]
    bench.claim(second)
    row = scene.row(first.row.key)
    assert (row.status, row.crashes, row.attempt) == ("pending", 0, 1)
    assert scene.incidents(batch_id) == []
    assert [each.ticket.attempt for each in tracker.outbox.sent] == [1], "published for the attempt it is at"


def test_a_claim_that_was_given_up_goes_back_by_the_reconciliation_too(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    bench.runner.tracker = replace(tracker, settings=replace(tracker.settings, claim_timeout=0.0))
    (message,) = messages(tracker, scene.batch(1))
    scene.store.loses_answers = 1  # type: ignore[attr-defined]
    bench.runner.claim(message.ticket, "demo.task", None)
    reconciler = Reconciler(tracker, bench.worker, bench.boxes)
    reconciler.beat()
    reconciler.beat()
    row = scene.row(message.row.key)
    assert (row.status, row.crashes) == ("pending", 0) and len(tracker.outbox.sent) == 1


def test_a_claim_interrupted_while_it_waits_counts_as_given_up(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1))
    scene.store.loses_answers = 1  # type: ignore[attr-defined]

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    bench.runner.pause = interrupted
    with pytest.raises(KeyboardInterrupt):
        bench.runner.claim(message.ticket, "demo.task", None)
    page = bench.boxes.page(blackbox.slot_name())
    assert page.path is not None
    state = blackbox.read(page.path)
    assert state is not None and state.phase is Phase.GAVE_UP


# -- the database is away --------------------------------------------------------------------------


def test_a_claim_whose_answer_was_lost_is_asked_again_and_won(scene: Scene, tracker: Told, bench: Bench) -> None:
    (message,) = messages(tracker, scene.batch(1))
    scene.store.loses_answers = 1  # type: ignore[attr-defined]
    run = bench.claim(message)
    assert run.attempt == 1 and scene.row(message.row.key).attempt == 1


def test_a_claim_waits_in_its_slot_for_the_database(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1))
    pauses: list[float] = []
    with away(path) as other:

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 4:
                other.rollback()

        bench.runner.pause = pause
        run = bench.claim(message)
    assert run.attempt == 1 and pauses == [0.05, 0.1, 0.2, 0.4]
    assert {event.doing for event in tracker.of(events.DatabaseAway)} == {"claim"}


def test_a_claim_gives_up_after_its_time_out_and_the_row_stays_pending(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1))
    pauses: list[float] = []
    bench.runner.pause = pauses.append
    with away(path):
        answer = bench.runner.claim(message.ticket, "demo.task", None)
    assert isinstance(answer, Refused) and answer.wait
    assert 30 <= sum(pauses) <= 32
    assert scene.row(message.row.key).status == "pending"


def test_a_settle_lies_on_disk_while_the_database_is_away_and_is_written_when_it_is_back(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1, calls=CALLS))
    run = bench.claim(message)
    folder = bench.boxes.folder
    assert folder is not None
    lying: list[int] = []
    with away(path) as other:

        def pause(seconds: float) -> None:
            lying.append(len(list(spool.read_all(folder))))
            if len(lying) == 3:
                other.rollback()

        bench.runner.pause = pause
        assert bench.runner.settle(run, DONE).written
    assert lying == [1, 1, 1]
    assert list(spool.read_all(folder)) == []
    assert [event.spooled for event in tracker.of(events.DatabaseAway)] == [True]
    assert scene.status(message.row.batch_id) == "completed"


def test_a_full_disk_does_not_keep_a_settle_from_being_tried(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1))
    run = bench.claim(message)
    folder = bench.boxes.folder
    assert folder is not None
    (folder / "spool").rmdir()
    with away(path) as other:
        bench.runner.pause = lambda seconds: other.rollback()
        assert bench.runner.settle(run, DONE).written


def _dies_while_the_database_is_away(path: Path, bench: Bench, run: Run) -> None:
    class Killed(BaseException):
        pass

    def pause(seconds: float) -> None:
        raise Killed

    bench.runner.pause = pause
    with away(path), pytest.raises(Killed):
        bench.runner.settle(run, DONE)


def test_the_main_process_delivers_the_end_of_a_run_that_could_not_write_it(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(1, calls=CALLS)
    (message,) = messages(tracker, batch_id)
    _dies_while_the_database_is_away(path, bench, bench.claim(message))
    assert scene.statuses(batch_id) == ["running"]
    Reconciler(tracker, bench.worker, bench.boxes).beat()
    assert scene.status(batch_id) == "completed" and scene.incidents(batch_id) == []
    assert tracker.outbox.kinds(batch_id) == ["on_finish", "on_success"]
    assert [event.written for event in tracker.of(events.SpoolDelivered)] == [True]


def test_an_end_is_delivered_once_and_its_file_goes(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1))
    _dies_while_the_database_is_away(path, bench, bench.claim(message))
    assert deliver_spool(tracker, bench.boxes) == 1
    assert deliver_spool(tracker, bench.boxes) == 0
    (end,) = tracker.of(events.ChildSettled)
    assert (end.key, end.status, end.attempt) == (message.row.key, Status.COMPLETED, 1), "and told of"
    assert add_up(scene, message.row.batch_id)


def test_an_end_that_cannot_be_delivered_yet_stays_on_disk(
    scene: Scene, path: Path, tracker: Told, bench: Bench
) -> None:
    (message,) = messages(tracker, scene.batch(1))
    _dies_while_the_database_is_away(path, bench, bench.claim(message))
    with away(path), pytest.raises(errors.DatabaseUnavailable):
        deliver_spool(tracker, bench.boxes)
    assert deliver_spool(tracker, bench.boxes) == 1


def test_without_a_folder_a_settle_waits_all_the_same(scene: Scene, path: Path, tracker: Told) -> None:
    bench = Bench.of(tracker, None)
    (message,) = messages(tracker, scene.batch(1))
    run = bench.claim(message)
    with away(path) as other:
        bench.runner.pause = lambda seconds: other.rollback()
        assert bench.runner.settle(run, DONE).written
    assert Boxes(None, bench.worker.id).folder is None


def test_a_release_waits_for_the_database_too(scene: Scene, path: Path, tracker: Told, bench: Bench) -> None:
    (message,) = messages(tracker, scene.batch(1))
    run = bench.claim(message)
    with away(path) as other:
        bench.runner.pause = lambda seconds: other.rollback()
        bench.runner.release(run, Release())
    assert scene.row(message.row.key).status == "pending"
    assert ChildKey(message.row.batch_id, 0) in tracker.outbox.published()
