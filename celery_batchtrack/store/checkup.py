"""The database about itself: version, clock, schema, connections, what is between it and us; for `doctor`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.checkup import Connections, DatabaseFacts, Tables
from celery_batchtrack.vocabulary.records import WorkerRow
from celery_batchtrack.vocabulary.states import BATCH_ALIVE, BatchStatus, Kind, Status

from . import migrate
from .clock import age, now
from .engine import Connected
from .rows import WORKER_COLUMNS, worker_row
from .schema import batch, child, meta, worker

#: Workers and beat prune once an hour.
_PRUNED_WITHIN = 2 * 3600.0


class CheckingUp(Connected):
    """Reads that change nothing: no tables are made, no file."""

    def check_up(self, retention: Mapping[str, float]) -> DatabaseFacts:
        """One look. `retention`: seconds by outcome. Raises DatabaseUnavailable."""
        wanted = migrate.newest()
        if self._has_no_file():
            empty = migrate.State.EMPTY
            known = ("SQLite", self.shown_url, empty.name, empty.value, None, wanted)
            return DatabaseFacts(*known, True, self._auto_migrate, 0.0)
        with self._raw_read() as connection:
            version = connection.dialect.server_version_info or ()
            ahead = _ahead(connection)
            state, revision = migrate.state(connection), migrate.revision(connection)
        name = "SQLite" if self.sqlite else "PostgreSQL"
        return DatabaseFacts(
            f"{name} {'.'.join(map(str, version))}".strip(), self.shown_url, state.name, state.value, revision, wanted,
            self.sqlite, self._auto_migrate, ahead, None if self.sqlite else self._connections(),
            self._tables(retention) if state is migrate.State.CURRENT else None,
        )  # fmt: skip

    def _has_no_file(self) -> bool:
        """To connect would make one."""
        name = self.url.database
        return self.sqlite and name not in (None, "", ":memory:") and not str(name).startswith("file:") and not (
            Path(str(name)).exists()
        )

    def _tables(self, retention: Mapping[str, float]) -> Tables:
        with self.read() as connection:
            swept = connection.execute(sa.select(meta.c.store_id, meta.c.swept_by, age(meta.c.swept_at))).one()
            alive = sa.select(*WORKER_COLUMNS).where(worker.c.stopped_at.is_(None), worker.c.lost_at.is_(None))
            workers: list[WorkerRow] = [worker_row(row) for row in connection.execute(alive)]
            is_open = batch.c.status.in_([each.value for each in BATCH_ALIVE])
            count = connection.execute(sa.select(sa.func.count()).where(is_open)).scalar_one()
            kept, oldest = connection.execute(_kept_too_long(retention)).one()
            waits = connection.execute(
                sa.select(sa.func.max(age(now(), child.c.not_before))).where(
                    child.c.status == Status.PENDING.value, child.c.not_before.is_not(None)
                )
            ).scalar_one()
            sent = {str(queue): int(number) for queue, number in connection.execute(sent_by_queue())}
        return Tables(str(swept[0]), workers, swept[1], swept[2], count, kept, oldest, max(0.0, waits or 0.0), sent)

    def _connections(self) -> Connections:
        with self._translated(), self.engine.connect() as connection:
            allowed, others = connection.execute(
                sa.text(
                    "SELECT current_setting('max_connections')::int"
                    " - current_setting('superuser_reserved_connections')::int,"
                    " (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL"
                    "  AND coalesce(backend_type, 'client backend') = 'client backend'"  # NULL: another role's
                    "  AND application_name <> 'celery-batchtrack')"
                )
            ).one()
            driver: Any = connection.connection.driver_connection
            prepares = getattr(driver, "prepare_threshold", None) is not None
        return Connections(int(allowed), int(others), self._pooler(), prepares)

    def _pooler(self) -> str | None:
        """A pooler such as PgBouncer answers a connection with a process id of its own making. Whether it hands a
        server connection to others between two transactions is seen by having two clients at once: they get the same
        one, or one gets different ones."""
        with self._translated(), self.engine.connect() as opened, self.engine.connect() as second:
            first = opened.execution_options(isolation_level="AUTOCOMMIT")
            told = getattr(getattr(first.connection.driver_connection, "info", None), "backend_pid", None)
            mine = _backend(first)
            if told is None or told == mine:
                return None
            theirs = _backend(second)  # and keeps it, for its transaction goes on
            again = _backend(first)
        return "transaction" if mine == theirs or mine != again else "pooler"


def _backend(connection: sa.Connection) -> int:
    return int(connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())


def _ahead(connection: sa.Connection) -> float:
    """Seconds by which this host's clock is ahead of the database's (negative: behind), less what the answer took."""
    before = time.time()
    theirs = connection.execute(sa.select(now())).scalar_one().timestamp()
    after = time.time()
    if theirs > after:
        return after - theirs
    return max(0.0, before - theirs)


def sent_by_queue() -> sa.Select[Any]:
    """(queue, how many): children and callbacks that were sent and have not begun.

    In the words of the indexes of such rows; and counted by batch first, for a million of them are not to be joined.
    """
    by = (child.c.queue, child.c.batch_id, child.c.kind, child.c.round)
    sent = (
        sa.select(*by, sa.func.count().label("number"))
        .where(
            child.c.status == sa.literal_column(f"'{Status.PENDING.value}'"), child.c.dispatched_at.is_not(None),
            child.c.waits_on_batch.is_(None), child.c.queue.is_not(None),
        )
        .group_by(*by)
        .subquery()
    )  # fmt: skip
    alive = batch.c.status.in_([each.value for each in BATCH_ALIVE])
    awaited = sa.or_(alive, sa.and_(sent.c.kind != Kind.CHILD.value, sent.c.round == batch.c.round))
    query = sa.select(sent.c.queue, sa.func.sum(sent.c.number)).join_from(sent, batch, batch.c.id == sent.c.batch_id)
    return query.where(awaited).group_by(sent.c.queue)


def _kept_too_long(retention: Mapping[str, float]) -> sa.Select[Any]:
    """How many batches ended longer ago than their retention is, and when the oldest did."""
    seconds = sa.case(
        (batch.c.status == BatchStatus.COMPLETED.value, float(retention["completed"])),
        else_=float(retention["other"]),
    )
    ended = age(batch.c.finished_at)
    columns: tuple[Any, ...] = (sa.func.count(), sa.func.max(ended))
    over = ended > seconds + _PRUNED_WITHIN
    return sa.select(*columns).where(batch.c.finished_at.is_not(None), batch.c.parent_batch.is_(None), over)
