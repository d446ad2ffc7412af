"""Transactions of the application's own SQLAlchemy sessions and connections: a block within one, and what follows its
commit."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Session, scoped_session

from celery_batchtrack import errors

from .borrowed import writes

Call = Callable[[], None]


class SqlTransaction:
    """What a session or a connection has begun, or begins with the first block."""

    @staticmethod
    def of(value: Any) -> SqlTransaction | None:
        """None for what is neither a session nor a connection. Raises InvalidOption for the asynchronous ones."""
        if isinstance(value, scoped_session):
            value = value()
        if isinstance(value, Session):
            return _OfSession(value)
        if isinstance(value, sa.Connection):
            return SqlTransaction(value)
        if any(each.__module__.startswith("sqlalchemy.ext.asyncio") for each in type(value).__mro__):
            raise errors.InvalidOption(
                "transaction= takes no AsyncSession or AsyncConnection: call it as `await session.run_sync(lambda s: "
                "Batch.create(…, transaction=s))`, which gives the `.sync_session`"
            )
        return None

    _nested: Any = None
    where: str | None = None  # the connection tells

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    @contextlib.contextmanager
    def block(self) -> Iterator[sa.Connection]:
        """The connection, within a savepoint: an exception leaves nothing of the block behind, also where it is caught
        and the transaction is committed. Raises BatchStateError if the transaction ends inside."""
        connection = begun(self._connection)
        with connection.begin_nested() as self._nested:
            yield connection
            self.refuse_ended()

    def refuse_ended(self) -> None:
        """Raise BatchStateError if the transaction ended since the block began."""
        if not self._nested.is_active:
            raise errors.BatchStateError(
                "the transaction was committed or rolled back while its batch was being created: end it after that"
            )

    def after_commit(self, call: Call) -> None:
        """Call it once the transaction has ended; of a connection, whose commit is not told before the next use of it,
        when it begins another one or goes back to its pool. Not after a rollback, as far as that is known."""
        _watch(self._connection).calls.append(call)


class _OfSession(SqlTransaction):
    def __init__(self, session: Session) -> None:
        self._session = session

    @contextlib.contextmanager
    def block(self) -> Iterator[sa.Connection]:
        session = self._session
        try:
            begun(session.connection())
        except exc.UnboundExecutionError:
            raise errors.InvalidOption(
                "transaction=: the session has no one database: give the connection of the tracking database, "
                "session.connection(bind_arguments={'mapper': …})"
            ) from None
        with session.begin_nested() as self._nested:  # flushes first, so that rows of owners have their keys
            yield session.connection()  # only now is it in the savepoint
            self.refuse_ended()

    def after_commit(self, call: Call) -> None:
        session = self._session
        if session not in _ends:
            _ends[session] = []
            event.listen(session, "after_transaction_end", _ended)
        _ends[session].append((weakref.ref(_root(session)), call))


def begun(connection: sa.Connection) -> sa.Connection:
    """In a transaction that the driver knows of, too: on SQLite it begins one with the first INSERT only, and the
    release of a savepoint before that would commit."""
    options = connection.get_execution_options()
    level = options.get("isolation_level") or getattr(connection.dialect, "_on_connect_isolation_level", None)
    if level == "AUTOCOMMIT" or getattr(connection.connection.driver_connection, "autocommit", None) is True:
        raise errors.InvalidOption(
            "transaction=: the connection is in AUTOCOMMIT mode, so it has no transaction; leave out transaction="
        )
    if not connection.in_transaction():
        connection.begin()
    if connection.dialect.name == "sqlite" and not writes(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    return connection


# -- the end of a session's transaction ------------------------------------------------------------

#: What follows the ends of root transactions, by session. A listener cannot remove itself while it is called.
_ends: weakref.WeakKeyDictionary[Session, list[tuple[Any, Call]]] = weakref.WeakKeyDictionary()


def _root(session: Session) -> Any:
    transaction: Any = session.get_transaction()
    while transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def _ended(session: Session, transaction: Any) -> None:
    due = [call for root, call in _ends.get(session, ()) if root() is transaction]
    if due:
        _ends[session] = [each for each in _ends[session] if each[0]() not in (transaction, None)]
    for call in due:
        call()


# -- the end of a connection's transaction ---------------------------------------------------------


@dataclass(eq=False)
class _Watch:
    """What follows the present transaction of a connection, and what follows one that was being committed."""

    calls: list[Call] = field(default_factory=list)
    committed: list[Call] = field(default_factory=list)

    def commit(self, *_: Any) -> None:
        self.committed += self.calls
        self.calls = []

    def rollback(self, *_: Any) -> None:
        self.calls = []

    def ended(self, *_: Any) -> None:
        due, self.committed = self.committed, []
        for call in due:
            call()


_watches: weakref.WeakKeyDictionary[sa.Connection, _Watch] = weakref.WeakKeyDictionary()
#: By the driver's connection, as long as it is checked out of its pool.
_checked_out: dict[int, _Watch] = {}
_pools: weakref.WeakSet[sa.Pool] = weakref.WeakSet()


def _watch(connection: sa.Connection) -> _Watch:
    watch = _watches.get(connection)
    if watch is None:
        watch = _watches[connection] = _Watch()
        event.listen(connection, "commit", watch.commit)
        event.listen(connection, "rollback", watch.rollback)
        event.listen(connection, "begin", watch.ended)
        pool = connection.engine.pool
        if pool not in _pools:
            _pools.add(pool)
            event.listen(pool, "checkin", _checked_in)
    _checked_out[id(connection.connection.dbapi_connection)] = watch
    return watch


def _checked_in(dbapi_connection: Any, record: Any) -> None:
    watch = _checked_out.pop(id(dbapi_connection), None)
    if watch is not None:
        watch.ended()


__all__ = ["SqlTransaction", "begun"]
