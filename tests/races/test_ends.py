"""Races at the end of children and batches: settles, verdicts, finish, cancel, seal, add, sweeps."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa

from celery_batchtrack.behaviour import finish
from celery_batchtrack.behaviour.detector import Sweeper
from celery_batchtrack.store import Store, schema
from celery_batchtrack.store.clock import later, now
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.aftermath import Rerun
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Cause, EndReason, Status, Verdict
from tests.races.rivals import Held, Rivals
from tests.store.behaviour_kit import tracker_on
from tests.store.kit import ERROR, HERE, SEGFAULT, Scene, add_up, counts, some

Hold = Callable[[], Held]
ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")
DONE = Ending(Status.COMPLETED, '"done"')
FAILED = Ending(Status.FAILED, None, Cause.EXCEPTION, ERROR)

# -- settles and finish ----------------------------------------------------------------------------


def test_two_settles_in_one_shard_both_count(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch(2, shards=1), hold()
    mine, yours = scene.run(batch_id, 0), scene.run(batch_id, 1)
    held = rivals.start_held(first, first.settle, mine.key, mine.token, DONE)
    waiting = rivals.start_blocked(scene.complete, yours)
    first.commit()
    assert not held.result().look and waiting.result().look, "who empties the shard looks"
    assert counts(scene, batch_id) == {"completed": 2}
    assert add_up(scene, batch_id)


def test_of_two_last_settles_that_cannot_see_each_other_the_later_ends_the_batch(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, first = scene.batch(2, calls=ALL), hold()
    mine, yours = scene.run(batch_id, 0), scene.run(batch_id, 1)
    rivals.start_held(first, first.settle, mine.key, mine.token, DONE)
    assert scene.complete(yours).look, "another shard: it need not wait"
    assert scene.store.finish(batch_id) is None, "the first is settled, but nobody else can know"
    first.commit()
    rivals.join()
    assert scene.store.finish(batch_id) is not None
    assert scene.called(batch_id) == ["on_finish", "on_success"]


def test_settlers_of_a_whole_batch_at_once_end_it_exactly_once(scene: Scene, rivals: Rivals) -> None:
    for _ in range(10):
        batch_id = scene.batch(8, shards=4, calls=ALL)
        runs = [scene.run(batch_id, position) for position in range(8)]

        def settle_and_look(position: int, runs: list = runs, batch_id: uuid.UUID = batch_id) -> bool:
            look = scene.complete(runs[position]).look
            return look and scene.store.finish(batch_id) is not None

        ended = rivals.at_once(*[lambda position=position: settle_and_look(position) for position in range(8)])
        assert ended.count(True) == 1
        assert scene.called(batch_id) == ["on_finish", "on_success"]
    assert scene.violations() == {}


def test_of_two_finish_checks_at_once_one_ends_the_batch(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch(1, calls=ALL), hold()
    scene.complete(scene.run(batch_id))
    mine = rivals.start_held(first, first.finish, batch_id)
    yours = rivals.start_blocked(scene.store.finish, batch_id)
    first.commit()
    assert mine.result() is not None and yours.result() is None
    assert scene.called(batch_id) == ["on_finish", "on_success"]


def _reopened(scene: Scene, calls: tuple[str, ...] = ALL) -> tuple[uuid.UUID, sa.Connection]:
    """A batch with nothing open, and a transaction that is opening a child of it, by the rule for that:
    the batch row `FOR SHARE` first."""
    batch_id = scene.batch(1, calls=calls)
    scene.crash(scene.run(batch_id))
    connection = scene.store.engine.connect()
    table, parent = schema.child, schema.batch
    connection.execute(sa.select(parent.c.status).where(parent.c.id == batch_id).with_for_update(read=True))
    connection.execute(
        sa.update(table)
        .where(table.c.batch_id == batch_id)
        .values(status="pending", finished_at=None, worker_id=None, slot=None, cause=None)
    )
    counted = schema.tally
    connection.execute(
        sa.update(counted).where(counted.c.batch_id == batch_id, counted.c.shard == 0)
        .values(crashed=0, items_crashed=0, weight_done=0)
    )  # fmt: skip
    return batch_id, connection


def test_a_finish_that_waited_looks_again_and_sees_the_child_that_was_opened(
    scene: Scene, rivals: Rivals
) -> None:
    batch_id, opener = _reopened(scene)
    with opener:
        ending = rivals.start_blocked(scene.store.finish, batch_id)
        opener.commit()
    assert ending.result() is None
    assert scene.status(batch_id) == "running"
    assert add_up(scene, batch_id)


def test_one_guarded_update_would_end_a_batch_with_an_open_child(scene: Scene, rivals: Rivals) -> None:
    """What the two statements are for: the lock is waited for, but NOT EXISTS is not asked again."""
    batch_id, opener = _reopened(scene)

    def finish_wrongly() -> int:
        table, parent = schema.child, schema.batch
        still_open = sa.exists().where(
            table.c.batch_id == parent.c.id, table.c.status.in_(["pending", "running"]), table.c.kind == "child"
        )
        statement = sa.update(parent).where(parent.c.id == batch_id, parent.c.status == "running", ~still_open)
        with scene.store.write() as connection:
            return connection.execute(statement.values(status="failed", finished_at=now())).rowcount

    with opener:
        ending = rivals.start_blocked(finish_wrongly)
        opener.commit()
    assert ending.result() == 1, "PostgreSQL no longer needs the rule"
    assert scene.statuses(batch_id) == ["pending"]
    assert "ended_batch_has_no_open_child" in scene.violations(), "and verify sees it"


# -- verdicts --------------------------------------------------------------------------------------


def test_a_crash_verdict_that_waited_for_the_settle_changes_nothing(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    claimed, settler = scene.run(scene.batch(1)), hold()
    seen = scene.row(claimed.key)
    rivals.start_held(settler, settler.settle, claimed.key, claimed.token, DONE)
    verdict = rivals.start_blocked(scene.store.crash, seen, SEGFAULT, Verdict.OBSERVED, None)
    settler.commit()
    assert not verdict.result().written
    assert counts(scene, claimed.key.batch_id) == {"completed": 1}
    assert scene.incidents(claimed.key.batch_id) == []


@pytest.mark.parametrize("again", [None, Rerun()], ids=["crashed", "runs again"])
def test_a_settle_that_waited_for_an_observed_verdict_is_late(
    scene: Scene, rivals: Rivals, hold: Hold, again: Rerun | None
) -> None:
    claimed, judge = scene.run(scene.batch(1)), hold()
    rivals.start_held(judge, judge.crash, scene.row(claimed.key), SEGFAULT, Verdict.OBSERVED, again)
    settle = rivals.start_blocked(scene.complete, claimed)
    judge.commit()
    assert settle.result().late
    assert counts(scene, claimed.key.batch_id) == ({"crashed": 1} if again is None else {"pending": 1})
    assert add_up(scene, claimed.key.batch_id)


def test_a_settle_that_waited_for_a_lease_verdict_overturns_it(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    claimed, judge = scene.run(scene.batch(1)), hold()
    rivals.start_held(judge, judge.crash, scene.row(claimed.key), SEGFAULT, Verdict.LEASE, None)
    settle = rivals.start_blocked(scene.complete, claimed)
    judge.commit()
    assert settle.result().overturned
    assert counts(scene, claimed.key.batch_id) == {"completed": 1}
    assert add_up(scene, claimed.key.batch_id)


def test_of_two_verdicts_on_one_run_one_is_written(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    claimed, first = scene.run(scene.batch(1, calls=ALL)), hold()
    seen = scene.row(claimed.key)
    mine = rivals.start_held(first, first.crash, seen, SEGFAULT, Verdict.OBSERVED, None)
    yours = rivals.start_blocked(scene.store.crash, seen, SEGFAULT, Verdict.OBSERVED, None)
    first.commit()
    assert mine.result().written and not yours.result().written
    assert len(scene.incidents(claimed.key.batch_id)) == 1
    assert scene.row(claimed.key).crashes == 1


def test_one_run_that_settles_twice_at_once_counts_once(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    """Its process, and the main process that delivers its spool."""
    claimed, first = scene.run(scene.batch(1)), hold()
    mine = rivals.start_held(first, first.settle, claimed.key, claimed.token, DONE)
    yours = rivals.start_blocked(scene.store.settle, claimed.key, claimed.token, DONE)
    first.commit()
    assert mine.result().written and yours.result().written and not yours.result().late
    assert counts(scene, claimed.key.batch_id) == {"completed": 1}
    assert add_up(scene, claimed.key.batch_id)


# -- overturn and finish ---------------------------------------------------------------------------


def _convicted(scene: Scene) -> tuple[uuid.UUID, ChildKey, uuid.UUID]:
    batch_id = scene.batch(1, calls=ALL)
    claimed = scene.run(batch_id)
    scene.crash(claimed, Verdict.LEASE)
    return batch_id, claimed.key, claimed.token


def test_an_overturn_that_waited_for_the_end_comes_too_late(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    (batch_id, key, token), ender = _convicted(scene), hold()
    rivals.start_held(ender, ender.finish, batch_id)
    late = rivals.start_blocked(scene.store.settle, key, token, DONE)
    ender.commit()
    assert late.result().late
    assert (scene.status(batch_id), scene.statuses(batch_id)) == ("failed", ["crashed"])
    assert add_up(scene, batch_id)


def test_an_end_that_waited_for_an_overturn_has_the_right_outcome(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    (batch_id, key, token), overturner = _convicted(scene), hold()
    rivals.start_held(overturner, overturner._settle_late, key, token, DONE)
    ending = rivals.start_blocked(scene.store.finish, batch_id)
    overturner.commit()
    finished = ending.result()
    assert finished is not None and finished.status == "completed"
    assert scene.called(batch_id) == ["on_finish", "on_success"]
    assert add_up(scene, batch_id)


# -- first failure, cancel, lock order -------------------------------------------------------------


def test_two_first_failures_at_once_call_once(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch(3, calls=ALL), hold()
    mine, yours = scene.run(batch_id, 0), scene.run(batch_id, 1)
    won = rivals.start_held(first, first.settle, mine.key, mine.token, FAILED)
    lost = rivals.start_blocked(scene.fail, yours)
    first.commit()
    assert won.result().callbacks and lost.result().written and not lost.result().callbacks
    assert scene.called(batch_id) == ["on_first_failure"]
    assert add_up(scene, batch_id)


def test_a_cancel_waits_for_a_failing_child_and_keeps_its_end(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, settler = scene.batch(3, calls=ALL), hold()
    claimed = scene.run(batch_id, 0)
    rivals.start_held(settler, settler.settle, claimed.key, claimed.token, FAILED)
    cancel = rivals.start_blocked(scene.store.cancel, batch_id)
    settler.commit()
    assert cancel.result() is not None
    assert scene.statuses(batch_id) == ["failed", "cancelled", "cancelled"]
    assert scene.called(batch_id) == ["on_finish", "on_first_failure"]
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("ending", [DONE, FAILED], ids=["completing", "failing"])
def test_a_settle_that_waited_for_a_cancel_is_late(
    scene: Scene, rivals: Rivals, hold: Hold, ending: Ending
) -> None:
    batch_id, canceller = scene.batch(2, calls=ALL), hold()
    claimed = scene.run(batch_id, 0)
    rivals.start_held(canceller, canceller.cancel, batch_id)
    settle = rivals.start_blocked(scene.store.settle, claimed.key, claimed.token, ending)
    canceller.commit()
    assert settle.result().late
    assert scene.statuses(batch_id) == ["cancelled", "cancelled"]
    assert scene.called(batch_id) == ["on_finish"]
    assert add_up(scene, batch_id)


def test_cancels_failures_overturns_and_verdicts_at_once_never_deadlock(scene: Scene, rivals: Rivals) -> None:
    """Every writer locks batch, then child, then tally. One shard, so that all of them meet."""
    for _ in range(15):
        batch_id = scene.batch(8, shards=1, calls=ALL)
        runs = [scene.run(batch_id, position) for position in range(6)]
        scene.crash(runs[0], Verdict.LEASE)
        dying = scene.row(runs[4].key)
        rivals.at_once(
            lambda run=runs[0]: scene.complete(run),
            lambda run=runs[1]: scene.fail(run),
            lambda run=runs[2]: scene.fail(run),
            lambda run=runs[3]: scene.complete(run),
            lambda row=dying: scene.store.crash(row, SEGFAULT, Verdict.OBSERVED, None),
            lambda batch_id=batch_id: scene.store.cancel(batch_id),
            lambda batch_id=batch_id: scene.store.finish(batch_id),
            lambda batch_id=batch_id: scene.store.take_undispatched(batch_id, 10),
        )
        assert scene.status(batch_id) == "cancelled"
        assert len([kind for kind in scene.called(batch_id) if kind == "on_first_failure"]) <= 1
        assert scene.called(batch_id).count("on_finish") == 1
    assert scene.violations() == {}


# -- add, seal, cancel -----------------------------------------------------------------------------


def test_a_cancel_takes_the_children_whose_add_was_in_flight(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, adder = scene.batch(2, seal=False), hold()
    added = rivals.start_held(adder, adder.add, batch_id, some(3))
    cancel = rivals.start_blocked(scene.store.cancel, batch_id)
    adder.commit()
    assert added.result() == 2 and cancel.result() is not None
    assert scene.statuses(batch_id) == ["cancelled"] * 5
    assert add_up(scene, batch_id)


def test_an_add_that_waited_for_a_cancel_adds_nothing(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, canceller = scene.batch(2, seal=False), hold()
    rivals.start_held(canceller, canceller.cancel, batch_id, EndReason.ABANDONED)
    add = rivals.start_blocked(scene.store.add, batch_id, some(3))
    canceller.commit()
    assert add.result() is None
    assert scene.store.progress(batch_id).total == 2
    assert add_up(scene, batch_id)


def test_two_adds_at_once_give_every_child_a_position_of_its_own(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch(0, seal=False), hold()
    mine = rivals.start_held(first, first.add, batch_id, some(2))
    yours = rivals.start_blocked(scene.store.add, batch_id, some(2))
    first.commit()
    assert (mine.result(), yours.result()) == (0, 2)
    assert add_up(scene, batch_id)


def test_an_add_that_waited_for_the_seal_adds_nothing(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, sealer = scene.batch(2, seal=False), hold()
    rivals.start_held(sealer, sealer.seal, batch_id)
    add = rivals.start_blocked(scene.store.add, batch_id, some(3))
    sealer.commit()
    assert add.result() is None


@pytest.mark.parametrize("first", ["seal", "cancel"])
def test_a_seal_and_a_cancel_end_in_a_cancelled_batch(
    scene: Scene, rivals: Rivals, hold: Hold, first: str
) -> None:
    batch_id, held = scene.batch(2, seal=False), hold()
    rivals.start_held(held, getattr(held, first), batch_id)
    other = rivals.start_blocked(getattr(scene.store, "cancel" if first == "seal" else "seal"), batch_id)
    held.commit()
    assert bool(other.result()) is (first == "seal")
    assert scene.status(batch_id) == "cancelled"
    assert scene.statuses(batch_id) == ["cancelled", "cancelled"]
    assert add_up(scene, batch_id)


def test_a_last_settle_and_the_seal_at_once_end_the_batch(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    """start="now": the settle looks while the seal is not committed; the seal looks after its commit."""
    batch_id, sealer = scene.batch(1, seal=False, start_now=True, calls=ALL), hold()
    claimed = scene.run(batch_id)
    sealed = rivals.start_held(sealer, sealer.seal, batch_id)
    assert scene.complete(claimed).look
    assert scene.store.finish(batch_id) is None, "not sealed, as far as anybody knows"
    sealer.commit()
    assert sealed.result()
    assert scene.store.finish(batch_id) is not None


# -- sweeps ----------------------------------------------------------------------------------------


def test_two_sweeps_at_once_pass_one_verdict_and_call_once(
    scene: Scene, rivals: Rivals, postgres_url: str
) -> None:
    stores = [Store(postgres_url), Store(postgres_url)]
    trackers = [tracker_on(store) for store in stores]
    sweepers = [Sweeper(tracker, "sweep", None) for tracker in trackers]
    for sweeper in sweepers:
        sweeper.sweep()
    try:
        for _ in range(10):
            batch_id, lost = scene.batch(3, calls=ALL), scene.worker()
            for position in range(2):
                scene.run(batch_id, position, worker=lost)
            scene.complete(scene.run(batch_id, 2))
            scene.set_worker(
                lost, beat=1, beat_at=later(-60.0), suspected_beat=1, suspected_at=later(-30.0)
            )
            rivals.at_once(*[sweeper.sweep for sweeper in sweepers])
            if scene.status(batch_id) == "running":  # each may have passed one of the two verdicts
                sweepers[0].sweep()
            heard = [each for tracker in trackers for each in tracker.of(events.ChildCrashed)]
            assert sorted(each.key.position for each in heard if each.key.batch_id == batch_id) == [0, 1]
            ended = [each for tracker in trackers for each in tracker.of(events.BatchEnded)]
            assert [each.status for each in ended if each.batch_id == batch_id] == ["failed"]
            sent = [kind for tracker in trackers for kind in tracker.outbox.kinds(batch_id)]
            assert sorted(sent) == ["on_failure", "on_finish", "on_first_failure"]
            losses = [each for tracker in trackers for each in tracker.of(events.WorkerLost)]
            assert [each.worker_id for each in losses].count(lost) == 1
    finally:
        for store in stores:
            store.dispose()
    assert scene.violations() == {}


def test_a_beat_that_comes_while_the_sweep_convicts_saves_the_worker(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    """The conviction names the beat it rests on."""
    worker_id, pulse = scene.worker(), hold()
    rivals.start_held(pulse, pulse.beat, worker_id)
    lose = rivals.start_blocked(lambda: scene.store.lose(worker_id, _lease(), 0))
    pulse.commit()
    assert lose.result() is False
    assert worker_id in {each.id for each in scene.store.live_workers()}


def _lease() -> object:
    from celery_batchtrack.vocabulary.states import Detector

    return Detector.LEASE


def test_the_finish_of_behaviour_publishes_the_callbacks_once(scene: Scene, rivals: Rivals) -> None:
    tracker = tracker_on(scene.store)
    for _ in range(10):
        batch_id = scene.batch(4, shards=2, calls=ALL, tolerance=4)
        runs = [scene.run(batch_id, position) for position in range(4)]

        def end(number: int, runs: list = runs) -> None:
            settled = scene.fail(runs[number]) if number % 2 else scene.complete(runs[number])
            finish.after(tracker, runs[number].key, settled)

        rivals.at_once(*[lambda number=number: end(number) for number in range(4)])
        assert tracker.outbox.kinds(batch_id) == ["on_finish", "on_first_failure", "on_success"]


def test_here_is_a_host_that_nobody_shares() -> None:
    """The forged hosts of these tests must not be this machine: detector 2 would be first."""
    from celery_batchtrack.behaviour import hosts

    assert replace(HERE) != hosts.identity()
