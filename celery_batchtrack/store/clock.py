"""The database's clock in SQL: no Python clock is ever compared with a time stamp.

Dialects differ here, in `settle` (`children`) and in bulk inserts, and nowhere else.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

_SQLITE_FORMAT = "'%Y-%m-%d %H:%M:%f000'"  # %f is SS.SSS: six digits, as SQLAlchemy writes them


class _SqliteMoment(sqlite.DATETIME):
    """As SQLAlchemy reads it, or as a connection of somebody else gives it, which may parse it by itself."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        parse: Any = super().result_processor(dialect, coltype)
        return lambda value: value if isinstance(value, datetime) else parse(value)


class Moment(sa.TypeDecorator[datetime]):
    """An aware UTC datetime on every database (``timestamptz``; ISO text on SQLite)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        kind: Any = _SqliteMoment
        return dialect.type_descriptor(kind() if dialect.name == "sqlite" else sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class now(FunctionElement[datetime]):
    """The database's present moment: the start of the statement, not of its transaction."""

    type = Moment()
    inherit_cache = True


class later(FunctionElement[datetime]):
    """`later(seconds)`: that many seconds from now (negative: ago)."""

    type = Moment()
    inherit_cache = True


class age(FunctionElement[float]):
    """`age(column)`: seconds from the column's moment until now; `age(a, b)`: from a until b."""

    type = sa.Float()
    inherit_cache = True


class this_minute(FunctionElement[datetime]):
    """The database's present minute."""

    type = Moment()
    inherit_cache = True


class bare(FunctionElement[Any]):
    """`bare(column)`: its value without its affinity. SQLite would compare a column with an expression by the column's
    affinity, and then no index over the expression will do."""

    inherit_cache = True


@compiles(bare, "postgresql")
def _bare_pg(element: Any, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(element.clauses, **kw))


@compiles(bare, "sqlite")
def _bare_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"+{compiler.process(element.clauses, **kw)}"


class first_item(FunctionElement[str]):
    """`first_item(child.c.items)`: the first of the identifiers, as text."""

    type = sa.Text()
    inherit_cache = True


@compiles(this_minute, "postgresql")
def _this_minute_pg(element: Any, compiler: Any, **kw: Any) -> str:
    return "date_trunc('minute', statement_timestamp())"


@compiles(this_minute, "sqlite")
def _this_minute_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:00.000000', 'now')"


@compiles(first_item, "postgresql")
def _first_item_pg(element: Any, compiler: Any, **kw: Any) -> str:
    return f"({compiler.process(element.clauses, **kw)} ->> 0)"


@compiles(first_item, "sqlite")
def _first_item_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_extract({compiler.process(element.clauses, **kw)}, '$[0]')"


@compiles(now, "postgresql")
def _now_pg(element: Any, compiler: Any, **kw: Any) -> str:
    return "statement_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"strftime({_SQLITE_FORMAT}, 'now')"


@compiles(later, "postgresql")
def _later_pg(element: Any, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"(statement_timestamp() + make_interval(secs => CAST({seconds} AS double precision)))"


@compiles(later, "sqlite")
def _later_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime({_SQLITE_FORMAT}, 'now', CAST({seconds} AS TEXT) || ' seconds')"


class fresh_id(FunctionElement[str]):
    """A random UUID's 36 characters, another one for each row."""

    type = sa.String(36)
    inherit_cache = True


@compiles(fresh_id, "postgresql")
def _fresh_id_pg(element: Any, compiler: Any, **kw: Any) -> str:
    return "CAST(gen_random_uuid() AS text)"


@compiles(fresh_id, "sqlite")
def _fresh_id_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    parts = (f"lower(hex(randomblob({count})))" for count in (4, 2, 2, 2, 6))
    return "(" + " || '-' || ".join(parts) + ")"


def _age_ends(element: Any, compiler: Any, **kw: Any) -> tuple[str, str]:
    clauses = list(element.clauses)
    until = clauses[1] if len(clauses) > 1 else now()
    return compiler.process(clauses[0], **kw), compiler.process(until, **kw)


@compiles(age, "postgresql")
def _age_pg(element: Any, compiler: Any, **kw: Any) -> str:
    since, until = _age_ends(element, compiler, **kw)
    return f"CAST(extract(epoch FROM {until} - {since}) AS double precision)"


@compiles(age, "sqlite")
def _age_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    since, until = _age_ends(element, compiler, **kw)
    return f"((julianday({until}) - julianday({since})) * 86400.0)"


class Identifier(sa.TypeDecorator[Any]):
    """A UUID: native on PostgreSQL, its usual 36 characters of text on SQLite (so that SQL can name it)."""

    impl = sa.Uuid
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.Uuid(as_uuid=True))
        return dialect.type_descriptor(sa.String(36))

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else str(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return value if value is None or isinstance(value, uuid.UUID) else uuid.UUID(str(value))


def moment(seconds: float | None, absolute: datetime | None) -> Any:
    """SQL for a time given as seconds from now, or as it stands; None for neither."""
    return absolute if seconds is None else later(float(seconds))
