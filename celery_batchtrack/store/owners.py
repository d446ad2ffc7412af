"""Owners: rows of the application that batches go with when they are deleted.

Each has a column ``owner_<name>`` in ``batchtrack_batch``, which is there for a configuration and not for a version:
it is made after Alembic's steps, and `schema` does not know it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from celery_batchtrack import errors

from .clock import Identifier
from .engine import Connected
from .schema import batch

#: The type of a column as the database declares it, or no row. Reflected types would lose what SQLAlchemy does not
#: know: domains, types of extensions, SQLite's free choice of words.
_TYPE = {
    "postgresql": """
        SELECT format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attcollation <> t.typcollation
            THEN ' COLLATE ' || CAST(CAST(a.attcollation AS regcollation) AS text) ELSE '' END
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE a.attrelid = to_regclass(:table) AND a.attname = :key AND a.attnum > 0 AND NOT a.attisdropped""",
    "sqlite": "SELECT type FROM pragma_table_info(:table) WHERE lower(name) = lower(:key)",
}
#: Whether the foreign key of `own` is the one that is configured, or no row where it has none.
_REFERS = {
    "postgresql": """
        SELECT c.confrelid = to_regclass(:table) AND f.attname = :key AND c.confdeltype = 'c'
        FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND c.conkey = ARRAY[a.attnum]
        JOIN pg_attribute f ON f.attrelid = c.confrelid AND c.confkey = ARRAY[f.attnum]
        WHERE c.contype = 'f' AND c.conrelid = to_regclass('batchtrack_batch') AND a.attname = :own""",
    "sqlite": """
        SELECT lower("table") = lower(:table) AND lower("to") = lower(:key) AND on_delete = 'CASCADE'
        FROM pragma_foreign_key_list('batchtrack_batch') WHERE lower("from") = lower(:own)""",
}
#: SQLite takes any column here, and then fails at every write; PostgreSQL refuses it by itself.
_UNIQUE = """
    SELECT (SELECT count(*) = 1 AND max(lower(name)) = lower(:key) FROM pragma_table_info(:table) WHERE pk > 0)
    OR EXISTS (
        SELECT 1 FROM pragma_index_list(:table) AS i WHERE i."unique" AND NOT i.partial
        AND (SELECT group_concat(lower(name)) FROM pragma_index_info(i.name)) = lower(:key)
    )"""
_DATATYPE_MISMATCH = "42804"


@dataclass(frozen=True, slots=True)
class _Target:
    """What an owner's column refers to; names as they are, unquoted."""

    name: str
    schema: str | None
    table: str
    key: str

    @classmethod
    def parse(cls, name: str, text: str) -> _Target:
        """Of ``"table.column"`` or ``"schema.table.column"``."""
        *schema, table, key = text.split(".")
        return cls(name, schema[0] if schema else None, table, key)

    @property
    def column(self) -> str:
        return f"owner_{self.name}"

    @property
    def whole_table(self) -> str:
        return f"{self.schema}.{self.table}" if self.schema else self.table

    @property
    def setting(self) -> str:
        return f"batchtrack_owners[{self.name!r}] = '{self.whole_table}.{self.key}'"


class Owning(Connected):
    """Columns of owners, made and written."""

    def _target(self, name: str) -> _Target:
        if name not in self._owners:
            raise errors.InvalidOption(f"batchtrack_owners names no owner {name!r}")
        return _Target.parse(name, self._owners[name])

    def _after_steps(self, connection: sa.Connection) -> None:
        super()._after_steps(connection)
        for name in self._owners:
            _make(connection, self._target(name), self.shown_url)

    def _own(self, connection: sa.Connection, batch_id: uuid.UUID, owner: tuple[str, Any]) -> None:
        """Write a new batch's owner: its name, and its key. Raises InvalidOption if there is no such row, and
        SchemaOutdated if there is no such column."""
        target, key = self._target(owner[0]), owner[1]
        try:
            with connection.begin_nested():  # the transaction may be the application's: it outlives a refusal
                _write(connection, batch_id, target, key)
        except (exc.DBAPIError, OverflowError) as error:
            refusal = self._refusal(connection, target, key, error)
            if refusal is None:
                raise
            raise refusal from None

    def _refusal(
        self, connection: sa.Connection, target: _Target, key: Any, error: Exception
    ) -> errors.BatchTrackError | None:
        if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
            return None
        if _type(connection, batch.name, target.column) is None:
            return errors.SchemaOutdated(
                f"tracking database {self.shown_url} has no column {target.column} yet, for {target.setting}: "
                "run `celery -A <app> batchtrack migrate`"
            )
        if isinstance(error, (exc.IntegrityError, OverflowError)):
            return errors.InvalidOption(
                f"there is no {target.name} {key} in {target.whole_table} (or its transaction is not committed yet)"
            )
        if _is_no_key(error):
            return errors.InvalidOption(
                f"{key!r:.100} is no {target.key} of {target.whole_table}, for owner {target.name!r}: {_said(error)}"
            )
        return None


# -- the column ------------------------------------------------------------------------------------


