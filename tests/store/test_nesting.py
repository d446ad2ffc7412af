"""A child of several steps: from link to link, and through batches of its own, however deep; on every database."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack.behaviour import dispatch, ending, finish
from celery_batchtrack.behaviour.detector import Sweeper
from celery_batchtrack.store import Store, schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, NewBatch, NewChild, Refused, Step
from celery_batchtrack.vocabulary.states import Cause, EndReason, Status
from tests.store.behaviour_kit import Told, killed, tracker_on
from tests.store.kit import HERE, Scene, add_up, callbacks, counts, dispatch_all, documents, refused, some

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")
NESTED = Evidence(Cause.NESTED, phase="before_claim", message="nested batch failed")

# -- a canvas without Celery: what a child's steps are --------------------------------------------

#: A task's name, or a group of chains with, perhaps, a body.
Link = str | dict[str, Any]


def group(*elements: Link | list[Link], body: Link | list[Link] | None = None) -> dict[str, Any]:
    return {"group": [each if isinstance(each, list) else [each] for each in elements], "body": body}


def _task(link: Link) -> str:
    return link if isinstance(link, str) else "celery.group" if link["body"] is None else "celery.chord"


def _signature(links: Sequence[Link], given: Any = None) -> str:
    return json.dumps({"step": links[0], "chain": list(links[1:]), "given": given})


def steps(*links: Link, **more: Any) -> NewChild:
    """A child that goes through these links."""
    return NewChild(
        _task(links[0]), str(uuid.uuid4()), _signature(links), result_id=str(uuid.uuid4()), **more
    )  # fmt: skip


def declared(**kinds: Any) -> str:
    """What a batch declares: by kind, a link or a chain of them."""
    found = {}
    for kind, links in kinds.items():
        chain = links if isinstance(links, list) else [links]
        found[kind] = [{"task": _task(chain[0]), "task_id": str(uuid.uuid4()), "signature": _signature(chain)}]
    return json.dumps(found)


class Steps:
    """`behaviour.tracker.Canvas` for signatures made above."""

    def expand(self, row: ChildRow, batch: BatchRow, prefix: tuple[Any, ...]) -> tuple[NewBatch, list[NewChild]]:
        step = json.loads(row.signature or "")["step"]
        called = {} if step["body"] is None else {"on_success": step["body"]}
        new = NewBatch(
            uuid7(), f"nested in {batch.name}", declared(**called), {"tolerance": 0, "canvas": True}, shards=2,
            parent_batch=row.batch_id, parent_position=row.position,
        )  # fmt: skip
        return new, [steps(*links) for links in step["group"]]

    def next_step(self, row: ChildRow, batch: BatchRow, result: Any) -> Step | None:
        rest = json.loads(row.signature or "{}").get("chain")
        return Step(_task(rest[0]), str(uuid.uuid4()), _signature(rest, result)) if rest else None


@dataclass
class Play:
    """A worker that runs what is published, and its tracker."""

    tracker: Told
    scene: Scene
    ran: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scene: Scene) -> Play:
        tracker = tracker_on(scene.store)
        tracker.canvas = Steps()
        return cls(tracker, scene)

    def start(self, *children: NewChild, calls: str | None = None, **more: Any) -> uuid.UUID:
        batch_id = uuid7()
        self.scene.store.create(
            NewBatch(batch_id, "upload", calls or "{}", {"tolerance": 0, **more.pop("options", {})}, **more),
            children, seal=True,
        )  # fmt: skip
        finish.started(self.tracker, batch_id)
        return batch_id

    def work(self, *failing: str, only: int | None = None) -> None:
        """Run every message there is, and those that this leads to; what is in `failing` fails."""
        sent = self.tracker.outbox.sent
        while sent and only != 0:
            only = None if only is None else only - 1
            message = sent.pop(0)
            claimed = self.scene.claim(message.row.key, attempt=message.ticket.attempt)
            if isinstance(claimed, Refused):
                continue
            self.ran.append(message.row.task)
            self.end(message.row.key, claimed, message.row.task in failing)

    def end(self, key: ChildKey, claimed: Any, fails: bool = False) -> None:
        """What the task's process does at its end."""
        row = self.scene.row(key)
        batch = self.scene.store.batch(key.batch_id)
        assert batch is not None
        if fails:
            finish.after(self.tracker, key, self.scene.fail(claimed))
            return
        given = json.loads(row.signature or "{}").get("given")
        result = row.task if given is None else [row.task, given]
        step = self.tracker.canvas.next_step(row, batch, result)
        if step is None:
            finish.after(self.tracker, key, self.scene.complete(claimed, json.dumps(result)))
        else:
            assert self.scene.store.advance(key, claimed.token, step)
            dispatch.pump(self.tracker, key.batch_id)

    def sweep(self) -> None:
        Sweeper(self.tracker, "test", None).sweep()

    def nested(self, batch_id: uuid.UUID) -> list[uuid.UUID]:
        return self.scene.store.list_batches(parent=batch_id, limit=None)[::-1]

    def only_nested(self, batch_id: uuid.UUID) -> uuid.UUID:
        (nested,) = self.nested(batch_id)
        return nested

    def line(self, batch_id: uuid.UUID) -> list[uuid.UUID]:
        """It, the only batch nested in it, the one nested in that, and so on."""
        found = [batch_id]
        while below := self.nested(found[-1]):
            (one,) = below
            found.append(one)
        return found


