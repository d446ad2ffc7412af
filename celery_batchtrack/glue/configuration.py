"""From `app.conf` and the environment to `Settings`: read late, every spelling known, nothing written back."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.settings import PREFIX, Settings

logger = logging.getLogger("celery_batchtrack")

EMBEDDED = "batchtrack+filesystem://"
EMBEDDED_DATABASE = "sqlite:///batchtrack.db"

#: Task annotations and the like may hold such keys that are no settings.
_NO_SETTINGS = frozenset({"batchtrack_owners"})


def load(app: Any, *, warn: bool = True) -> Settings:
    """Validated settings of an app. Raises ImproperlyConfigured with what to write instead."""
    app.conf.get(PREFIX + "enabled")  # the first read puts another object into `app.conf`, which knows its namespace
    conf = app.conf
    namespace = getattr(conf, "prefix", "") or ""
    keys = _keys(conf)
    _refuse_unknown(keys, namespace)
    values: dict[str, Any] = {}
    for name in Settings.names():
        found = _look_up(conf, keys, namespace, name, warn=warn)
        if found is not None:
            values[name] = found
    values.update(_from_environment(os.environ))
    return Settings.validated(values, lambda name: _spelling(namespace, name))


def ignored(app: Any) -> dict[str, str]:
    """Settings that are there under a spelling that does not count, and how to write them."""
    app.conf.get(PREFIX + "enabled")
    conf = app.conf
    namespace, keys = getattr(conf, "prefix", "") or "", _keys(conf)
    found: dict[str, str] = {}
    for name in Settings.names():
        if conf.get(PREFIX + name) is None:
            found.update(_ignored(keys, namespace, name))
    return found


def database_url(app: Any, settings: Settings) -> str:
    """The configured URL; a SQLite file only where nothing can be shared with other machines anyway."""
    if settings.database_url:
        return settings.database_url
    if app.conf.task_always_eager or str(app.conf.broker_url or "").startswith(EMBEDDED):
        return EMBEDDED_DATABASE
    raise errors.ImproperlyConfigured(
        "batchtrack_database_url is not set: name the database that all workers share, e.g. "
        "'postgresql+psycopg://user@host/name', or in a Django project 'django:default' (only the embedded broker has "
        "a default)"
    )


def _spelling(namespace: str, name: str) -> str:
    key = PREFIX + name
    return (namespace + key).upper() if namespace else key


def _keys(conf: Any) -> list[str]:
    try:
        return [key for key in conf if isinstance(key, str)]
    except TypeError:
        return []


def _normalised(key: str, namespace: str) -> str:
    lowered = key.lower()
    prefix = namespace.lower()
    return lowered.removeprefix(prefix) if prefix else lowered


def _refuse_unknown(keys: Iterable[str], namespace: str) -> None:
    known = [PREFIX + name for name in Settings.names()]
    for key in keys:
        plain = _normalised(key, namespace)
        for extra in ("celery_",):  # CELERY_BATCHTRACK_… where no namespace was declared
            plain = plain.removeprefix(extra) if plain.startswith(extra + PREFIX) else plain
        if plain.replace("_", "").startswith("batchtrack") and plain not in known and plain not in _NO_SETTINGS:
            as_written = [_spelling(namespace, name) for name in Settings.names()]
            close = difflib.get_close_matches(plain, known, n=1)
            hint = f": did you mean {as_written[known.index(close[0])]!r}?" if close else ""
            raise errors.ImproperlyConfigured(f"{key} is not a setting{hint}")


def _look_up(conf: Any, keys: list[str], namespace: str, name: str, *, warn: bool) -> Any:
    """A setting under any spelling that counts; warns about one that does not."""
    found = conf.get(PREFIX + name)
    if found is not None:
        return found
    upper = (PREFIX + name).upper()
    if upper not in keys and ("CELERY_" + upper) not in keys:
        return None
    if not namespace and upper in keys:
        return conf.get(upper)
    for spelling, counts in _ignored(keys, namespace, name).items() if warn else ():
        logger.warning("%s is ignored: write it as %s", spelling, counts)
    return None


def _ignored(keys: list[str], namespace: str, name: str) -> dict[str, str]:
    upper, counts = (PREFIX + name).upper(), _spelling(namespace, name)
    if not namespace and upper in keys:
        return {}
    return {each: counts for each in (upper, "CELERY_" + upper) if each in keys and each != counts}


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    names = [name.upper() for name in Settings.names()]
    for key in environment:
        name = key.removeprefix(PREFIX.upper())
        # Others may have variables of that prefix for purposes of their own: only what is nearly a setting.
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.75) if name != key else []
        if close and name not in names:
            meant = PREFIX.upper() + close[0]
            raise errors.ImproperlyConfigured(f"{key} in the environment is not a setting: did you mean {meant!r}?")
    found: dict[str, str] = {}
    for name in Settings.names():
        value = environment.get((PREFIX + name).upper())
        if value is not None and name not in ("engine_options", "retention"):
            found[name] = value
    return found
