"""`make bench`: no-op children through a batch and through Celery's own chord, in one run.

Prints children per second from the call to the callback's result, and the statements that the tracking
database executed, by kind (pg_stat_statements is not needed: the store's own engine counts in one process,
and PostgreSQL's commit counter over all). Prints, never asserts: timings vary.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.nodes import ProcessWorker
from tests.servers import PostgresServer, RedisServer


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--children", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=2)
    asked = parser.parse_args()
    with PostgresServer() as postgres, RedisServer() as redis, tempfile.TemporaryDirectory() as folder:
        database = postgres.create_database()
        os.environ.update(BENCH_DATABASE=database, BENCH_BROKER=f"{redis.url}", BENCH_BACKEND=redis.url)
        from celery_batchtrack import BatchTrack
        from tests.bench_app import app

        BatchTrack.of(app).migrate()
        options = ("--concurrency", str(asked.concurrency), "--without-mingle", "--without-gossip")
        print(f"{asked.children} no-op children, prefork {asked.concurrency}, Redis + PostgreSQL")
        with ProcessWorker("tests.bench_app", *options, folder=Path(folder), env=dict(os.environ)):
            for number in range(1, asked.rounds + 1):
                print(f"round {number}")
                _round(asked.children, database)
        print(f"bytes per child row, indexes included: {_bytes_per_row(database):.0f}")


if __name__ == "__main__":
    main()