def _make(connection: sa.Connection, target: _Target, url: str) -> None:
    """What is missing of the column, its foreign key and its index. Nothing is ever dropped."""
    if target.schema and connection.dialect.name == "sqlite":
        raise errors.ImproperlyConfigured(f"{target.setting}: on SQLite, write it as table.column, without a schema")
    kind = _type(connection, _regclass(connection, target), target.key)
    if kind is None:
        raise errors.ImproperlyConfigured(
            f"{target.setting}: there is no table {target.whole_table} with a column {target.key} in the tracking "
            f"database {url}. It must be the application's own database: run the application's migrations first, "
            "and then `batchtrack migrate`; or correct the setting"
        )
    try:
        _add(connection, target, kind)
    except (exc.ProgrammingError, exc.IntegrityError) as error:
        if "permission denied" in str(error.orig).lower():
            raise
        raise _useless(target, _said(error)) from None
    column = _quoted(connection, target.column)
    index = _quoted(connection, f"{batch.name}_{target.column}")
    _run(connection, f"CREATE INDEX IF NOT EXISTS {index} ON {batch.name} ({column}) WHERE {column} IS NOT NULL")


def _add(connection: sa.Connection, target: _Target, kind: str) -> None:
    if connection.dialect.name == "sqlite" and not _ask(connection, _UNIQUE, table=target.table, key=target.key):
        raise _useless(target, "it is neither the primary key nor unique")
    column = _quoted(connection, target.column)
    refers = f"REFERENCES {_table(connection, target)} ({_quoted(connection, target.key)}) ON DELETE CASCADE"
    if _type(connection, batch.name, target.column) is None:
        _run(connection, f"ALTER TABLE {batch.name} ADD COLUMN {column} {kind} {refers}")
        return
    table = _regclass(connection, target)
    found = _ask(connection, _REFERS[connection.dialect.name], table=table, key=target.key, own=target.column)
    if found is None and connection.dialect.name != "sqlite":  # it went with a table that was dropped and made again
        _run(connection, f"ALTER TABLE {batch.name} ADD FOREIGN KEY ({column}) {refers}")
    elif not found:
        raise errors.ImproperlyConfigured(
            f"{target.setting}: {batch.name}.{target.column} is there already, and refers to something else. Give "
            "this owner another name, or drop that column first"
        )


def _useless(target: _Target, why: str) -> errors.ImproperlyConfigured:
    return errors.ImproperlyConfigured(
        f"{target.setting} cannot be referred to: {why}. Name the primary key, or a unique column, of a table"
    )


# -- a batch's value -------------------------------------------------------------------------------


def _write(connection: sa.Connection, batch_id: uuid.UUID, target: _Target, key: Any) -> None:
    keys, value = (key,), ":key_0"
    if connection.dialect.name == "sqlite":
        keys = _spellings(key)
        column, names = _quoted(connection, target.key), ", ".join(f":key_{at}" for at in range(len(keys)))
        found = f"SELECT {column} FROM {_table(connection, target)} WHERE {column} IN ({names})"
        value = f"coalesce(({found}), :key_0)"
    # As text, so that the database reads the key by the column's type, and not by Python's.
    update = sa.text(f"UPDATE {batch.name} SET {_quoted(connection, target.column)} = {value} WHERE id = :id")
    connection.execute(
        update.bindparams(sa.bindparam("id", type_=Identifier)),
        {"id": batch_id, **{f"key_{at}": each for at, each in enumerate(keys)}},
    )


def _spellings(key: Any) -> tuple[Any, ...]:
    """SQLite has no UUIDs: each library writes them in its own way, and only the row itself tells which."""
    try:
        found = key if isinstance(key, uuid.UUID) else uuid.UUID(key) if isinstance(key, str) else None
    except ValueError:
        found = None
    return (key,) if found is None else (str(found), found.hex, found.bytes, str(key))


# -- small things ----------------------------------------------------------------------------------


def _is_no_key(error: Exception) -> bool:
    code = getattr(getattr(error, "orig", None), "sqlstate", None)
    # Without a code: the driver itself cannot write such a value.
    return isinstance(error, exc.DataError) or (
        isinstance(error, exc.ProgrammingError) and code in (None, _DATATYPE_MISMATCH)
    )


def _said(error: Any) -> str:
    return (str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__])[0]


def _type(connection: sa.Connection, table: str, key: str) -> str | None:
    found = _ask(connection, _TYPE[connection.dialect.name], table=table, key=key)
    return None if found is None else str(found)


def _regclass(connection: sa.Connection, target: _Target) -> str:
    """The table as the catalogue is asked for it."""
    return target.table if connection.dialect.name == "sqlite" else _table(connection, target)


def _table(connection: sa.Connection, target: _Target) -> str:
    parts = (target.schema, target.table) if target.schema else (target.table,)
    return ".".join(_quoted(connection, each) for each in parts)


def _quoted(connection: sa.Connection, name: str) -> str:
    return str(connection.dialect.identifier_preparer.quote_identifier(name))


def _ask(connection: sa.Connection, query: str, **values: str) -> Any:
    return connection.execute(sa.text(query), values).scalar()


def _run(connection: sa.Connection, statement: str) -> None:
    connection.execute(sa.text(statement))
