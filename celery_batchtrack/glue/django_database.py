"""Django's databases and transactions, where Django is loaded; nothing here imports it before it is asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_batchtrack import errors
from celery_batchtrack.store.borrowed import Lend, over
from celery_batchtrack.store.engine import url_of

PREFIX = "django:"
DEFAULT = "default"

#: OPTIONS of a database that are Django's own, and no driver's.
_DJANGOS_OWN = frozenset(
    {"pool", "isolation_level", "server_side_binding", "assume_role", "cursor_factory", "context", "client_encoding"}
)


def alias_of(url: str | None) -> str | None:
    """The alias of a ``django:alias`` URL, or None for any other."""
    return (url.removeprefix(PREFIX) or DEFAULT) if url is not None and url.startswith(PREFIX) else None


def is_used() -> bool:
    """Whether this process has Django and its settings."""
    conf = sys.modules.get("django.conf")
    return "django.db" in sys.modules and conf is not None and bool(conf.settings.configured)


def databases() -> Any:
    """Django's ``connections``. Raises ImproperlyConfigured."""
    try:
        from django.core.exceptions import ImproperlyConfigured
        from django.db import connections
    except ImportError:
        raise errors.ImproperlyConfigured("this needs Django: pip install 'celery-batchtrack[django]'") from None
    try:
        connections.databases  # noqa: B018
    except ImproperlyConfigured as error:
        raise errors.ImproperlyConfigured(
            f"this needs Django's settings: set DJANGO_SETTINGS_MODULE before it is used ({error})"
        ) from None
    return connections


def connection_of(alias: str) -> Any:
    """Django's connection of this thread. Raises ImproperlyConfigured for an alias that is not there."""
    found = databases()
    if alias not in found.databases:
        raise errors.ImproperlyConfigured(
            f"Django's DATABASES has no {alias!r}: it has {', '.join(map(repr, found.databases))}"
        )
    return found[alias]


# -- the tracking database is one of Django's ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolved:
    """How our own connections reach it."""

    url: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool = True


def place(alias: str) -> tuple[Any, ...]:
    """What changes when a test runner puts its own database in the place of an alias's."""
    settings = databases().databases.get(alias, {})
    return (*(str(settings.get(name)) for name in ("ENGINE", "NAME", "HOST", "PORT", "USER")), _under_test())


def _under_test() -> bool:
    """Between Django's `setup_test_environment` and its end; test runners drop the database when they are done, which
    an idle connection of ours would keep them from."""
    return hasattr(sys.modules.get("django.core.mail"), "outbox")


def resolve(alias: str) -> Resolved:
    """As the database's settings say now. Raises ImproperlyConfigured for a database that is neither PostgreSQL nor
    SQLite."""
    connection = connection_of(alias)
    settings = connection.settings_dict
    if _under_test():  # what keeps a test from the database, keeps it from ours: it may not be the test's own yet
        with _translated(alias):
            connection.ensure_connection()
    if connection.vendor == "sqlite":
        return _sqlite(alias, settings)
    if connection.vendor == "postgresql":
        return _postgresql(settings)
    raise errors.ImproperlyConfigured(
        f"batchtrack_database_url = 'django:{alias}' is {settings['ENGINE']}; the tracking database must be PostgreSQL "
        "or SQLite: name another alias, or a URL"
    )


def shown(alias: str) -> str:
    """The database, for messages."""
    settings = connection_of(alias).settings_dict
    host = f" at {settings['HOST']}" if settings.get("HOST") else ""
    return f"{settings['NAME']}{host} (Django's {alias!r})"


def _sqlite(alias: str, settings: Mapping[str, Any]) -> Resolved:
    name, query = str(settings["NAME"]), {}
    if name == ":memory:":
        raise errors.ImproperlyConfigured(
            f"batchtrack_database_url = 'django:{alias}' is in memory (':memory:'), where no second connection finds "
            "it: name a file"
        )
    if name.startswith("file:"):
        name, _, parameters = name.partition("?")
        query = {"uri": "true", **dict(each.split("=", 1) for each in parameters.split("&") if "=" in each)}
    options = settings.get("OPTIONS") or {}
    connecting = {key: options[key] for key in ("timeout",) if key in options}
    return Resolved(url_of("sqlite", name, query=query), {"connect_args": connecting}, not _under_test())


def _postgresql(settings: Mapping[str, Any]) -> Resolved:
    options = dict(settings.get("OPTIONS") or {})
    connecting = {key: value for key, value in options.items() if key not in _DJANGOS_OWN}
    if options.get("assume_role"):
        connecting["options"] = f"{connecting.get('options', '')} -c role={options['assume_role']}".strip()
    parts = {"username": "USER", "password": "PASSWORD", "host": "HOST"}
    url = url_of(
        "postgresql+psycopg", settings["NAME"] or None, port=int(settings["PORT"]) if settings.get("PORT") else None,
        **{part: settings.get(name) or None for part, name in parts.items()},
    )  # fmt: skip
    return Resolved(url, {"connect_args": connecting}, not _under_test())


# -- its transactions ------------------------------------------------------------------------------


def _blocks(alias: str) -> list[Any]:
    """The atomic blocks of this thread, outermost first. A connection that it never had is not made for that."""
    made = getattr(databases()._connections, alias, None)
    return list(getattr(made, "atomic_blocks", ()))


def _is_a_tests(block: Any) -> bool:
    return bool(getattr(block, "_from_testcase", False))


def in_test(alias: str) -> bool:
    """Whether all that this thread does is in the transaction of a `TestCase`, which nobody else ever sees."""
    blocks = _blocks(alias) if is_used() else []
    return bool(blocks) and _is_a_tests(blocks[0])


def in_atomic(alias: str) -> bool:
    """Whether the application is in ``atomic()``; those of a `TestCase` are not the application's."""
    return is_used() and any(not _is_a_tests(each) for each in _blocks(alias))


def lend(alias: str) -> Lend:
    """Lends this thread's connection."""

    def raw() -> Any:
        connection = connection_of(alias)
        with _translated(alias):
            connection.ensure_connection()
            connection.validate_no_broken_transaction()
        return connection.connection

    return over(raw, sqlite=connection_of(alias).vendor == "sqlite")


@contextlib.contextmanager
def _translated(alias: str) -> Iterator[None]:
    from django.db import InterfaceError, OperationalError

    try:
        yield
    except (OperationalError, InterfaceError) as error:
        raise errors.DatabaseUnavailable(f"Django's database {alias!r}: {error}") from error


def on_commit(alias: str, call: Callable[[], None]) -> None:
    """Call it after the commit of the present transaction; never after a rollback."""
    from django.db import transaction

    transaction.on_commit(call, using=alias)


def atomic(alias: str) -> Any:
    from django.db import transaction

    return transaction.atomic(using=alias)
