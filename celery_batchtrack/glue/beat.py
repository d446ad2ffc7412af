"""What beat knows of the detector: the entry in the schedule, and in django-celery-beat's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import django_database
from .extension import DETECT_ENTRY, DETECT_TASK


def detector_entry(app: Any) -> Mapping[str, Any] | None:
    """Ours, or the user's own for the detector's task."""
    for entry in (app.conf.beat_schedule or {}).values():
        if isinstance(entry, Mapping) and entry.get("task") == DETECT_TASK:
            return entry
    return None


def is_disabled() -> bool:
    """Whether somebody has switched our entry off in django-celery-beat, which leaves `enabled` as it was set."""
    if not django_database.is_used():
        return False
    from django.apps import apps
    from django.db import DatabaseError

    if not apps.ready or not apps.is_installed("django_celery_beat"):
        return False
    from django_celery_beat.models import PeriodicTask

    try:
        return bool(PeriodicTask.objects.filter(name=DETECT_ENTRY, enabled=False).exists())
    except DatabaseError:
        return False  # its tables are not there yet
