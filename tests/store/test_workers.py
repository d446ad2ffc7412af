"""Pulse, suspicion, loss, and the sweep's own book-keeping, on every database."""

from __future__ import annotations

import uuid

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.records import WorkerRow
from celery_batchtrack.vocabulary.states import Detector
from tests.store.kit import HERE, Scene


def _row(scene: Scene, worker_id: uuid.UUID) -> WorkerRow:
    (row,) = [each for each in scene.store.workers(all=True) if each.id == worker_id]
    return row


def _silent(scene: Scene, seconds: float, suspected: float | None = None) -> uuid.UUID:
    """A worker with a lease of 15 s that has not beaten for `seconds`, suspected since so many seconds."""
    worker_id = scene.worker()
    values = {"beat": 3, "beat_at": later(-seconds)}
    if suspected is not None:
        values.update(suspected_beat=3, suspected_at=later(-suspected))
    scene.set_worker(worker_id, **values)
    return worker_id


def _stale(scene: Scene) -> list[uuid.UUID]:
    return [each.id for each in scene.store.confirmed_stale()]


def test_registering_twice_changes_nothing(scene: Scene) -> None:
    scene.store.beat(scene.worker_id)
    before = _row(scene, scene.worker_id)
    scene.worker(HERE, id=scene.worker_id, name="another")
    assert _row(scene, scene.worker_id) == before


def test_a_beat_counts_and_moves_the_time(scene: Scene) -> None:
    before = _row(scene, scene.worker_id)
    assert scene.store.beat(scene.worker_id)
    after = _row(scene, scene.worker_id)
    assert after.beat == before.beat + 1 and after.beat_at >= before.beat_at


@pytest.mark.parametrize("who", ["unknown", "stopped"])
def test_only_a_known_worker_that_has_not_stopped_can_beat(scene: Scene, who: str) -> None:
    worker_id = uuid.uuid4() if who == "unknown" else scene.worker_id
    scene.store.stop(scene.worker_id)
    assert not scene.store.beat(worker_id)


def test_a_beat_clears_the_suspicion_and_revives_the_worker(scene: Scene) -> None:
    worker_id = _silent(scene, 60, suspected=30)
    assert scene.store.lose(worker_id, Detector.LEASE, 3)
    assert scene.store.beat(worker_id)
    row = _row(scene, worker_id)
    assert (row.suspected_at, row.suspected_beat, row.lost_at, row.lost_by) == (None, None, None, None)
    assert row in scene.store.live_workers()


def test_stopping_is_noted_once(scene: Scene) -> None:
    scene.store.stop(scene.worker_id)
    first = _row(scene, scene.worker_id).stopped_at
    scene.store.stop(scene.worker_id)
    assert first is not None and _row(scene, scene.worker_id).stopped_at == first
    assert scene.store.live_workers() == []
    assert [each.id for each in scene.store.workers(all=True)] == [scene.worker_id]


def test_a_worker_is_lost_once(scene: Scene) -> None:
    assert scene.store.lose(scene.worker_id, Detector.HOST)
    assert not scene.store.lose(scene.worker_id, Detector.LEASE)
    assert _row(scene, scene.worker_id).lost_by == "host"


def test_a_worker_that_beat_meanwhile_or_stopped_is_not_lost(scene: Scene) -> None:
    scene.store.beat(scene.worker_id)
    assert not scene.store.lose(scene.worker_id, Detector.LEASE, beat=0)
    scene.store.stop(scene.worker_id)
    assert not scene.store.lose(scene.worker_id, Detector.HOST)


# -- suspicion, then confirmation ------------------------------------------------------------------


def test_only_a_worker_silent_for_longer_than_its_lease_is_suspected(scene: Scene) -> None:
    silent, fresh = _silent(scene, 16), _silent(scene, 10)
    scene.store.suspect(anew=False)
    assert _row(scene, silent).suspected_beat == 3
    assert _row(scene, fresh).suspected_at is None


def test_a_suspicion_is_stamped_once_and_not_again_by_the_next_sweep(scene: Scene) -> None:
    worker_id = _silent(scene, 60, suspected=10)
    before = _row(scene, worker_id)
    scene.store.suspect(anew=False)
    assert _row(scene, worker_id).suspected_at == before.suspected_at


def test_a_suspicion_of_an_older_beat_is_stamped_anew(scene: Scene) -> None:
    worker_id = _silent(scene, 60, suspected=100)
    scene.set_worker(worker_id, beat=4)
    assert _stale(scene) == [], "it has beaten since it was suspected"
    scene.store.suspect(anew=False)
    assert _row(scene, worker_id).suspected_beat == 4