@pytest.fixture
def play(scene: Scene) -> Play:
    return Play.of(scene)


def nest(scene: Scene, batch_id: uuid.UUID, position: int = 0, count: int = 2, **more: Any) -> uuid.UUID | None:
    """Let a pending child wait for a batch of so many children; None if it may not."""
    row = more.pop("row", None) or scene.at(batch_id, position)
    new = NewBatch(
        uuid7(), "nested", callbacks(*more.pop("calls", ())), {"tolerance": 0}, parent_batch=batch_id,
        parent_position=position, **more,
    )  # fmt: skip
    return new.id if scene.store.nest(row, new, some(count)) else None


def nested_in(scene: Scene, batch_id: uuid.UUID, position: int = 0, **more: Any) -> uuid.UUID:
    nested = nest(scene, batch_id, position, **more)
    assert nested is not None
    return nested


def completed(scene: Scene, batch_id: uuid.UUID) -> None:
    """Everything of it completes, and it ends."""
    for row in scene.rows(batch_id):
        if row.status == "pending":
            scene.complete(scene.run(batch_id, row.position))
    assert scene.store.finish(batch_id) is not None


def failed(scene: Scene, batch_id: uuid.UUID) -> None:
    scene.fail(scene.run(batch_id, 0))
    completed(scene, batch_id)


# -- from link to link -----------------------------------------------------------------------------

NEXT = Step("demo.second", "second-id", '{"task": "demo.second"}', queue="slow")


def test_the_next_link_waits_with_all_but_its_attempts_anew(scene: Scene) -> None:
    batch_id = scene.batch(some(1, result_id="the-last-id"))
    scene.crash(scene.run(batch_id), again=0.0)
    dispatch_all(scene, batch_id)
    claimed = scene.run(batch_id, policy={"on_crash": "retry"})
    before = scene.row(claimed.key)
    assert (before.attempt, before.crashes, before.dispatches) == (2, 1, 1)
    assert scene.store.advance(claimed.key, claimed.token, NEXT)
    row = scene.row(claimed.key)
    assert (row.status, row.link, row.attempt) == ("pending", 1, 2)
    assert (row.task, row.task_id, row.signature, row.queue) == (NEXT.task, NEXT.task_id, NEXT.signature, "slow")
    assert (row.crashes, row.retries, row.dispatches, row.policy, row.verdict) == (0, 0, 0, None, None)
    assert (row.worker_id, row.slot, row.started_at, row.dispatched_at, row.waits_on_batch) == (None,) * 5
    assert row.result_id == "the-last-id" and row.items == before.items
    assert counts(scene, batch_id) == {"pending": 1} and scene.store.progress(batch_id).items_settled == 0
    assert add_up(scene, batch_id)


def test_a_child_that_is_replaced_stays_known_by_the_id_it_had_first(scene: Scene) -> None:
    batch_id = scene.batch(1)
    first = scene.at(batch_id, 0).task_id
    for number in range(3):
        claimed = scene.run(batch_id)
        step = Step("demo.again", f"id-{number}", "{}")
        assert scene.store.advance(claimed.key, claimed.token, step)
        assert scene.at(batch_id, 0).result_id == first
    assert scene.at(batch_id, 0).link == 3
    found = scene.store.by_result_id(first)
    assert found is not None and found.key == ChildKey(batch_id, 0)
    assert scene.store.header_task_id(batch_id) == first


def test_only_the_present_run_goes_to_the_next_link_and_once(scene: Scene) -> None:
    batch_id = scene.batch(2)
    key = ChildKey(batch_id, 0)
    assert not scene.store.advance(key, uuid.uuid4(), NEXT), "never claimed"
    former = scene.run(batch_id)
    scene.crash(former, again=0.0)
    assert not scene.store.advance(key, former.token, NEXT), "taken for dead"
    present = scene.run(batch_id)
    assert not scene.store.advance(key, former.token, NEXT), "another one runs"
    assert scene.store.advance(key, present.token, NEXT)
    assert not scene.store.advance(key, present.token, NEXT), "twice"
    assert scene.at(batch_id, 0).link == 1
    other = scene.run(batch_id, 1)
    scene.store.cancel(batch_id)
    assert not scene.store.advance(other.key, other.token, NEXT), "cancelled"
    assert add_up(scene, batch_id)


