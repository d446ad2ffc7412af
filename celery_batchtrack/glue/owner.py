"""``owner=``: which configured owner is meant, and its key. Objects of Django and of SQLAlchemy are known by what they
have; neither is imported."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.settings import Settings, suggestion

_KEYS = (int, str, bytes, uuid.UUID, Decimal)


def owner_of(settings: Settings, value: Any) -> tuple[str, Any] | None:
    """(name of the owner as configured, key of its row), or None for no owner.

    `value` is ``{"upload": 4711}``, ``("upload", 4711)``, or a saved object of a model whose table is named in
    `batchtrack_owners`; an object may also stand in the key's place. Raises InvalidOption.
    """
    if value is None:
        return None
    if not settings.owners:
        raise errors.InvalidOption(
            "owner needs the setting batchtrack_owners, such as batchtrack_owners = {'upload': 'shop_upload.id'}, and "
            "`celery -A <app> batchtrack migrate` after it is set"
        )
    named = _named(value)
    name, key = (_name_of(settings, value), value) if named is None else named
    if not isinstance(name, str) or name not in settings.owners:
        raise errors.InvalidOption(
            f"batchtrack_owners names no owner {name!r}{suggestion(str(name), list(settings.owners))}"
        )
    return name, _key(key, name, settings.owners[name].rpartition(".")[2])


def _named(value: Any) -> tuple[Any, Any] | None:
    """What is said by name; None for an object."""
    if isinstance(value, Mapping) and len(value) == 1:
        return next(iter(value.items()))
    if isinstance(value, (tuple, list)) and len(value) == 2:  # JSON makes a list of a tuple
        return value[0], value[1]
    if _is_model(value) and not isinstance(value, type):
        return None
    raise errors.InvalidOption(
        "owner must be one owner's name and key, such as {'upload': 4711} or ('upload', 4711), or an object of a "
        f"model whose table is named in batchtrack_owners, not {value!r:.100}"
    )


def _is_model(value: Any) -> bool:
    return hasattr(getattr(value, "_meta", None), "db_table") or hasattr(value, "__mapper__")


# -- an object's owner -----------------------------------------------------------------------------


def _name_of(settings: Settings, value: Any) -> str:
    tables = list(_tables(value))
    configured = {name: column.rpartition(".")[0] for name, column in settings.owners.items()}
    names = [name for name, table in configured.items() if table in tables]
    names = names or [name for name, table in configured.items() if any(_same(table, each) for each in tables)]
    if len(names) == 1:
        return names[0]
    model = type(value).__name__
    if names:
        raise errors.InvalidOption(
            f"batchtrack_owners names several owners for {model}, {', '.join(map(repr, names))}: say which, as "
            f"owner={{{names[0]!r}: …}}"
        )
    raise errors.InvalidOption(
        f"batchtrack_owners names no owner for {model}, whose table is {tables[0]}"
        f"{suggestion(tables[0], list(configured.values()))} (it has {', '.join(map(repr, configured.values()))})"
    )


def _tables(value: Any) -> Iterable[str]:
    """The tables that have a row of this object: its own, and those of the models that it inherits from."""
    meta = getattr(value, "_meta", None)
    if meta is not None and hasattr(meta, "db_table"):
        parents = meta.get_parent_list() if hasattr(meta, "get_parent_list") else ()
        # Quotes are Django's known way to name a schema: db_table = 'shop"."upload'.
        return [each.db_table.replace('"', "") for each in (meta, *(parent._meta for parent in parents))]
    own = value.__mapper__.local_table
    return [own.fullname, *(each.fullname for each in value.__mapper__.tables if each is not own)]


def _same(one: str, other: str) -> bool:
    """Whether two tables may be the same: one is named without its schema."""
    return ("." in one) != ("." in other) and one.rpartition(".")[2] == other.rpartition(".")[2]


# -- its key ---------------------------------------------------------------------------------------


def _key(value: Any, name: str, column: str) -> Any:
    found = _column_of(value, column) if _is_model(value) else value
    if found is None or _is_unsaved(value):
        raise errors.InvalidOption(f"the owner {name!r} has no {column} yet: save it before its batch is made")
    if isinstance(found, bool) or not isinstance(found, _KEYS):
        raise errors.InvalidOption(f"the key of owner {name!r} must be a number, text or a UUID, not {found!r:.100}")
    return found


def _is_unsaved(value: Any) -> bool:
    """A Django object whose key has a default has one before it has a row."""
    return bool(getattr(getattr(value, "_state", None), "adding", False))


def _column_of(value: Any, column: str) -> Any:
    """The value that the object has for a column of its table."""
    if not hasattr(value, "__mapper__"):
        return _django_column(value, column)
    mapper = value.__mapper__
    for table in mapper.tables:
        for each in table.columns:
            if each.name == column:
                return getattr(value, mapper.get_property_by_column(each).key)
    raise errors.InvalidOption(f"{type(value).__name__} has no column {column}, which batchtrack_owners names")


def _django_column(value: Any, column: str) -> Any:
    for field in getattr(value._meta, "fields", ()):
        if field.column == column:
            found = getattr(value, field.attname)
            # A key of a class of its own knows by its field how the database has it.
            prepare = getattr(field, "get_prep_value", None)
            return found if found is None or prepare is None else prepare(found)
    return value.pk
