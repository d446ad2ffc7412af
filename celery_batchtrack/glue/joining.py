"""A batch that begins in the application's transaction: its rows are there when that is committed, or never."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from celery_batchtrack import errors
from celery_batchtrack.behaviour import finish
from celery_batchtrack.store.borrowed import check_place
from celery_batchtrack.vocabulary.records import NewBatch, NewChild
from celery_batchtrack.vocabulary.states import EndReason

from . import django_database, starting, transaction
from .extension import BatchTrack
from .narrate import logger

#: Told once the transaction is known to be committed.
Then = Callable[[], None]


def joined(extension: BatchTrack, wanted: Any) -> Joined | Deferred | None:
    """By the option `transaction`, as it was checked; without one, by Django's ``atomic()`` if the caller is in that.
    None: the batch has transactions of its own."""
    if isinstance(wanted, str):
        wanted = transaction.of_django(wanted, extension.django_alias)
    if wanted is not None:
        return Joined(extension, wanted)
    for alias in dict.fromkeys((extension.django_alias or django_database.DEFAULT, django_database.DEFAULT)):
        if django_database.in_atomic(alias):
            return Deferred(extension, alias)
    return None


class Joined:
    """Rows are written as they come, in the application's own transaction and within a savepoint of it.

    Nothing is registered for the creator meanwhile, and nothing goes through our own connections, which on SQLite would
    wait for the application's. After the commit its children are sent; where that does not happen (a connection that
    nobody uses again after its commit, a process that dies just then), a sweep sends them.
    """

    def __init__(self, extension: BatchTrack, outer: transaction.Transaction) -> None:
        self._extension, self._outer = extension, outer
        self._stack = contextlib.ExitStack()
        self._id: uuid.UUID | None = None

    def __enter__(self) -> Self:
        own = self._extension.store
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(self._outer.block())
            if not self._is_the_stores():
                check_place(own, connection, self._outer.where)
            self._store = own.within(lambda: contextlib.nullcontext(connection))
            self._stack = stack.pop_all()
        return self

    def _is_the_stores(self) -> bool:
        """In a `TestCase`, where our own connections would not see the tables of a database in memory."""
        alias = getattr(self._outer, "alias", None)
        return alias is not None and alias == self._extension.django_alias and django_database.in_test(alias)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            if kind is not None:
                self._cancel_if_committed()

    def _cancel_if_committed(self) -> None:
        """Somebody committed inside the block, and then it failed: an open batch must not stay."""
        with contextlib.suppress(errors.BatchTrackError):
            if self._id is not None and self._extension.store.batch(self._id) is not None:
                finish.cancel(self._extension.tracker, self._id, EndReason.EXCEPTION)

    def insert(self, new: NewBatch, children: Sequence[NewChild] = (), *, seal: bool = False) -> None:
        self._id = new.id
        starting.insert(self._extension, new, children, seal=seal, store=self._store)

    def add(self, batch_id: uuid.UUID, block: Sequence[NewChild]) -> int | None:
        self._outer.refuse_ended()
        return self._store.add(batch_id, block)

    def seal(self, batch_id: uuid.UUID) -> bool:
        self._outer.refuse_ended()
        return self._store.seal(batch_id)

    def afterwards(self, batch_id: uuid.UUID, then: Then) -> None:
        """Send its children after the commit."""

        def committed() -> None:
            if _sent(self._extension, batch_id):
                then()

        self._outer.after_commit(committed)


def _sent(extension: BatchTrack, batch_id: uuid.UUID) -> bool:
    """Whether it may be there: the commit is done, and must not seem to have failed. After a rollback there is nothing
    to send."""
    try:
        if extension.store.batch(batch_id) is None:
            return False
        starting.send(extension, batch_id)
    except Exception:  # noqa: BLE001 (a broker may raise anything)
        logger.exception("action=start_waits batch %s (a sweep sends its children)", batch_id)
    return True


class Deferred:
    """In Django's ``atomic()`` without ``transaction=``: rows are kept in memory, and written and sent by
    `on_commit`."""

    def __init__(self, extension: BatchTrack, alias: str) -> None:
        self._extension, self._alias = extension, alias
        self._new: NewBatch | None = None
        self._children: list[NewChild] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def insert(self, new: NewBatch, children: Sequence[NewChild] = (), *, seal: bool = False) -> None:
        self._new, self._children = new, list(children)

    def add(self, batch_id: uuid.UUID, block: Sequence[NewChild]) -> int | None:
        self._children += block
        return len(self._children) - len(block)

    def seal(self, batch_id: uuid.UUID) -> bool:
        return True

    def afterwards(self, batch_id: uuid.UUID, then: Then) -> None:
        """Create it, and send its children, after the commit."""

        def committed() -> None:
            self._begin()
            then()

        django_database.on_commit(self._alias, committed)

    def _begin(self) -> None:
        assert self._new is not None
        try:
            starting.create(self._extension, self._new, self._children)
        except Exception as error:
            logger.error(
                "action=create_lost batch %s %r of %d children was not created, although its transaction was "
                "committed: %s. Create it anew; with transaction='django' both are committed, or neither",
                self._new.id, self._new.name, len(self._children), error,
            )  # fmt: skip
            raise
        starting.send(self._extension, self._new.id)