def test_messages_and_ends_of_the_former_link_are_refused(scene: Scene) -> None:
    batch_id = scene.batch(1)
    (message,) = scene.store.take_undispatched(batch_id, 10)
    claimed = scene.run(batch_id)
    scene.store.advance(claimed.key, claimed.token, NEXT)
    answer = refused(scene.claim(claimed.key, attempt=message.child.attempt))
    assert "attempt" in answer.reason
    assert scene.complete(claimed).late, "the run that was is over"
    (second,) = scene.store.take_undispatched(batch_id, 10)
    assert second.child.task == NEXT.task
    scene.complete(scene.run(batch_id, attempt=second.child.attempt), '"both"')
    assert scene.at(batch_id, 0).result == '"both"' and counts(scene, batch_id) == {"completed": 1}
    assert add_up(scene, batch_id)


def test_items_of_the_next_link_are_told_apart_where_they_are_as_many_and_stay_counted_where_not(
    scene: Scene,
) -> None:
    told: list[tuple[tuple[str, ...] | None, list[str]]] = [
        (None, ["a", "b"]), (("page-a", "page-b"), ["page-a", "page-b"]), (("a.1", "a.2", "b.1"), []),
    ]  # fmt: skip
    batch_id = scene.batch([documents("a", "b") for _ in told])
    for position, (given, items) in enumerate(told):
        claimed = scene.run(batch_id, position)
        assert scene.store.advance(claimed.key, claimed.token, Step("demo.next", "an-id", "{}", items=given))
        assert (scene.at(batch_id, position).items, scene.at(batch_id, position).item_count) == (items, 2)
    assert add_up(scene, batch_id)


def test_the_next_link_has_times_to_start_of_its_own(scene: Scene) -> None:
    batch_id = scene.batch(some(1, expires_in=600.0))
    claimed = scene.run(batch_id)
    scene.store.advance(claimed.key, claimed.token, Step("demo.next", "an-id", "{}", countdown=60.0))
    row = scene.row(claimed.key)
    assert row.expires_at is None and row.not_before is not None
    assert 50 < (row.not_before - scene.store.current_time()).total_seconds() <= 60


# -- a child waits for a batch ---------------------------------------------------------------------


def test_a_child_whose_step_is_a_batch_waits_for_it(scene: Scene) -> None:
    batch_id = scene.batch(2)
    nested = nested_in(scene, batch_id, 1)
    row, below = scene.at(batch_id, 1), scene.store.batch(nested)
    assert (row.status, row.waits_on_batch, row.dispatched_at) == ("pending", nested, None)
    assert below is not None and (below.status, below.parent_batch, below.parent_position) == ("running", batch_id, 1)
    waiting = scene.store.waiting_for(nested)
    assert waiting is not None and waiting.key == row.key
    assert scene.store.nested_in(batch_id) == [(nested, True)]
    assert counts(scene, batch_id) == {"pending": 2} and counts(scene, nested) == {"pending": 2}
    assert add_up(scene, batch_id)


@pytest.mark.parametrize("how", ["cancelled", "paused", "deleted", "claimed", "moved on", "waiting", "another round"])
def test_a_child_that_may_not_wait_leaves_no_batch_behind(scene: Scene, how: str) -> None:
    """Its row was read, and before the write it was too late."""
    batch_id = scene.batch(0 if how == "another round" else 1, calls=("on_finish",))
    if how == "another round":
        scene.store.finish(batch_id)
    seen = scene.at(batch_id, 0)
    if how == "cancelled":
        scene.store.cancel(batch_id)
    elif how == "paused":
        scene.store.pause(batch_id, "by hand")
    elif how == "deleted":
        scene.execute(sa.delete(schema.batch).where(schema.batch.c.id == batch_id))
    elif how == "claimed":
        scene.run(batch_id)
    elif how == "moved on":
        claimed = scene.run(batch_id)
        scene.store.advance(claimed.key, claimed.token, NEXT)
    elif how == "waiting":
        nested_in(scene, batch_id)
    else:
        scene.set_batch(batch_id, round=2)
    before = scene.store.list_batches()
    assert nest(scene, batch_id, row=seen) is None
    assert scene.store.list_batches() == before
    with scene.store.read() as connection:
        orphans = sa.select(sa.func.count()).select_from(schema.tally).where(schema.tally.c.batch_id.not_in(before))
        assert connection.execute(orphans).scalar_one() == 0
    if how not in ("deleted", "another round"):
        assert add_up(scene, batch_id)


def test_a_callback_waits_for_a_batch_of_its_own_after_its_batchs_end(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=("on_success",))
    scene.store.finish(batch_id)
    nested = nested_in(scene, batch_id)
    assert scene.store.joinable() == []
    completed(scene, nested)
    settled = scene.store.join(ChildKey(batch_id, 0), nested, 1, '"all"', keep=False)
    assert settled.written and settled.body and not settled.look
    assert add_up(scene, batch_id)


