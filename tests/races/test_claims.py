"""Races for a row: claims against claims, cancels, verdicts and dispatchers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import SlotTaken, Store, schema
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token
from celery_batchtrack.vocabulary.records import Claimed, Ending, Refused, Release
from celery_batchtrack.vocabulary.states import Cause, Status, Verdict
from tests.races.rivals import Held, Rivals
from tests.store.kit import SEGFAULT, Scene, add_up, counts, dispatch_all, refused

Hold = Callable[[], Held]


def test_of_two_claimers_of_one_row_one_wins(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    key, first = ChildKey(scene.batch(1), 0), hold()
    mine = rivals.start_held(first, first.claim, key, 0, new_token(), scene.worker_id, "1:1:1:0")
    yours = rivals.start_blocked(scene.store.claim, key, 0, new_token(), scene.worker_id, "2:1:1:0")
    first.commit()
    won = mine.result()
    assert isinstance(won, Claimed) and isinstance(yours.result(), Refused)
    assert scene.row(key).run_token == won.token and scene.row(key).attempt == 1


def test_of_two_claims_in_one_slot_the_second_hears_that_it_is_taken(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, first = scene.batch(2), hold()
    rivals.start_held(first, first.claim, ChildKey(batch_id, 0), 0, new_token(), scene.worker_id, "1:1:1:0")
    second = rivals.start_blocked(
        scene.store.claim, ChildKey(batch_id, 1), 0, new_token(), scene.worker_id, "1:1:1:0"
    )
    first.commit()
    with pytest.raises(SlotTaken):
        second.result()
    assert scene.statuses(batch_id) == ["running", "pending"]


def test_a_claim_that_waits_for_a_cancel_is_refused(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, canceller = scene.batch(1), hold()
    rivals.start_held(canceller, canceller.cancel, batch_id)
    claim = rivals.start_blocked(
        scene.store.claim, ChildKey(batch_id, 0), 0, new_token(), scene.worker_id, "1:1:1:0"
    )
    canceller.commit()
    assert not refused(claim.result()).wait
    assert counts(scene, batch_id) == {"cancelled": 1}


# -- a claim or a release in flight, and a cancel --------------------------------------------------


def _in_flight(scene: Scene, rivals: Rivals, hold: Hold, which: str) -> tuple[ChildKey, Held]:
    """A child whose claim, or release, is written and not yet committed."""
    key, held = ChildKey(scene.batch(3), 1), hold()
    if which == "claim":
        rivals.start_held(held, held.claim, key, 0, new_token(), scene.worker_id, "1:1:1:0")
    else:
        claimed = scene.run(key.batch_id, 1)
        rivals.start_held(held, held.release, key, claimed.token, Release())
    return key, held


@pytest.mark.parametrize("which", ["claim", "release"])
def test_a_cancel_takes_the_child_whose_claim_or_release_is_in_flight(
    scene: Scene, rivals: Rivals, hold: Hold, which: str
) -> None:
    key, held = _in_flight(scene, rivals, hold, which)
    cancel = rivals.start_blocked(scene.store.cancel, key.batch_id)
    held.commit()
    finished = cancel.result()
    assert finished is not None
    assert [run.key for run in finished.cancelled_runs] == ([key] if which == "claim" else [])
    assert scene.statuses(key.batch_id) == ["cancelled"] * 3
    assert add_up(scene, key.batch_id)


@pytest.mark.parametrize("which", ["claim", "release"])
def test_a_cancel_in_two_updates_would_lose_it(scene: Scene, rivals: Rivals, hold: Hold, which: str) -> None:
    """What the one UPDATE is for: either order of two loses one kind of child in flight."""
    key, held = _in_flight(scene, rivals, hold, which)
    order = ("running", "pending") if which == "claim" else ("pending", "running")

    def cancel_wrongly() -> None:
        table = schema.child
        with scene.store.write() as connection:
            for status in order:
                connection.execute(
                    sa.update(table)
                    .where(table.c.batch_id == key.batch_id, table.c.status == status)
                    .values(status="cancelled", cause="cancelled", finished_at=sa.func.now())
                )

    wrong = rivals.start_blocked(cancel_wrongly)
    held.commit()
    wrong.result()
    lost = "running" if which == "claim" else "pending"
    assert scene.row(key).status == lost, "PostgreSQL no longer needs the rule"


def test_a_cancel_never_waits_crosswise_with_a_dispatcher_that_gives_back(
    scene: Scene, rivals: Rivals, postgres_url: str
) -> None:
    """Both write several children: whoever does so takes them by position, whatever their place on disk."""
    batch_id = scene.batch(2)
    taken = [each.child for each in scene.store.take_undispatched(batch_id, 10)]
    scene.set_child(ChildKey(batch_id, 0), queue="moved")  # now the first position lies behind the second,
    no_index = "-c enable_indexscan=off -c enable_bitmapscan=off"  # and a scan meets the second one first
    canceller = Store(postgres_url, engine_options={"connect_args": {"options": no_index}})
    assert canceller.store_id
    with scene.store.engine.connect() as blocker:
        blocker.execute(_locking(ChildKey(batch_id, 0)))
        give_back = rivals.start_blocked(scene.store.give_back, taken)
        cancel = rivals.start_blocked(canceller.cancel, batch_id)
        blocker.rollback()
    give_back.result()
    assert cancel.result() is not None
    canceller.dispose()
    assert scene.statuses(batch_id) == ["cancelled", "cancelled"]


def _locking(key: ChildKey) -> sa.Select[tuple[int]]:
    table = schema.child
    where = (table.c.batch_id == key.batch_id, table.c.position == key.position)
    return sa.select(table.c.attempt).where(*where).with_for_update()


# -- a claim and a verdict -------------------------------------------------------------------------


def test_a_death_before_the_claim_does_not_strike_a_claim_in_flight(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    key, claimer = ChildKey(scene.batch(1), 0), hold()
    seen = scene.row(key)
    rivals.start_held(claimer, claimer.claim, key, 0, new_token(), scene.worker_id, "1:1:1:0")
    strike = rivals.start_blocked(scene.store.crash_unclaimed, seen, SEGFAULT, None)
    claimer.commit()
    assert not strike.result().written
    assert scene.row(key).status == "running" and scene.incidents(key.batch_id) == []


def test_a_withdrawal_does_not_take_a_claim_in_flight(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    key, claimer = ChildKey(scene.batch(1), 0), hold()
    rivals.start_held(claimer, claimer.claim, key, 0, new_token(), scene.worker_id, "1:1:1:0")
    revoke = rivals.start_blocked(
        scene.store.settle_unstarted, key, 0, Status.CANCELLED, Evidence(Cause.REVOKED)
    )
    claimer.commit()
    assert not revoke.result().written
    assert scene.row(key).status == "running"


def test_a_newer_claim_in_flight_keeps_an_older_run_from_overturning(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    old, claimer = scene.run(scene.batch(1)), hold()
    scene.crash(old, Verdict.LEASE, again=0.0)
    newer = rivals.start_held(claimer, claimer.claim, old.key, 1, new_token(), scene.worker_id, "2:1:1:0")
    late = rivals.start_blocked(scene.complete, old)
    claimer.commit()
    assert late.result().late
    won = newer.result()
    assert isinstance(won, Claimed) and scene.row(old.key).run_token == won.token
    assert scene.row(old.key).status == "running"


def test_a_claim_waiting_for_an_overturn_is_refused(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    old, overturner = scene.run(scene.batch(1)), hold()
    scene.crash(old, Verdict.LEASE, again=0.0)
    # The first write of the held store is the overturn itself: the plain settle has lost its guard.
    done = Ending(Status.COMPLETED, "1")
    overturn = rivals.start_held(overturner, overturner._settle_late, old.key, old.token, done)
    claim = rivals.start_blocked(scene.store.claim, old.key, 1, new_token(), scene.worker_id, "2:1:1:0")
    overturner.commit()
    assert overturn.result().overturned
    refused(claim.result())
    assert counts(scene, old.key.batch_id) == {"completed": 1}
    assert add_up(scene, old.key.batch_id)


# -- dispatchers -----------------------------------------------------------------------------------


def test_two_dispatchers_never_take_the_same_row_and_never_wait(scene: Scene, rivals: Rivals, hold: Hold) -> None:
    batch_id, first = scene.batch(5), hold()
    mine = rivals.start_held(first, first.take_undispatched, batch_id, 3)
    yours = dispatch_all(scene, batch_id)  # it does not wait: it skips what is locked
    first.commit()
    assert yours == [3, 4]
    assert [each.child.position for each in mine.result()] == [0, 1, 2]
    assert [row.dispatches for row in scene.rows(batch_id)] == [1] * 5


def test_many_dispatchers_at_once_publish_every_row_once(scene: Scene, rivals: Rivals) -> None:
    batch_id = scene.batch(60)

    def dispatch() -> list[int]:
        found: list[int] = []
        while taken := scene.store.take_undispatched(batch_id, 7):
            found += [each.child.position for each in taken]
        return found

    found = rivals.at_once(*[dispatch] * 6)
    assert sorted(position for each in found for position in each) == list(range(60))


def test_a_redispatch_and_a_claim_of_the_same_row_do_not_hurt_each_other(
    scene: Scene, rivals: Rivals, hold: Hold
) -> None:
    batch_id, claimer = scene.batch(1), hold()
    dispatch_all(scene, batch_id)
    rivals.start_held(claimer, claimer.claim, ChildKey(batch_id, 0), 0, new_token(), scene.worker_id, "1:1:1:0")
    assert scene.store.take_again([ChildKey(batch_id, 0)], -1.0) == []
    claimer.commit()


# -- Show 5 ----------------------------------------------------------------------------------------


def test_twenty_claimers_over_ten_children_in_three_batches_run_each_child_once(
    scene: Scene, rivals: Rivals, postgres_url: str
) -> None:
    """Each claimer tries every child of its batch, from a place of its own, on a connection of its own."""
    batches = [scene.batch(10) for _ in range(3)]
    stores = [Store(postgres_url, engine_options={"pool_size": 1, "max_overflow": 0}) for _ in range(60)]
    for store in stores:
        assert store.store_id

    def claim_all(number: int) -> list[Claimed]:
        store, batch_id = stores[number], batches[number % 3]
        won = []
        for step in range(10):
            key = ChildKey(batch_id, (number + step) % 10)
            slot = f"{number}:1:1:{step}"
            answer = store.claim(key, 0, new_token(), scene.worker_id, slot)
            if isinstance(answer, Claimed):
                won.append(answer)
        return won

    try:
        found = rivals.at_once(*[lambda number=number: claim_all(number) for number in range(60)])
    finally:
        for store in stores:
            store.dispose()
    runs = Counter(each.key for won in found for each in won)
    assert runs == Counter(ChildKey(batch_id, position) for batch_id in batches for position in range(10))
    assert all(row.attempt == 1 for batch_id in batches for row in scene.rows(batch_id))
    assert scene.violations() == {}