def test_silence_for_one_lease_after_the_suspicion_confirms_it(scene: Scene) -> None:
    confirmed = _silent(scene, 60, suspected=15)
    _silent(scene, 60, suspected=10)  # not yet
    _silent(scene, 600)  # long silent, but nobody has suspected it: age alone is no verdict
    assert _stale(scene) == [confirmed]


def test_a_second_of_jitter_between_two_sweeps_is_forgiven(scene: Scene) -> None:
    worker_id = _silent(scene, 60, suspected=14.2)
    assert _stale(scene) == [worker_id]


def test_every_worker_has_its_own_lease(scene: Scene) -> None:
    worker_id = _silent(scene, 50, suspected=40)
    scene.set_worker(worker_id, lease=60.0)
    assert _stale(scene) == []
    scene.store.suspect(anew=True)
    assert _stale(scene) == []


@pytest.mark.parametrize("over", ["stopped_at", "lost_at"])
def test_a_worker_that_is_over_is_not_confirmed_again(scene: Scene, over: str) -> None:
    worker_id = _silent(scene, 60, suspected=30)
    more = {"lost_by": "lease"} if over == "lost_at" else {}
    scene.set_worker(worker_id, **{over: later(0.0)}, **more)
    assert _stale(scene) == []


def test_after_an_outage_every_suspicion_starts_anew(scene: Scene) -> None:
    worker_id = _silent(scene, 600, suspected=300)
    scene.store.suspect(anew=True)
    assert _stale(scene) == []
    assert _row(scene, worker_id).suspected_beat == 3


def test_after_an_outage_a_suspicion_by_name_starts_anew_too(scene: Scene) -> None:
    """It was stamped while the worker still beat, so that its pulse is not stale yet."""
    worker_id = _silent(scene, 14, suspected=60)
    scene.store.suspect(anew=True)
    scene.set_worker(worker_id, beat_at=later(-16.0))
    assert _stale(scene) == []


def test_a_suspicion_by_name_needs_the_silence_all_the_same(scene: Scene) -> None:
    worker_id = _silent(scene, 1)
    scene.store.suspect_now(worker_id)
    assert _row(scene, worker_id).suspected_beat == 3
    scene.set_worker(worker_id, suspected_at=later(-30.0))
    assert _stale(scene) == []
    scene.set_worker(worker_id, beat_at=later(-31.0))
    assert _stale(scene) == [worker_id]


# -- whose rows ------------------------------------------------------------------------------------


def test_orphans_are_running_rows_of_workers_that_stopped_or_were_lost(scene: Scene) -> None:
    batch_id = scene.batch(4)
    lost, stopped = scene.worker(), scene.worker()
    scene.run(batch_id, 0)
    scene.run(batch_id, 1, worker=lost)
    scene.run(batch_id, 2, worker=stopped)
    scene.complete(scene.run(batch_id, 3, worker=lost))
    assert scene.store.orphans() == []
    scene.store.lose(lost, Detector.HOST)
    scene.store.stop(stopped)
    found = {(row.position, worker.id) for row, worker in scene.store.orphans()}
    assert found == {(1, lost), (2, stopped)}


# -- the sweep's own row ---------------------------------------------------------------------------


def _forge_meta(scene: Scene, **values: object) -> None:
    scene.execute(sa.update(schema.meta).values(**values))


def test_the_first_sweep_ever_may_not_convict_the_next_may(scene: Scene) -> None:
    assert scene.store.sweep_overdue(15)
    assert not scene.store.begin_sweep("a", 15)
    assert not scene.store.sweep_overdue(15)
    assert scene.store.begin_sweep("b", 15)


def test_a_sweep_is_overdue_after_an_interval(scene: Scene) -> None:
    scene.store.begin_sweep("a", 15)
    _forge_meta(scene, swept_at=later(-5.0))
    assert not scene.store.sweep_overdue(15)
    _forge_meta(scene, swept_at=later(-15.5))
    assert scene.store.sweep_overdue(15)


def test_a_sweep_long_after_the_last_one_may_not_convict(scene: Scene) -> None:
    scene.store.begin_sweep("a", 15)
    _forge_meta(scene, swept_at=later(-25.0))
    assert scene.store.begin_sweep("a", 15)
    _forge_meta(scene, swept_at=later(-40.0))
    assert not scene.store.begin_sweep("a", 15)


def test_a_sweep_after_a_restart_of_the_server_may_not_convict(scene: Scene) -> None:
    if scene.store.sqlite:
        pytest.skip("SQLite has no server")
    scene.store.begin_sweep("a", 15)
    _forge_meta(scene, server_started_at=later(-1000.0))
    assert not scene.store.begin_sweep("a", 15)
    assert scene.store.begin_sweep("a", 15)