def test_the_weight_of_a_waiting_child_is_that_of_its_batch(scene: Scene) -> None:
    batch_id = scene.batch([*some(1, weight=70), *some(1, weight=30)])
    nested = nested_in(scene, batch_id, 0, count=10)
    progress = scene.store.progress(batch_id)
    assert (progress.weight_total, progress.nested, progress.items_total, progress.total) == (40, 1, 2, 2)
    assert scene.store.progress(nested).weight_total == 10
    assert add_up(scene, batch_id)


def test_a_waiting_row_is_never_published_nor_claimed_nor_published_again(scene: Scene) -> None:
    batch_id = scene.batch(1)
    nested = nested_in(scene, batch_id, count=0)
    scene.store.pause(batch_id, "by hand")
    scene.store.resume(batch_id)
    assert scene.store.undispatched() == [] and dispatch_all(scene) == []
    scene.set_child(ChildKey(batch_id, 0), dispatched_at=later(-9999.0))
    assert scene.store.overdue_queues(1.0) == []
    assert scene.store.overdue((None, "demo.task"), 1.0) == []
    assert scene.store.take_again([ChildKey(batch_id, 0)], 1.0) == []
    assert scene.at(batch_id, 0).dispatches == 0 and nested


# -- created in a parent ---------------------------------------------------------------------------


def created_in(scene: Scene, parent: uuid.UUID, **more: Any) -> tuple[uuid.UUID, int | None]:
    new = NewBatch(uuid7(), "part", "{}", {"tolerance": 0}, parent_batch=parent)
    waiting = NewChild("celery.group", str(new.id), '{"args": []}', weight=0, result_id=str(new.id))
    return new.id, scene.store.create_nested(new, waiting, some(2), **more)


def test_a_batch_created_in_a_parent_has_a_child_there_that_waits_for_it(scene: Scene) -> None:
    for seal in (True, False):
        parent = scene.batch(3, seal=seal)
        nested, position = created_in(scene, parent)
        assert position == 3
        row, below = scene.at(parent, 3), scene.store.batch(nested)
        assert (row.status, row.waits_on_batch, row.kind) == ("pending", nested, "child")
        assert below is not None and (below.parent_position, below.status) == (3, "open")
        assert created_in(scene, parent, seal=True)[1] == 4
        assert 3 not in dispatch_all(scene, parent) and counts(scene, parent) == {"pending": 5}
        assert add_up(scene, parent)


def test_a_parent_does_not_end_before_the_batch_created_in_it(scene: Scene, play: Play) -> None:
    parent = scene.batch(0, start_now=True, seal=False)
    nested, _ = created_in(scene, parent, seal=True)
    scene.store.seal(parent)
    assert scene.store.finish(parent) is None
    finish.started(play.tracker, nested)
    play.work()
    assert (scene.status(nested), scene.status(parent)) == ("completed", "completed")
    assert add_up(scene, parent)


@pytest.mark.parametrize("how", ["completed", "cancelled", "gone"])
def test_nothing_is_created_in_a_parent_that_has_ended(scene: Scene, how: str) -> None:
    parent = scene.batch(0)
    if how == "cancelled":
        scene.store.cancel(parent)
    elif how == "completed":
        scene.store.finish(parent)
    nested, position = created_in(scene, uuid7() if how == "gone" else parent)
    assert position is None and scene.store.batch(nested) is None
    assert scene.rows(parent) == [] and add_up(scene, parent)


# -- joined ----------------------------------------------------------------------------------------


def test_the_result_of_the_batch_is_the_childs_and_the_last_child_ends_the_parent(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=ALL, shards=1)
    scene.complete(scene.run(batch_id, 1))
    nested = nested_in(scene, batch_id)
    key = ChildKey(batch_id, 0)
    assert not scene.store.join(key, nested, 1, '"early"', keep=False).written, "it has not ended"
    completed(scene, nested)
    assert scene.store.joinable() == [nested]
    for wrong in ((nested, 2), (uuid7(), 1), (batch_id, 1)):
        assert not scene.store.join(key, *wrong, '"wrong"', keep=False).written
    settled = scene.store.join(key, nested, 1, '"all"', keep=False)
    assert settled.written and settled.look and not settled.body
    assert not scene.store.join(key, nested, 1, '"twice"', keep=False).written
    row = scene.row(key)
    assert (row.status, row.result, row.signature, row.cause) == ("completed", '"all"', None, None)
    assert scene.store.joinable() == []
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "completed"
    assert add_up(scene, batch_id)


