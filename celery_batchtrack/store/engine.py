"""Connections: engines per process, transactions, schema check, and errors in our own words."""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from celery_batchtrack import errors

from . import migrate, schema

#: Serialises this process's SQLite transactions, and keeps a fork from falling into one: a child
#: forked inside a transaction would inherit locks that nobody ever releases.
_sqlite_guard = threading.RLock()
#: Engines inherited by a fork. Never used and never collected: closing them would close, or
#: checkpoint, what the parent still uses.
_inherited: list[Any] = []


def _before_fork() -> None:
    _sqlite_guard.acquire()


def _after_fork_parent() -> None:
    _sqlite_guard.release()


def _after_fork_child() -> None:
    global _sqlite_guard
    _sqlite_guard = threading.RLock()


#: Seconds that each statement of a read may take on the server, in this thread.
_limit: ContextVar[float | None] = ContextVar("batchtrack_statement_limit", default=None)


@contextlib.contextmanager
def reading_at_most(seconds: float) -> Iterator[None]:
    """For whoever gives up on a read after a while: PostgreSQL gives it up, too, and its connection is free again."""
    token = _limit.set(seconds)
    try:
        yield
    finally:
        _limit.reset(token)


def _milliseconds(limit: float) -> int:
    """As PostgreSQL takes it: 0 would be no limit, and more does not fit. Never less, so that who gets no answer has
    waited for so long."""
    return max(1, math.ceil(min(limit * 1000, 2**31 - 1)))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_parent, after_in_child=_after_fork_child)


#: libpq would wait for minutes for a host that does not answer, and for hours for one that went away.
_PATIENCE = {
    "connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3,
    "tcp_user_timeout": 30_000, "application_name": "celery-batchtrack",
}  # fmt: skip


def normalised(url: str | sa.URL) -> sa.URL:
    """The URL with psycopg 3 where PostgreSQL is named without a driver."""
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        raise errors.ImproperlyConfigured(
            "batchtrack_database_url is no SQLAlchemy URL; write e.g. 'postgresql+psycopg://user@host/name' "
            "or 'sqlite:///batchtrack.db'"
        ) from None
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg2", "postgresql+asyncpg"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise errors.ImproperlyConfigured(
            f"batchtrack_database_url names {parsed.get_backend_name()!r}; "
            "the tracking database must be PostgreSQL or SQLite"
        )
    return parsed


def url_of(backend: str, database: str | None, *, query: Mapping[str, str] | None = None, **parts: Any) -> sa.URL:
    """A URL from its parts (`username`, `password`, `host`, `port`), which need no escaping."""
    return sa.URL.create(backend, database=database, query=dict(query or {}), **parts)


def create_engine(url: sa.URL, options: Mapping[str, Any], *, pooled: bool = True) -> sa.Engine:
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, options, pooled=pooled)
    defaults: dict[str, Any] = {
        "pool_size": 2, "max_overflow": 8, "pool_recycle": 1800, "isolation_level": "READ COMMITTED",
        "connect_args": {**_PATIENCE, **options.get("connect_args", {})},
    }  # fmt: skip
    others = {name: value for name, value in options.items() if name != "connect_args"}
    if not pooled:
        for name in ("pool_size", "max_overflow", "pool_recycle"):
            defaults.pop(name), others.pop(name, None)
        defaults["poolclass"] = sa.NullPool
    try:
        engine = sa.create_engine(url, **{**defaults, **others})
    except ModuleNotFoundError as error:
        raise errors.ImproperlyConfigured(
            f"PostgreSQL needs a driver ({error.name} is missing): pip install 'celery-batchtrack[postgresql]'"
        ) from None
    event.listen(engine, "checkout", _refuse_closed)
    return engine


def _refuse_closed(connection: Any, record: Any, proxy: Any) -> None:
    """A server says nothing to an idle connection but that it is over (a restart, a fail-over, a time-out). Told by
    the socket, so that it costs no round trip; the pool then makes a new connection."""
    try:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        closed = bool(poll.poll(0))
    except Exception:  # noqa: BLE001 (a driver without a socket to ask, or one that knows it is closed)
        closed = bool(getattr(connection, "closed", False))
    if closed:
        raise exc.DisconnectionError("closed by the server while it was idle")


def _sqlite_engine(url: sa.URL, options: Mapping[str, Any], *, pooled: bool = True) -> sa.Engine:
    connecting = {"timeout": 30, "check_same_thread": False, **options.get("connect_args", {})}
    defaults: dict[str, Any] = {}
    if url.database in (None, "", ":memory:"):
        defaults["poolclass"] = sa.StaticPool
    elif not pooled or url.query.get("mode") == "memory":
        defaults["poolclass"] = sa.NullPool
    engine = sa.create_engine(url, **{**defaults, **options, "connect_args": connecting})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours: see `begin`
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            # A read-only file refuses WAL; reading it still works, and a write says so by itself.
            with contextlib.suppress(Exception):
                connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # Never an upgraded deferred transaction: two of those that both write end in SQLITE_BUSY at once.
        reading = connection.get_execution_options().get("batchtrack_read")
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


