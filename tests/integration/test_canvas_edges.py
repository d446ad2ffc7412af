"""Canvases at the edges: old protocols, great depth and length, who comes from whom, and what becomes of leftovers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, group
from celery.contrib.testing.worker import start_worker

from celery_batchtrack import Batch, BatchTrack, chord
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Everything in this process; `calls` are (task, root, parent, id, argument)."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(batchtrack_database_url=f"sqlite:///{tmp_path / 'b.db'}", task_always_eager=True)
    BatchTrack(app)
    calls: list[tuple[Any, ...]] = []

    @app.task(bind=True, shared=False, name="shop.note")
    def note(self: Any, value: Any) -> Any:
        request = self.request
        calls.append((request.root_id, request.parent_id, request.id, value))
        return value

    @app.task(shared=False, name="shop.total")
    def total(values: list[int]) -> int:
        return sum(values)

    yield SimpleNamespace(app=app, note=note, total=total, calls=calls, store=app.batchtrack.store)
    app.batchtrack.reset()


@pytest.fixture
def working(shop: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """With a worker in a thread."""
    shop.app.conf.update(
        task_always_eager=False, broker_transport_options={"polling_interval": 0.02}, batchtrack_wait_poll=0.02
    )
    with start_worker(shop.app, pool="solo", perform_ping_check=False, shutdown_timeout=20):
        yield shop


def violations(shop: SimpleNamespace) -> list[Any]:
    return [each for each in shop.store.verify(5.0) if each.violations]


def test_under_task_protocol_1_each_link_runs_once(working: SimpleNamespace) -> None:
    shop = working
    shop.app.conf.task_protocol = 1
    links = chain(shop.note.si(1), shop.note.si(2), shop.note.si(3))
    made = chord([links, shop.note.s(4)], chain(shop.total.s(), shop.note.s(), shop.note.s()), app=shop.app)
    assert made().get(timeout=20) == 7
    assert sorted(each[-1] for each in shop.calls) == [1, 2, 3, 4, 7, 7]
    frozen = chord([links.clone(), shop.note.s(4)], shop.total.s(), app=shop.app)
    frozen.freeze()
    shop.calls.clear()
    assert frozen.apply_async().get(timeout=20) == 7
    assert sorted(each[-1] for each in shop.calls) == [1, 2, 3, 4]
    assert violations(shop) == []


def test_tasks_of_a_nested_group_come_from_the_link_before_it(working: SimpleNamespace) -> None:
    shop = working
    element = shop.note.s(1) | group(shop.note.si(2), shop.note.si(3))
    assert chord([element], shop.note.s(), app=shop.app)().get(timeout=20) == [[2, 3]]
    by_value = {str(each[-1]): each for each in shop.calls}
    first = by_value["1"]
    for value in ("2", "3"):
        root, parent, _, _ = by_value[value]
        assert (root, parent) == (first[2], first[2])


def test_building_a_deeply_nested_chord_costs_what_its_depth_costs(shop: SimpleNamespace) -> None:
    def nested(depth: int) -> Any:
        return chord([nested(depth - 1) if depth else shop.note.s(1)], shop.total.s(), app=shop.app)

    def seconds(depth: int) -> float:
        text = json.dumps(nested(depth))
        took = []
        for _ in range(3):
            start = time.perf_counter()
            shop.app.signature(json.loads(text))
            took.append(time.perf_counter() - start)
        return min(took)

    assert seconds(16) < 60 * seconds(4), "squared is 16 times as much, doubling at each depth 4096 times"


def test_a_long_chain_runs_inline_without_nesting_its_calls(shop: SimpleNamespace) -> None:
    links = chain(shop.note.si(at) for at in range(400))
    assert chord([links, shop.note.s(1)], shop.total.s(), app=shop.app)().get() == 400
    assert [each[-1] for each in shop.calls if each[-1] != 1] == [0, *range(2, 400)]
    assert violations(shop) == []


def test_a_task_may_wait_inline_for_a_batch_that_it_starts(shop: SimpleNamespace) -> None:
    from celery.result import allow_join_result

    @shop.app.task(shared=False, name="shop.outer")
    def outer() -> int:
        with allow_join_result():
            return int(chord([shop.note.s(1), shop.note.s(2)], app=shop.app)(shop.total.s()).get(timeout=5))

    assert chord([outer.s(), chain(outer.s(), shop.note.s())], app=shop.app)(shop.total.s()).get(timeout=5) == 6


def test_results_that_nobody_reads_are_not_kept_but_those_of_callbacks_are(shop: SimpleNamespace) -> None:
    several = group(shop.note.si(1), shop.note.si(2))
    header = [chain(shop.note.s(3), shop.note.s()), chord([shop.note.s(4)], shop.total.s(), app=shop.app)]
    batch = Batch.create(
        "quiet", header, app=shop.app, results="none", callback_arg="nothing", on_success=[several, shop.note.si(5)]
    )
    assert batch.status == "completed" and [child.result for child in batch.children()] == [None, None]
    assert [row.result for row in batch.children(kind="callbacks")] == [[1, 2], 5]


def test_callbacks_given_to_a_result_are_called_by_get(shop: SimpleNamespace) -> None:
    result = chord([shop.note.s(1)], app=shop.app)(shop.total.s())
    seen: list[Any] = []
    result.then(lambda done: seen.append(done.id))
    assert result.get() == 1 and seen == [result.id]
    assert result.date_done is not None and result.ready() and result.status == "SUCCESS"


def test_a_child_whose_nested_batch_was_deleted_by_hand_ends_with_a_sweep(shop: SimpleNamespace) -> None:
    with Batch("outer", app=shop.app) as outer:
        outer.add(shop.note.s(1))
        inner = Batch("inner", app=shop.app, parent_batch=outer)
        inner.__enter__()
    with shop.store.write() as connection:
        connection.exec_driver_sql("DELETE FROM batchtrack_batch WHERE id = ?", (str(inner.id),))
    shop.app.batchtrack.sweep()
    assert outer.status == "failed"
    [lost] = outer.children("failed")
    assert lost.cause == "nested" and "is gone" in outer.incidents()[0].message
    inner._client.__exit__(None, None, None)


def test_what_is_paused_half_way_down_is_mended_by_a_sweep(shop: SimpleNamespace) -> None:
    with Batch("outer", app=shop.app) as outer:
        inner = Batch("inner", app=shop.app, parent_batch=outer)
        inner.__enter__()
        assert shop.store.pause(outer.id, "by hand"), "and died before it came to the nested one"
        shop.app.batchtrack.sweep()
        assert inner.row.paused_at is not None and str(outer.id) in inner.row.pause_reason
        assert shop.store.resume(outer.id)
        shop.app.batchtrack.sweep()
        assert inner.row.paused_at is None
        inner.__exit__(None, None, None)
    assert outer.status == "completed"


def test_a_batch_that_was_never_sealed_is_not_retried(shop: SimpleNamespace) -> None:
    from celery_batchtrack import errors

    with pytest.raises(KeyError), Batch("half", app=shop.app) as batch:
        batch.add(shop.note.s(1))
        batch.flush()
        raise KeyError
    assert (batch.status, batch.row.reason) == ("cancelled", "exception")
    with pytest.raises(errors.BatchStateError, match="before it was sealed"):
        batch.retry()


def test_a_nested_batch_that_was_cancelled_when_all_had_completed_ends_anew(shop: SimpleNamespace) -> None:
    batch = Batch.create("outer", [chord([shop.note.s(1)], shop.total.s(), app=shop.app)], app=shop.app)
    [nested] = batch.nested()
    with shop.store.write() as connection:  # as if a cancel had been first
        for status, key in (("cancelled", nested.id), ("cancelled", batch.id)):
            connection.exec_driver_sql(
                "UPDATE batchtrack_batch SET status = ?, reason = 'user' WHERE id = ?", (status, str(key))
            )
        connection.exec_driver_sql("DELETE FROM batchtrack_child WHERE kind <> 'child'")
        connection.exec_driver_sql(
            "UPDATE batchtrack_child SET status = 'cancelled', cause = 'cancelled', result = NULL, signature = ? "
            "WHERE batch_id = ?",
            ('{"args": []}', str(batch.id)),
        )
        connection.exec_driver_sql(
            "UPDATE batchtrack_tally SET completed = 0, items_completed = 0, cancelled = 1, items_cancelled = 1 "
            "WHERE batch_id = ?",
            (str(batch.id),),
        )
    assert batch.retry() == 1
    assert batch.status == "completed" and list(batch.results()) == [1]
    assert [each[-1] for each in shop.calls] == [1], "its child did not run again"
    assert violations(shop) == []


def test_a_nested_batch_is_retried_through_its_parent_only(shop: SimpleNamespace) -> None:
    from celery_batchtrack import errors

    @shop.app.task(shared=False, name="shop.fail")
    def fail() -> None:
        raise LookupError

    result = chord([chord([fail.s()], shop.total.s(), app=shop.app)], app=shop.app)(shop.total.s())
    [nested] = result.batch.nested()
    with pytest.raises(errors.BatchStateError, match=f"nested in {result.batch.id}"):
        nested.retry()
    with pytest.raises(errors.BatchNotFound):
        Batch._handle(shop.app.batchtrack, uuid7()).retry()
    assert shop.store.child(ChildKey(nested.id, 0)).status == "failed"