def test_after_the_batch_the_child_goes_to_its_next_link(scene: Scene) -> None:
    batch_id = scene.batch(1)
    nested, key = nested_in(scene, batch_id), ChildKey(batch_id, 0)
    assert not scene.store.join_advance(key, nested, 1, NEXT)
    completed(scene, nested)
    assert not scene.store.join_advance(key, nested, 2, NEXT)
    before = scene.row(key)
    assert scene.store.join_advance(key, nested, 1, NEXT)
    assert not scene.store.join_advance(key, nested, 1, NEXT), "twice"
    row = scene.row(key)
    assert (row.status, row.task, row.link, row.waits_on_batch) == ("pending", NEXT.task, before.link + 1, None)
    assert row.attempt == before.attempt + 1, "whatever was published before is stale"
    assert refused(scene.claim(key, attempt=before.attempt)).reason
    assert dispatch_all(scene, batch_id) == [0]
    assert counts(scene, batch_id) == {"pending": 1} and add_up(scene, batch_id)


@pytest.mark.parametrize(("status", "called"), [(Status.FAILED, ["on_first_failure"]), (Status.CANCELLED, [])])
def test_a_child_whose_batch_did_not_succeed_ends_so_and_says_why(
    scene: Scene, status: Status, called: list[str]
) -> None:
    batch_id = scene.batch(2, calls=ALL, shards=1)
    scene.complete(scene.run(batch_id, 1))
    nested, key = nested_in(scene, batch_id), ChildKey(batch_id, 0)
    assert not scene.store.fail_waiting(key, nested, 1, status, NESTED).written, "it has not ended"
    failed(scene, nested)
    assert not scene.store.fail_waiting(key, nested, 2, status, NESTED).written
    assert scene.called(batch_id) == []
    settled = scene.store.fail_waiting(key, nested, 1, status, NESTED)
    assert settled.written and settled.look and settled.callbacks is bool(called)
    assert not scene.store.fail_waiting(key, nested, 1, status, NESTED).written, "twice"
    assert (scene.row(key).status, scene.row(key).cause) == (status, "nested")
    (incident,) = scene.incidents(batch_id)
    assert (incident.position, incident.outcome, incident.message) == (0, status, NESTED.message)
    assert scene.called(batch_id) == called
    finished = scene.store.finish(batch_id)
    assert finished is not None and finished.status == "failed"
    assert add_up(scene, batch_id)


def test_a_nested_batch_is_joinable_when_it_and_its_body_are_over_and_somebody_waits(scene: Scene) -> None:
    batch_id = scene.batch(1)
    nested = nested_in(scene, batch_id, calls=("on_success", "on_finish"))
    assert scene.store.joinable() == []
    completed(scene, nested)
    assert scene.store.joinable() == [], "its body has not run"
    body = next(row for row in scene.store.callback_rows(nested) if row.kind == "on_success")
    claimed = scene.run(nested, body.position)
    assert scene.store.joinable() == [], "its body runs"
    assert scene.complete(claimed).body
    assert scene.store.joinable() == [nested], "on_finish is nothing to wait for"
    scene.store.join(ChildKey(batch_id, 0), nested, 1, None, keep=False)
    assert scene.store.joinable() == []
    assert scene.store.waiting_for(nested) is None


def test_a_batch_that_nobody_waits_for_any_more_is_forsaken(scene: Scene) -> None:
    kept, left = scene.batch(1), scene.batch(1)
    alive, ended = nested_in(scene, kept), scene.batch(1)
    forsaken = nested_in(scene, left)
    scene.store.finish(ended)
    assert scene.store.forsaken() == []
    scene.store.cancel(left)
    assert scene.store.forsaken() == [forsaken] and scene.store.nested_in(left) == [(forsaken, True)]
    scene.store.cancel(forsaken, EndReason.PARENT)
    assert scene.store.forsaken() == [] and scene.store.nested_in(left) == [(forsaken, False)]
    assert scene.store.nested_in(kept) == [(alive, True)]


# -- trees -----------------------------------------------------------------------------------------


def deep(levels: int, leaf: Link | list[Link] = "leaf") -> Link | list[Link]:
    return leaf if levels == 0 else group(deep(levels - 1, leaf))


def test_the_end_of_the_deepest_batch_ends_all_above_it(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(deep(5)), calls=callbacks("on_success"))
    line = play.line(batch_id)
    assert len(line) == 6 and [scene.status(each) for each in line] == ["running"] * 6
    message = play.tracker.outbox.sent.pop()
    claimed = scene.run(line[-1], message.row.position)
    assert scene.complete(claimed, '"leaf"').look
    ended = ending.conclude(play.tracker, line[-1])
    assert ended is not None and ended.due == (batch_id,), "its callback is all that is to be published"
    assert [scene.status(each) for each in line] == ["completed"] * 6
    assert [each.batch_id for each in play.tracker.of(events.BatchEnded)] == line[::-1]
    assert json.loads(scene.at(batch_id, 0).result or "") == [[[[["leaf"]]]]]
    assert add_up(scene, batch_id)


