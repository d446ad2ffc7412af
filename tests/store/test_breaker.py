"""Pausing a batch, by hand and by its breaker: what it stops, what it lets go on, and what a resume forgives."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.aftermath import Rerun
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.policies import CrashRate, Sample
from celery_batchtrack.vocabulary.records import BatchRow, Claimed, Release, Settled
from celery_batchtrack.vocabulary.states import Verdict
from tests.store.kit import (
    SEGFAULT,
    SILENCE,
    Scene,
    add_up,
    counts,
    documents,
    done,
    killed,
    part,
    refused,
    some,
)

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")


def watched(scene: Scene, children: int, percent: float = 20.0, window: float = 300.0, **more: Any) -> uuid.UUID:
    return scene.batch(children, options={"crash_rate": CrashRate(percent, window).as_option()}, **more)


def row_of(scene: Scene, batch_id: uuid.UUID) -> BatchRow:
    row = scene.store.batch(batch_id)
    assert row is not None
    return row


def paused(scene: Scene, batch_id: uuid.UUID) -> bool:
    row = row_of(scene, batch_id)
    assert (row.paused_at is None) == (row.pause_reason is None)
    return row.paused_at is not None


def state_of(scene: Scene, batch_id: uuid.UUID) -> tuple[int, list[Sample]]:
    """Deaths counted, and the samples kept."""
    table = schema.batch
    with scene.store.read() as connection:
        query = sa.select(table.c.deaths, table.c.crash_samples).where(table.c.id == batch_id)
        deaths, samples = connection.execute(query).one()
    return deaths, [Sample(*each) for each in samples or ()]


def age_samples(scene: Scene, batch_id: uuid.UUID, seconds: float) -> None:
    """As if what was sampled had been that much earlier."""
    samples = [[at - seconds, well, deaths] for at, well, deaths in state_of(scene, batch_id)[1]]
    scene.set_batch(batch_id, crash_samples=samples)


# -- by hand ---------------------------------------------------------------------------------------


def test_a_paused_batch_dispatches_and_claims_nothing_until_it_is_resumed(scene: Scene) -> None:
    batch_id = scene.batch(3)
    scene.store.take_undispatched(batch_id, 1)
    assert scene.store.pause(batch_id, "by hand")
    assert row_of(scene, batch_id).pause_reason == "by hand"
    assert scene.store.undispatched() == [] and scene.store.take_undispatched(batch_id, 10) == []
    assert "paused" in refused(scene.claim(ChildKey(batch_id, 0))).reason
    assert scene.store.resume(batch_id)
    assert not paused(scene, batch_id)
    taken = scene.store.take_undispatched(batch_id, 10)
    assert [each.child.position for each in taken] == [0, 1, 2], "also the one whose message was refused meanwhile"
    scene.run(batch_id, 0)
    assert add_up(scene, batch_id)


def test_pausing_and_resuming_twice_does_nothing_more(scene: Scene) -> None:
    batch_id = scene.batch(1)
    assert not scene.store.resume(batch_id), "it was not paused"
    assert scene.store.pause(batch_id, "first")
    first = row_of(scene, batch_id)
    assert not scene.store.pause(batch_id, "second")
    assert row_of(scene, batch_id) == first
    assert scene.store.resume(batch_id)
    scene.store.take_undispatched(batch_id, 10)
    before = scene.at(batch_id, 0)
    assert not scene.store.resume(batch_id)
    assert scene.at(batch_id, 0) == before, "a resume that resumes nothing sends nothing again"


@pytest.mark.parametrize("ended", ["cancelled", "completed", "gone"])
def test_what_has_ended_is_neither_paused_nor_resumed(scene: Scene, ended: str) -> None:
    batch_id = uuid7() if ended == "gone" else scene.batch(0)
    if ended == "cancelled":
        scene.store.cancel(batch_id)
    elif ended == "completed":
        scene.store.finish(batch_id)
    assert not scene.store.pause(batch_id, "too late")
    if ended != "gone":
        scene.set_batch(batch_id, paused_at=later(0.0), pause_reason="before its end")
    assert not scene.store.resume(batch_id)


def test_an_open_batch_that_starts_now_may_be_paused(scene: Scene) -> None:
    batch_id = scene.batch(1, seal=False, start_now=True)
    assert scene.store.pause(batch_id, "by hand")
    assert scene.store.take_undispatched(batch_id, 10) == []
    assert scene.store.add(batch_id, some(1)) == 1 and scene.store.seal(batch_id)
    assert scene.store.take_undispatched(batch_id, 10) == [], "sealing does not resume"


def test_what_runs_in_a_paused_batch_goes_on_and_may_end_it(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=ALL, tolerance=1)
    runs = [scene.run(batch_id, position) for position in range(2)]
    scene.store.pause(batch_id, "by hand")
    scene.complete(runs[0])
    assert scene.crash(runs[1]).callbacks
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "partial"
    assert len(scene.store.take_undispatched(batch_id, 10)) == 3, "callbacks are no children"
    assert add_up(scene, batch_id)


def test_a_paused_batch_may_be_cancelled(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=ALL)
    scene.store.pause(batch_id, "by hand")
    assert scene.store.cancel(batch_id) is not None
    assert counts(scene, batch_id) == {"cancelled": 2}
    assert add_up(scene, batch_id)


def test_a_resume_makes_only_what_is_pending_due_again(scene: Scene) -> None:
    batch_id = scene.batch(4, calls=ALL, tolerance=4)
    dispatched = [each.child.position for each in scene.store.take_undispatched(batch_id, 10)]
    assert dispatched == [0, 1, 2, 3]
    scene.complete(scene.run(batch_id, 0))
    scene.fail(scene.run(batch_id, 1))  # inserts on_first_failure
    callback = scene.store.take_undispatched(batch_id, 10)[0].child.key
    running = scene.run(batch_id, 2)
    scene.store.pause(batch_id, "by hand")
    before = {row.position: row for row in (*scene.rows(batch_id), scene.row(callback))}
    scene.store.resume(batch_id)
    for position in (0, 1, running.key.position, callback.position):
        assert scene.at(batch_id, position) == before[position], "its message was not refused"
    assert scene.at(batch_id, 3).dispatched_at is None
    other = scene.batch(1)
    scene.store.take_undispatched(other, 10)
    scene.store.pause(batch_id, "again")
    scene.store.resume(batch_id)
    assert scene.at(other, 0).dispatched_at is not None, "another batch's children are none of its business"


# -- by the breaker --------------------------------------------------------------------------------


def test_too_many_deaths_pause_the_batch_once_and_say_why(scene: Scene) -> None:
    batch_id = watched(scene, 9)
    for position in range(4):
        scene.complete(scene.run(batch_id, position))
    answers = [scene.crash(scene.run(batch_id, position)) for position in range(4, 6)]
    last = scene.run(batch_id, 6), scene.run(batch_id, 7)
    assert [each.paused for each in answers] == [None, None] and not paused(scene, batch_id)
    tripped = scene.crash(last[0])
    assert tripped.paused == "3 of 7 runs died within 300 s, more than max_crash_rate 20%"
    assert row_of(scene, batch_id).pause_reason == f"breaker: {tripped.paused}"
    first = row_of(scene, batch_id).paused_at
    assert scene.crash(last[1]).paused is None, "it is paused already"
    assert row_of(scene, batch_id).paused_at == first
    assert state_of(scene, batch_id)[0] == 4, "and counts on"
    refused(scene.claim(ChildKey(batch_id, 8)))
    assert add_up(scene, batch_id)


def test_deaths_at_the_rate_do_not_pause(scene: Scene) -> None:
    batch_id = watched(scene, 15)
    for position in range(12):
        scene.complete(scene.run(batch_id, position))
    for position in range(12, 15):
        assert scene.crash(scene.run(batch_id, position)).paused is None


def test_failures_end_well_enough(scene: Scene) -> None:
    """The breaker is for crashes: an exception is a run that reported its end."""
    batch_id = watched(scene, 15)
    for position in range(12):
        scene.fail(scene.run(batch_id, position))
    for position in range(12, 15):
        assert scene.crash(scene.run(batch_id, position)).paused is None
    assert state_of(scene, batch_id)[0] == 3


def _rerun(scene: Scene, batch_id: uuid.UUID) -> Settled:
    return scene.crash(scene.run(batch_id), again=0.0)


def _split(scene: Scene, batch_id: uuid.UUID) -> Settled:
    position = max(row.position for row in scene.rows(batch_id) if row.status == "pending")
    return scene.split(scene.run(batch_id, position), part("a"), part("b"), evidence=SEGFAULT)


def _skip(scene: Scene, batch_id: uuid.UUID) -> Settled:
    position = max(row.position for row in scene.rows(batch_id) if row.status == "pending")
    return scene.split(scene.run(batch_id, position), killed("a"), part("b"))


def _unclaimed(scene: Scene, batch_id: uuid.UUID) -> Settled:
    return scene.store.crash_unclaimed(scene.at(batch_id, 0), SEGFAULT, Rerun())


def _silent(scene: Scene, batch_id: uuid.UUID) -> Settled:
    return scene.crash(scene.run(batch_id), Verdict.LEASE, again=0.0)


@pytest.mark.parametrize("die", [_rerun, _split, _skip, _unclaimed, _silent])
def test_every_death_counts_also_those_after_which_a_child_goes_on(
    scene: Scene, die: Callable[[Scene, uuid.UUID], Settled]
) -> None:
    batch_id = watched(scene, 1)
    answers = [die(scene, batch_id).paused for _ in range(3)]
    assert answers[:2] == [None, None] and answers[2] is not None
    assert paused(scene, batch_id) and state_of(scene, batch_id)[0] == 3
    assert row_of(scene, batch_id).ended is False


def test_what_is_no_death_of_a_child_counts_nowhere(scene: Scene) -> None:
    batch_id = watched(scene, 3, percent=0.0, calls=ALL, tolerance=3)
    released = scene.run(batch_id, 0)
    scene.store.release(released.key, released.token, Release())
    co_victim = scene.run(batch_id, 0)
    scene.store.crash(scene.row(co_victim.key), SILENCE, Verdict.OBSERVED, Rerun(strike=False, isolated=True))
    given_up = scene.run(batch_id, 1)
    scene.store.release_claiming(scene.row(given_up.key))
    told_late = scene.run(batch_id, 1)
    seen = scene.row(told_late.key)
    scene.fail(told_late)  # inserts on_first_failure, at 3
    assert not scene.store.crash(seen, SEGFAULT, Verdict.OBSERVED, None).written
    for _ in range(3):
        scene.crash(scene.run(batch_id, 3), again=0.0)
    assert state_of(scene, batch_id) == (0, []) and not paused(scene, batch_id)


def test_a_callback_that_dies_after_the_end_pauses_nothing(scene: Scene) -> None:
    batch_id = watched(scene, 0, percent=0.0, calls=("on_finish",))
    scene.store.finish(batch_id)
    answers = [scene.crash(scene.run(batch_id, 0), again=0.0) for _ in range(4)]
    assert [each.paused for each in answers] == [None] * 4 and not paused(scene, batch_id)


def test_a_batch_without_a_breaker_counts_nothing_and_is_never_paused(scene: Scene) -> None:
    batch_id = scene.batch(4, tolerance=4)
    for position in range(4):
        assert scene.crash(scene.run(batch_id, position)).paused is None
    assert state_of(scene, batch_id) == (0, [])
    scene.store.sample_crash_rates()
    assert state_of(scene, batch_id) == (0, [])


def test_a_resume_forgives_what_was_before_it(scene: Scene) -> None:
    batch_id = watched(scene, 9)
    tripped = [scene.crash(scene.run(batch_id, position)).paused for position in range(3)]
    assert tripped[2] is not None
    assert scene.store.resume(batch_id)
    again = [scene.crash(scene.run(batch_id, position)).paused for position in range(3, 6)]
    assert again[:2] == [None, None], "two deaths prove nothing again"
    assert again[2] is not None and again[2].startswith("3 of 3 runs")
    assert add_up(scene, batch_id)


def test_a_resume_by_hand_forgives_too(scene: Scene) -> None:
    batch_id = watched(scene, 5)
    for position in range(2):
        scene.crash(scene.run(batch_id, position))
    scene.store.pause(batch_id, "by hand")
    scene.store.resume(batch_id)
    assert scene.crash(scene.run(batch_id, 2)).paused is None


# -- the window ------------------------------------------------------------------------------------


def test_deaths_older_than_the_window_are_forgiven_where_sweeps_have_sampled(scene: Scene) -> None:
    batch_id = watched(scene, 8, window=60.0)
    for position in range(2):
        scene.crash(scene.run(batch_id, position))
    age_samples(scene, batch_id, 30.0)
    scene.store.sample_crash_rates()
    age_samples(scene, batch_id, 61.0)
    assert [scene.crash(scene.run(batch_id, position)).paused for position in (2, 3)] == [None, None]
    tripped = scene.crash(scene.run(batch_id, 4)).paused
    assert tripped is not None and tripped.startswith("3 of 3 runs"), "three within the window are three"


def test_deaths_within_the_window_are_not_forgiven_by_a_sweep(scene: Scene) -> None:
    batch_id = watched(scene, 8, window=60.0)
    for position in range(2):
        scene.crash(scene.run(batch_id, position))
    for _ in range(3):
        age_samples(scene, batch_id, 10.0)
        scene.store.sample_crash_rates()
    assert scene.crash(scene.run(batch_id, 2)).paused is not None


def test_a_sweep_samples_what_ended_well_and_only_now_and_then(scene: Scene) -> None:
    batch_id, plain = watched(scene, 8, window=100.0), scene.batch(2)
    scene.store.sample_crash_rates()
    ((_, well, deaths),) = state_of(scene, batch_id)[1]
    assert (well, deaths) == (0, 0)
    for position in range(3):
        scene.complete(scene.run(batch_id, position))
    scene.store.sample_crash_rates()
    assert len(state_of(scene, batch_id)[1]) == 1, "ten a window are enough"
    for number in range(1, 30):
        age_samples(scene, batch_id, 10.0)
        scene.store.sample_crash_rates()
        samples = state_of(scene, batch_id)[1]
        assert len(samples) == min(number + 1, 11), "a window, and the one before it"
        assert samples[-1][1:] == (3, 0)
    assert state_of(scene, plain) == (0, [])


def test_a_sweep_samples_only_what_runs(scene: Scene) -> None:
    opened, ended = watched(scene, 1, seal=False, start_now=True), watched(scene, 0)
    scene.store.finish(ended)
    scene.store.sample_crash_rates()
    assert state_of(scene, opened)[1] == [] == state_of(scene, ended)[1]


def test_the_window_of_a_split_batch_counts_each_death_once(scene: Scene) -> None:
    batch_id = scene.batch([documents(*"abcd")], options={"crash_rate": CrashRate(50.0).as_option()})
    scene.split(scene.run(batch_id), killed("a"), part(*"bcd"))
    scene.split(scene.run(batch_id, 2), killed("b"), part(*"cd"))
    assert state_of(scene, batch_id)[0] == 2
    last = scene.split(scene.run(batch_id, 4), killed("c"), part("d"))
    assert last.paused == "3 of 3 runs died within 300 s, more than max_crash_rate 50%"
    assert last.successors == 1, "its successor waits for the resume"
    assert add_up(scene, batch_id)


def test_what_was_done_before_a_death_is_no_run_that_ended_well(scene: Scene) -> None:
    batch_id = scene.batch([documents(*"abcdefg"), documents("x")], options={"crash_rate": CrashRate(60.0).as_option()})
    scene.complete(take(scene, batch_id, 1))
    scene.split(take(scene, batch_id, 0), done("a"), killed("b"), part(*"cdefg"))
    scene.split(take(scene, batch_id, 4), done("c"), killed("d"), part(*"efg"))
    last = scene.split(take(scene, batch_id, 7), done("e"), killed("f"), part("g"))
    assert last.paused is not None and last.paused.startswith("3 of 4 runs")
    scene.store.resume(batch_id)
    scene.complete(take(scene, batch_id, 10))
    age_samples(scene, batch_id, 60.0)
    scene.store.sample_crash_rates()
    assert state_of(scene, batch_id)[1][-1][1:] == (2, 3), "a part that ran is a run"


def take(scene: Scene, batch_id: uuid.UUID, position: int) -> Claimed:
    """Published and claimed, as in life."""
    scene.store.take_undispatched(batch_id, 100)
    return scene.run(batch_id, position)
