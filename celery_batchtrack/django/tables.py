"""The tracking tables in a database of Django's, brought to a schema by our own steps on Django's own connection."""

from __future__ import annotations

from typing import Any

from celery._state import _get_active_apps
from django.conf import settings
from django.db import transaction
from django.db.migrations.loader import MigrationLoader

from celery_batchtrack import errors
from celery_batchtrack.glue import django_database
from celery_batchtrack.glue.extension import BatchTrack, logger
from celery_batchtrack.store import BorrowedStore, Store


def extension() -> BatchTrack | None:
    """Of the project's Celery app; None if none that has a BatchTrack was imported."""
    try:
        return BatchTrack.of()
    except errors.ImproperlyConfigured:
        found = [getattr(app, "batchtrack", None) for app in _get_active_apps()]
        return next((each for each in found if isinstance(each, BatchTrack)), None)


def tracking_alias() -> str | None:
    """Which of Django's databases has the tracking tables; None if it is none of them."""
    found = extension()
    if found is not None:
        return found.django_alias
    return django_database.alias_of(getattr(settings, "CELERY_BATCHTRACK_DATABASE_URL", None))


def _store(alias: str) -> BorrowedStore:
    found = extension()
    url = django_database.resolve(alias).url
    own = Store(url, owners=found.settings.owners if found is not None else None)
    return own.within(django_database.lend(alias))


def bring(alias: str, revision: str) -> None:
    """Run our steps up to this one, in Django's present transaction. Nothing happens in other databases than the
    tracking one, or if it is beyond that step already."""
    if alias == tracking_alias():
        _store(alias).migrate(revision)


def prepare(alias: str) -> None:
    """Where a test runner has switched migrations off, Django would make the tables as the models have them."""
    if MigrationLoader.migrations_module("celery_batchtrack")[0] is None and alias == tracking_alias():
        with transaction.atomic(using=alias):
            _store(alias).migrate()


def complete(alias: str) -> None:
    """What migrations leave: columns of owners, whose tables are only now all there; everything, where they ran before
    the setting named this database."""
    if alias != tracking_alias():
        return
    with transaction.atomic(using=alias):
        store = _store(alias)
        store.migrate()
        try:
            store.complete()
        except errors.ImproperlyConfigured as error:
            logger.warning("action=owners_wait %s", error)


def migration_to(revision: str) -> Any:
    """What a migration does that brings the tables to this step of ours."""

    def forwards(apps: Any, schema_editor: Any) -> None:
        bring(schema_editor.connection.alias, revision)

    return forwards


def nothing(apps: Any, schema_editor: Any) -> None:
    """Backwards: the tables stay, with their batches; older code refuses a newer schema with a clear error."""