def test_a_failure_climbs_as_deep_as_it_was(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(deep(4)), steps("other"), calls=callbacks(*ALL))
    play.work("leaf")
    line = play.line(batch_id)
    assert [scene.status(each) for each in line] == ["failed"] * 5
    assert [scene.at(each, 0).cause for each in line] == ["nested"] * 4 + ["exception"]
    first = scene.store.first_failure(batch_id)
    assert first is not None and "ValueError: no" in (first.message or "")
    assert scene.called(batch_id) == ["on_failure", "on_finish", "on_first_failure"]
    assert add_up(scene, batch_id)


def test_chains_groups_and_bodies_run_one_after_the_other_with_what_came_before(scene: Scene, play: Play) -> None:
    batch_id = play.start(
        steps("first", group("left", ["right", "last"], body=["joined", group("wide")]), "end"), steps("alone"),
        calls=callbacks("on_success"),
    )  # fmt: skip
    play.work()
    assert scene.status(batch_id) == "completed"
    assert [each for each in play.ran if each not in ("left", "right", "last", "alone")] == [
        "first", "joined", "wide", "end", "demo.on_success",
    ]  # fmt: skip
    assert set(play.ran) >= {"left", "right", "last", "alone"}
    assert json.loads(scene.at(batch_id, 0).result or "") == ["end", ["wide"]]
    assert scene.at(batch_id, 0).link == 2
    assert add_up(scene, batch_id)


def test_a_failing_body_fails_who_waits_for_it(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one", "two", body="body"), "never"))
    play.work("body")
    assert scene.status(play.only_nested(batch_id)) == "completed"
    assert scene.status(batch_id) == "failed" and "never" not in play.ran
    assert scene.at(batch_id, 0).cause == "nested" and add_up(scene, batch_id)


def test_a_group_of_nothing_is_done_at_once(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group(), "after"))
    play.work()
    assert play.ran == ["after"] and scene.status(batch_id) == "completed"
    assert json.loads(scene.at(batch_id, 0).result or "") == ["after", []]


def test_a_step_that_cannot_be_made_a_batch_fails_its_child_alone(scene: Scene, play: Play) -> None:
    broken = NewChild("celery.chord", "an-id", "no JSON", result_id="an-id")
    batch_id = play.start(broken, steps("other"))
    play.work()
    assert [row.cause for row in scene.rows(batch_id)] == ["not_sent", None]
    assert scene.status(batch_id) == "failed" and play.nested(batch_id) == []


def test_a_step_whose_batch_cannot_be_written_does_not_stop_the_publishing_of_others(database_url: str) -> None:
    """Its owner, a row of the application, was deleted before it was the chord's turn."""
    first = Store(database_url, auto_migrate=True)
    with first.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE shop_upload (id bigint PRIMARY KEY)"))
    store = Store(database_url, owners={"upload": "shop_upload.id"})
    store.migrate()
    play = Play.of(Scene(store))
    play.scene.worker(HERE, id=play.scene.worker_id)

    class Owned(Steps):
        def expand(self, row: ChildRow, batch: BatchRow, prefix: tuple[Any, ...]) -> tuple[NewBatch, list[NewChild]]:
            new, children = super().expand(row, batch, prefix)
            values = {name: getattr(new, name) for name in NewBatch.__slots__}
            return NewBatch(**{**values, "owner": ("upload", 4711)}), children

    play.tracker.canvas = Owned()
    try:
        batch_id = play.start(steps(group("never")), steps("other"))
        play.work()
        play.sweep()
        assert [row.cause for row in play.scene.rows(batch_id)] == ["not_sent", None]
        assert play.scene.status(batch_id) == "failed"
    finally:
        store.dispose()
        first.dispose()


# -- a process dies between two of its steps -------------------------------------------------------


