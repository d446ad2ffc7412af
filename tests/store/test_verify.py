"""Every invariant of `verify` finds the row that breaks it, and nothing on a healthy database."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import schema, verify
from celery_batchtrack.store.clock import later, now
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.records import NewBatch
from celery_batchtrack.vocabulary.states import Status, Verdict
from tests.store.kit import SEGFAULT, SET_ASIDE, Scene, callbacks, documents, done, killed, part, some

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")

Break = Callable[[Scene], object]
#: check → what breaks it. The value names what the database's own constraints would refuse before.
CASES: dict[str, list[tuple[str, tuple[str, ...], Break]]] = {}


def breaks(check: str, *, against: tuple[str, ...] = ()) -> Callable[[Break], Break]:
    """Register a way to break `check`; `against` names constraints and indexes dropped first."""

    def register(function: Break) -> Break:
        CASES.setdefault(check, []).append((function.__name__.strip("_"), against, function))
        return function

    return register


def _ended(scene: Scene, **more: object) -> uuid.UUID:
    batch_id = scene.batch(2, calls=ALL, tolerance=1, **more)
    scene.complete(scene.run(batch_id, 0))
    scene.fail(scene.run(batch_id, 1))
    scene.store.finish(batch_id)
    return batch_id


def _tally(batch_id: uuid.UUID, **values: object) -> sa.Update:
    table = schema.tally
    return sa.update(table).where(table.c.batch_id == batch_id, table.c.shard == 0).values(**values)


def _delete_rows(batch_id: uuid.UUID, kind: str) -> sa.Delete:
    return sa.delete(schema.child).where(schema.child.c.batch_id == batch_id, schema.child.c.kind == kind)


@breaks("tally_equals_rows")
def a_child_that_was_counted_twice(scene: Scene) -> None:
    scene.execute(_tally(_ended(scene), completed=2))


@breaks("tally_equals_rows")
def items_that_were_not_counted(scene: Scene) -> None:
    scene.execute(_tally(scene.batch(some(1, items=3)), items_total=1))


@breaks("tally_equals_rows")
def a_child_that_vanished(scene: Scene) -> None:
    scene.execute(_delete_rows(scene.batch(3), "child"))


@breaks("what_ended_is_counted")
def an_end_that_was_not_counted(scene: Scene) -> None:
    scene.execute(sa.delete(schema.outcome).where(schema.outcome.c.batch_id == _ended(scene)))


@breaks("window_is_kept")
def more_children_run_than_their_window_lets_through(scene: Scene) -> None:
    batch_id = scene.batch(3, max_in_flight=1)
    scene.run(batch_id, 0)
    scene.run(batch_id, 1)


@breaks("window_is_kept")
def more_messages_are_sent_than_their_window_lets_through(scene: Scene) -> None:
    batch_id = scene.batch(3, max_in_flight=1)
    for position in (0, 1):
        scene.set_child(ChildKey(batch_id, position), dispatched_at=now())


@breaks("every_child_has_a_tally")
def a_shard_that_vanished(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.execute(sa.delete(schema.tally).where(schema.tally.c.batch_id == batch_id, schema.tally.c.shard == 1))


@breaks("settled_has_finished_at", against=("child.finished",))
def a_settled_child_without_an_end(scene: Scene) -> None:
    scene.set_child(ChildKey(_ended(scene), 0), finished_at=None)


@breaks("settled_has_finished_at", against=("child.finished",))
def an_open_child_with_an_end(scene: Scene) -> None:
    scene.set_child(ChildKey(scene.batch(1), 0), finished_at=now())


@breaks("pending_has_no_worker", against=("child.pending",))
def a_pending_child_on_a_worker(scene: Scene) -> None:
    scene.set_child(ChildKey(scene.batch(1), 0), worker_id=scene.worker_id)


@breaks("running_has_worker_and_start", against=("child.running",))
def a_running_child_without_a_slot(scene: Scene) -> None:
    scene.set_child(scene.run(scene.batch(1)).key, slot=None)


@breaks("running_has_worker_and_start")
def a_running_child_that_was_never_claimed(scene: Scene) -> None:
    scene.set_child(scene.run(scene.batch(1)).key, attempt=0)


@breaks("not_completed_has_cause")
def a_failed_child_that_does_not_say_why(scene: Scene) -> None:
    scene.set_child(ChildKey(_ended(scene), 1), cause=None)


@breaks("not_completed_has_cause", against=("child.cause",))
def a_completed_child_with_a_cause(scene: Scene) -> None:
    scene.set_child(ChildKey(_ended(scene), 0), cause="signal")


@breaks("crashed_has_incident")
def a_crash_without_evidence(scene: Scene) -> None:
    scene.crash(scene.run(scene.batch(2)))
    scene.execute(sa.delete(schema.incident))


def _split(scene: Scene) -> uuid.UUID:
    """Two header positions, the first split into 2 (crashed) and 3; the latter split into 4 and 5."""
    batch_id = scene.batch([documents("a", "b", "c"), documents("x")])
    scene.split(scene.run(batch_id), killed("a"), part("b", "c"))
    scene.split(scene.run(batch_id, 3), part("b"), part("c"), evidence=SEGFAULT)
    return batch_id


@breaks("split_hands_on_every_item")
def an_item_that_was_lost_in_a_split(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 2), item_count=0)


@breaks("split_hands_on_every_item")
def an_item_that_was_doubled_in_a_split(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 5), item_count=2)


@breaks("split_hands_on_every_item")
def a_part_that_vanished(scene: Scene) -> None:
    batch_id = _split(scene)
    scene.execute(sa.delete(schema.child).where(schema.child.c.batch_id == batch_id, schema.child.c.position == 4))


@breaks("split_hands_on_every_item")
def a_split_child_without_any_part(scene: Scene) -> None:
    scene.set_child(ChildKey(scene.batch(1), 0), status="split", finished_at=now())


@breaks("parts_belong_to_a_split_child")
def a_part_of_a_child_that_was_not_split(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 5), split_from=1)


@breaks("parts_belong_to_a_split_child")
def a_part_of_nobody(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 5), split_from=99)


@breaks("parts_belong_to_a_split_child")
def a_part_of_no_header_position(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 5), origin=None)


@breaks("parts_belong_to_a_split_child")
def a_part_that_takes_another_part_for_its_header_position(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 5), origin=3)


@breaks("parts_belong_to_a_split_child")
def a_part_of_another_header_position(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 5), origin=1)


@breaks("parts_belong_to_a_split_child")
def a_split_child_that_completed_after_all(scene: Scene) -> None:
    scene.set_child(ChildKey(_split(scene), 3), status="completed", cause=None)


@breaks("running_on_a_living_worker")
def a_run_on_a_worker_that_stopped_long_ago(scene: Scene) -> None:
    scene.run(scene.batch(1))
    scene.set_worker(scene.worker_id, stopped_at=later(-600.0))


@breaks("running_on_a_living_worker")
def a_run_on_a_worker_that_was_lost_long_ago(scene: Scene) -> None:
    scene.run(scene.batch(1))
    scene.set_worker(scene.worker_id, lost_at=later(-600.0), lost_by="lease")


@breaks("running_on_a_living_worker")
def a_run_on_a_worker_silent_beyond_its_lease(scene: Scene) -> None:
    scene.run(scene.batch(1))
    scene.set_worker(scene.worker_id, beat_at=later(-600.0))


@breaks("running_on_a_living_worker")
def a_run_on_a_worker_that_nobody_knows(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    scene.set_child(claimed.key, worker_id=uuid.uuid4())


@breaks("no_slot_runs_two", against=("index batchtrack_child_slot",))
def two_runs_in_one_slot(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.run(batch_id, 0, slot="1:1:1:0")
    scene.set_child(scene.run(batch_id, 1).key, slot="1:1:1:0")


@breaks("ended_batch_has_no_open_child")
def a_child_left_open(scene: Scene) -> None:
    scene.set_child(ChildKey(_ended(scene), 1), status="pending", finished_at=None, worker_id=None, slot=None)


@breaks("ended_batch_has_finished_at", against=("batch.finished",))
def an_end_without_a_time(scene: Scene) -> None:
    scene.set_batch(_ended(scene), finished_at=None)


@breaks("sealed_batch_with_nothing_open_ended")
def a_batch_that_forgot_to_end(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.complete(claimed)
    scene.set_child(claimed.key, finished_at=later(-600.0))


@breaks("sealed_batch_with_nothing_open_ended")
def an_empty_batch_that_forgot_to_end(scene: Scene) -> None:
    scene.set_batch(scene.batch(0), sealed_at=later(-600.0))


@breaks("open_batch_dispatches_nothing")
def a_child_published_before_the_seal(scene: Scene) -> None:
    scene.set_child(ChildKey(scene.batch(1, seal=False), 0), dispatches=1)


@breaks("ended_batch_has_its_callbacks")
def a_lost_success(scene: Scene) -> None:
    scene.execute(_delete_rows(_ended(scene), "on_success"))


@breaks("ended_batch_has_its_callbacks")
def a_lost_failure(scene: Scene) -> None:
    batch_id = scene.batch(1, calls=ALL)
    scene.fail(scene.run(batch_id))
    scene.store.finish(batch_id)
    scene.execute(_delete_rows(batch_id, "on_failure"))


@breaks("ended_batch_has_its_callbacks")
def a_lost_finish_of_a_cancelled_batch(scene: Scene) -> None:
    batch_id = scene.batch(1, calls=ALL)
    scene.store.cancel(batch_id)
    scene.execute(_delete_rows(batch_id, "on_finish"))


@breaks("ended_batch_has_its_callbacks")
def a_lost_first_failure(scene: Scene) -> None:
    scene.execute(_delete_rows(_ended(scene), "on_first_failure"))


@breaks("callback_rows_once", against=("index batchtrack_child_callback",))
def a_callback_that_is_there_twice(scene: Scene) -> None:
    batch_id = _ended(scene)
    row = scene.store.callback_rows(batch_id)[-1]
    scene.set_batch(batch_id, next_position=row.position + 2)
    copy = {
        "batch_id": batch_id, "position": row.position + 1, "kind": row.kind, "shard": 0, "task": row.task,
        "task_id": "another", "status": "pending", "item_count": 0,
    }  # fmt: skip
    scene.execute(sa.insert(schema.child).values(created_at=now(), **copy))


@breaks("no_callback_before_the_end")
def a_callback_of_a_batch_that_runs(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.execute(_tally(batch_id, total=0, items_total=0))
    scene.set_child(ChildKey(batch_id, 0), kind="on_finish")


@breaks("outcome_fits_the_children")
def a_success_that_was_none(scene: Scene) -> None:
    scene.set_batch(_ended(scene), status="completed")


@breaks("outcome_fits_the_children")
def a_failure_that_was_none(scene: Scene) -> None:
    batch_id = scene.batch(1)
    scene.complete(scene.run(batch_id))
    scene.store.finish(batch_id)
    scene.set_batch(batch_id, status="failed")


@breaks("positions_below_next")
def a_position_given_out_twice(scene: Scene) -> None:
    scene.set_batch(scene.batch(3), next_position=2)


def _nested(scene: Scene, *calls: str) -> tuple[uuid.UUID, uuid.UUID]:
    """A batch, and one that its first child waits for."""
    batch_id = scene.batch(2)
    new = NewBatch(uuid7(), "nested", callbacks(*calls), {"tolerance": 0}, parent_batch=batch_id, parent_position=0)
    assert scene.store.nest(scene.at(batch_id, 0), new, some(2))
    return batch_id, new.id


def _over(scene: Scene, batch_id: uuid.UUID, seconds: float = 600.0) -> None:
    """It ended so long ago."""
    for row in scene.rows(batch_id):
        scene.complete(scene.run(batch_id, row.position))
    scene.store.finish(batch_id)
    scene.set_batch(batch_id, finished_at=later(-seconds))


@breaks("waiting_for_a_batch_that_exists")
def a_child_that_waits_for_a_batch_that_is_gone(scene: Scene) -> None:
    _, nested = _nested(scene)
    scene.execute(sa.delete(schema.batch).where(schema.batch.c.id == nested))


@breaks("waiting_for_a_batch_that_exists")
def a_child_that_waits_for_a_batch_that_names_another(scene: Scene) -> None:
    batch_id, nested = _nested(scene)
    scene.set_child(ChildKey(batch_id, 1), waits_on_batch=nested)


@breaks("waiting_for_a_batch_that_exists")
def a_child_that_waits_for_a_batch_that_nobody_nested(scene: Scene) -> None:
    scene.set_child(ChildKey(scene.batch(1), 0), waits_on_batch=scene.batch(1))


@breaks("waiting_for_a_batch_that_exists")
def a_child_that_still_waits_for_a_batch_long_over(scene: Scene) -> None:
    _over(scene, _nested(scene)[1])


@breaks("waiting_for_a_batch_that_exists")
def a_child_that_still_waits_for_a_body_long_over(scene: Scene) -> None:
    _, nested = _nested(scene, "on_success")
    _over(scene, nested)
    claimed = scene.run(nested, 2)
    scene.complete(claimed)
    scene.set_child(claimed.key, finished_at=later(-600.0))


@breaks("nested_batch_is_waited_for")
def a_nested_batch_of_a_child_that_settled_long_ago(scene: Scene) -> None:
    batch_id, _ = _nested(scene)
    scene.store.cancel(batch_id)
    scene.set_child(ChildKey(batch_id, 0), finished_at=later(-600.0))


@breaks("nested_batch_is_waited_for")
def a_nested_batch_of_a_child_that_vanished(scene: Scene) -> None:
    batch_id, _ = _nested(scene)
    table = schema.child
    scene.execute(sa.delete(table).where(table.c.batch_id == batch_id, table.c.position == 0))


@breaks("nested_batch_is_waited_for")
def a_nested_batch_that_names_no_child(scene: Scene) -> None:
    scene.set_batch(_nested(scene)[1], parent_position=None)


# -- the tests -------------------------------------------------------------------------------------


def healthy(scene: Scene) -> None:
    """One batch in every state of its life, and children in every state of theirs."""
    _ended(scene)
    scene.batch(2, seal=False, calls=ALL)
    eager = scene.batch(3, seal=False, start_now=True)
    scene.store.take_undispatched(eager, 1)
    empty = scene.batch(0, calls=ALL)
    scene.store.finish(empty)
    scene.complete(scene.run(empty, 0))
    cancelled = scene.batch(2, calls=ALL)
    scene.run(cancelled)
    scene.store.cancel(cancelled)
    busy = scene.batch(some(6, items=3), shards=2, calls=ALL)
    scene.complete(scene.run(busy, 0))
    scene.crash(scene.run(busy, 1))
    overturned = scene.run(busy, 2)
    scene.crash(overturned, Verdict.LEASE)
    scene.complete(overturned)
    scene.crash(scene.run(busy, 3), again=0.0)
    scene.run(busy, 4)
    scene.store.stop(scene.worker())
    _split(scene)
    resumed = scene.batch([documents("a", "b")], calls=ALL, tolerance=1)
    scene.split(scene.run(resumed), done("a"), killed("b"))
    scene.store.finish(resumed)
    aside = scene.batch([documents("a", "b"), documents("c")], options={"crash_rate": {"percent": 20, "window": 60}})
    scene.store.split(
        scene.at(aside, 0), [killed("a", evidence=SET_ASIDE), part("b")], None, claimed=False, death=False
    )
    scene.store.quarantine(scene.at(aside, 1), SET_ASIDE)
    scene.store.pause(aside, "by hand")
    _nested(scene)
    _over(scene, _nested(scene)[1], 0.0)  # its end will be told in a moment
    busy_body = _nested(scene, "on_success")[1]
    _over(scene, busy_body)
    scene.run(busy_body, 2)
    scene.store.cancel(_nested(scene)[0])  # so will this one's
    again = _ended(scene)
    scene.store.retry(again, [Status.FAILED])


@contextmanager
def _without(scene: Scene, constraints: tuple[str, ...]) -> Iterator[None]:
    """PostgreSQL drops them; SQLite is told to ignore its CHECKs, and drops its indexes."""
    for name in constraints:
        kind, _, rest = name.partition(" ")
        if kind == "index":
            scene.execute(sa.text(f"DROP INDEX {rest}"))
        elif not scene.store.sqlite:
            table, _, check = name.partition(".")
            scene.execute(sa.text(f"ALTER TABLE batchtrack_{table} DROP CONSTRAINT ck_batchtrack_{table}_{check}"))
    if scene.store.sqlite and constraints:
        event = sa.event
        event.listen(scene.store.engine, "checkout", _ignore_checks)
        try:
            yield
        finally:
            event.remove(scene.store.engine, "checkout", _ignore_checks)
    else:
        yield


def _ignore_checks(connection: object, record: object, proxy: object) -> None:
    connection.execute("PRAGMA ignore_check_constraints=ON")  # type: ignore[attr-defined]


def test_a_healthy_database_has_no_violation(scene: Scene) -> None:
    healthy(scene)
    assert [(each.check, each.examples) for each in scene.store.verify(60.0) if each.violations] == []
    assert [each.check for each in scene.store.verify(60.0)] == list(verify.CHECKS)


def test_an_empty_database_has_no_violation(scene: Scene) -> None:
    assert scene.violations() == {}


@pytest.mark.parametrize(
    ("check", "against", "case"),
    [pytest.param(check, against, case, id=name) for check, cases in CASES.items() for name, against, case in cases],
)
def test_what_is_broken_is_found_by_name(
    scene: Scene, check: str, against: tuple[str, ...], case: Break
) -> None:
    healthy(scene)
    with _without(scene, against):
        case(scene)
    found = {each.check: each for each in scene.store.verify(60.0) if each.violations}
    assert check in found, found
    assert len(found[check].examples) == min(5, found[check].violations), "it names who"


def test_every_check_is_broken_by_a_test_here() -> None:
    assert set(CASES) == set(verify.CHECKS)


def test_a_verdict_still_under_way_is_no_violation(scene: Scene) -> None:
    """`grace` is the time that detection may take."""
    scene.run(scene.batch(1))
    scene.set_worker(scene.worker_id, stopped_at=later(-30.0))
    assert scene.violations(grace=60) == {}
    assert set(scene.violations(grace=5)) == {"running_on_a_living_worker"}
