"""Pages read by an index, a page at a time: no query of theirs goes through a whole table, or all of a large batch.

Each is asked of the database that runs it. PostgreSQL says how many rows every node of the plan really read; SQLite,
whose plans do not depend on statistics, which tables it would scan, and how many steps of its machine the query took.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_batchtrack.store import Store, browsing, checkup
from tests.large import Large, seeded
from tests.servers import PostgresServer
from tests.store.kit import statements

CHILDREN, SMALL_BATCHES, LOOKED_THROUGH = 8_000, 60, 400
#: Rows of one table that one query may read: an eighth of the batch. The sample of durations has 1,000.
FEW = 1_100
#: Steps of SQLite's machine. To read 8,000 rows takes at least 5 for each.
STEPS = 35_000
#: Of counts by the minute: they grow with the time that a batch takes, not with its children.
LARGER = {"throughput": (2_000, 50_000), "signatures": (FEW, 60_000)}

SCANNED = re.compile(r"SCAN (batchtrack_(batch|child|tally|incident|outcome)|[bctio])$")

Ask = Callable[[Large], object]


def _view(name: str, order_by: tuple[str, ...] = (), column: str = "batch_id", **more: Any) -> Ask:
    return lambda large: large.store.view(name, {column: large.batch_id}, order_by=order_by, limit=100, **more)


def _throughput(large: Large) -> object:
    start = large.store.batches([large.batch_id])[large.batch_id].created_at
    return large.store.throughput(large.batch_id, start, 60.0, by_minute=True)


def _children(**how: Any) -> Ask:
    return lambda large: large.store.browse_children(large.batch_id, **how)


def _batches(**how: Any) -> Ask:
    return lambda large: large.store.browse_batches(**how)


def _sent_by_queue(large: Large) -> object:
    with large.store.read() as connection:
        return connection.execute(checkup.sent_by_queue()).all()


_STATES = ("pending", "running", "completed", "failed", "crashed", "cancelled", "split")
CASES: dict[str, Ask] = {
    **{f"batches: {chip}": _batches(chip=chip) for chip in ("attention", "running", "crashed", "failed")},
    **{f"batches: {chip}": _batches(chip=chip) for chip in ("completed", "all")},
    **{f"batches with {text!r}": _batches(search=text) for text in ("reindex", "nightly", "DOC:77", "nothing")},
    "batches by a task id": lambda large: large.store.browse_batches(search=f"{large.batch_id}-77"),
    "batches by an id": lambda large: large.store.browse_batches(search=str(large.batch_id)[:13]),
    "children": _children(),
    "children, far behind": _children(after=6_000),
    **{f"children {status}": _children(status=status) for status in _STATES},
    "children pending, far behind": _children(status="pending", after=7_900),
    "children by item": _children(item="DOC:30"),
    "children by worker": _children(worker_name="web-1"),
    "children by fingerprint": _children(fingerprint="aaaa"),
    "progress": lambda large: large.store.progress(large.batch_id),
    "throughput": _throughput,
    "durations": lambda large: large.store.durations(large.batch_id, large.settled),
    "signatures": lambda large: large.store.signatures(large.batch_id),
    "deaths": lambda large: large.store.deaths_of(large.batch_id),
    "incidents of a page": lambda large: large.store.newest_incidents(large.batch_id, list(range(50))),
    "facts": lambda large: large.store.facts(),
    "sent, by queue": _sent_by_queue,
    "slowest": _view("slowest", ("rank",)),
    "running": _view("running", ("started_at",)),
    "batch_progress": _view("batch_progress"),
    "stuck_batch": _view("stuck_batch"),
    "stuck_batch of all": lambda large: large.store.view("stuck_batch"),
    "running of all": lambda large: large.store.view("running"),
    "worker_liveness": lambda large: large.store.view("worker_liveness"),
    "failures, newest first": lambda large: large.store.view("failure", order_by=("-detected_at",), limit=20),
    "failures alike": lambda large: large.store.view(
        "failure", {"fingerprint": "aaaa"}, order_by=("-detected_at",), limit=20
    ),
    "last deaths": lambda large: large.store.last_deaths(["DOC:7", "DOC:5007"], since=604_800.0),
    "children as a view": _view("batch_child", ("position",)),
    "crash in a minute": lambda large: large.store.view("crash", since=("detected_at", 60.0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('plans') / 'batchtrack.db'}", auto_migrate=True)
    yield seeded(store, CHILDREN, SMALL_BATCHES)
    store.dispose()


@pytest.fixture(scope="module")
def on_postgresql(postgres_server: PostgresServer) -> Iterator[Large]:
    url = postgres_server.create_database(migrated=True)
    store = Store(url)
    yield seeded(store, CHILDREN, SMALL_BATCHES)
    store.dispose()
    postgres_server.drop_database(url)


@pytest.fixture(autouse=True)
def looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no index knows is looked for in so many rows: fewer than there are."""
    monkeypatch.setattr(browsing, "SEARCHED", LOOKED_THROUGH)


def _sent(large: Large, ask: Ask) -> list[tuple[str, Any]]:
    parameters: list[Any] = []
    with statements(large.store.engine, parameters) as sent:
        ask(large)
    return [each for each in zip(sent, parameters, strict=True) if each[0].lstrip().startswith(("SELECT", "WITH"))]


@pytest.mark.parametrize("case", CASES)
def test_postgresql_reads_few_rows(on_postgresql: Large, case: str) -> None:
    asked = _sent(on_postgresql, CASES[case])
    assert asked
    with on_postgresql.store.engine.connect() as connection:
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # so small a table it would rather read whole
        for statement, values in asked:
            plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", values).scalar_one()
            plan = json.loads(plan) if isinstance(plan, str) else plan
            for relation, rows in _read(plan[0]["Plan"]):
                assert rows <= LARGER.get(case, (FEW,))[0], (relation, rows, statement)


def _read(node: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(relation, rows that were looked at) of each node that reads one."""
    if "Relation Name" in node:
        removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        yield node["Relation Name"], round((node["Actual Rows"] + removed) * node["Actual Loops"])
    for each in node.get("Plans", ()):
        yield from _read(each)


@pytest.mark.parametrize("case", CASES)
def test_sqlite_scans_no_table_that_grows(on_sqlite: Large, case: str) -> None:
    asked = _sent(on_sqlite, CASES[case])
    assert asked
    with on_sqlite.store.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        for statement, values in asked:
            plan = driver.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
            for *_, detail in plan:
                assert not SCANNED.match(detail), (detail, statement)
            steps = _steps(driver, statement, values)
            assert steps < LARGER.get(case, (0, STEPS))[1], (steps, plan, statement)


def _steps(driver: sqlite3.Connection, statement: str, values: Any) -> int:
    taken = 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    driver.set_progress_handler(count, 100)
    try:
        driver.execute(statement, values).fetchall()
    finally:
        driver.set_progress_handler(None, 0)
    return taken * 100


def test_children_alike_and_in_some_state_are_all_found_page_by_page(on_sqlite: Large) -> None:
    store, batch_id = on_sqlite.store, on_sqlite.batch_id
    wanted = [each.position for each in store.children(batch_id) if each.status == "crashed"]
    found: list[int] = []
    after: int | None = -1
    while after is not None:
        page = store.browse_children(batch_id, status="crashed", fingerprint="aaaa", after=after, limit=5)
        found += [each.position for each in page.rows]
        after = page.next
    assert found == wanted
    assert store.browse_children(batch_id, status="failed", fingerprint="aaaa", limit=5).searched_to is not None
