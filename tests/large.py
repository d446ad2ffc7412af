"""A database with one large batch that runs and many small ones that ended, made by SQL on both databases.

Nine tenths of the large batch have settled. Of its children each 1000th failed and each 5000th crashed (in a small
database more often, so that there are some), 20 run, the others wait.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary.durations import bucket
from celery_batchtrack.vocabulary.ids import uuid7

RUNNING = 20
SMALL = 50  # children of a small batch
TASK = "shop.parse"
_COUNTED = ("completed", "failed", "crashed", "cancelled")


@dataclass(frozen=True, slots=True)
class _Words:
    """One database's words."""

    sqlite: bool

    @property
    def now(self) -> str:
        return "'now'" if self.sqlite else "statement_timestamp()"

    def after(self, start: str, seconds: str) -> str:
        """A moment so many seconds after `start`, a moment that is written out."""
        if self.sqlite:
            return f"strftime('%Y-%m-%d %H:%M:%f000', {start}, ({seconds}) || ' seconds')"
        return f"{start} + make_interval(secs => {seconds})"

    def ago(self, seconds: float) -> str:
        return self.after(self.now, f"-{seconds}")

    def id(self, value: uuid.UUID) -> str:
        return f"'{value}'" if self.sqlite else f"uuid '{value}'"

    @property
    def new_id(self) -> str:
        if not self.sqlite:
            return "gen_random_uuid()"
        return "lower(" + " || '-' || ".join(f"hex(randomblob({count}))" for count in (4, 2, 2, 2, 6)) + ")"

    def numbers(self, count: int) -> tuple[str, str]:
        """(WITH clause, FROM clause) that give `g.i` from 0."""
        if self.sqlite:
            more = f"SELECT i + 1 FROM g WHERE i < {count - 1}"
            return f"WITH RECURSIVE g(i) AS (SELECT 0 UNION ALL {more})", "g"
        return "", f"generate_series(0, {count - 1}) g(i)"

    def minute(self, moment: str) -> str:
        if self.sqlite:
            return f"strftime('%Y-%m-%d %H:%M:00.000000', {moment})"
        return f"date_trunc('minute', {moment})"

    def list_of(self, text: str) -> str:
        return f"{'json_array' if self.sqlite else 'jsonb_build_array'}({text})"


@dataclass(frozen=True, slots=True)
class Large:
    """What was seeded."""

    store: Store
    batch_id: uuid.UUID
    children: int

    @property
    def settled(self) -> int:
        return self.children * 9 // 10


