"""A dead child's items are handed on: none is lost or doubled, and its header position stays one, on every database."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.aftermath import HeaderResult, Part, Rerun
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token
from celery_batchtrack.vocabulary.records import Ending, NewChild, Settled
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict
from tests.store.kit import (
    RETRY,
    SEGFAULT,
    SET_ASIDE,
    SILENCE,
    Scene,
    add_up,
    counts,
    documents,
    done,
    items_by_status,
    killed,
    part,
    refused,
    statements,
)

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")
ABCDE = ("a", "b", "c", "d", "e")
MERGED = {"on_crash": "skip", "max_crashes": 3, "items": ["args", 0], "merge": "concat"}


def halves(first: str, second: str) -> list[Part]:
    return [part(*first), part(*second)]


#: How `a` to `e` are divided → (parts, the split child's own evidence, counts of children, items by status).
SHAPES: dict[str, tuple[Callable[[], list[Part]], Evidence | None, dict[str, int], dict[str, str]]] = {
    "bisect": (lambda: halves("abc", "de"), SEGFAULT, {"pending": 2}, {"pending": "abcde"}),
    "skip": (
        lambda: [killed("c"), part(*"abde")], None,
        {"crashed": 1, "pending": 1}, {"crashed": "c", "pending": "abde"},
    ),
    "resume": (
        lambda: [done(*"ab"), killed("c"), part(*"de")], None,
        {"completed": 1, "crashed": 1, "pending": 1}, {"completed": "ab", "crashed": "c", "pending": "de"},
    ),
    "resume at the first": (
        lambda: [killed("a"), part(*"bcde")], None, {"crashed": 1, "pending": 1}, {"crashed": "a", "pending": "bcde"},
    ),
    "resume at the last": (
        lambda: [done(*"abcd"), killed("e")], None,
        {"completed": 1, "crashed": 1}, {"completed": "abcd", "crashed": "e"},
    ),
    "go on": (
        lambda: [done(*"ab"), part(*"cde")], SEGFAULT,
        {"completed": 1, "pending": 1}, {"completed": "ab", "pending": "cde"},
    ),
    "one each": (lambda: [part(each) for each in ABCDE], SEGFAULT, {"pending": 5}, {"pending": "abcde"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_item_is_counted_once_however_a_child_is_split(scene: Scene, shape: str, shards: int) -> None:
    make, own, children, items = SHAPES[shape]
    batch_id = scene.batch([documents("x"), documents(*ABCDE), documents("y", "z")], shards=shards)
    scene.complete(scene.run(batch_id, 0))
    parts = make()
    settled = scene.split(scene.run(batch_id, 1), *parts, evidence=own)
    pending = [each for each in parts if each.status is Status.PENDING]
    assert settled == Settled(True, look=not pending, successors=len(pending))
    expected = {**children, "completed": children.get("completed", 0) + 1, "pending": children.get("pending", 0) + 1}
    assert counts(scene, batch_id) == expected
    found = items_by_status(scene, batch_id)
    assert {status: "".join(names) for status, names in found.items()} == {
        **items, "completed": items.get("completed", "") + "x", "pending": items.get("pending", "") + "yz",
    }  # fmt: skip
    assert [each.cause for each in scene.incidents(batch_id)] == ["signal"], "one death, one incident"
    assert add_up(scene, batch_id)


def test_the_split_child_ends_and_its_parts_say_whose_they_are(scene: Scene) -> None:
    batch_id = scene.batch([documents("x"), documents(*ABCDE)], shards=4)
    claimed = scene.run(batch_id, 1, policy=MERGED)
    before = scene.at(batch_id, 1)
    scene.split(claimed, done("a", "b"), killed("c"), part("d", "e"))
    whole, (first, second, third) = scene.at(batch_id, 1), scene.rows(batch_id)[2:]
    assert (whole.status, whole.verdict, whole.crashes, whole.signature) == ("split", "observed", 1, None)
    assert whole.finished_at is not None
    for position, row in enumerate((first, second, third), 2):
        assert (row.position, row.shard, row.kind, row.round) == (position, position % 4, "child", 1)
        assert (row.split_from, row.origin, row.task, row.policy) == (1, 1, "demo.task", MERGED)
    assert len({row.task_id for row in scene.rows(batch_id)}) == 5
    assert (first.status, first.items, first.cause, first.attempt, first.result) == (
        "completed", ["a", "b"], None, 1, None,
    )  # fmt: skip
    assert (second.status, second.cause, second.verdict, second.crashes) == ("crashed", "signal", "observed", 1)
    for settled in (first, second):  # they ended in the very run that died
        assert (settled.run_token, settled.worker_id, settled.slot) == (before.run_token, before.worker_id, before.slot)
        assert settled.started_at == before.started_at and settled.finished_at is not None
    assert (third.status, third.attempt, third.crashes, third.run_token) == ("pending", 0, 0, None)
    assert (third.worker_id, third.slot, third.started_at, third.dispatched_at) == (None, None, None, None)
    assert third.signature is not None and '["d", "e"]' in third.signature


def test_a_part_that_died_carries_the_incident_and_a_halved_child_its_own(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b"), documents("c", "d")])
    scene.split(scene.run(batch_id, 0), killed("a"), part("b"))
    scene.split(scene.run(batch_id, 1), *halves("c", "d"), evidence=SEGFAULT)
    skipped, halved = scene.incidents(batch_id)
    assert (skipped.position, skipped.outcome, skipped.attempt, skipped.items) == (2, "crashed", 1, ["a"])
    assert (halved.position, halved.outcome, halved.attempt, halved.items) == (1, "split", 1, ["c", "d"])
    assert {each.verdict for each in (skipped, halved)} == {"observed"}
    assert scene.at(batch_id, 0).cause is None and scene.at(batch_id, 1).cause == "signal"


def test_parts_are_due_at_once_and_run_and_end_the_batch(scene: Scene) -> None:
    batch_id = scene.batch([documents(*ABCDE)], calls=ALL)
    scene.split(scene.run(batch_id), *halves("abc", "de"), evidence=SEGFAULT)
    assert [each.child.position for each in scene.store.take_undispatched(batch_id, 10)] == [1, 2]
    assert not scene.complete(scene.run(batch_id, 1)).look or scene.store.finish(batch_id) is None
    assert scene.complete(scene.run(batch_id, 2)).look
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "completed"
    assert scene.called(batch_id) == ["on_finish", "on_success"]
    assert scene.store.progress(batch_id).percent == 100
    assert add_up(scene, batch_id)


def test_parts_go_where_their_whole_went_unless_they_are_sent_elsewhere(scene: Scene) -> None:
    when = scene.store.current_time().replace(year=2040)
    batch_id = scene.batch([documents("a", "b", "c", queue="q", expires_at=when)])
    scene.split(
        scene.run(batch_id), part("a"), part("b", isolated=True, queue="q.isolated"), part("c"), evidence=SEGFAULT
    )
    rows = scene.rows(batch_id)[1:]
    assert [(row.queue, row.rerouted, row.isolated) for row in rows] == [
        ("q", False, False), ("q.isolated", True, True), ("q", False, False),
    ]  # fmt: skip
    assert {row.expires_at for row in rows} == {when}
    assert scene.store.isolated_queues() == ["q.isolated"]
    scene.run(batch_id, 2)
    assert scene.store.isolated_queues() == [], "nobody waits there any more"


def test_parts_of_what_was_rerouted_stay_there(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b", queue="q")])
    scene.set_child(ChildKey(batch_id, 0), queue="big", rerouted=True)
    scene.split(scene.run(batch_id), *halves("a", "b"), evidence=SEGFAULT)
    assert {(row.queue, row.rerouted) for row in scene.rows(batch_id)[1:]} == {("big", True)}


# -- before the claim ------------------------------------------------------------------------------


def test_a_death_before_the_claim_splits_too_and_uses_up_an_attempt(scene: Scene) -> None:
    batch_id = scene.batch([documents(*ABCDE)], calls=ALL)
    scene.store.take_undispatched(batch_id, 10)
    row = scene.at(batch_id, 0)
    parts = halves("abc", "de")
    told = replace(SEGFAULT, phase="before_claim")
    assert scene.store.split(row, parts, told, claimed=False) == Settled(True, successors=2)
    assert not scene.store.split(row, halves("abc", "de"), told, claimed=False).written, "one death, told twice"
    whole = scene.at(batch_id, 0)
    assert (whole.status, whole.attempt, whole.crashes, whole.started_at) == ("split", 1, 1, None)
    refused(scene.claim(whole.key, attempt=0))
    refused(scene.claim(whole.key, attempt=1))
    (incident,) = scene.incidents(batch_id)
    assert (incident.phase, incident.attempt, incident.outcome) == ("before_claim", 1, "split")
    assert counts(scene, batch_id) == {"pending": 2}
    assert add_up(scene, batch_id)


def test_a_death_before_the_claim_does_not_split_what_was_claimed_meanwhile(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    seen = scene.at(batch_id, 0)
    claimed = scene.run(batch_id)
    assert not scene.store.split(seen, halves("a", "b"), SEGFAULT, claimed=False).written
    assert not scene.store.split(scene.row(claimed.key), halves("a", "b"), SEGFAULT, claimed=False).written
    assert scene.complete(claimed).written
    assert add_up(scene, batch_id)


def test_a_part_crashed_before_the_claim_was_never_on_a_worker(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    scene.store.split(scene.at(batch_id, 0), [killed("a"), part("b")], None, claimed=False)
    row = scene.at(batch_id, 1)
    assert (row.status, row.worker_id, row.run_token, row.attempt, row.started_at) == ("crashed", None, None, 1, None)
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("left", ["some", "none"])
def test_items_in_quarantine_are_set_aside_without_a_death(scene: Scene, left: str) -> None:
    batch_id = scene.batch([documents("x"), documents("a", "b", "c")], tolerance=2, calls=ALL, shards=2)
    scene.complete(scene.run(batch_id, 0))
    condemned = "ac" if left == "some" else "abc"
    parts = [killed(each, evidence=SET_ASIDE) for each in condemned]
    parts += [part("b")] if left == "some" else []
    settled = scene.store.split(scene.at(batch_id, 1), parts, None, claimed=False, death=False)
    assert settled == Settled(True, look=left == "none", callbacks=True, successors=int(left == "some"))
    whole = scene.at(batch_id, 1)
    assert (whole.status, whole.attempt, whole.crashes, whole.verdict) == ("split", 0, 0, None)
    assert {(each.cause, each.attempt, each.outcome) for each in scene.incidents(batch_id)} == {
        ("quarantined", 0, "crashed")
    }
    crashed = [row for row in scene.rows(batch_id) if row.status == "crashed"]
    assert {(row.cause, row.attempt) for row in crashed} == {("quarantined", 0)}
    assert items_by_status(scene, batch_id)["crashed"] == sorted(condemned)
    if left == "some":
        scene.complete(scene.run(batch_id, 4))
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "partial", "one header position of two, however many parts"
    assert scene.called(batch_id) == ["on_finish", "on_first_failure", "on_success"]
    assert add_up(scene, batch_id)


def test_a_single_item_in_quarantine_is_crashed_without_a_death(scene: Scene) -> None:
    batch_id = scene.batch([documents("a"), documents("b")], calls=ALL, options={"crash_rate": _rate(0)})
    seen = scene.at(batch_id, 0)
    assert scene.store.quarantine(seen, SET_ASIDE) == Settled(True, look=True, callbacks=True)
    row, (incident,) = scene.at(batch_id, 0), scene.incidents(batch_id)
    assert (row.status, row.cause, row.crashes, row.attempt) == ("crashed", "quarantined", 0, 0)
    assert (incident.cause, incident.attempt, incident.phase) == ("quarantined", 0, "before_claim")
    assert not scene.store.quarantine(seen, SET_ASIDE).written
    claimed = scene.run(batch_id, 1)
    assert not scene.store.quarantine(scene.row(claimed.key), SET_ASIDE).written, "it runs already"
    assert _deaths(scene, batch_id) == 0
    assert add_up(scene, batch_id)


def _rate(percent: float) -> dict[str, float]:
    return {"percent": percent, "window": 300.0}


def _deaths(scene: Scene, batch_id: uuid.UUID) -> int:
    with scene.store.read() as connection:
        query = sa.select(schema.batch.c.deaths).where(schema.batch.c.id == batch_id)
        return int(connection.execute(query).scalar_one())


# -- fences ----------------------------------------------------------------------------------------


def _unchanged(scene: Scene, batch_id: uuid.UUID, act: Callable[[], Settled]) -> None:
    before = (scene.rows(batch_id), scene.incidents(batch_id), scene.store.batch(batch_id))
    assert act() == Settled(False)
    assert (scene.rows(batch_id), scene.incidents(batch_id), scene.store.batch(batch_id)) == before


def test_a_run_that_settled_is_not_split(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b"), documents("c")])
    claimed = scene.run(batch_id)
    seen = scene.row(claimed.key)
    scene.complete(claimed)
    _unchanged(scene, batch_id, lambda: scene.store.split(seen, halves("a", "b"), SEGFAULT))
    assert add_up(scene, batch_id)


def test_an_older_run_is_not_split_when_a_newer_has_the_row(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    first = scene.run(batch_id)
    seen = scene.row(first.key)
    scene.crash(first, again=0.0)
    _unchanged(scene, batch_id, lambda: scene.store.split(seen, halves("a", "b"), SEGFAULT))
    second = scene.run(batch_id)
    _unchanged(scene, batch_id, lambda: scene.store.split(seen, halves("a", "b"), SEGFAULT))
    assert scene.complete(second).written
    assert add_up(scene, batch_id)


def test_a_death_that_is_told_twice_splits_once(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    claimed = scene.run(batch_id)
    seen = scene.row(claimed.key)
    assert scene.store.split(seen, halves("a", "b"), SEGFAULT).written
    _unchanged(scene, batch_id, lambda: scene.store.split(seen, halves("a", "b"), SEGFAULT))
    _unchanged(scene, batch_id, lambda: scene.store.crash(seen, SEGFAULT, Verdict.OBSERVED, None))


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "before the claim"])
def test_nothing_is_split_after_the_batch_ended(scene: Scene, claimed: bool) -> None:
    batch_id = scene.batch([documents("a", "b")], calls=ALL)
    if claimed:
        scene.run(batch_id)
    seen = scene.at(batch_id, 0)
    scene.store.cancel(batch_id)
    _unchanged(scene, batch_id, lambda: scene.store.split(seen, halves("a", "b"), SEGFAULT, claimed=claimed))
    assert counts(scene, batch_id) == {"cancelled": 1}
    assert add_up(scene, batch_id)


def test_nothing_is_split_off_a_batch_that_ended_with_a_row_left_open(scene: Scene) -> None:
    """It must not be, but if it were, new open rows would make it worse."""
    batch_id = scene.batch([documents("a", "b")])
    claimed = scene.run(batch_id)
    scene.set_batch(batch_id, status="failed", finished_at=later(0.0))
    _unchanged(scene, batch_id, lambda: scene.split(claimed, *halves("a", "b"), evidence=SEGFAULT))


def test_nothing_is_split_of_a_batch_that_is_gone(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    seen = scene.row(scene.run(batch_id).key)
    scene.store.cancel(batch_id)
    scene.set_batch(batch_id, finished_at=later(-10.0))
    scene.store.prune(completed=1, other=1)
    assert scene.store.split(seen, halves("a", "b"), SEGFAULT) == Settled(False)


def test_a_child_of_an_open_batch_that_starts_now_is_split_and_its_successors_run(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")], seal=False, start_now=True)
    scene.split(scene.run(batch_id), *halves("a", "b"), evidence=SEGFAULT)
    assert scene.store.add(batch_id, [documents("c")]) == 3
    assert [each.child.position for each in scene.store.take_undispatched(batch_id, 10)] == [1, 2, 3]
    assert add_up(scene, batch_id)


def test_a_split_in_a_paused_batch_waits_with_its_batch(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    claimed = scene.run(batch_id)
    scene.store.pause(batch_id, "by hand")
    assert scene.split(claimed, *halves("a", "b"), evidence=SEGFAULT).successors == 2
    assert scene.store.take_undispatched(batch_id, 10) == []
    scene.store.resume(batch_id)
    assert len(scene.store.take_undispatched(batch_id, 10)) == 2


@pytest.mark.parametrize(
    "ending", [Ending(Status.COMPLETED, '"all done"'), Ending(Status.FAILED, None, Cause.EXCEPTION)], ids=["ok", "not"]
)
def test_a_late_write_of_a_split_run_is_recorded_and_changes_nothing(scene: Scene, ending: Ending) -> None:
    batch_id = scene.batch([documents("a", "b")], calls=ALL)
    claimed = scene.run(batch_id)
    scene.split(claimed, *halves("a", "b"), evidence=SEGFAULT)
    before = scene.rows(batch_id)
    settled = scene.store.settle(claimed.key, claimed.token, ending)
    assert settled.late and not settled.written and not settled.look
    assert scene.rows(batch_id) == before and scene.called(batch_id) == []
    assert [each.outcome for each in scene.incidents(batch_id)] == ["split", "late_write"]
    assert add_up(scene, batch_id)


def test_a_run_that_goes_on_although_its_child_was_split_is_a_zombie(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b"), documents("c", "d")])
    for claimed in (scene.run(batch_id, 0), scene.run(batch_id, 1)):
        assert scene.store.cancelled_runs([(claimed.key, claimed.token)]) == {}
        scene.split(claimed, killed("a"), part("b")) if claimed.key.position == 0 else scene.split(
            claimed, *halves("c", "d"), evidence=SEGFAULT
        )
        assert claimed.key in scene.store.cancelled_runs([(claimed.key, claimed.token)]), "its items run twice"


def test_a_split_row_is_never_taken_claimed_cancelled_or_released_again(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    claimed = scene.run(batch_id)
    seen = scene.row(claimed.key)
    scene.split(claimed, *halves("a", "b"), evidence=SEGFAULT)
    whole = scene.at(batch_id, 0)
    refused(scene.claim(whole.key, attempt=1))
    assert not scene.store.release_claiming(seen)
    assert not scene.store.settle_unstarted(whole.key, 1, Status.CANCELLED, Evidence(Cause.REVOKED)).written
    assert not scene.store.settle_terminated(seen, Evidence(Cause.TERMINATED)).written
    scene.store.cancel(batch_id)
    assert scene.at(batch_id, 0) == whole
    assert scene.statuses(batch_id) == ["split", "cancelled", "cancelled"]
    assert add_up(scene, batch_id)


# -- nested splits ---------------------------------------------------------------------------------


def test_parts_of_parts_keep_the_header_position_they_came_from(scene: Scene) -> None:
    batch_id = scene.batch([documents("x", "y"), documents(*"abcdefgh")], shards=3)
    scene.split(scene.run(batch_id, 1), *halves("abcd", "efgh"), evidence=SEGFAULT)  # 2, 3
    scene.split(scene.run(batch_id, 3), *halves("ef", "gh"), evidence=SEGFAULT)  # 4, 5
    scene.split(scene.run(batch_id, 4), killed("e"), part("f"))  # 6, 7
    scene.split(scene.run(batch_id, 0), *halves("x", "y"), evidence=SEGFAULT)  # 8, 9
    assert [(row.position, row.split_from, row.origin) for row in scene.rows(batch_id)] == [
        (0, None, None), (1, None, None), (2, 1, 1), (3, 1, 1), (4, 3, 1), (5, 3, 1), (6, 4, 1), (7, 4, 1),
        (8, 0, 0), (9, 0, 0),
    ]  # fmt: skip
    assert [scene.store.splits_of(row) for row in scene.rows(batch_id)] == [1, 2, 2, 2, 2, 2, 2, 2, 1, 1]
    assert items_by_status(scene, batch_id) == {"crashed": ["e"], "pending": [*"abcdfghxy"]}
    assert add_up(scene, batch_id)


def test_only_halving_spends_the_budget_of_bisection(scene: Scene) -> None:
    """What skips, goes on or sets aside comes nearer to the end with each death."""
    batch_id = scene.batch([documents(*"abcdefgh")])
    scene.store.split(
        scene.at(batch_id, 0), [killed("a", evidence=SET_ASIDE), part(*"bcdefgh")], None, claimed=False, death=False
    )
    scene.split(scene.run(batch_id, 2), killed("b"), part(*"cdefgh"))
    scene.split(scene.run(batch_id, 4), done("c"), killed("d"), part(*"efgh"))
    scene.split(scene.run(batch_id, 7), done("e"), part(*"fgh"), evidence=SEGFAULT)
    assert scene.store.splits_of(scene.at(batch_id, 9)) == 0
    scene.split(scene.run(batch_id, 9), *halves("fg", "h"), evidence=SEGFAULT)
    scene.store.take_undispatched(batch_id, 10)
    scene.complete(scene.run(batch_id, 10))
    assert scene.store.splits_of(scene.at(batch_id, 11)) == 1, "a half that completed is no part that was done before"


def test_a_header_position_that_was_never_split_has_no_splits(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b"), documents("c", "d")])
    scene.split(scene.run(batch_id, 0), *halves("a", "b"), evidence=SEGFAULT)
    assert scene.store.splits_of(scene.at(batch_id, 1)) == 0
    other = scene.batch([documents("a", "b"), documents("c", "d")])
    assert scene.store.splits_of(scene.at(other, 0)) == 0


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 16])
def test_a_batch_whose_last_open_child_was_split_into_settled_parts_ends(scene: Scene, shards: int) -> None:
    batch_id = scene.batch([documents("x"), documents(*"abc")], tolerance=1, calls=ALL, shards=shards)
    scene.complete(scene.run(batch_id, 0))
    claimed = scene.run(batch_id, 1)
    assert scene.store.finish(batch_id) is None
    settled = scene.split(claimed, done("a", "b"), killed("c"))
    assert settled.look and settled.callbacks and not settled.successors
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "partial"
    assert scene.store.finish(batch_id) is None
    assert scene.called(batch_id) == ["on_finish", "on_first_failure", "on_success"]
    assert add_up(scene, batch_id)


def test_a_batch_with_an_open_part_does_not_end(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    scene.split(scene.run(batch_id), killed("a"), part("b"))
    assert scene.store.finish(batch_id) is None and scene.store.unfinished() == []
    scene.run(batch_id, 2)
    assert scene.store.finish(batch_id) is None


def test_the_sweep_finds_a_batch_whose_last_child_was_split_by_a_dying_process(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    scene.split(scene.run(batch_id), done("a"), killed("b"))
    assert scene.store.unfinished() == [batch_id]


@pytest.mark.parametrize(
    "parts", [("killed", "part"), ("part", "killed"), ("done", "killed", "part")], ids=" ".join
)
def test_a_first_failure_among_the_parts_is_called_once_and_takes_no_parts_position(
    scene: Scene, parts: tuple[str, ...]
) -> None:
    make = {"killed": killed, "part": part, "done": done}
    names = [*"abc"][: len(parts)]
    batch_id = scene.batch([documents(*names), documents("x")], tolerance=2, calls=ALL)
    made = [make[kind](name) for kind, name in zip(parts, names, strict=True)]
    settled = scene.split(scene.run(batch_id, 0), *made)
    assert settled.callbacks
    (callback,) = scene.store.callback_rows(batch_id)
    assert (callback.kind, callback.position) == ("on_first_failure", 2 + len(parts))
    assert [row.position for row in scene.rows(batch_id)] == list(range(2 + len(parts)))
    assert not scene.fail(scene.run(batch_id, 1)).callbacks, "not the first any more"
    row = scene.store.batch(batch_id)
    assert row is not None and row.next_position == 3 + len(parts)
    assert add_up(scene, batch_id)


def test_halves_alone_are_no_failure_yet(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")], calls=ALL)
    assert not scene.split(scene.run(batch_id), *halves("a", "b"), evidence=SEGFAULT).callbacks
    assert scene.called(batch_id) == []
    assert scene.crash(scene.run(batch_id, 1)).callbacks
    assert scene.called(batch_id) == ["on_first_failure"]


def test_a_later_crash_among_parts_is_no_first_failure(scene: Scene) -> None:
    batch_id = scene.batch([documents("x"), documents("a", "b", "c")], calls=ALL)
    scene.fail(scene.run(batch_id, 0))
    assert not scene.split(scene.run(batch_id, 1), killed("a"), part("b", "c")).callbacks
    assert scene.called(batch_id) == ["on_first_failure"]
    assert add_up(scene, batch_id)


# -- tolerance -------------------------------------------------------------------------------------


def _with_crashes(scene: Scene, tolerance: int | str, crashes: tuple[int, ...], headers: int = 5) -> str:
    """A batch of header positions of three items each, of which so many crash; how it ends."""
    batch_id = scene.batch([documents(*"abc") for _ in range(headers)], tolerance=tolerance, calls=ALL)
    for position in range(headers):
        claimed = scene.run(batch_id, position)
        wrong = crashes[position] if position < len(crashes) else 0
        if not wrong:
            scene.complete(claimed)
            continue
        rest = [done(*"abc"[wrong:])] if wrong < 3 else []
        scene.split(claimed, *(killed(each) for each in "abc"[:wrong]), *rest)
    finished = scene.store.finish(batch_id)
    assert finished is not None
    assert add_up(scene, batch_id)
    return finished.status


@pytest.mark.parametrize(
    ("tolerance", "crashes", "ends"),
    [
        (0, (), "completed"), (0, (1,), "failed"), (1, (1,), "partial"), (1, (2,), "partial"), (1, (3,), "partial"),
        (1, (1, 1), "failed"), (2, (2, 2), "partial"), (2, (2, 2, 1), "failed"),
        ("20%", (2,), "partial"), ("20%", (1, 1), "failed"), ("19%", (1,), "failed"), ("40%", (2, 2), "partial"),
        ("100%", (3, 3, 3, 3, 3), "partial"),
    ],
)  # fmt: skip
def test_a_tolerance_counts_header_positions_however_many_parts_of_one_crash(
    scene: Scene, tolerance: int | str, crashes: tuple[int, ...], ends: str
) -> None:
    assert _with_crashes(scene, tolerance, crashes) == ends


def test_failed_and_cancelled_parts_count_their_position_once_too(scene: Scene) -> None:
    batch_id = scene.batch([documents(*"abcd"), documents("x")], tolerance=1)
    scene.split(scene.run(batch_id, 0), killed("a"), part("b"), part("c"), part("d"))
    scene.fail(scene.run(batch_id, 3))
    ignored = scene.run(batch_id, 4)
    scene.store.settle(ignored.key, ignored.token, Ending(Status.CANCELLED, cause=Cause.IGNORED))
    scene.complete(scene.run(batch_id, 5))
    scene.complete(scene.run(batch_id, 1))
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "partial"
    assert counts(scene, batch_id) == {"crashed": 1, "failed": 1, "cancelled": 1, "completed": 2}
    assert add_up(scene, batch_id)


def test_a_split_batch_all_of_whose_parts_complete_is_completed(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b"), documents("x")])
    scene.split(scene.run(batch_id, 0), done("a"), part("b"), evidence=SEGFAULT)
    for position in (1, 3):
        scene.complete(scene.run(batch_id, position))
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "completed"


# -- results ---------------------------------------------------------------------------------------


def _complete(scene: Scene, batch_id: uuid.UUID, position: int) -> None:
    """Its result is the list of its items; claimed with a policy that says how to merge."""
    claimed = scene.run(batch_id, position, policy=MERGED)
    scene.complete(claimed, "".join(scene.row(claimed.key).items))


def _split(scene: Scene, batch_id: uuid.UUID, position: int, *parts: Part) -> None:
    own = None if any(each.evidence for each in parts) else SEGFAULT
    scene.split(scene.run(batch_id, position, policy=MERGED), *parts, evidence=own)


def test_results_of_parts_stand_in_the_order_of_their_items(scene: Scene) -> None:
    """Whatever the order of their ends and however deep they are nested."""
    batch_id = scene.batch([documents("x"), documents(*"abcdefgh"), documents("y")])
    _split(scene, batch_id, 1, *halves("abcd", "efgh"))  # 3, 4
    _split(scene, batch_id, 4, *halves("ef", "gh"))  # 5, 6
    _split(scene, batch_id, 3, killed("a"), part(*"bcd"))  # 7, 8
    _split(scene, batch_id, 8, done("b"), killed("c"), part("d"))  # 9, 10, 11
    _split(scene, batch_id, 6, *halves("g", "h"))  # 12, 13
    for position in (13, 12, 2, 11, 5, 0):
        _complete(scene, batch_id, position)
    assert list(scene.store.results(batch_id)) == [
        HeaderResult(0, ("x",), merge="concat"),
        HeaderResult(1, (None, "d", "ef", "g", "h"), split=True, merge="concat"),
        HeaderResult(2, ("y",), merge="concat"),
    ]
    assert add_up(scene, batch_id)


def test_a_position_of_which_nothing_completed_has_no_result(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b"), documents("c", "d"), documents("e", "f")])
    _split(scene, batch_id, 0, killed("a"), killed("b"))
    _split(scene, batch_id, 1, killed("c"), part("d"))
    assert list(scene.store.results(batch_id)) == [], "what is open has none yet"
    _complete(scene, batch_id, 6)
    scene.crash(scene.run(batch_id, 2))
    assert list(scene.store.results(batch_id)) == [HeaderResult(1, ("d",), split=True, merge="concat")]


def test_results_over_splits_are_whole_across_pages(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = scene.batch([documents(f"{number}a", f"{number}b") for number in range(7)])
    for position in (1, 2, 5, 6):
        _split(scene, batch_id, position, part(f"{position}a"), part(f"{position}b"))
    for row in reversed(scene.rows(batch_id)):
        if row.status == "pending":
            _complete(scene, batch_id, row.position)
    whole = list(scene.store.results(batch_id))
    assert [each.texts for each in whole] == [
        (f"{number}a", f"{number}b") if number in (1, 2, 5, 6) else (f"{number}a{number}b",) for number in range(7)
    ]
    for page in (1, 2, 3):
        monkeypatch.setattr("celery_batchtrack.store.queries._PAGE", page)
        assert list(scene.store.results(batch_id)) == whole


@pytest.mark.parametrize("death", [True, False], ids=["a death before the claim", "set aside"])
def test_a_position_that_was_split_before_its_first_claim_knows_how_to_merge(scene: Scene, death: bool) -> None:
    batch_id = scene.batch([documents("a", "b", "c")])
    row = scene.at(batch_id, 0)
    parts = [killed("a", evidence=SET_ASIDE), part("b"), part("c")]
    scene.store.split(row, parts, None, claimed=False, death=death, policy=MERGED)
    for position in (2, 3):
        _complete(scene, batch_id, position)
    assert list(scene.store.results(batch_id)) == [HeaderResult(0, ("b", "c"), split=True, merge="concat")]
    assert scene.at(batch_id, 2).policy == MERGED


def test_the_policy_of_a_claim_is_not_replaced_by_a_split(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", "b")])
    scene.split(scene.run(batch_id, policy=RETRY), *halves("a", "b"), evidence=SEGFAULT, policy=MERGED)
    assert {str(row.policy) for row in scene.rows(batch_id)} == {str(scene.at(batch_id, 0).policy)}
    assert scene.at(batch_id, 1).policy == RETRY


# -- who went down together ------------------------------------------------------------------------

LOST = Evidence(Cause.WORKER_LOST, detected_by=Detector.HOST)


def _lost_with(scene: Scene, worker: uuid.UUID) -> Evidence:
    return replace(LOST, worker_id=worker)


def test_its_own_earlier_attempts_are_nobody_else(scene: Scene) -> None:
    """Alone, it would never use up its strikes."""
    batch_id = scene.batch(1)
    for _ in range(3):
        run = scene.run(batch_id)
        assert scene.store.others_lost_with(scene.row(run.key)) == 0
        lost = replace(SILENCE, worker_id=scene.worker_id, detected_by=Detector.HOST)
        scene.crash(run, again=0.0, evidence=lost)


def test_others_lost_with_a_run_are_those_still_to_be_judged_and_those_that_were(scene: Scene) -> None:
    batch_id, worker = scene.batch(4), scene.worker()
    runs = [scene.run(batch_id, position, worker=worker, slot=f"{position}:1:1:0") for position in range(3)]
    elsewhere = scene.run(batch_id, 3)
    for again, run in zip((None, 0.0, 0.0), runs, strict=True):
        assert scene.store.others_lost_with(scene.row(run.key)) == 2
        scene.crash(run, again=again, evidence=_lost_with(scene, worker))
    assert scene.store.others_lost_with(scene.row(elsewhere.key)) == 0


def test_a_run_that_was_alone_in_its_worker_was_lost_with_nobody(scene: Scene) -> None:
    batch_id, worker = scene.batch(3), scene.worker()
    scene.complete(scene.run(batch_id, 0, worker=worker))
    scene.fail(scene.run(batch_id, 1, worker=worker))
    alone = scene.run(batch_id, 2, worker=worker)
    assert scene.store.others_lost_with(scene.row(alone.key)) == 0


def test_runs_within_one_thread_are_one_and_threads_are_many(scene: Scene) -> None:
    batch_id, worker = scene.batch(3), scene.worker()
    outer = scene.run(batch_id, 0, worker=worker, slot="7:1:5:0")
    scene.run(batch_id, 1, worker=worker, slot="7:1:5:1")  # called eagerly by the first
    assert scene.store.others_lost_with(scene.row(outer.key)) == 0
    scene.run(batch_id, 2, worker=worker, slot="7:1:6:0")
    assert scene.store.others_lost_with(scene.row(outer.key)) == 1


def test_processes_that_died_one_by_one_in_a_living_worker_were_not_lost_with_it(scene: Scene) -> None:
    batch_id, worker = scene.batch(2), scene.worker()
    scene.crash(scene.run(batch_id, 0, worker=worker), evidence=replace(SEGFAULT, worker_id=worker))
    last = scene.run(batch_id, 1, worker=worker)
    assert scene.store.others_lost_with(scene.row(last.key)) == 0


def test_a_fatal_signal_seen_on_a_lost_worker_makes_the_others_no_culprits(scene: Scene) -> None:
    """Its own stack told how it died, after its worker had gone with it."""
    batch_id, worker = scene.batch(2), scene.worker()
    culprit, victim = scene.run(batch_id, 0, worker=worker), scene.run(batch_id, 1, worker=worker)
    scene.crash(culprit, evidence=replace(SEGFAULT, worker_id=worker, detected_by=Detector.HOST))
    assert scene.store.others_lost_with(scene.row(victim.key)) == 1


def test_a_run_that_was_taken_for_dead_by_its_lease_and_reported_was_not_lost(scene: Scene) -> None:
    batch_id, worker = scene.batch(2), scene.worker()
    suspect, other = scene.run(batch_id, 0, worker=worker), scene.run(batch_id, 1, worker=worker)
    silent = Evidence(Cause.WORKER_LOST, detected_by=Detector.LEASE, worker_id=worker)
    scene.crash(suspect, Verdict.LEASE, evidence=silent)
    assert scene.store.others_lost_with(scene.row(other.key)) == 1
    assert scene.complete(suspect).overturned
    assert scene.store.others_lost_with(scene.row(other.key)) == 0


def test_a_co_victim_runs_again_without_a_strike_alone(scene: Scene) -> None:
    batch_id = scene.batch([documents("a", queue="q")])
    claimed = scene.run(batch_id)
    again = Rerun(0.0, strike=False, isolated=True, queue="q.isolated")
    assert scene.store.crash(scene.row(claimed.key), LOST, Verdict.OBSERVED, again).written
    row = scene.at(batch_id, 0)
    assert (row.status, row.crashes, row.isolated, row.queue, row.rerouted) == ("pending", 0, True, "q.isolated", True)
    (incident,) = scene.incidents(batch_id)
    assert (incident.outcome, incident.queue) == ("retried", "q"), "where it was, not where it goes"
    assert scene.store.isolated_queues() == ["q.isolated"]
    assert add_up(scene, batch_id)


# -- cost ------------------------------------------------------------------------------------------


def _sent(scene: Scene, act: Callable[[], object]) -> list[str]:
    with statements(scene.store.engine) as sent:
        act()
    return [statement.split()[0] for statement in sent]


def _split_of(scene: Scene, children: list[NewChild], parts: list[Part]) -> list[str]:
    batch_id = scene.batch([*children, documents(*"abcd")], calls=ALL, options={"crash_rate": _rate(50)})
    row = scene.row(scene.run(batch_id, len(children)).key)
    return _sent(scene, lambda: scene.store.split(row, parts, None))


def test_a_splits_cost_does_not_grow_with_the_batch(scene: Scene) -> None:
    def parts() -> list[Part]:
        return [killed("a"), part(*"bcd")]

    _split_of(scene, [], parts())  # warm: the first use of a connection asks more
    small = _split_of(scene, [], parts())
    large = _split_of(scene, [documents(f"x{number}") for number in range(300)], parts())
    assert small == large


def test_no_statement_of_a_split_reads_a_whole_batch(scene: Scene) -> None:
    """SQLite says how it would look rows up; so few statements are alike on both that one is asked."""
    if not scene.store.sqlite:
        pytest.skip("PostgreSQL plans by statistics")
    batch_id = scene.batch([documents(*"abcd"), documents("x")], calls=ALL, options={"crash_rate": _rate(50)})
    scene.split(scene.run(batch_id), *halves("ab", "cd"), evidence=SEGFAULT)
    row = scene.row(scene.run(batch_id, 2).key)
    parameters: list[object] = []
    with statements(scene.store.engine, parameters) as sent:
        scene.store.splits_of(row)
        scene.store.others_lost_with(row)
        scene.store.split(row, [killed("a"), part("b")], None)
    plans = []
    with scene.store.engine.connect() as connection:
        for statement, values in zip(sent, parameters, strict=True):
            if statement.split()[0] in ("SELECT", "UPDATE"):
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
                plans += [(each.detail, statement) for each in plan]
    assert plans
    for detail, statement in plans:
        assert not detail.startswith("SCAN batchtrack_"), (detail, statement)
        if "batchtrack_child" in detail and "SEARCH" in detail:
            narrow = any(f"{column}=?" in detail for column in ("position", "origin", "kind", "worker_id"))
            narrow |= "origin>?" in detail  # the parts there are, for a breaker
            assert narrow, (detail, statement)


def _cost_of_a_child(scene: Scene, batch_id: uuid.UUID, position: int) -> tuple[list[str], list[str]]:
    """What its claim and its completion send."""
    row, token, slot = scene.at(batch_id, position), new_token(), scene.slot()
    claim = _sent(scene, lambda: scene.store.claim(row.key, row.attempt, token, scene.worker_id, slot, MERGED))
    settle = _sent(scene, lambda: scene.store.settle(row.key, token, Ending(Status.COMPLETED, "1")))
    assert scene.row(row.key).status == "completed"
    return claim, settle


@pytest.mark.parametrize("options", [{}, {"crash_rate": {"percent": 50.0, "window": 300.0}}], ids=["plain", "breaker"])
def test_a_completed_child_costs_what_it_always_did(scene: Scene, options: dict[str, object]) -> None:
    """Also in a batch with a breaker and parts, and for a part."""
    batch_id = scene.batch([documents("a", "b"), *(documents(f"x{each}") for each in range(3))], options=options)
    scene.split(scene.run(batch_id, 0), *halves("a", "b"), evidence=SEGFAULT)
    scene.complete(scene.run(batch_id, 1))
    steps = (["BEGIN", "UPDATE"], ["BEGIN", "UPDATE", "UPDATE", "INSERT"])
    usual = steps if scene.store.sqlite else (["UPDATE"], ["WITH"])
    assert _cost_of_a_child(scene, batch_id, 2) == usual
    assert _cost_of_a_child(scene, batch_id, 5) == usual, "a part"
