"""``transaction=``: whose transaction a batch is created in, and what follows its commit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol

from celery_batchtrack import errors
from celery_batchtrack.store.sessions import SqlTransaction

from . import django_database

DJANGO = "django"


class Transaction(Protocol):
    """The application's."""

    def block(self) -> AbstractContextManager[Any]:
        """Its connection, for SQLAlchemy, within a savepoint."""

    @property
    def where(self) -> str | None:
        """Its database, where the connection itself does not tell."""

    def refuse_ended(self) -> None:
        """Raise BatchStateError if it ended since the block began."""

    def after_commit(self, call: Callable[[], None]) -> None:
        """Call it when it has been committed. It may also be called when that is not certain."""


class DjangoTransaction:
    """The present one of a database of Django's; where there is none, one of its own."""

    def __init__(self, alias: str) -> None:
        self.alias = alias

    @contextlib.contextmanager
    def block(self) -> Iterator[Any]:
        with django_database.atomic(self.alias), django_database.lend(self.alias)() as connection:
            yield connection

    @property
    def where(self) -> str | None:
        return django_database.shown(self.alias)

    def refuse_ended(self) -> None:
        """Django lets nobody end it inside an atomic block."""

    def after_commit(self, call: Callable[[], None]) -> None:
        django_database.on_commit(self.alias, call)


class Held:
    """A session or connection within a signature: copied along with it in this process, and never sent."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __copy__(self) -> Held:
        return self

    def __deepcopy__(self, memo: Any) -> Held:
        return self

    def __repr__(self) -> str:
        return f"<transaction of {type(self.value).__name__}>"

    def __json__(self) -> NoReturn:
        raise errors.InvalidOption(
            "a chord with transaction=session is to be sent in a message or kept in a row, where no session can go: "
            "leave transaction= out of chords within chains and chords, or give it to the outermost one, which is "
            "started here"
        )

    __reduce__ = __json__


def kept(value: Any) -> Any:
    """As an option among a signature's kwargs."""
    return value if value is None or isinstance(value, (str, Held)) else Held(value)


def checked(value: Any) -> Any:
    """None, ``"django:alias"`` (``"django:"`` for the tracking database's), or a Transaction. Raises InvalidOption."""
    if isinstance(value, Held):
        value = value.value
    if value is None:
        return None
    if isinstance(value, str) and (value == DJANGO or value.startswith(django_database.PREFIX)):
        return django_database.PREFIX if value == DJANGO else value
    found = None if isinstance(value, str) else SqlTransaction.of(value)
    if found is None:
        raise errors.InvalidOption(
            "transaction takes an SQLAlchemy Session or Connection that is in a transaction, or 'django' "
            f"('django:alias'), not {value!r:.100}"
        )
    return found


def of_django(text: str, tracking: str | None) -> DjangoTransaction:
    """Of a checked ``"django:…"``. `tracking`: the alias of the tracking database, if it is one of Django's."""
    try:
        alias = text.removeprefix(django_database.PREFIX) or tracking or django_database.DEFAULT
        django_database.connection_of(alias)
    except errors.ImproperlyConfigured as error:
        raise errors.InvalidOption(f"transaction='django': {error}") from None
    return DjangoTransaction(alias)