def test_who_waited_for_a_batch_whose_ender_died_is_let_go_on_by_a_sweep(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one", body=None), "after"), calls=callbacks("on_success"))
    nested = play.only_nested(batch_id)
    scene.complete(scene.run(nested, 0), '"one"')
    killed(lambda: ending.conclude(play.tracker, nested), at="finish.committed")
    assert scene.status(nested) == "completed" and scene.at(batch_id, 0).waits_on_batch == nested
    assert scene.store.joinable() == [nested]
    play.sweep()
    play.work()
    assert "after" in play.ran and scene.status(batch_id) == "completed"
    assert add_up(scene, batch_id)


def test_a_batch_whose_parents_process_died_right_after_nesting_it_is_published_by_a_sweep(
    scene: Scene, play: Play
) -> None:
    full, empty = scene.batch([steps(group("one"))]), scene.batch([steps(group())])
    for batch_id in (full, empty):
        killed(lambda batch_id=batch_id: dispatch.pump(play.tracker, batch_id), at="nest.committed")
    assert scene.status(play.only_nested(empty)) == "running"
    play.sweep()
    play.work()
    assert scene.status(full) == scene.status(empty) == "completed" and play.ran == ["one"]
    assert add_up(scene, full)


def test_nested_batches_of_a_cancel_that_died_half_way_are_cancelled_by_a_sweep(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(deep(3)))
    killed(lambda: scene.store.cancel(batch_id))
    line = play.line(batch_id)
    assert [scene.status(each) for each in line] == ["cancelled"] + ["running"] * 3
    play.sweep()
    for each in line[1:]:
        row = scene.store.batch(each)
        assert row is not None and (row.status, row.reason) == ("cancelled", "parent")
    assert add_up(scene, batch_id)


def test_a_body_whose_settle_died_before_the_join_is_joined_by_a_sweep(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one", body="body")))
    play.work(only=1)
    nested = play.only_nested(batch_id)
    message = play.tracker.outbox.sent.pop()
    scene.complete(scene.run(nested, message.row.position), '"sum"')
    assert scene.status(batch_id) == "running"
    play.sweep()
    assert scene.status(batch_id) == "completed" and scene.at(batch_id, 0).result == '"sum"'


# -- cancel, pause, delete, prune ------------------------------------------------------------------


def test_a_cancel_reaches_batches_nested_in_it_with_what_runs_there(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(deep(3)), steps("other"), calls=callbacks("on_finish"))
    line = play.line(batch_id)
    running = scene.run(line[-1], 0)
    task_id = scene.row(running.key).task_id
    assert finish.cancel(play.tracker, batch_id) is not None
    reasons = [row.reason for row in map(scene.store.batch, line) if row is not None]
    assert reasons == ["user", "parent", "parent", "parent"]
    assert scene.row(running.key).status == "cancelled" and play.tracker.outbox.terminated == [task_id]
    assert scene.called(batch_id) == ["on_finish"]
    assert scene.store.forsaken() == [] and scene.store.joinable() == []
    assert add_up(scene, batch_id)


def test_a_cancelled_nested_batch_cancels_who_waits_for_it_alone(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(group("one"), "never"), steps("other"), options={"tolerance": 1})
    finish.cancel(play.tracker, play.only_nested(batch_id))
    play.work()
    assert [(row.status, row.cause) for row in scene.rows(batch_id)] == [("cancelled", "nested"), ("completed", None)]
    assert scene.status(batch_id) == "partial" and "never" not in play.ran
    assert add_up(scene, batch_id)


def test_a_cancel_reaches_the_batch_of_a_nested_batchs_body(scene: Scene, play: Play) -> None:
    """What nobody waits for any more does not go on: the body belongs to the cancelled child."""
    batch_id = play.start(steps(group("one", body=group("wide", "wider"))))
    play.work(only=1)
    nested = play.only_nested(batch_id)
    below = play.only_nested(nested)
    assert scene.status(nested) == "completed" and scene.status(below) == "running"
    finish.cancel(play.tracker, batch_id)
    play.sweep()
    play.work()
    assert scene.status(below) == "cancelled" and "wide" not in play.ran


def test_pause_and_resume_reach_nested_batches(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(deep(2)), calls=callbacks("on_success"))
    line = play.line(batch_id)
    assert finish.pause(play.tracker, batch_id)
    assert all(row.paused_at for row in map(scene.store.batch, line) if row is not None)
    play.work()
    assert play.ran == [], "its message was refused"
    assert not finish.pause(play.tracker, batch_id)
    assert finish.resume(play.tracker, batch_id)
    assert not any(row.paused_at for row in map(scene.store.batch, line) if row is not None)
    play.work()
    assert play.ran == ["leaf", "demo.on_success"] and scene.status(batch_id) == "completed"


def test_a_step_that_would_be_a_batch_waits_while_its_parent_is_paused(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps("first", group("one")))
    finish.pause(play.tracker, batch_id)
    finish.resume(play.tracker, batch_id)
    claimed = scene.run(batch_id, 0)
    finish.pause(play.tracker, batch_id)
    play.end(claimed.key, claimed)
    assert play.nested(batch_id) == []
    finish.resume(play.tracker, batch_id)
    play.work()
    assert scene.status(batch_id) == "completed"


def _everything(scene: Scene) -> Iterator[int]:
    with scene.store.read() as connection:
        for table in (schema.batch, schema.child, schema.tally, schema.incident):
            yield connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def test_a_deleted_batch_takes_those_nested_in_it_along(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(deep(3)), steps(group("fails", "works")))
    play.work("fails")
    scene.execute(sa.delete(schema.batch).where(schema.batch.c.id == batch_id))
    assert list(_everything(scene)) == [0, 0, 0, 0]


def test_pruning_leaves_nested_batches_whose_parent_stays_and_takes_them_with_it(scene: Scene, play: Play) -> None:
    batch_id = play.start(steps(deep(2)), steps("other"))
    play.work(only=2)
    line = play.line(batch_id)
    for each in line[1:]:
        scene.set_batch(each, finished_at=later(-100.0)) if scene.status(each) != "running" else None
    assert scene.store.prune(completed=1, other=1) == 0
    play.work()
    for each in line:
        scene.set_batch(each, finished_at=later(-100.0))
    scene.set_batch(batch_id, finished_at=later(0.0))
    assert scene.store.prune(completed=50, other=50) == 0
    assert all(scene.store.batch(each) for each in line)
    scene.set_batch(batch_id, finished_at=later(-100.0))
    assert scene.store.prune(completed=50, other=50) == 1, "counted as one"
    assert list(_everything(scene)) == [0, 0, 0, 0]


def test_pruning_keeps_a_batch_until_the_callbacks_of_its_nested_batches_are_over(scene: Scene) -> None:
    batch_id = scene.batch(1)
    nested = nested_in(scene, batch_id, calls=("on_finish",), count=0)
    scene.store.finish(nested)
    scene.store.join(ChildKey(batch_id, 0), nested, 1, None, keep=False)
    scene.store.finish(batch_id)
    for each in (batch_id, nested):
        scene.set_batch(each, finished_at=later(-100.0))
    claimed = scene.run(nested, 0)
    assert scene.store.prune(completed=1, other=1) == 0
    scene.complete(claimed)
    assert scene.store.prune(completed=1, other=1) == 1


# -- progress --------------------------------------------------------------------------------------


def test_progress_rolls_up_and_the_counts_stay_the_batchs_own(scene: Scene) -> None:
    batch_id = scene.batch(2)
    nested = nested_in(scene, batch_id, 0, count=7)
    below = nested_in(scene, nested, 0, count=3)
    progress = scene.store.progress(batch_id)
    assert (progress.total, progress.items_total, progress.weight_total, progress.nested) == (2, 2, 10, 2)
    scene.set_batch(batch_id, started_at=later(-30.0))
    scene.complete(scene.run(below, 1))
    scene.complete(scene.run(nested, 1))
    scene.complete(scene.run(batch_id, 1))
    progress = scene.store.progress(batch_id)
    assert (progress.percent, progress.completed, progress.pending) == (30, 1, 1)
    assert progress.eta == pytest.approx(70, rel=0.2)
    assert (scene.store.progress(nested).percent, scene.store.progress(nested).nested) == (22, 1)
    found = {each.batch_id: each.percent for each in scene.store.progress_of([batch_id, nested, below])}
    assert found == {batch_id: 30, nested: 22, below: 33}
    completed(scene, below)
    scene.store.join(ChildKey(nested, 0), below, 1, None, keep=False)
    completed(scene, nested)
    assert scene.store.progress(batch_id).percent == 99, "all is done but the end"
    scene.store.join(ChildKey(batch_id, 0), nested, 1, None, keep=False)
    scene.store.finish(batch_id)
    assert scene.store.progress(batch_id).percent == 100
    assert add_up(scene, batch_id)


def test_milestones_are_those_of_the_progress_that_rolls_up(scene: Scene, play: Play) -> None:
    half = json.dumps({"on_progress": [{"task": "half", "task_id": "id", "signature": "{}", "percent": 50}]})
    batch_id = play.start(steps(group(*["one"] * 9)), steps("other"), calls=half)
    scene.complete(scene.run(batch_id, 1))
    assert scene.store.progress(batch_id).percent == 10
    assert scene.store.reach_milestones(batch_id) == 0, "a tenth is done"
    play.work()
    assert scene.called(batch_id) == ["on_progress"] and scene.status(batch_id) == "completed"


def test_batches_go_through_the_window_of_the_one_they_are_nested_in_one_after_another(
    scene: Scene, play: Play
) -> None:
    batch_id = play.start(steps(group("a", "b"), "c"), *(steps(group("a", "b")) for _ in range(4)), max_in_flight=1)
    most = 0
    while play.tracker.outbox.sent:
        waiting = [row for row in scene.rows(batch_id) if row.waits_on_batch is not None and row.status == "pending"]
        most = max(most, len(waiting))
        play.work(only=1)
    assert (most, scene.status(batch_id)) == (1, "completed"), "without a sweep"
    assert play.ran == ["a", "b", "c"] + ["a", "b"] * 4
    assert add_up(scene, batch_id)


def test_hundreds_of_groups_go_through_a_shared_window_without_nesting_calls(scene: Scene, play: Play) -> None:
    if not scene.store.sqlite:
        pytest.skip("once is enough")
    play.tracker.settings = replace(play.tracker.settings, max_in_flight=4)
    batch_id = play.start(*(steps(group("a")) for _ in range(300)))
    play.work()
    play.sweep()
    play.work()
    assert scene.status(batch_id) == "completed" and counts(scene, batch_id) == {"completed": 300}
