"""System checks: what ``manage.py check`` says of the configuration, and ``check --database default`` of the tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning

from celery_batchtrack import errors
from celery_batchtrack.glue import beat, configuration, django_database
from celery_batchtrack.glue.extension import DETECT_ENTRY
from celery_batchtrack.store.migrate import State
from celery_batchtrack.vocabulary.settings import Settings

from . import tables

_NO_APP = """no Celery app with BatchTrack is loaded, so nothing is tracked.
    {0}/celery.py:
        import os
        from celery import Celery
        from celery_batchtrack import BatchTrack
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "{1}")
        app = Celery("{0}")
        app.config_from_object("django.conf:settings", namespace="CELERY")
        BatchTrack(app)
        app.autodiscover_tasks()
    {0}/__init__.py:
        from .celery import app as celery_app"""


def check_configuration(app_configs: Any = None, **_: Any) -> list[CheckMessage]:
    return [*_app(), *_without_prefix()]  # in this order: Celery reads its configuration at first use


def _app() -> Iterator[CheckMessage]:
    found = tables.extension()
    if found is None:
        module = settings.SETTINGS_MODULE or "shop.settings"
        hint = _NO_APP.format(module.split(".")[0], module)
        yield Error("celery_batchtrack: no Celery app.", hint=hint, id=_id("E001"))
        return
    try:
        wanted = configuration.load(found.app, warn=False)
        configuration.database_url(found.app, wanted)
    except errors.ImproperlyConfigured as error:
        yield Error(f"celery_batchtrack: {error}", id=_id("E002"))
        return
    alias = django_database.alias_of(wanted.database_url)
    try:
        if alias is not None:
            django_database.resolve(alias)
    except errors.ImproperlyConfigured as error:
        yield Error(f"celery_batchtrack: {error}", id=_id("E003"))


def _without_prefix() -> Iterator[CheckMessage]:
    found = tables.extension()
    if found is None or not getattr(found.app.conf, "prefix", ""):
        return
    known = {f"BATCHTRACK_{name.upper()}" for name in Settings.names()}
    for name in dir(settings):
        if name in known:
            yield Warning(
                f"celery_batchtrack: the setting {name} is ignored.",
                hint=f"Write it as {found.app.conf.prefix.upper()}{name}.", id=_id("W001"),
            )  # fmt: skip


def check_databases(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    try:
        alias = tables.tracking_alias()
        # `migrate` begins with these checks, and is what they ask for.
        if alias is None or alias not in (databases or ()) or sys.argv[1:2] == ["migrate"]:
            return []
        return [*_schema(alias), *_detector_entry()]
    except errors.ImproperlyConfigured:
        return []  # told already
    except errors.DatabaseUnavailable as error:
        return [Warning(f"celery_batchtrack: {error}", id=_id("W003"))]


def _schema(alias: str) -> Iterator[CheckMessage]:
    state = tables._store(alias).schema_state()
    if state is not State.CURRENT:
        hint = "Upgrade the package." if state is State.NEWER else f"Run manage.py migrate --database {alias}."
        # No error, which would keep any command that begins with database checks from running.
        yield Warning(f"celery_batchtrack: the database {alias!r} {state.value}.", hint=hint, id=_id("W003"))


def _detector_entry() -> Iterator[CheckMessage]:
    if beat.is_disabled():
        yield Warning(
            f"celery_batchtrack: the periodic task {DETECT_ENTRY!r} is disabled.",
            hint="Workers sweep when a sweep is overdue; enable it in the admin to have beat do it.", id=_id("W002"),
        )  # fmt: skip


def _id(number: str) -> str:
    return f"batchtrack.{number}"
