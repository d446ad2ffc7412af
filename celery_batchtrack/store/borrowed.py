"""A store whose connection, and whose transaction, are the application's."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from celery_batchtrack import errors

from . import migrate, schema
from .engine import Connected

#: Gives the connection for the length of a block.
Lend = Callable[[], AbstractContextManager[sa.Connection]]


class Borrowed(Connected):
    """Begins, commits and rolls back nothing but savepoints: a write that fails leaves nothing behind, and the
    application's transaction goes on."""

    def __init__(self, own: Connected, lend: Lend) -> None:
        self.__dict__.update(own.__dict__)
        self._lend = lend
        self._auto_migrate = False

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        with self._translated(), self._lend() as connection, connection.begin_nested():
            yield connection

    single = write

    @contextlib.contextmanager
    def _raw_read(self) -> Iterator[sa.Connection]:
        with self._translated(), self._lend() as connection:
            yield connection

    def migrate(self, to: str = "head") -> None:
        """Bring the tables to a revision, if they are not beyond it already."""
        with self._translated(), self._lend() as connection, connection.begin_nested():
            if not migrate.reaches(connection, to):
                migrate.upgrade_on(connection, self._before_steps, self.shown_url, to)
        self._store_id = None

    def complete(self) -> None:
        """What no step makes: columns of owners, whose tables must be there, and the views."""
        with self.write() as connection:
            self._after_steps(connection)

    def dispose(self) -> None:
        """Nothing here is ours to close."""


# -- is it the tracking database? ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """What tells one tracking database from another, and from its own copy."""

    store_id: uuid.UUID | None  # None: it has no batchtrack tables
    server: tuple[str, ...]


def place_of(connection: sa.Connection) -> Place:
    """Fails no statement, so that the connection's transaction goes on whatever the answer."""
    found = None
    if sa.inspect(connection).has_table(schema.meta.name):
        with connection.begin_nested():
            found = connection.execute(sa.select(schema.meta.c.store_id)).scalar_one_or_none()
    if connection.dialect.name == "sqlite":
        path = connection.exec_driver_sql("PRAGMA database_list").all()[0][2]
        return Place(found, (os.path.realpath(path),) if path else ())
    # As a number: as text, it is in the time zone of the connection.
    started_at = sa.extract("epoch", sa.func.pg_postmaster_start_time())
    name, started = connection.execute(sa.select(sa.func.current_database(), started_at)).one()
    return Place(found, (str(name), str(started)))


def check_place(own: Connected, connection: sa.Connection, where: str | None = None) -> None:
    """Raises InvalidOption unless the connection leads to the tracking database: rows that are written elsewhere would
    never be found. `where`: what it leads to, if its engine does not know."""
    theirs = place_of(connection)
    _use_once(own, connection)
    with own._raw_read() as ours:
        mine = place_of(ours)
    if mine != theirs:
        where = where or connection.engine.url.render_as_string(hide_password=True)
        raise errors.InvalidOption(
            f"transaction=… is on the database {where}{_told(theirs)}, but the tracking database is "
            f"{own.shown_url}{_told(mine)}: a batch can be created in a transaction of the tracking database only. "
            "Leave out transaction=, or let batchtrack_database_url name the application's own database"
        )


def _told(place: Place) -> str:
    return f" ({'no batchtrack tables' if place.store_id is None else f'store {str(place.store_id)[:8]}'})"


def _use_once(own: Connected, connection: sa.Connection) -> None:
    """The first use of the tracking database may make its tables. On SQLite it cannot while somebody writes."""
    if own._store_id is not None:
        return
    if own.sqlite and writes(connection) and own.schema_state() is migrate.State.EMPTY:
        raise migrate.refusal(migrate.State.EMPTY, own.shown_url)
    own.store_id  # noqa: B018


def writes(connection: sa.Connection) -> bool:
    """Whether the driver has begun a transaction (SQLite). SQLAlchemy says that it has begun one long before."""
    return bool(getattr(connection.connection.driver_connection, "in_transaction", True))


# -- a driver's connection -------------------------------------------------------------------------


class _Guest:
    """A driver's connection for SQLAlchemy, whose host keeps it as it is: what would end its transaction, close it, or
    change its functions does nothing."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        cursor = self._connection.cursor(*args, **kwargs)
        if getattr(cursor, "adapters", None) is not None:
            _read_as_psycopg(cursor)
        return cursor

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    commit = rollback = close = add_notice_handler = create_function = _nothing


def _read_as_psycopg(cursor: Any) -> None:
    """Django leaves JSON as text, and chops time zones where USE_TZ is off."""
    from psycopg.types.datetime import TimestamptzLoader
    from psycopg.types.json import JsonbLoader

    cursor.adapters.register_loader("jsonb", JsonbLoader)
    cursor.adapters.register_loader("timestamptz", TimestamptzLoader)


_host: ContextVar[Any] = ContextVar("batchtrack_host")


@functools.cache
def _engine(sqlite: bool) -> sa.Engine:
    """One for all connections, so that what a dialect asks of its first one is asked once a process."""
    # psycopg would look for hstore by a way of its own, which takes no guest.
    name, options = ("sqlite", {}) if sqlite else ("postgresql+psycopg", {"use_native_hstore": False})
    return sa.create_engine(f"{name}://", creator=lambda: _Guest(_host.get()), poolclass=sa.NullPool, **options)


def over(connection: Callable[[], Any], *, sqlite: bool) -> Lend:
    """Lends the connection of a driver (sqlite3, psycopg 3) that is in a transaction, whatever it is at that time."""

    @contextlib.contextmanager
    def lend() -> Iterator[sa.Connection]:
        token = _host.set(connection())
        try:
            lent = _engine(sqlite).connect()
        finally:
            _host.reset(token)
        with lent:
            yield lent

    return lend


__all__ = ["Borrowed", "Lend", "Place", "check_place", "over", "place_of", "writes"]
