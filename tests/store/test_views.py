"""The SQL views: public API. Their columns are declared, they hold what a scene holds, and who may read reads them."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack import errors
from celery_batchtrack.store import Store, schema
from celery_batchtrack.store.clock import later, now
from celery_batchtrack.store.verify import LIVENESS
from celery_batchtrack.store.views import READER, VIEWS
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.states import Cause, Detector, Status
from tests.helpers import unique
from tests.servers import PostgresServer
from tests.store.kit import SEGFAULT, Scene, documents, statements

FAILED = Evidence(
    Cause.EXCEPTION, exception="ValueError", message="no span", traceback='  File "a.py", line 7, in f\nValueError'
)
DIED = Evidence(
    Cause.SIGNAL, signal="SIGSEGV", exit_code=-11, python_frame="annotate.py:88 in annotate_one", item="PMC:13900",
    item_index=0, stack='  File "annotate.py", line 88 in annotate_one', hostname="web-3", worker="w1@web-3", pid=771,
    detected_by=Detector.MAIN,
)  # fmt: skip


@pytest.fixture
def shop(scene: Scene) -> tuple[Scene, uuid.UUID]:
    """One batch: a crash, a failure, one completed, one that runs, one that waits."""
    batch_id = scene.batch(
        [documents("PMC:13900", "PMC:1"), documents("PMC:2"), documents("PMC:3"), documents("PMC:4"), documents("x")],
        tags=["nightly"],
    )
    scene.crash(scene.run(batch_id, 0), evidence=DIED)
    scene.fail(scene.run(batch_id, 1), FAILED)
    scene.complete(scene.run(batch_id, 2))
    scene.run(batch_id, 3)
    return scene, batch_id


def only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    (row,) = rows
    return row


def some_of(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


def test_a_view_has_the_columns_that_are_declared_in_this_order(store: Store) -> None:
    inspector = sa.inspect(store.engine)
    assert store.store_id
    columns = {name: inspector.get_columns(name) for name in inspector.get_view_names()}
    found = {name: [each["name"] for each in those] for name, those in columns.items()}
    assert found == {view.relation: list(view.columns) for view in VIEWS.values()}
    decimals = [(name, each["name"]) for name in found for each in columns[name] if str(each["type"]) == "NUMERIC"]
    assert store.sqlite or decimals == [], "as JSON they would be text"


def test_which_documents_crashed_and_why_is_one_select(shop: tuple[Scene, uuid.UUID]) -> None:
    scene, batch_id = shop
    query = "SELECT item, signal, python_frame, hostname, died_at FROM batchtrack_crash WHERE batch_id = :id"
    with scene.store.read() as connection:
        found = connection.execute(sa.text(query), {"id": str(batch_id) if scene.store.sqlite else batch_id}).one()
    assert found[:4] == ("PMC:13900", "SIGSEGV", "annotate.py:88 in annotate_one", "web-3") and found.died_at


def test_each_view_tells_what_is_there(shop: tuple[Scene, uuid.UUID]) -> None:
    scene, batch_id = shop
    view = scene.store.view
    progress = only(view("batchtrack_batch_progress"))
    counts = ("total", "done", "pending", "running", "completed", "failed", "crashed", "cancelled", "items_done")
    assert some_of(progress, *counts) == (5, 3, 1, 1, 1, 1, 1, 0, 4)
    assert progress["done_percent"] == 66 and progress["tags"] == ["nightly"] and progress["eta_seconds"] is not None
    told = scene.store.progress(batch_id)
    assert progress["done_percent"] == told.percent and progress["seconds"] == pytest.approx(told.seconds, abs=30)

    crash = only(view("crash"))
    names = ("batch_id", "batch_name", "position", "item", "items", "pid", "detected_by", "outcome")
    assert some_of(crash, *names) == (
        batch_id, "upload", 0, "PMC:13900", ["PMC:13900", "PMC:1"], 771, "main", "crashed"
    )  # fmt: skip
    failures = {each["position"]: each for each in view("failure")}
    assert some_of(failures[1], "item", "exception", "is_crash") == ("PMC:2", "ValueError", False), "its only item"
    assert failures[0]["is_crash"] is True
    signatures = {each["exception"] or each["signal"]: each for each in view("failure_signature")}
    names = ("occurrences", "crashes", "items", "batches", "last_item", "last_batch_id")
    assert signatures["SIGSEGV"]["exit_code"] == -11
    assert some_of(signatures["SIGSEGV"], *names) == (1, 1, 1, 1, "PMC:13900", batch_id)
    assert some_of(signatures["ValueError"], "occurrences", "crashes", "last_position") == (1, 0, 1)

    for name in ("outcome_per_minute", "outcome_per_hour"):
        rows = view(name)
        assert [sum(row[each] for row in rows) for each in ("completed", "failed", "crashed", "items")] == [1, 1, 1, 4]
    assert sum(row["crash_percent"] for row in view("outcome_per_hour")) == pytest.approx(100 / 3)
    assert {(row["status"], row["children"]) for row in view("task_duration")} == {
        ("completed", 1), ("failed", 1), ("crashed", 1)
    }  # fmt: skip
    slowest = view("slowest", {"batch_id": batch_id}, order_by=["rank"])
    assert [row["rank"] for row in slowest] == [1, 2, 3] and {row["worker"] for row in slowest} == {"w1@here"}
    running = only(view("running"))
    assert some_of(running, "batch_id", "position", "items", "worker", "worker_state") == (
        batch_id, 3, ["PMC:4"], "w1@here", "alive"
    )  # fmt: skip
    assert running["process_pid"] == int(running["slot"].partition(":")[0]) != running["pid"]
    children = {each["position"]: each for each in view("batch_child", {"batch_id": batch_id, "kind": "child"})}
    assert [children[at]["status"] for at in range(5)] == ["crashed", "failed", "completed", "running", "pending"]
    assert children[0]["items"] == ["PMC:13900", "PMC:1"] and children[0]["worker"] == "w1@here"
    worker = only(view("worker_liveness"))
    assert some_of(worker, "state", "running", "crashes_24h", "hostname") == ("alive", 1, 0, "here")
    assert view("stuck_batch") == []
    assert {row["violations"] for row in view("invariant")} == {0}
    assert {row["check_name"] for row in view("invariant") if row["kind"] == "liveness"} == set(LIVENESS)


def test_documents_that_fail_most_often_across_batches(scene: Scene) -> None:
    for _ in range(2):
        batch_id = scene.batch([documents("PMC:13900"), documents("fine")])
        scene.crash(scene.run(batch_id, 0), evidence=DIED)
        scene.fail(scene.run(batch_id, 1), FAILED)
    query = (
        "SELECT item, count(*) AS times, count(DISTINCT batch_id) AS batches FROM batchtrack_failure"
        " WHERE is_crash GROUP BY item ORDER BY times DESC"
    )
    with scene.store.read() as connection:
        assert connection.execute(sa.text(query)).all() == [("PMC:13900", 2, 2)]
    assert only(scene.store.view("failure_signature", {"signal": "SIGSEGV"}))["batches"] == 2


@pytest.mark.parametrize("reason", ["paused", "never_sealed", "deadline_passed", "worker_gone", "no_progress"])
def test_a_batch_that_does_not_go_on_says_why(scene: Scene, reason: str) -> None:
    batch_id = scene.batch(2, seal=reason != "never_sealed")
    assert scene.store.view("stuck_batch") == []
    if reason == "paused":
        scene.store.pause(batch_id, "the disk is full")
    elif reason == "never_sealed":
        opener = scene.worker(kind="client")
        scene.set_batch(batch_id, opened_by=opener)
        scene.set_worker(opener, stopped_at=later(-1.0))
    elif reason == "deadline_passed":
        scene.set_batch(batch_id, deadline_at=later(-100.0))
    elif reason == "worker_gone":
        dead = scene.worker()
        scene.run(batch_id, 0, worker=dead)
        scene.set_worker(dead, beat_at=later(-100.0))
    else:
        scene.set_batch(batch_id, created_at=later(-400.0), started_at=later(-400.0))
    found = only(scene.store.view("stuck_batch"))
    assert some_of(found, "batch_id", "reason", "open") == (batch_id, reason, 2)
    assert found["detail"] and found["stuck_seconds"] > -1
    if reason == "paused":
        assert found["detail"].startswith("the disk is full")
    if reason == "no_progress":
        scene.set_child(ChildKey(batch_id, 0), queue="nobody")
        scene.set_child(ChildKey(batch_id, 1), queue="nobody")
        assert "in queue nobody" in only(scene.store.view("stuck_batch"))["detail"]
        scene.set_worker(scene.worker_id, beat_at=later(-100.0))
        assert only(scene.store.view("stuck_batch"))["reason"] == "no_worker"
        scene.set_child(ChildKey(batch_id, 0), not_before=later(60.0))
        scene.set_child(ChildKey(batch_id, 1), not_before=later(60.0))
        assert scene.store.view("stuck_batch") == [], "its children are due later"


def test_what_waits_for_good_reason_is_not_stuck(scene: Scene) -> None:
    def ended(**values: object) -> uuid.UUID:
        batch_id = scene.batch(1, calls=("on_success",))
        scene.complete(scene.run(batch_id))
        scene.store.finish(batch_id)
        (callback,) = scene.store.callback_rows(batch_id)
        scene.set_child(callback.key, created_at=later(-4000.0), **values)
        scene.set_batch(batch_id, created_at=later(-4000.0), started_at=later(-4000.0), finished_at=later(-4000.0))
        return batch_id

    ended(waits_on_batch=scene.batch(1))
    ended(not_before=later(3000.0))
    assert scene.store.retry_callbacks(ended(status="crashed", cause="exit", finished_at=now()), [Status.CRASHED])
    held = scene.batch(1)
    scene.set_batch(held, created_at=later(-4000.0), started_at=later(-4000.0), dispatch_at=later(3600.0))
    again = scene.batch(1)
    scene.crash(scene.run(again))
    scene.store.finish(again)
    scene.set_batch(again, created_at=later(-90_000.0), started_at=later(-90_000.0), finished_at=later(-86_400.0))
    scene.execute(sa.update(schema.outcome).values(time=later(-86_400.0)))
    assert scene.store.retry(again, [Status.CRASHED])
    assert scene.store.view("stuck_batch") == []


def test_an_ended_batch_whose_callback_nobody_takes_is_stuck(scene: Scene) -> None:
    batch_id = scene.batch(1, calls=("on_success",))
    scene.complete(scene.run(batch_id))
    scene.store.finish(batch_id)
    (callback,) = scene.store.callback_rows(batch_id)
    assert scene.store.view("stuck_batch") == []
    scene.set_child(callback.key, created_at=later(-400.0))
    assert only(scene.store.view("stuck_batch"))["reason"] == "callback_waiting"
    scene.run(batch_id, callback.position)
    assert scene.store.view("stuck_batch") == []


def test_each_broken_invariant_is_seen(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.complete(scene.run(batch_id, 0))
    scene.execute(sa.text("UPDATE batchtrack_tally SET completed = completed + 1 WHERE shard = 1"))
    scene.execute(sa.text("DELETE FROM batchtrack_outcome"))
    broken = {row["check_name"] for row in scene.store.view("invariant") if row["violations"]}
    assert {"tally_equals_rows", "what_ended_is_counted"} <= broken


def test_workers_that_were_lost_or_stopped_say_so(scene: Scene) -> None:
    lost, stopped, silent = (scene.worker(name=name) for name in ("lost", "stopped", "silent"))
    scene.store.lose(lost, Detector.HOST)
    scene.set_worker(stopped, stopped_at=later(-1.0))
    scene.set_worker(silent, beat_at=later(-100.0))
    states = {row["name"]: row["state"] for row in scene.store.view("worker_liveness")}
    assert states == {"w1@here": "alive", "lost": "lost", "stopped": "stopped", "silent": "suspected"}


# -- reading by name --------------------------------------------------------------------------------


def test_a_view_or_column_that_is_not_there_is_a_clear_error(store: Store) -> None:
    with pytest.raises(errors.InvalidOption, match="no view 'crashs': there are batch_progress, crash"):
        store.view("crashs")
    with pytest.raises(errors.InvalidOption, match="batchtrack_crash has no column 'sig'"):
        store.view("crash", {"sig": 1})
    with pytest.raises(errors.InvalidOption):
        store.view("crash", order_by=["-sig; DROP TABLE batchtrack_meta"])


def test_rows_are_chosen_and_ordered(scene: Scene) -> None:
    first, second = scene.batch(1), scene.batch(1)
    for each in (first, second):
        scene.crash(scene.run(each), evidence=SEGFAULT)
    view = scene.store.view
    assert [row["batch_id"] for row in view("crash", order_by=["-detected_at"])] == [second, first]
    assert len(view("crash", {"batch_id": [first, second]}, limit=1)) == 1
    assert view("crash", {"batch_id": first, "item": None}) == []
    scene.execute(sa.text("UPDATE batchtrack_incident SET detected_at = '2020-01-01 00:00:00+00'"))
    assert view("crash", since=("detected_at", 3600.0)) == []


def test_a_query_can_be_run_as_it_is_printed(shop: tuple[Scene, uuid.UUID]) -> None:
    scene, _ = shop
    with scene.store.read() as connection:
        for name in VIEWS:
            text = scene.store.view_query(name)
            if not scene.store.sqlite:
                text = text.replace("%", "%%")
            assert connection.exec_driver_sql(f"SELECT count(*) FROM ({text}) AS x").scalar_one() is not None


# -- made by migrate --------------------------------------------------------------------------------


def _made(sent: list[str]) -> list[str]:
    return [each.split(" AS")[0].split()[-1] for each in sent if each.startswith(("CREATE VIEW", "CREATE OR REPLACE"))]


def test_views_are_made_again_only_if_they_changed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.store_id
    with statements(store.engine) as sent:
        store.migrate()
    assert _made(sent) == []
    for name, view in VIEWS.items():  # each by itself, also where others read it

        def changed(self: Store, each: str, name: str = name, real: Any = Store.view_query) -> str:
            return str(real(self, each)) + ("\n-- changed" if each == name else "")

        with monkeypatch.context() as patched, statements(store.engine) as sent:
            patched.setattr(Store, "view_query", changed)
            store.migrate()
        assert view.relation in _made(sent) and (store.sqlite or len(_made(sent)) <= 2), "and the one before, back"
    store.migrate()
    assert store.view("failure_signature") == []


def test_what_others_built_upon_a_view_and_who_may_read_it_stays(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, role = Store(postgres_url, auto_migrate=True), unique("grafana")
    assert store.store_id
    real = Store.view_query
    with store.write() as connection:
        for each in (
            f"CREATE ROLE {role}", f"GRANT SELECT ON batchtrack_crash TO {role}",
            "CREATE VIEW my_crashes AS SELECT item FROM batchtrack_crash",
        ):  # fmt: skip
            connection.exec_driver_sql(each)
    may = f"SELECT has_table_privilege('{role}', 'batchtrack_crash', 'SELECT')"
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Store, "view_query", lambda self, name: real(self, name) + "\n-- changed")
            store.migrate()
        with store.read() as connection:
            assert connection.exec_driver_sql(may).scalar_one()
            connection.exec_driver_sql("SELECT * FROM my_crashes")
        with store.write() as connection:  # a step that is still to come drops them all
            with pytest.raises(errors.SchemaError, match=r"my_crashes.*drop what you built"):
                store._before_steps(connection)
            connection.rollback()
        with store.engine.begin() as connection:
            connection.exec_driver_sql("DROP VIEW my_crashes")
            store._before_steps(connection)
            store._after_steps(connection)
            assert connection.exec_driver_sql(may).scalar_one()
    finally:
        with store.write() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")
        store.dispose()


def test_a_reader_reads_the_views_and_nothing_else(postgres_server: PostgresServer, postgres_url: str) -> None:
    owner = Store(postgres_url, auto_migrate=True)
    assert owner.store_id
    with owner.write() as connection:
        connection.exec_driver_sql(f"DROP ROLE IF EXISTS {READER}")
        connection.exec_driver_sql(f"CREATE ROLE {READER} LOGIN")
        connection.exec_driver_sql("DROP VIEW batchtrack_crash")
    owner.migrate()
    reader = sa.create_engine(sa.make_url(postgres_url).set(username=READER))
    try:
        with reader.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM batchtrack_crash").scalar_one() == 0
            with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
                connection.exec_driver_sql("SELECT signature FROM batchtrack_child")
    finally:
        reader.dispose()
        with owner.write() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {READER}")
            connection.exec_driver_sql(f"DROP ROLE {READER}")
        owner.dispose()