class Connected:
    """One database, reached from any number of threads and, by forks, processes.

    Every transaction is short. `write` and `read` raise `errors.DatabaseUnavailable` where the
    database, rather than the statement, is the trouble.
    """

    def __init__(
        self, url: str | sa.URL, *, auto_migrate: bool | None = None, engine_options: Mapping[str, Any] | None = None,
        owners: Mapping[str, str] | None = None, pooled: bool = True,
    ) -> None:  # fmt: skip
        """`pooled`: keep connections open for the next use."""
        self.url = normalised(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self._auto_migrate = self.sqlite if auto_migrate is None else auto_migrate
        self._options = dict(engine_options or {})
        self._owners = dict(owners or {})
        self.pooled = pooled
        self._lock = threading.Lock()
        self._engine: tuple[int, sa.Engine] | None = None
        self._store_id: uuid.UUID | None = None

    # -- connecting ------------------------------------------------------------------------------

    @property
    def engine(self) -> sa.Engine:
        """This process's engine; a fork gets its own."""
        held = self._engine
        if held is not None and held[0] == os.getpid():
            return held[1]
        if held is not None and held[0] != os.getpid():
            _inherited.append(held)
            self._lock = threading.Lock()  # the fork may have copied it locked
        with self._lock:
            if self._engine is None or self._engine[0] != os.getpid():
                self._engine = (os.getpid(), create_engine(self.url, self._options, pooled=self.pooled))
            return self._engine[1]

    def dispose(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        if self._engine is not None and self._engine[0] == os.getpid():
            self._engine[1].dispose()

    @property
    def store_id(self) -> uuid.UUID:
        """Identity of the database, carried by every message. The first use checks the schema."""
        if self._store_id is None:
            self._store_id = self._opened()
        return self._store_id

    @property
    def known_store_id(self) -> uuid.UUID | None:
        """The same, if it was asked for before: no look at the database."""
        return self._store_id

    def _opened(self) -> uuid.UUID:
        with self._raw_read() as connection:
            state = migrate.state(connection)
        if state is migrate.State.EMPTY and self._auto_migrate:
            self.migrate()
        elif state is not migrate.State.CURRENT:
            raise migrate.refusal(state, self.shown_url)
        with self._raw_read() as connection:
            found: uuid.UUID = connection.execute(sa.select(schema.meta.c.store_id)).scalar_one()
            return found

    def schema_state(self) -> migrate.State:
        """How the database's schema compares with the code's."""
        with self._raw_read() as connection:
            return migrate.state(connection)

    def migrate(self) -> None:
        """Bring the tables to this version's schema. Safe to run twice, and by two at once."""
        with self._translated(), self._guarded():
            migrate.upgrade(self.engine, self._before_steps, self._after_steps)
        self._store_id = None

    def _before_steps(self, connection: sa.Connection) -> None:
        """What stands in the way of steps, where there are any to go."""

    def _after_steps(self, connection: sa.Connection) -> None:
        """What else the tables need, in the transaction of the steps."""

    @property
    def shown_url(self) -> str:
        """The URL without its password, for messages."""
        secret = {key: "***" for key in self.url.query if "pass" in key.lower()}
        return self.url.update_query_dict(secret).render_as_string(hide_password=True)

    # -- transactions ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A write transaction (``BEGIN IMMEDIATE`` on SQLite); commits at the end of the block."""
        self.store_id  # noqa: B018 (checks the schema once)
        with self._translated(), self._guarded(), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def single(self) -> Iterator[sa.Connection]:
        """For exactly one statement: no BEGIN and COMMIT of its own where the database can do without."""
        if self.sqlite:
            with self.write() as connection:
                yield connection
            return
        self.store_id  # noqa: B018
        with self._translated(), self.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read transaction: one snapshot on SQLite, one per statement on PostgreSQL."""
        self.store_id  # noqa: B018
        with self._raw_read() as connection:
            yield connection

    @contextlib.contextmanager
    def _raw_read(self) -> Iterator[sa.Connection]:
        with self._translated(), self._guarded(), self.engine.connect() as connection:
            connection = connection.execution_options(batchtrack_read=True)
            if (limit := _limit.get()) is not None and not self.sqlite:
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_milliseconds(limit)}")
            yield connection

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        if not self.sqlite:
            yield
            return
        guard = _sqlite_guard
        with guard:
            yield

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError) as error:
            raise errors.DatabaseUnavailable(self._explain(error)) from error
        except exc.DatabaseError as error:
            if type(error) is exc.DatabaseError:  # e.g. SQLite: the file is no database, or is damaged
                raise errors.DatabaseUnavailable(self._explain(error)) from error
            if isinstance(error, exc.ProgrammingError) and "permission denied" in str(error.orig).lower():
                raise errors.DatabaseUnavailable(self._explain(error)) from error
            raise

    def _explain(self, error: exc.SQLAlchemyError) -> str:
        original = str(getattr(error, "orig", None) or error).strip().splitlines()
        text = original[0] if original else type(error).__name__
        lowered = text.lower()
        if "readonly" in lowered or "read-only" in lowered or "permission denied" in lowered:
            advice = "it is read-only for this user: check the file's and folder's permissions, or the role's grants"
        elif "locked" in lowered:
            advice = "another process holds it for long: look for an open transaction"
        elif "statement timeout" in lowered:
            limit = _limit.get()
            within = "in time" if limit is None else f"within {limit:.3g} s"
            advice = (
                f"no answer {within}: somebody holds a lock, or there is too much to do; "
                "pg_stat_activity and pg_blocking_pids(pid) say who"
            )
        else:
            advice = "check that it runs, and batchtrack_database_url"
        return f"tracking database {self.shown_url}: {text} ({advice})"
