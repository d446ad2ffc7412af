"""The SQL views: public API, made by every migration, and read by name.

Columns are only ever added, at the end. What they are fast by: progress sums a batch's 16 tally rows; outcomes and
durations read counts that are kept as children end; crashes and failures are the unhappy few; the slowest children
of a batch stand in an index. Only `invariant` reads everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from celery_batchtrack import errors

from . import migrate, verify, view_texts
from .clock import Identifier, Moment, later
from .engine import Connected
from .schema import Json
from .view_texts import View, Words

#: The role that `migrate` lets read the views, where there is one of this name.
READER = "batchtrack_reader"
#: Seconds that a dead worker's rows may stay as they are for `invariant`. A view knows no settings; `verify` reckons
#: with those of the application, which is 160 by default.
GRACE = 130.0

_INCIDENT = (
    "incident_id", "batch_id", "batch_name", "position", "task", "task_id", "item", "items", "signal", "exit_code",
    "cause", "python_frame", "stack", "message", "note", "attempt", "outcome", "worker", "worker_id", "hostname",
    "pid", "queue", "died_at", "detected_at", "detected_by", "detection_seconds", "verdict", "fingerprint",
    "peak_memory",
)  # fmt: skip


def _invariant(words: Words) -> str:
    module: Any = sqlite if words.sqlite else postgresql
    dialect = module.dialect()
    parts = []
    for name, query in verify.CHECKS.items():
        offenders = query(GRACE).compile(dialect=dialect, compile_kwargs={"literal_binds": True})
        text = "\n".join(f"    {line}" for line in str(offenders).replace("%%", "%").splitlines())
        kind = "liveness" if name in verify.LIVENESS else "structural"
        parts.append(
            f"SELECT '{name}' AS check_name, '{kind}' AS kind, count(*) AS violations FROM (\n{text}\n  ) AS x"
        )  # fmt: skip
    return "\nUNION ALL ".join(parts)


def _view(name: str, summary: str, columns: str | Sequence[str], text: Any) -> View:
    return View(name, summary, tuple(columns.split() if isinstance(columns, str) else columns), text)


_ALL = (
    _view(
        "batch_progress", "how far each batch is",
        "batch_id name status reason round tags total done pending running completed failed crashed cancelled"
        " done_percent items_total items_done items_completed items_failed items_crashed items_cancelled"
        " items_per_second eta_seconds seconds created_at sealed_at started_at finished_at deadline_at paused_at"
        " pause_reason parent_batch parent_position parent_task parent_task_id description metadata priority",
        view_texts.batch_progress,
    ),
    _view("crash", "every death: which item, signal, Python line, host", _INCIDENT, view_texts.crash),
    _view(
        "failure", "every attempt that failed or died", (*_INCIDENT, "exception", "traceback", "is_crash"),
        view_texts.failure,
    ),
    _view(
        "failure_signature", "failures by root cause, across batches",
        "fingerprint task cause signal exception python_frame message occurrences crashes items batches hosts first_at"
        " last_at last_batch_id last_position last_item exit_code",
        view_texts.failure_signature,
    ),
    _view(
        "outcome_per_minute", "what ended in each minute, by batch and task",
        "time batch_id task completed failed crashed cancelled items seconds_total", view_texts.outcome_per_minute,
    ),
    _view(
        "outcome_per_hour", "what ended in each hour, by task; pruned batches included",
        "time task completed failed crashed cancelled crash_percent items seconds_avg", view_texts.outcome_per_hour,
    ),
    _view(
        "task_duration", "how long children ran, by task and status; percentiles to the next class of duration",
        "task status children seconds_total seconds_avg seconds_max p50_seconds p95_seconds p99_seconds",
        view_texts.task_duration,
    ),
    _view(
        "batch_child", "every child and callback, without arguments and results",
        "batch_id batch_name position kind ordinal round task task_id status cause verdict attempt crashes retries"
        " dispatches link waits_on_batch split_from origin isolated items item_count weight queue worker_id worker"
        " hostname created_at dispatched_at not_before expires_at started_at finished_at seconds",
        view_texts.batch_child,
    ),
    _view(
        "slowest", f"the {view_texts.SLOWEST} slowest children of each batch",
        "batch_id batch_name rank position task task_id status items seconds started_at finished_at worker_id worker"
        " hostname",
        view_texts.slowest,
    ),
    _view(
        "running", "what runs now, since when, on whom",
        "batch_id batch_name position kind task task_id items attempt started_at running_seconds worker_id worker"
        " hostname pid slot beat_at beat_age_seconds worker_state process_pid",
        view_texts.running,
    ),
    _view(
        "worker_liveness", "workers and clients: who lives, who was lost",
        "worker_id kind name hostname pid pool version state beat_at beat_age_seconds lease started_at uptime_seconds"
        " running crashes_24h stopped_at lost_at lost_by",
        view_texts.worker_liveness,
    ),
    _view(
        "stuck_batch", "batches that do not go on, and why",
        "batch_id name status reason detail since stuck_seconds open running", view_texts.stuck_batch,
    ),
    _view(
        "invariant", "whether the bookkeeping is consistent; reads everything", "check_name kind violations", _invariant
    ),
)  # fmt: skip
#: By name, without the prefix ``batchtrack_``.
VIEWS: Mapping[str, View] = MappingProxyType({each.name: each for each in _ALL})

#: What SQLite gives back as text.
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("batch_id", "incident_id", "worker_id", "parent_batch", "last_batch_id"), Identifier),
    "waits_on_batch": Identifier, **dict.fromkeys(("time", "since", "not_before"), Moment),
    **dict.fromkeys(("items", "tags", "metadata"), Json),
    **dict.fromkeys(("is_crash", "isolated"), sa.Boolean),
}  # fmt: skip


def _type_of(view: View, column: str) -> Any:
    if column == "items" and view.name in ("outcome_per_minute", "outcome_per_hour", "failure_signature"):
        return sa.BigInteger  # how many
    return Moment if column.endswith("_at") else _TYPES.get(column)


def table_of(view: View) -> sa.TableClause:
    return sa.table(view.relation, *(sa.column(each, _type_of(view, each)) for each in view.columns))


def named(name: str) -> View:
    """Raises InvalidOption."""
    found = VIEWS.get(name.removeprefix("batchtrack_"))
    if found is None:
        raise errors.InvalidOption(f"no view {name!r}: there are {', '.join(VIEWS)}")
    return found


def _readers(connection: sa.Connection) -> dict[str, list[str]]:
    """Who was granted SELECT on our views: relation → roles, quoted."""
    query = sa.text(
        "SELECT table_name, CASE grantee WHEN 'PUBLIC' THEN 'PUBLIC' ELSE quote_ident(grantee) END"
        " FROM information_schema.role_table_grants WHERE privilege_type = 'SELECT' AND grantee <> grantor"
        " AND table_schema = current_schema() AND table_name = ANY (:names)"
    )
    found: dict[str, list[str]] = {}
    for name, role in connection.execute(query, {"names": [view.relation for view in _ALL]}):
        found.setdefault(name, []).append(role)
    return found


class Viewing(Connected):
    """Makes the views, and reads them."""

    _readers: Mapping[str, Sequence[str]] = MappingProxyType({})

    def _before_steps(self, connection: sa.Connection) -> None:
        """Steps may change what the views read. Who may read them is kept in mind."""
        super()._before_steps(connection)
        self._readers = {} if self.sqlite else _readers(connection)
        self._drop(connection)

    def _after_steps(self, connection: sa.Connection) -> None:
        super()._after_steps(connection)
        if not migrate.reaches(connection):
            return
        changed = [view for view in _ALL if not self._is_made(connection, view)]
        if changed and self.sqlite:
            self._drop(connection)
            changed = list(_ALL)
        for view in changed:
            self._make(connection, view)

    def _drop(self, connection: sa.Connection) -> None:
        try:
            for view in reversed(_ALL):
                connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view.relation}")
        except sa.exc.DBAPIError as error:
            told = " ".join(str(error.orig).split())
            advice = "drop what you built upon our views, migrate, and make it anew"
            raise errors.SchemaError(f"tracking database {self.shown_url}: {told} ({advice})") from error

    def _is_made(self, connection: sa.Connection, view: View) -> bool:
        text, mark = self._definition(view)
        query, parameters = _made(view, sqlite=self.sqlite)
        return bool(connection.execute(query, parameters).scalar_one_or_none() == (text if self.sqlite else mark))

    def _definition(self, view: View) -> tuple[str, str]:
        """The statement, and a mark by which it is known."""
        text = f"CREATE VIEW {view.relation} AS\n{self.view_query(view.name)}"
        return text, f"{view.summary} [{hashlib.sha256(text.encode()).hexdigest()[:12]}]"

    def _make(self, connection: sa.Connection, view: View) -> None:
        text, mark = self._definition(view)
        if self.sqlite:
            connection.exec_driver_sql(text)
            return
        # Replaced, it keeps its grants and what is built upon it. psycopg looks for parameters.
        connection.exec_driver_sql(text.replace("CREATE VIEW", "CREATE OR REPLACE VIEW", 1).replace("%", "%%"))
        connection.exec_driver_sql(f"COMMENT ON VIEW {view.relation} IS '{mark}'")
        reader = connection.execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :name"), {"name": READER})
        readers = {*self._readers.get(view.relation, ()), *((READER,) if reader.one_or_none() is not None else ())}
        for role in sorted(readers):
            connection.exec_driver_sql(f"GRANT SELECT ON {view.relation} TO {role}")

    def view_query(self, name: str) -> str:
        """A view's SELECT, for this database. Raises InvalidOption."""
        return named(name).text(Words(self.sqlite))

    def view(
        self, name: str, where: Mapping[str, Any] = MappingProxyType({}), *, since: tuple[str, float] | None = None,
        order_by: Sequence[str] = (), limit: int | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Rows of a view, as mappings by column.

        Arguments:
            where: columns and what they are equal to, or lists of what they may be.
            since: a column of moments, and of how many seconds ago at most.
            order_by: columns; descending with ``-`` before them.

        Raises InvalidOption for a view or a column that is not there.
        """
        found = named(name)
        table = table_of(found)

        def column(each: str) -> Any:
            if each not in found.columns:
                raise errors.InvalidOption(f"{found.relation} has no column {each!r}: {', '.join(found.columns)}")
            return table.c[each]

        query = sa.select(table)
        for each, value in where.items():
            if isinstance(value, (list, tuple)):
                query = query.where(column(each).in_(value))
            else:
                query = query.where(column(each) == value if value is not None else column(each).is_(None))
        if since is not None:
            query = query.where(column(since[0]) >= later(-since[1]))
        for each in order_by:
            query = query.order_by(_descending(column(each[1:])) if each[0] == "-" else column(each))
        with self.read() as connection:
            return [dict(row) for row in connection.execute(query.limit(limit)).mappings()]


#: Never NULL in any view: without NULLS LAST, an index on them is read from its end.
_NEVER_NULL = ("created_at", "detected_at", "last_at", "position", "rank", "time")


def _descending(column: sa.ColumnClause[Any]) -> sa.UnaryExpression[Any]:
    return column.desc() if column.name in _NEVER_NULL else column.desc().nulls_last()


def _made(view: View, *, sqlite: bool) -> tuple[sa.TextClause, dict[str, str]]:
    """What tells how a view was made."""
    if sqlite:
        query = "SELECT sql FROM sqlite_master WHERE type = 'view' AND name = :name"
    else:
        query = "SELECT obj_description(to_regclass(:name), 'pg_class')"
    return sa.text(query), {"name": view.relation}


__all__ = ["READER", "VIEWS", "View", "Viewing"]
