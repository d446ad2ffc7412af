"""`make bench`: what it costs, in one run: an item of `each_item`, a child's decorator, no-op children through a batch
and through Celery's own chord.

Then, on each database, how long pages and views take beside a batch of a million children (`--rows`).

Prints nanoseconds per item, microseconds per call in Celery's own tracer, children per second from the call to the
callback's result, and the statements that the tracking database executed, by kind (pg_stat_statements is not needed:
the store's own engine counts in one process, and PostgreSQL's commit counter over all). Prints, never asserts:
timings vary.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from tests.nodes import ProcessWorker
from tests.servers import BrokerWatch, PostgresServer, RedisServer, resident


def _timed(label: str, children: int, start: Callable[[], Any]) -> float:
    began = time.perf_counter()
    result = start()
    called = time.perf_counter() - began
    assert result.get(timeout=600) == children
    seconds = time.perf_counter() - began
    print(f"  {label:<34} {children / seconds:8.0f} children/s   ({seconds:.2f} s, call {called:.2f} s)")
    return seconds


def _transactions(url: str) -> int:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT pg_stat_clear_snapshot()"))
        query = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        value = connection.execute(sa.text(query)).scalar_one()
    engine.dispose()
    return int(value)


def _bytes_per_row(url: str) -> float:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        query = (
            "SELECT pg_total_relation_size('batchtrack_child')::float8 / greatest(1, count(*)) FROM batchtrack_child"
        )
        value = float(connection.execute(sa.text(query)).scalar_one())
    engine.dispose()
    return value


def _per_item(items: int) -> None:
    """A loop over `each_item` in a child, less the same loop without it."""
    from celery_batchtrack import each_item, note
    from celery_batchtrack.behaviour.blackbox import Page
    from celery_batchtrack.glue import tracked_task
    from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
    from tests import bench_app

    docs = [{"db": "PMC", "id": f"PMC:{at}"} for at in range(items)]
    bare = _best(lambda: _walk(docs))
    with tempfile.TemporaryDirectory() as folder:
        page = Page(Path(folder) / "bench.box")
        page.enter(ChildKey(uuid7(), 0), new_token())
        for label, task in (
            ("item_id='id'", bench_app.by_key), ("item_id=('db', 'id')", bench_app.by_keys),
            ("no item_id", bench_app.by_index),
        ):  # fmt: skip
            run = SimpleNamespace(page=page)
            current = tracked_task.CurrentRun(run, task, bench_app.POLICY, (docs,), {})  # type: ignore[arg-type]
            tracked_task._local.runs = [current]
            ours = _best(lambda: _walk(each_item(docs)))
            print(f"  each_item, {label:<23} {(ours - bare) / items * 1e9:8.0f} ns an item")
        noted = _best(lambda: [note("tokenise") for _ in docs])
        print(f"  note                               {noted / items * 1e9:8.0f} ns")
        tracked_task._local.runs = []
        page.close()


def _walk(docs: Iterable[object]) -> None:
    for _ in docs:
        pass


def _best(act: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the quickest of some rounds: what disturbs only ever adds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return min(times)


def _per_call(children: int) -> None:
    """One call in Celery's tracer, as a pool process makes it, without a broker."""
    from celery import Celery
    from celery.app.trace import build_tracer

    from celery_batchtrack.glue.rows import new_child
    from celery_batchtrack.vocabulary.ids import HEADER, ChildKey, Ticket, uuid7
    from celery_batchtrack.vocabulary.records import NewBatch
    from tests import bench_app

    plain = Celery("plain", set_as_current=False, broker="memory://")

    def undecorated(number: int) -> int:
        return number

    bare = plain.task(undecorated, name="undecorated", ignore_result=True, shared=False)
    plain.finalize()

    def timed(task: Any, headers: Sequence[dict[str, Any]]) -> float:
        tracer = build_tracer(task.name, task, app=task.app)
        began = time.perf_counter()
        for at, header in enumerate(headers):
            tracer(str(at), (at,), {}, request={"ignore_result": True, **header})
        return (time.perf_counter() - began) / len(headers) * 1e6

    without = timed(bare, [{}] * children)
    outside = timed(bench_app.nothing, [{}] * children)
    tracker = bench_app.app.batchtrack.tracker
    batch_id = uuid7()
    signatures = [new_child(bench_app.app, bench_app.nothing.s(at), "a child") for at in range(children)]
    # Sealed without being sent: the messages are made here.
    tracker.store.create(NewBatch(batch_id, "bench", "{}", {}), signatures, seal=True)
    tickets = [Ticket(tracker.store_id, ChildKey(batch_id, at), 0).as_header() for at in range(children)]
    inside = timed(bench_app.nothing, [{HEADER: ticket} for ticket in tickets])
    bench_app.app.batchtrack.reset()
    print(f"  undecorated task, no BatchTrack    {without:8.1f} us a call")
    print(f"  tracked task outside a batch       {outside:8.1f} us a call")
    print(f"  child of a batch                   {inside:8.1f} us a call   (claim and settle on PostgreSQL included)")


def _round(children: int, database: str) -> None:
    from celery.canvas import chord as celery_chord

    from celery_batchtrack import chord
    from tests.bench_app import count, nothing

    header = [nothing.s(number) for number in range(children)]
    before = _transactions(database)
    ours = _timed("celery-batchtrack", children, lambda: chord(list(header))(count.s()))
    after = _transactions(database)
    theirs = _timed("Celery's chord, Redis results", children, lambda: celery_chord(list(header))(count.s()))
    print(f"  ratio (Celery's time / ours)       {theirs / ours:8.2f}")
    print(f"  transactions per child             {(after - before) / children:8.2f}   (claim + settle = 2)")


