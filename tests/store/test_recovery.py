"""A death from its judgement to the row: what the policy says is what is written, published and counted."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from celery_batchtrack.behaviour import dispatch, recovery
from celery_batchtrack.behaviour.handover import item_hash
from celery_batchtrack.store.quarantine import count_kill
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.aftermath import Killer
from celery_batchtrack.vocabulary.crash_policy import FROM_OUTSIDE, RowPolicy
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.policies import CrashRate
from celery_batchtrack.vocabulary.states import Cause, Detector, Verdict
from tests.store.behaviour_kit import Told, tracker_on
from tests.store.kit import SEGFAULT, Scene, add_up, documents, items_by_status

SKIP = RowPolicy("skip", True, True, True, items=("args", 0), quarantine_after=2)
RETRY = replace(SKIP, on_crash="retry")
LOST = Evidence(Cause.WORKER_LOST, detected_by=Detector.HOST)


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store, app_version="1")


Die = Callable[..., bool]


@pytest.fixture
def die(scene: Scene, tracker: Told) -> Die:
    """A child is claimed under a policy, and dies."""

    def die(
        batch_id: uuid.UUID, position: int, policy: RowPolicy, evidence: Evidence = SEGFAULT,
        verdict: Verdict = Verdict.OBSERVED, **more: object,
    ) -> bool:  # fmt: skip
        claimed = scene.run(batch_id, position, policy=policy.as_option())
        return recovery.run_died(tracker, scene.row(claimed.key), replace(evidence, **more), verdict)

    return die


def kills(scene: Scene) -> dict[str, int]:
    return {each.item: each.deaths for each in scene.store.quarantine_list(all=True)}


def test_who_is_blamed_is_counted_once_however_its_child_goes_on(scene: Scene, die: Die) -> None:
    batch_id = scene.batch([documents(*"abc"), documents("d"), documents("e")])
    assert die(batch_id, 0, SKIP, item_index=1)
    assert die(batch_id, 1, RETRY)
    assert die(batch_id, 2, replace(SKIP, on_crash="record"))
    assert kills(scene) == {"b": 1, "d": 1, "e": 1}
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("signal", FROM_OUTSIDE)
def test_a_signal_that_somebody_sent_is_no_items_fault(scene: Scene, die: Die, signal: str) -> None:
    batch_id = scene.batch([documents("a"), documents("b", "c")])
    for _ in range(3):
        assert die(batch_id, 0, RETRY, signal=signal)
        die(batch_id, 1, SKIP, signal=signal, item_index=0)
    assert kills(scene) == {}
    assert items_by_status(scene, batch_id) == {"crashed": ["a", "b"], "pending": ["c"]}, "its last chance was over"


@pytest.mark.parametrize("cause", [Cause.WORKER_LOST, Cause.TIME_LIMIT, Cause.SETTLE_LOST])
def test_nor_is_a_lost_worker_or_report_or_the_end_of_the_time(scene: Scene, die: Die, cause: Cause) -> None:
    batch_id = scene.batch([documents("a")])
    for _ in range(3):
        die(batch_id, 0, RETRY, Evidence(cause, item_index=0))
    assert kills(scene) == {}


def test_a_lease_verdict_blames_nobody(scene: Scene, die: Die) -> None:
    batch_id = scene.batch([documents("a")])
    die(batch_id, 0, RETRY, verdict=Verdict.LEASE)
    assert kills(scene) == {}


def test_who_halves_blames_nobody_yet(scene: Scene, die: Die) -> None:
    batch_id = scene.batch([documents("a", "b")])
    bisect = replace(SKIP, on_crash="bisect")
    assert die(batch_id, 0, bisect, item_index=0)
    assert kills(scene) == {}
    assert die(batch_id, 1, bisect)
    assert kills(scene) == {"a": 1}


def test_an_item_that_killed_often_enough_is_set_aside_in_every_batch(scene: Scene, tracker: Told, die: Die) -> None:
    tracker.policy_of = lambda row, batch: SKIP
    first = scene.batch([documents(*"abc")])
    assert die(first, 0, SKIP, item_index=0)
    other = scene.batch([documents("a", "x"), documents("a"), documents("y")], tolerance=2)
    assert die(other, 1, SKIP)
    assert [each.item for each in tracker.of(events.Quarantined)] == ["a"]
    tracker.outbox.sent.clear()
    third = scene.batch([documents(*"xay"), documents("a"), documents("z")], tolerance=2)
    dispatch.pump(tracker, third)
    assert [each.row.items for each in tracker.outbox.sent] == [["z"], ["x", "y"]]
    assert items_by_status(scene, third) == {"crashed": ["a", "a"], "pending": ["x", "y", "z"]}
    assert {(each.cause, each.item) for each in scene.incidents(third)} == {("quarantined", "a")}
    assert kills(scene)["a"] == 2, "not sent is not killed"
    assert scene.at(third, 0).policy == SKIP.as_option(), "so that the parts' results can be merged"
    assert add_up(scene, third)


def test_a_batch_of_nothing_but_quarantined_items_ends_at_its_dispatch(scene: Scene, tracker: Told) -> None:
    tracker.policy_of = lambda row, batch: SKIP
    with scene.store.write() as connection:
        killer = Killer("a", item_hash("a", "a"), "1", 1)
        count_kill(connection, "demo.task", killer, ChildKey(uuid.uuid4(), 0), SEGFAULT)
    batch_id = scene.batch([documents("a"), documents("a")], calls=("on_failure", "on_finish", "on_first_failure"))
    dispatch.pump(tracker, batch_id)
    assert scene.status(batch_id) == "failed"
    assert tracker.outbox.kinds(batch_id) == ["on_failure", "on_finish", "on_first_failure"]
    assert add_up(scene, batch_id)


def test_those_that_went_down_together_run_again_alone_and_the_culprit_is_convicted(
    scene: Scene, tracker: Told, die: Die
) -> None:
    """Issue 3, show 4: four run when their worker is killed, and one of them is why."""
    isolate = replace(SKIP, isolate=True, quarantine_after=None)
    worker = scene.worker()
    batch_id = scene.batch([documents(f"doc-{each}", queue="q") for each in range(4)], tolerance=1)
    rows = [
        scene.row(scene.run(batch_id, position, worker=worker, policy=isolate.as_option()).key) for position in range(4)
    ]
    for row in rows:
        assert recovery.run_died(tracker, row, replace(LOST, worker_id=worker), Verdict.OBSERVED)
    assert [(row.status, row.crashes, row.isolated, row.queue) for row in scene.rows(batch_id)] == [
        ("pending", 0, True, "q.isolated")
    ] * 4
    assert all(each.ticket.isolated for each in tracker.outbox.sent) and len(tracker.outbox.sent) == 4
    for position in range(4):
        alone = scene.worker()
        for _ in range(3):
            if scene.at(batch_id, position).status != "pending":
                break
            claimed = scene.run(batch_id, position, worker=alone, policy=isolate.as_option())
            if position != 2:
                scene.complete(claimed)
                break
            evidence = replace(LOST, worker_id=alone)
            assert recovery.run_died(tracker, scene.row(claimed.key), evidence, Verdict.OBSERVED)
            alone = scene.worker()
    assert items_by_status(scene, batch_id) == {"completed": ["doc-0", "doc-1", "doc-3"], "crashed": ["doc-2"]}
    assert scene.at(batch_id, 2).crashes == 3
    assert add_up(scene, batch_id)


def test_what_died_of_memory_goes_on_where_there_is_more_and_is_judged_there(
    scene: Scene, tracker: Told, die: Die
) -> None:
    roomy = replace(SKIP, oom_queue="big")
    batch_id = scene.batch([documents("a", "b", queue="small")])
    oom = Evidence(Cause.OOM, signal="SIGKILL", item_index=0)
    assert die(batch_id, 0, roomy, oom)
    row = scene.at(batch_id, 0)
    assert (row.status, row.queue, row.rerouted, row.isolated) == ("pending", "big", True, False)
    assert die(batch_id, 0, roomy, oom)
    assert items_by_status(scene, batch_id) == {"crashed": ["a"], "pending": ["b"]}
    assert scene.at(batch_id, 2).queue == "big", "its successor stays there"


def test_items_that_cannot_be_found_in_the_row_run_again_and_are_crashed_as_a_whole(scene: Scene, die: Die) -> None:
    batch_id = scene.batch([documents("a", "b"), replace(documents("c", "d"), signature="no JSON")])
    elsewhere = replace(SKIP, items=("kwargs", "docs"))
    for _ in range(SKIP.max_crashes - 1):
        assert die(batch_id, 0, elsewhere, item_index=0)
        assert items_by_status(scene, batch_id)["pending"][:2] == ["a", "b"]
    assert die(batch_id, 0, elsewhere, item_index=0)
    assert "could not be taken apart" in (scene.incidents(batch_id)[-1].message or "")
    scene.set_child(ChildKey(batch_id, 1), crashes=SKIP.max_crashes - 1)
    assert die(batch_id, 1, SKIP, item_index=0)
    assert items_by_status(scene, batch_id) == {"crashed": [*"abcd"]}
    assert add_up(scene, batch_id)


def test_a_breaker_that_opens_is_told_and_holds_the_successors_back(scene: Scene, tracker: Told, die: Die) -> None:
    batch_id = scene.batch([documents(*"abcd")], options={"crash_rate": CrashRate(0.0).as_option()})
    for position in (0, 2, 4):
        assert die(batch_id, position, SKIP, item_index=0)
    (told,) = tracker.of(events.BatchPaused)
    assert told.batch_id == batch_id and "3 of 3 runs" in told.reason
    assert [each.row.items for each in tracker.outbox.sent] == [["b", "c", "d"], ["c", "d"]]
    assert scene.at(batch_id, 6).dispatched_at is None
