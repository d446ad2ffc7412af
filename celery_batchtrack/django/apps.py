"""The app's configuration."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.db.models.signals import post_migrate, pre_migrate


class BatchesConfig(AppConfig):
    name = "celery_batchtrack.django"
    label = "celery_batchtrack"
    verbose_name = "Batches"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks as ours

        checks.register(ours.check_configuration)
        checks.register(ours.check_databases, checks.Tags.database)
        pre_migrate.connect(_prepare, sender=self, dispatch_uid="celery_batchtrack")
        post_migrate.connect(_complete, sender=self, dispatch_uid="celery_batchtrack")


def _prepare(using: str, **_: Any) -> None:
    from .tables import prepare

    prepare(using)


def _complete(using: str, **_: Any) -> None:
    from .tables import complete

    complete(using)