def _windows(children: int, broker: str) -> None:
    """The same batch sent at once and through a window: how fast, how much the broker holds at most, and by how much
    the parent grows."""
    from celery_batchtrack import Batch
    from tests.bench_app import app, nothing

    for window in (None, max(1, children // 10), None, max(1, children // 10)):  # interleaved: timings drift
        before, began = resident(), time.perf_counter()
        with BrokerWatch(broker) as watch:
            with Batch("windows", app=app, max_in_flight=window, results="none") as batch:
                batch.add_many(nothing.s(number) for number in range(children))
            grown = resident() - before
            assert batch.wait(timeout=3600) == "completed"
        label = "sent at once" if window is None else f"max_in_flight={window}"
        print(
            f"  {label:<34} {children / (time.perf_counter() - began):8.0f} children/s   (the broker held "
            f"{watch.most}, the parent grew by {grown} kB)"
        )


def _views(url: str, children: int) -> None:
    """How long each page and each view takes, beside a batch of so many children and 2,000 small ones."""
    from celery_batchtrack.store import Store
    from celery_batchtrack.store.views import VIEWS
    from celery_batchtrack.surfaces import reading
    from celery_batchtrack.vocabulary.settings import Settings
    from tests.large import bytes_of, seeded

    store = Store(url)
    store.migrate()
    began = time.perf_counter()
    large = seeded(store, children, min(2000, children // 500))
    print(f"{store.url.get_backend_name()}: {children} children, seeded in {time.perf_counter() - began:.0f} s")
    big = large.batch_id
    asked: dict[str, Callable[[], object]] = {
        **{f"list, {chip}": lambda chip=chip: reading.batch_list(store, chip=chip) for chip in reading.CHIPS},
        **{
            f"list, search {text!r}": lambda text=text: reading.batch_list(store, chip="all", search=text)
            for text in ("reindex", "nightly", "DOC:77", "nothing")
        },
        "batch": lambda: reading.batch_page(store, big),
        "children": lambda: reading.child_list(store, big),
        "children, far behind": lambda: reading.child_list(store, big, after=children * 8 // 10),
        **{
            f"children, {status}": lambda status=status: reading.child_list(store, big, status=status)
            for status in ("pending", "running", "completed", "failed", "crashed", "cancelled")
        },
        "children, by item": lambda: reading.child_list(store, big, item="DOC:30"),
        "children, by worker": lambda: reading.child_list(store, big, worker="web-1"),
        "children, by fingerprint": lambda: reading.child_list(store, big, fingerprint="aaaa"),
        "child": lambda: reading.child_page(store, big, 7),
        "crashes": lambda: reading.crashes(store),
        "workers": lambda: reading.workers(store),
        "health": lambda: reading.health(store, Settings()),
        "counters": store.outcome_totals,
    }  # fmt: skip
    for label, act in asked.items():
        print(f"  page {label:<36} {_best(act, 3) * 1000:9.1f} ms")
    for name, view in VIEWS.items():
        if name == "invariant":
            continue
        whole = _best(lambda name=name: store.view(name, limit=100), 3) * 1000  # type: ignore[misc]
        own = ""
        if "batch_id" in view.columns:
            milliseconds = _best(lambda name=name: store.view(name, {"batch_id": big}, limit=100), 3) * 1000  # type: ignore[misc]
            own = f"   of the large batch {milliseconds:9.1f} ms"
        print(f"  view {name:<20} 100 rows {whole:9.1f} ms{own}")
    print(f"  view invariant (reads everything)       {_best(lambda: store.view('invariant'), 1):9.1f} s")
    for table, (rows, size) in bytes_of(store).items():
        if size:
            print(f"  bytes per row of {table or 'the file, all tables':<24} {size / rows:8.0f}   ({rows} rows)")
    store.dispose()


def _overhead(asked: argparse.Namespace) -> None:
    with PostgresServer() as postgres, RedisServer() as redis, tempfile.TemporaryDirectory() as folder:
        database = postgres.create_database()
        os.environ.update(BENCH_DATABASE=database, BENCH_BROKER=f"{redis.url}", BENCH_BACKEND=redis.url)
        from celery_batchtrack import BatchTrack
        from tests.bench_app import app

        BatchTrack.of(app).migrate()
        options = ("--concurrency", str(asked.concurrency), "--without-mingle", "--without-gossip")
        print("black box: a loop over items, less the same loop without each_item")
        _per_item(100_000)
        print("in the process of the child")
        _per_call(min(2000, asked.children))
        print(f"{asked.children} no-op children, prefork {asked.concurrency}, Redis + PostgreSQL")
        with ProcessWorker("tests.bench_app", *options, folder=Path(folder), env=dict(os.environ)):
            for number in range(1, asked.rounds + 1):
                print(f"round {number}")
                _round(asked.children, database)
            print("windows")
            _windows(asked.children, redis.url)
        print(f"bytes per child row, indexes included: {_bytes_per_row(database):.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["views"], help="this section alone")
    parser.add_argument("--rows", type=int, default=1_000_000, help="children in the section `views`")
    parser.add_argument("--children", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=2)
    asked = parser.parse_args()
    if asked.only != "views":
        _overhead(asked)
    print("pages and views")
    with PostgresServer() as postgres, tempfile.TemporaryDirectory() as folder:
        for url in (postgres.create_database(), f"sqlite:///{folder}/batchtrack.db"):
            _views(url, asked.rows)


if __name__ == "__main__":
    main()
