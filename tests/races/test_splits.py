"""Races of the recovery ladder: splits against ends, cancels, adds and each other; breakers; counts of kills."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack.behaviour import recovery
from celery_batchtrack.store import Store, schema
from celery_batchtrack.store.quarantine import count_kill
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.aftermath import Part
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.policies import CrashRate
from celery_batchtrack.vocabulary.records import Claimed, Ending
from celery_batchtrack.vocabulary.states import Cause, Status, Verdict
from tests.races.rivals import Held, Rivals
from tests.store.behaviour_kit import Told, tracker_on
from tests.store.kit import (
    ERROR,
    SEGFAULT,
    SET_ASIDE,
    Scene,
    add_up,
    counts,
    documents,
    done,
    every_item,
    items_by_status,
    killed,
    killer,
    part,
    refused,
)

Hold = Callable[[], Held]
ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")
DONE = Ending(Status.COMPLETED, '"done"')
FAILED = Ending(Status.FAILED, None, Cause.EXCEPTION, ERROR)


def halves(first: str, second: str) -> list[Part]:
    return [part(*first), part(*second)]


def skipped(item: str, others: str) -> list[Part]:
    return [killed(item), part(*others)]


# -- a settle and a split --------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [halves("ab", "cd"), skipped("a", "bcd")], ids=["bisect", "skip"])
@pytest.mark.parametrize("ending", [DONE, FAILED], ids=["completing", "failing"])
def test_a_split_that_waited_for_a_settle_changes_nothing(
    scene: Scene, rivals: Rivals, hold: Hold, parts: Sequence[Part], ending: Ending
) -> None:
    batch_id, settler = scene.batch([documents(*"abcd"), documents("x")]), hold()
    claimed = scene.run(batch_id)
    seen = scene.row(claimed.key)
    rivals.start_held(settler, settler.settle, claimed.key, claimed.token, ending)
    split = rivals.start_blocked(scene.store.split, seen, parts, SEGFAULT)
    settler.commit()
    assert not split.result().written
    assert items_by_status(scene, batch_id) == {ending.status.value: [*"abcd"], "pending": ["x"]}
    assert len(scene.rows(batch_id)) == 2
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("parts", [halves("ab", "cd"), skipped("a", "bcd")], ids=["bisect", "skip"])
@pytest.mark.parametrize("ending", [DONE, FAILED], ids=["completing", "failing"])
def test_a_settle_that_waited_for_a_split_is_late(
    scene: Scene, rivals: Rivals, hold: Hold, parts: Sequence[Part], ending: Ending
) -> None:
    batch_id, splitter = scene.batch([documents(*"abcd"), documents("x")]), hold()
    claimed = scene.run(batch_id)
    own = None if parts[0].evidence else SEGFAULT
    rivals.start_held(splitter, splitter.split, scene.row(claimed.key), parts, own)
    settle = rivals.start_blocked(scene.store.settle, claimed.key, claimed.token, ending)
    splitter.commit()
    assert settle.result().late
    assert scene.at(batch_id, 0).status == "split"
    assert every_item(scene, batch_id) == [*"abcdx"]
    assert [each.outcome for each in scene.incidents(batch_id)][-1] == "late_write"
    assert add_up(scene, batch_id)


def test_a_crash_verdict_that_waited_for_a_split_changes_nothing(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, splitter = scene.batch([documents("a", "b")]), hold()
    seen = scene.row(scene.run(batch_id).key)
    rivals.start_held(splitter, splitter.split, seen, halves("a", "b"), SEGFAULT)
    verdict = rivals.start_blocked(scene.store.crash, seen, SEGFAULT, Verdict.OBSERVED, None)
    splitter.commit()
    assert not verdict.result().written
    assert counts(scene, batch_id) == {"pending": 2} and len(scene.incidents(batch_id)) == 1


# -- before the claim ------------------------------------------------------------------------------


@pytest.mark.parametrize("death", [True, False], ids=["a death", "set aside"])
def test_a_split_before_the_claim_that_waited_for_a_claim_changes_nothing(
    scene: Scene, rivals: Rivals, hold: Hold, death: bool
) -> None:
    batch_id, claimer = scene.batch([documents("a", "b")]), hold()
    seen, token = scene.at(batch_id, 0), new_token()
    rivals.start_held(claimer, claimer.claim, seen.key, 0, token, scene.worker_id, scene.slot())
    parts = skipped("a", "b")
    split = rivals.start_blocked(lambda: scene.store.split(seen, parts, None, claimed=False, death=death))
    claimer.commit()
    assert not split.result().written
    assert scene.statuses(batch_id) == ["running"]
    assert scene.store.settle(seen.key, token, DONE).written
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("death", [True, False], ids=["a death", "set aside"])
def test_a_claim_that_waited_for_a_split_before_it_is_refused(
    scene: Scene, rivals: Rivals, hold: Hold, death: bool
) -> None:
    batch_id, splitter = scene.batch([documents("a", "b")]), hold()
    seen = scene.at(batch_id, 0)
    rivals.start_held(
        splitter, lambda: splitter.split(seen, [killed("a", evidence=SET_ASIDE), part("b")], None, claimed=False,
                                         death=death)
    )  # fmt: skip
    claim = rivals.start_blocked(scene.store.claim, seen.key, 0, new_token(), scene.worker_id, scene.slot())
    splitter.commit()
    assert not refused(claim.result()).wait
    assert scene.statuses(batch_id) == ["split", "crashed", "pending"]
    assert add_up(scene, batch_id)


# -- cancel ----------------------------------------------------------------------------------------


def test_a_cancel_takes_the_parts_of_a_split_in_flight(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, splitter = scene.batch([documents(*"abc"), documents("x")], calls=ALL), hold()
    rivals.start_held(splitter, splitter.split, scene.row(scene.run(batch_id).key), halves("ab", "c"), SEGFAULT)
    cancel = rivals.start_blocked(scene.store.cancel, batch_id)
    splitter.commit()
    assert cancel.result() is not None
    assert scene.statuses(batch_id) == ["split", "cancelled", "cancelled", "cancelled"]
    assert scene.called(batch_id) == ["on_finish"]
    assert add_up(scene, batch_id)


def test_a_split_that_waited_for_a_cancel_opens_nothing(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, canceller = scene.batch([documents(*"abc"), documents("x")], calls=ALL), hold()
    seen = scene.row(scene.run(batch_id).key)
    rivals.start_held(canceller, canceller.cancel, batch_id)
    split = rivals.start_blocked(scene.store.split, seen, halves("ab", "c"), SEGFAULT)
    canceller.commit()
    assert not split.result().written
    assert scene.statuses(batch_id) == ["cancelled", "cancelled"] and scene.called(batch_id) == ["on_finish"]
    assert add_up(scene, batch_id)


# -- positions -------------------------------------------------------------------------------------


def _open(scene: Scene, calls: Sequence[str]) -> tuple[uuid.UUID, Claimed]:
    batch_id = scene.batch([documents(*"abc"), documents(*"xyz")], seal=False, start_now=True, calls=calls)
    return batch_id, scene.run(batch_id, 0)


@pytest.mark.parametrize("calls", [(), ALL], ids=["no callback", "a first failure"])
def test_a_split_that_waited_for_an_add_gives_its_parts_the_next_positions(
    scene: Scene, rivals: Rivals, hold: Hold, calls: Sequence[str]
) -> None:
    (batch_id, claimed), adder = _open(scene, calls), hold()
    seen = scene.row(claimed.key)
    added = rivals.start_held(adder, adder.add, batch_id, [documents("n"), documents("m")])
    split = rivals.start_blocked(scene.store.split, seen, skipped("a", "bc"), None)
    adder.commit()
    assert added.result() == 2 and split.result().written
    assert [(row.position, row.items) for row in scene.rows(batch_id)][2:] == [
        (2, ["n"]), (3, ["m"]), (4, ["a"]), (5, ["b", "c"]),
    ]  # fmt: skip
    assert [row.position for row in scene.store.callback_rows(batch_id)] == ([6] if calls else [])
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("calls", [(), ALL], ids=["no callback", "a first failure"])
def test_an_add_that_waited_for_a_split_gives_its_children_the_next_positions(
    scene: Scene, rivals: Rivals, hold: Hold, calls: Sequence[str]
) -> None:
    (batch_id, claimed), splitter = _open(scene, calls), hold()
    rivals.start_held(splitter, splitter.split, scene.row(claimed.key), skipped("a", "bc"), None)
    add = rivals.start_blocked(scene.store.add, batch_id, [documents("n")])
    splitter.commit()
    assert add.result() == (5 if calls else 4), "behind two parts, and a callback"
    assert add_up(scene, batch_id)


def test_two_splits_at_once_give_every_part_a_position_of_its_own(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch([documents(*"abc"), documents(*"xyz")], shards=1), hold()
    mine, yours = (scene.row(scene.run(batch_id, position).key) for position in (0, 1))
    rivals.start_held(first, first.split, mine, halves("ab", "c"), SEGFAULT)
    split = rivals.start_blocked(scene.store.split, yours, skipped("x", "yz"), None)
    first.commit()
    assert split.result().written
    assert [(row.position, row.origin) for row in scene.rows(batch_id)][2:] == [(2, 0), (3, 0), (4, 1), (5, 1)]
    assert add_up(scene, batch_id)


def test_two_splits_with_a_first_failure_call_once(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch([documents(*"abc"), documents(*"xyz")], calls=ALL), hold()
    mine, yours = (scene.row(scene.run(batch_id, position).key) for position in (0, 1))
    won = rivals.start_held(first, first.split, mine, skipped("a", "bc"), None)
    lost = rivals.start_blocked(scene.store.split, yours, skipped("x", "yz"), None)
    first.commit()
    assert won.result().callbacks and lost.result().written and not lost.result().callbacks
    assert scene.called(batch_id) == ["on_first_failure"]
    assert add_up(scene, batch_id)


# -- two detectors ---------------------------------------------------------------------------------


@pytest.fixture
def detectors(scene: Scene, hold: Hold) -> Iterator[tuple[Told, Told]]:
    """One whose first write is held, and another."""
    held = hold()
    other = Store(scene.store.url.render_as_string(hide_password=False))
    yield tracker_on(held), tracker_on(other)
    other.dispose()


@pytest.mark.parametrize("on_crash", ["bisect", "skip", "resume"])
@pytest.mark.parametrize("known", [True, False], ids=["both know the item", "one does not"])
def test_two_detectors_that_judge_one_death_split_once(
    scene: Scene, rivals: Rivals, detectors: tuple[Told, Told], on_crash: str, known: bool
) -> None:
    first, second = detectors
    policy = RowPolicy(on_crash, True, True, True, items=("args", 0))
    batch_id = scene.batch([documents(*"abcd")])
    seen = scene.row(scene.run(batch_id, policy=policy.as_option()).key)
    mine = _told(item_index=1, promised=True)
    yours = mine if known else _told()
    won = rivals.start_held(_held(first), recovery.run_died, first, seen, mine, Verdict.OBSERVED)
    lost = rivals.start_blocked(recovery.run_died, second, seen, yours, Verdict.OBSERVED)
    _held(first).commit()
    assert won.result() and not lost.result()
    assert every_item(scene, batch_id) == [*"abcd"]
    assert len(scene.incidents(batch_id)) == 1
    assert len(first.of(events.ChildCrashed)) == 1 and second.heard == []
    assert len(first.outbox.sent) == sum(row.status == "pending" for row in scene.rows(batch_id))
    assert second.outbox.sent == []
    assert add_up(scene, batch_id)


def _held(tracker: Told) -> Held:
    assert isinstance(tracker.store, Held)
    return tracker.store


def _told(**more: Any) -> Evidence:
    return replace(SEGFAULT, **more)


# -- the end ---------------------------------------------------------------------------------------


def test_a_finish_that_waited_for_a_split_sees_its_parts(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, splitter = scene.batch([documents("a", "b")], calls=ALL, tolerance=1), hold()
    rivals.start_held(splitter, splitter.split, scene.row(scene.run(batch_id).key), skipped("a", "b"), None)
    ending = rivals.start_blocked(scene.store.finish, batch_id)
    splitter.commit()
    assert ending.result() is None
    scene.complete(scene.run(batch_id, 2))
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "partial"
    assert add_up(scene, batch_id)


def test_a_finish_that_waited_for_a_split_into_settled_parts_ends_the_batch_rightly(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, splitter = scene.batch([documents("a", "b"), documents("x")], calls=ALL, tolerance=1), hold()
    scene.complete(scene.run(batch_id, 1))
    rivals.start_held(splitter, splitter.split, scene.row(scene.run(batch_id).key), [done("a"), killed("b")], None)
    ending = rivals.start_blocked(scene.store.finish, batch_id)
    splitter.commit()
    finished = ending.result()
    assert finished is not None and finished.status == "partial"
    assert scene.called(batch_id) == ["on_finish", "on_first_failure", "on_success"]
    assert scene.store.finish(batch_id) is None
    assert add_up(scene, batch_id)


def test_a_split_that_waited_for_a_finish_check_that_came_too_early_goes_on(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, ender = scene.batch([documents("a", "b")], calls=ALL, tolerance=1), hold()
    seen = scene.row(scene.run(batch_id).key)
    ending = rivals.start_held(ender, ender.finish, batch_id)
    split = rivals.start_blocked(scene.store.split, seen, [done("a"), killed("b")], None)
    ender.commit()
    assert ending.result() is None, "the child still ran"
    assert split.result().look, "so the split looks itself"
    assert scene.store.finish(batch_id) is not None
    assert scene.called(batch_id) == ["on_finish", "on_first_failure", "on_success"]
    assert add_up(scene, batch_id)


def test_splits_and_settles_of_a_whole_batch_at_once_end_it_exactly_once(scene: Scene, rivals: Rivals) -> None:
    for _ in range(10):
        batch_id = scene.batch([documents("a", "b") for _ in range(6)], shards=2, calls=ALL, tolerance=6)
        runs = [scene.run(batch_id, position) for position in range(6)]

        def end(number: int, runs: list[Claimed] = runs, batch_id: uuid.UUID = batch_id) -> bool:
            if number % 2:
                look = scene.complete(runs[number]).look
            else:
                look = scene.split(runs[number], done("a"), killed("b")).look
            return look and scene.store.finish(batch_id) is not None

        ended = rivals.at_once(*[lambda number=number: end(number) for number in range(6)])
        assert ended.count(True) == 1
        assert scene.called(batch_id) == ["on_finish", "on_first_failure", "on_success"]
        assert items_by_status(scene, batch_id) == {"completed": [*"aaaaaabbb"], "crashed": [*"bbb"]}
    assert scene.violations() == {}


# -- the breaker -----------------------------------------------------------------------------------


def _watched(scene: Scene, children: int) -> tuple[uuid.UUID, list[Any]]:
    """A batch with a breaker and two deaths; its other children run."""
    batch_id = scene.batch(children, options={"crash_rate": CrashRate(20.0).as_option()})
    for position in range(2):
        scene.crash(scene.run(batch_id, position))
    return batch_id, [scene.row(scene.run(batch_id, position).key) for position in range(2, children)]


def _deaths(scene: Scene, batch_id: uuid.UUID) -> int:
    with scene.store.read() as connection:
        query = sa.select(schema.batch.c.deaths).where(schema.batch.c.id == batch_id)
        return int(connection.execute(query).scalar_one())


@pytest.mark.parametrize("how", ["crash", "split"])
def test_two_deaths_that_trip_the_breaker_at_once_pause_once_and_both_count(
    scene: Scene, rivals: Rivals, hold: Hold, how: str
) -> None:
    (batch_id, rows), first = _watched(scene, 4), hold()

    def die(store: Store, row: Any) -> Any:
        if how == "split":
            return store.split(row, [killed("a"), part()], None)
        return store.crash(row, SEGFAULT, Verdict.OBSERVED, None)

    mine = rivals.start_held(first, die, first, rows[0])
    yours = rivals.start_blocked(die, scene.store, rows[1])
    first.commit()
    assert mine.result().paused is not None and yours.result().written and yours.result().paused is None
    assert _deaths(scene, batch_id) == 4
    row = scene.store.batch(batch_id)
    assert row is not None and row.pause_reason == f"breaker: {mine.result().paused}"


def test_a_breaker_that_waited_for_a_hand_does_not_pause_again(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    (batch_id, rows), hand = _watched(scene, 3), hold()
    rivals.start_held(hand, hand.pause, batch_id, "by hand")
    death = rivals.start_blocked(scene.store.crash, rows[0], SEGFAULT, Verdict.OBSERVED, None)
    hand.commit()
    assert death.result().written and death.result().paused is None
    row = scene.store.batch(batch_id)
    assert row is not None and row.pause_reason == "by hand"
    assert _deaths(scene, batch_id) == 3


def test_a_death_that_waited_for_a_resume_is_the_first_of_a_new_count(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    (batch_id, rows), hand = _watched(scene, 5), hold()
    assert scene.store.crash(rows[0], SEGFAULT, Verdict.OBSERVED, None).paused is not None
    rivals.start_held(hand, hand.resume, batch_id)
    death = rivals.start_blocked(scene.store.crash, rows[1], SEGFAULT, Verdict.OBSERVED, None)
    hand.commit()
    assert death.result().written and death.result().paused is None
    assert scene.store.crash(rows[2], SEGFAULT, Verdict.OBSERVED, None).paused is None, "the second"
    row = scene.store.batch(batch_id)
    assert row is not None and row.paused_at is None
    assert _deaths(scene, batch_id) == 5


def test_a_sample_that_waited_for_a_death_does_not_undo_it(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    (batch_id, rows), judge = _watched(scene, 3), hold()
    rivals.start_held(judge, judge.crash, rows[0], SEGFAULT, Verdict.OBSERVED, None)
    sample = rivals.start_blocked(scene.store.sample_crash_rates)
    judge.commit()
    sample.result()
    row = scene.store.batch(batch_id)
    assert _deaths(scene, batch_id) == 3 and row is not None and row.paused_at is not None


def test_a_resume_waits_for_children_in_their_order_and_never_crosswise(scene: Scene, rivals: Rivals) -> None:
    """Somebody has the first child and then wants the last, as every writer of several does."""
    batch_id = scene.batch(3)
    scene.store.take_undispatched(batch_id, 10)
    scene.store.pause(batch_id, "by hand")
    scene.set_child(ChildKey(batch_id, 0), queue="q")  # rewritten: now it is the last one where the table stands
    assert _beside_one_who_locks_in_order(scene, rivals, batch_id, lambda: scene.store.resume(batch_id)) is True
    assert len(scene.store.take_undispatched(batch_id, 10)) == 3


def test_rows_are_given_back_in_their_order_and_never_crosswise(scene: Scene, rivals: Rivals) -> None:
    batch_id = scene.batch(3)
    taken = [each.child for each in scene.store.take_undispatched(batch_id, 10)]
    _beside_one_who_locks_in_order(scene, rivals, batch_id, lambda: scene.store.give_back(reversed(taken)))
    assert len(scene.store.take_undispatched(batch_id, 10)) == 3


def _beside_one_who_locks_in_order(scene: Scene, rivals: Rivals, batch_id: uuid.UUID, act: Callable[[], Any]) -> Any:
    table = schema.child

    def lock(connection: sa.Connection, position: int) -> None:
        here = sa.and_(table.c.batch_id == batch_id, table.c.position == position)
        connection.execute(sa.select(table.c.position).where(here).with_for_update())

    with scene.store.engine.connect() as connection:
        lock(connection, 0)
        waiting = rivals.start_blocked(act)
        lock(connection, 2)
        connection.commit()
    return waiting.result()


# -- quarantine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["an item never seen", "one that killed before"])
def test_two_processes_killed_by_one_item_at_once_count_two(
    scene: Scene, rivals: Rivals, hold: Hold, known: bool
) -> None:
    first = hold()
    if known:
        scene.kill("doc-1", after=9)

    def die(store: Store) -> bool:
        with store.write() as connection:
            return count_kill(connection, "demo.task", killer("doc-1", 9), ChildKey(uuid7(), 0), SEGFAULT)

    rivals.start_held(first, die, first)
    other = rivals.start_blocked(die, scene.store)
    first.commit()
    other.result()
    (entry,) = scene.store.quarantine_list(all=True)
    assert entry.deaths == 2 + known


@pytest.mark.parametrize("after", [1, 2, 3])
def test_two_kills_at_once_say_once_that_the_item_is_in_quarantine(
    scene: Scene, rivals: Rivals, hold: Hold, after: int
) -> None:
    first, batches = hold(), [scene.batch([documents("a")]) for _ in range(2)]
    mine, yours = (scene.row(scene.run(batch_id).key) for batch_id in batches)
    if after == 3:
        scene.kill("a", after=after)
    one = rivals.start_held(first, first.crash, mine, SEGFAULT, Verdict.OBSERVED, None, killer("a", after))
    two = rivals.start_blocked(scene.store.crash, yours, SEGFAULT, Verdict.OBSERVED, None, killer("a", after))
    first.commit()
    assert [one.result().quarantined, two.result().quarantined] == ([True, False] if after == 1 else [False, True])
    assert [each.state for each in scene.store.quarantine_list()] == ["quarantined"]


def test_a_release_beside_a_kill_in_flight_lets_out_nothing_that_is_not_in_yet(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    first = hold()
    scene.kill("doc-1")

    def die() -> bool:
        with first.write() as connection:
            return count_kill(connection, "demo.task", killer("doc-1"), ChildKey(uuid7(), 0), SEGFAULT)

    rivals.start_held(first, die)
    assert scene.store.release_from_quarantine() == [], "as far as anybody knows, it is merely counted"
    first.commit()
    rivals.join()
    assert len(scene.store.quarantine_list()) == 1
    assert len(scene.store.release_from_quarantine()) == 1


# -- all of them -----------------------------------------------------------------------------------


def test_everything_at_once_never_deadlocks_and_conserves_every_item(scene: Scene, rivals: Rivals) -> None:
    """Every writer locks batch, then child, then tally; the register of kills comes before the tally."""
    for number in range(15):
        options = {"crash_rate": CrashRate(0.0).as_option()}
        batch_id = scene.batch(
            [documents(*"abc") for _ in range(8)], shards=1, calls=ALL, options=options, tolerance=8
        )
        runs = [scene.run(batch_id, position) for position in range(7)]
        rows = [scene.row(run.key) for run in runs]
        rivals.at_once(
            lambda rows=rows: scene.store.split(rows[0], skipped("a", "bc"), None, killer=killer("a", 3)),
            lambda rows=rows: scene.store.split(rows[1], skipped("a", "bc"), None, killer=killer("a", 3)),
            lambda rows=rows: scene.store.split(rows[2], halves("ab", "c"), SEGFAULT),
            lambda rows=rows: scene.store.crash(rows[3], SEGFAULT, Verdict.OBSERVED, None, killer("a", 3)),
            lambda runs=runs: scene.complete(runs[4]),
            lambda runs=runs: scene.fail(runs[5]),
            lambda runs=runs, rows=rows: scene.complete(runs[6]).written
            or scene.store.split(rows[6], halves("ab", "c"), SEGFAULT).written,
            lambda batch_id=batch_id: scene.store.take_undispatched(batch_id, 10),
            lambda batch_id=batch_id: scene.store.pause(batch_id, "by hand"),
            lambda batch_id=batch_id: scene.store.resume(batch_id),
            lambda: scene.store.sample_crash_rates(),
            lambda batch_id=batch_id: scene.store.finish(batch_id),
            *([lambda batch_id=batch_id: scene.store.cancel(batch_id)] if number % 3 == 0 else []),
        )
        assert every_item(scene, batch_id) == sorted([*"abc"] * 8)
        assert scene.called(batch_id).count("on_first_failure") <= 1
    assert scene.violations() == {}