def seeded(store: Store, children: int, batches: int) -> Large:
    """Fill an empty store with `batches` small batches and a large one of so many children."""
    seed = _Seed(store)
    for number in range(batches):
        status = "failed" if number % 10 == 0 else "completed"
        seed.batch(f"small {number}", SMALL, SMALL, status, 90_000.0 - 10 * (number % 8000))
    batch_id = seed.batch("reindex", children, children * 9 // 10, "running", 3700.0)
    with store.engine.connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql("ANALYZE")
        if not store.sqlite:
            connection.exec_driver_sql("VACUUM")
    return Large(store, batch_id, children)


class _Seed:
    def __init__(self, store: Store) -> None:
        self.store, self.words = store, _Words(store.sqlite)
        self.worker = uuid.uuid4()
        with self._writing() as execute:
            execute(
                "INSERT INTO batchtrack_worker (id, kind, name, hostname, pid, pool, lease, version, beat_at,"
                f" started_at) VALUES ({self.words.id(self.worker)}, 'worker', 'w1@web-1', 'web-1', 77, 'prefork',"
                f" 3600, '0', {self.words.ago(0)}, {self.words.ago(0)})"
            )

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        with self.store.write() as connection:
            yield lambda text: connection.exec_driver_sql(text if self.store.sqlite else text.replace("%", "%%"))

    def batch(self, name: str, total: int, done: int, status: str, ago: float) -> uuid.UUID:
        batch_id = uuid7()
        with self._writing() as execute:
            execute(self._batch(batch_id, name, total, status, ago))
            execute(self._children(batch_id, total, done, status, ago))
            execute(self._tally(batch_id))
            execute(self._outcomes(batch_id))
            execute(self._incidents(batch_id))
        return batch_id

    def _batch(self, batch_id: uuid.UUID, name: str, total: int, status: str, ago: float) -> str:
        start = self.words.ago(ago)
        end = "NULL" if status == "running" else self.words.ago(ago - 3600)
        return (
            "INSERT INTO batchtrack_batch (id, name, status, options, callbacks, start_now, watch_failure, tags,"
            " shards, next_position, created_at, sealed_at, started_at, finished_at)"
            f" VALUES ({self.words.id(batch_id)}, '{name}', '{status}', '{{}}', '{{}}', false, false, '[\"nightly\"]',"
            f" 16, {total}, {start}, {start}, {start}, {end})"
        )

    def _children(self, batch_id: uuid.UUID, total: int, done: int, status: str, ago: float) -> str:
        words, often = self.words, max(50, total // 1000)
        generate, numbers = words.numbers(total)
        settled, claimed = f"g.i < {done}", f"g.i < {min(total, done + RUNNING)}"
        fails = status != "completed"
        state = (
            f"CASE WHEN NOT {claimed} THEN 'pending' WHEN NOT {settled} THEN 'running'"
            f" WHEN {fails} AND g.i % {5 * often} = 7 THEN 'crashed' WHEN {fails} AND g.i % {often} = 3 THEN 'failed'"
            " ELSE 'completed' END"
        )
        start = f"-{ago} + g.i * 3600.0 / {total}"
        begun = words.after(words.now, start)
        ended = words.after(words.now, f"{start} + g.i % 1000 * 7919 % 1000 / 500.0")
        columns = {
            "batch_id": words.id(batch_id), "position": "g.i", "kind": "'child'", "shard": "g.i % 16",
            "task": f"'{TASK}'", "task_id": f"'{batch_id}-' || g.i", "status": state,
            "cause": (
                f"CASE WHEN {settled} AND {fails} AND g.i % {5 * often} = 7 THEN 'signal'"
                f" WHEN {settled} AND {fails} AND g.i % {often} = 3 THEN 'exception' END"
            ),
            "attempt": f"CASE WHEN {claimed} THEN 1 ELSE 0 END",
            "run_token": f"CASE WHEN {claimed} THEN {words.id(batch_id)} END",
            "items": words.list_of("'DOC:' || g.i"),
            "worker_id": f"CASE WHEN {claimed} THEN {words.id(self.worker)} END",
            "slot": f"CASE WHEN {claimed} THEN '{batch_id}' || g.i END",
            "dispatches": f"CASE WHEN {claimed} THEN 1 ELSE 0 END",
            "dispatched_at": f"CASE WHEN {claimed} THEN {words.ago(ago)} END", "created_at": words.ago(ago),
            "started_at": f"CASE WHEN {claimed} THEN {begun} END",
            "finished_at": f"CASE WHEN {settled} THEN {ended} END",
        }  # fmt: skip
        return (
            f"{generate} INSERT INTO batchtrack_child ({', '.join(columns)})"
            f" SELECT {', '.join(columns.values())} FROM {numbers}"
        )

    def _tally(self, batch_id: uuid.UUID) -> str:
        sums = [f"sum(CASE WHEN status = '{name}' THEN 1 ELSE 0 END)" for name in _COUNTED]
        names = [*_COUNTED, *(f"items_{name}" for name in _COUNTED)]
        done = "sum(CASE WHEN finished_at IS NULL THEN 0 ELSE 1 END)"
        return (
            f"INSERT INTO batchtrack_tally (batch_id, shard, {', '.join(names)}, total, items_total, weight_total,"
            f" weight_done) SELECT batch_id, shard, {', '.join([*sums, *sums])}, count(*), count(*), count(*), {done}"
            f" FROM batchtrack_child WHERE batch_id = {self.words.id(batch_id)} GROUP BY batch_id, shard"
        )

    def _outcomes(self, batch_id: uuid.UUID) -> str:
        minute = self.words.minute("finished_at")
        return (
            "INSERT INTO batchtrack_outcome (batch_id, shard, time, task, status, detail, bucket, children, items,"
            f" seconds, seconds_max) SELECT batch_id, shard, {minute}, task, status, '', {bucket(1.0)}, count(*),"
            f" count(*), count(*) * 1.0, 2.0 FROM batchtrack_child WHERE batch_id = {self.words.id(batch_id)}"
            f" AND finished_at IS NOT NULL GROUP BY batch_id, shard, {minute}, task, status"
        )

    def _incidents(self, batch_id: uuid.UUID) -> str:
        died = "status = 'crashed'"
        columns = {
            "id": self.words.new_id, "batch_id": "batch_id", "position": "position", "attempt": "1",
            "outcome": "status", "cause": "cause", "phase": "'running'",
            "signal": f"CASE WHEN {died} THEN 'SIGSEGV' END",
            "exception": f"CASE WHEN NOT {died} THEN 'ValueError' END",
            "message": "'bad document'", "python_frame": "'parse.py:3 in parse'",
            "fingerprint": f"CASE WHEN {died} THEN 'aaaa' ELSE 'bbbb' || (position % 50) END",
            "item": "'DOC:' || position", "hostname": "'web-1'", "worker": "'w1@web-1'",
            "worker_id": self.words.id(self.worker), "pid": "77", "detected_by": f"CASE WHEN {died} THEN 'main' END",
            "verdict": f"CASE WHEN {died} THEN 'observed' END", "died_at": "finished_at", "detected_at": "finished_at",
        }  # fmt: skip
        return (
            f"INSERT INTO batchtrack_incident ({', '.join(columns)}) SELECT {', '.join(columns.values())}"
            f" FROM batchtrack_child WHERE batch_id = {self.words.id(batch_id)} AND status IN ('failed', 'crashed')"
        )


def bytes_of(store: Store) -> dict[str, tuple[int, int]]:
    """Of each table its rows, and its bytes with indexes (PostgreSQL) or the whole file's (SQLite, under ``""``)."""
    tables = ("child", "tally", "outcome", "incident", "batch")
    found: dict[str, tuple[int, int]] = {}
    with store.engine.connect() as connection:
        for table in tables:
            name = f"batchtrack_{table}"
            rows = connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar_one()
            size = f"SELECT pg_total_relation_size('{name}')"
            found[name] = (rows, 0 if store.sqlite else connection.execute(sa.text(size)).scalar_one())
        if store.sqlite:
            pages, size_of = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("page_count", "page_size")
            )
            found[""] = (sum(rows for rows, _ in found.values()), pages * size_of)
    return found


__all__ = ["Large", "bytes_of", "seeded"]
