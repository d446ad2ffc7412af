"""What ends is counted as it ends: exactly, for ever, and at no cost but one more row in the same transaction."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import Store, outcomes, schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.durations import BOUNDS, NEVER_RAN, bucket, nearest_rank
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Cause, EndReason, Status, Verdict
from tests.races.rivals import Held, Rivals
from tests.store.kit import HERE, SEGFAULT, Scene, documents, done, killed, part, some, statements


def counted(store: Store) -> dict[str, int]:
    """Children by how they ended, and deaths."""
    found: Counter[str] = Counter()
    for each in store.outcome_totals():
        found[f"{each.status} {each.detail}".strip()] += each.children
    return dict(found)


def shards(store: Store, batch_id: uuid.UUID | None = None) -> list[int]:
    query = sa.select(schema.outcome.c.shard).order_by(schema.outcome.c.shard)
    if batch_id is not None:
        query = query.where(schema.outcome.c.batch_id == batch_id)
    with store.read() as connection:
        return list(connection.execute(query).scalars())


def test_every_way_to_end_is_counted_once(scene: Scene) -> None:
    batch_id = scene.batch([*some(5, items=2), *some(1), documents("a", "x", "y"), *some(1)])
    scene.complete(scene.run(batch_id, 0))
    scene.complete(scene.run(batch_id, 1))
    scene.fail(scene.run(batch_id, 2))
    scene.crash(scene.run(batch_id, 3))
    scene.crash(scene.run(batch_id, 4), again=0.0)
    scene.store.settle_unstarted(ChildKey(batch_id, 5), 0, Status.FAILED, Evidence(Cause.NOT_REGISTERED))
    scene.split(scene.run(batch_id, 6), done("a"), killed("x"), part("y"))
    assert counted(scene.store) == {"completed": 3, "failed": 2, "crashed": 2, "died SIGSEGV": 3}
    scene.store.cancel(batch_id, EndReason.USER)
    assert counted(scene.store)["cancelled"] == 3, "one died and was to run again, one never ran, one was split off"
    assert sum(each.items for each in scene.store.outcome_totals()) == 5 * 2 + 1 + 3 + 1
    ran = {(each.status, each.bucket >= 0) for each in scene.store.outcome_totals() if each.status == "crashed"}
    assert ran == {("crashed", True)}, "also what died with its whole child"
    assert scene.violations() == {}


def test_callbacks_and_what_only_gave_its_row_back_are_not_counted(scene: Scene) -> None:
    batch_id = scene.batch(1, calls=("on_success",))
    scene.complete(scene.run(batch_id, 0))
    assert scene.store.finish(batch_id) is not None
    (callback,) = scene.store.callback_rows(batch_id)
    scene.complete(scene.run(batch_id, callback.position))
    assert counted(scene.store) == {"completed": 1}


def test_another_round_takes_nothing_away(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.crash(scene.run(batch_id, 0))
    scene.complete(scene.run(batch_id, 1))
    scene.store.finish(batch_id)
    scene.store.merge_outcomes()
    assert scene.store.retry(batch_id, [Status.CRASHED]) is not None
    assert counted(scene.store) == {"completed": 1, "crashed": 1, "died SIGSEGV": 1}
    scene.complete(scene.run(batch_id, 0))
    assert counted(scene.store) == {"completed": 2, "crashed": 1, "died SIGSEGV": 1}
    assert scene.violations() == {}


def test_a_verdict_that_is_overturned_was_two_ends(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.crash(claimed, Verdict.LEASE)
    assert scene.complete(claimed).overturned
    assert counted(scene.store) == {"crashed": 1, "completed": 1, "died worker_lost": 1}


def test_durations_are_in_their_class(scene: Scene) -> None:
    batch_id = scene.batch(3)
    for position, ago in enumerate((0.0, 42.0, 7210.0)):
        claimed = scene.run(batch_id, position)
        scene.set_child(claimed.key, started_at=later(-ago))
        scene.complete(claimed)
    scene.store.cancel(scene.batch(1), EndReason.USER)
    found = {each.bucket: each for each in scene.store.outcome_totals()}
    assert bucket(42.0) in found and len(BOUNDS) in found and NEVER_RAN in found and min(found) == NEVER_RAN
    assert found[len(BOUNDS)].seconds >= 7200 and found[NEVER_RAN].seconds == 0
    (row,) = scene.store.view("task_duration", {"status": "completed"})
    assert row["children"] == 3 and 7200 <= row["seconds_max"] < 7300
    assert row["p50_seconds"] == 60.0, "the upper bound of the class that it falls in"
    assert row["p95_seconds"] == row["p99_seconds"] == row["seconds_max"]


def test_percentiles_by_nearest_rank() -> None:
    assert nearest_rank([], 0.5) is None
    found = [nearest_rank([1.0, 2.0, 3.0, 4.0], share) for share in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)]
    assert found == [1, 1, 2, 3, 4, 4]


# -- putting together -------------------------------------------------------------------------------


def test_of_a_batch_that_ended_one_set_is_left_and_the_counts_are_the_same(scene: Scene) -> None:
    ended, going_on = scene.batch(8, shards=4), scene.batch(8, shards=4)
    for position in range(8):
        scene.complete(scene.run(ended, position))
    scene.complete(scene.run(going_on, 0))
    scene.store.finish(ended)
    before = counted(scene.store)
    assert scene.store.merge_outcomes() == 1
    assert set(shards(scene.store, ended)) == {outcomes.MERGED} and shards(scene.store, going_on) == [0]
    assert counted(scene.store) == before == {"completed": 9}
    assert scene.store.merge_outcomes() == 0


def test_what_was_pruned_stays_counted(scene: Scene) -> None:
    batch_id = scene.batch(3)
    scene.complete(scene.run(batch_id, 0))
    scene.fail(scene.run(batch_id, 1))
    scene.crash(scene.run(batch_id, 2))
    scene.store.finish(batch_id)
    before, per_hour = counted(scene.store), scene.store.view("outcome_per_hour")
    scene.set_batch(batch_id, finished_at=later(-100.0))
    assert scene.store.prune(completed=50.0, other=50.0) == 1
    assert counted(scene.store) == before, "nobody has put it away yet"
    assert scene.store.keep_outcomes() > 0
    assert counted(scene.store) == before == {"completed": 1, "failed": 1, "crashed": 1, "died SIGSEGV": 1}
    (then,), (now,) = per_hour, scene.store.view("outcome_per_hour")
    assert now.pop("seconds_avg") == pytest.approx(then.pop("seconds_avg")) and now == then
    assert scene.store.view("outcome_per_minute") == [], "its minutes are gone with it"
    assert scene.store.keep_outcomes() == 0


def test_after_90_days_hours_become_days(scene: Scene) -> None:
    batch_id = scene.batch(2)
    for position in range(2):
        scene.complete(scene.run(batch_id, position))
    scene.execute(sa.delete(schema.batch))
    scene.store.keep_outcomes()
    scene.execute(sa.update(schema.outcome).values(time=later(-100 * 86_400.0)))
    with scene.store.read() as connection:
        (time,) = set(connection.execute(sa.select(schema.outcome.c.time)).scalars())
    scene.execute(sa.update(schema.outcome).values(time=time.replace(hour=13, minute=0, second=0, microsecond=0)))
    assert scene.store.keep_outcomes() > 0 and scene.store.keep_outcomes() == 0
    (row,) = scene.store.view("outcome_per_hour")
    assert row["time"] == time.replace(hour=0, minute=0, second=0, microsecond=0) and row["completed"] == 2


# -- races ------------------------------------------------------------------------------------------


def test_two_that_put_the_same_counts_together_do_not_double_them(postgres_url: str) -> None:
    store = Store(postgres_url, auto_migrate=True)
    scene = Scene(store)
    scene.worker(HERE, id=scene.worker_id, name="w1@here", pid=40)
    batch_id = scene.batch(4, shards=2)
    for position in range(4):
        scene.complete(scene.run(batch_id, position))
    store.finish(batch_id)
    first = Held(postgres_url)
    assert first.store_id
    with Rivals(store) as rivals:
        rivals.held.append(first)
        held = rivals.start_held(first, first.merge_outcomes)
        waiting = rivals.start_blocked(store.merge_outcomes)
        first.commit()
        assert (held.result(), waiting.result()) == (1, 0)
    assert counted(store) == {"completed": 4}
    first.dispose()
    store.dispose()


def test_a_death_is_counted_before_the_tally_is_touched(scene: Scene) -> None:
    """Whoever holds the count of deaths may wait for a tally, so nobody may do it the other way round."""
    batch_id = scene.batch([*some(5), documents("a", "b")])
    claims = [scene.run(batch_id, position) for position in (0, 1, 2, 5)]
    lease = scene.run(batch_id, 3)
    scene.crash(lease, Verdict.LEASE)
    terminated = replace(SEGFAULT, cause=Cause.TERMINATED)
    acts: list[Callable[[], object]] = [
        lambda: scene.crash(claims[0]),
        lambda: scene.store.settle_terminated(scene.row(claims[1].key), terminated),
        lambda: scene.store.settle(claims[2].key, claims[2].token, Ending(Status.FAILED, None, Cause.OOM, SEGFAULT)),
        lambda: scene.split(claims[3], killed("a"), part("b")),
        lambda: scene.store.settle(lease.key, lease.token, Ending(Status.FAILED, None, Cause.OOM, SEGFAULT)),
        lambda: scene.store.settle_unstarted(ChildKey(batch_id, 4), 0, Status.FAILED, SEGFAULT),
    ]
    for act in acts:
        with statements(scene.store.engine) as sent:
            act()
        told = [each.split("(")[0].split(" SET")[0].strip() for each in sent if "outcome" in each or "_tally" in each]
        assert told[0] == "INSERT INTO batchtrack_outcome" and "UPDATE batchtrack_tally" in told, sent


def test_deaths_are_not_only_those_of_signals(scene: Scene) -> None:
    batch_id = scene.batch(1)
    scene.crash(scene.run(batch_id), evidence=Evidence(Cause.EXIT, exit_code=3, detected_by=SEGFAULT.detected_by))
    assert counted(scene.store) == {"crashed": 1, "died exit": 1}
