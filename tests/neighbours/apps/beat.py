"""With django-celery-beat: the schedule is in Django's database."""

from __future__ import annotations

import os
from typing import Any

import django
from celery import Celery
from celery.signals import before_task_publish
from django.conf import settings

settings.configure(
    INSTALLED_APPS=["django_celery_beat"], USE_TZ=True, DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    MIGRATION_MODULES={"django_celery_beat": None},
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["SHOP_DATABASE"]}},
)  # fmt: skip
django.setup()

from django.core.management import call_command  # noqa: E402
from django_celery_beat.models import PeriodicTask  # noqa: E402
from django_celery_beat.schedulers import DatabaseScheduler  # noqa: E402

from celery_batchtrack import BatchTrack  # noqa: E402
from celery_batchtrack.glue.extension import DETECT_ENTRY  # noqa: E402
from tests.acceptance.apps.crashes import note  # noqa: E402
from tests.neighbours.apps.kit import configured, main  # noqa: E402

app = configured(Celery("scheduled", set_as_current=False))
app.conf.beat_schedule = {
    "own": {"task": "scheduled.own", "schedule": 3600.0, "args": [os.environ["OWN_PLACE"]]},
}  # fmt: skip
BatchTrack(app)


@app.task(name="scheduled.own", shared=False)
def own(place: str) -> str:
    note(place, os.getpid())
    return place


def sync() -> dict[str, Any]:
    """As beat does at its start, and once more."""
    call_command("migrate", run_syncdb=True, verbosity=0)
    first = DatabaseScheduler(app=app)
    PeriodicTask.objects.filter(name=DETECT_ENTRY).update(last_run_at=None)
    sent: list[Any] = []

    def note_sent(sender: str, headers: dict[str, Any], **_: Any) -> None:
        sent.append([sender, headers["expires"] is not None])

    before_task_publish.connect(note_sent)
    for entry in first.all_as_schedule().values():
        first.apply_async(entry, advance=False)
    return {"entries": sorted(first.all_as_schedule()), "sent": sorted(sent)}


def disable() -> list[str]:
    """As an administrator; then beat starts again."""
    PeriodicTask.objects.filter(name=DETECT_ENTRY).update(enabled=False)
    return sorted(DatabaseScheduler(app=app).all_as_schedule())


if __name__ == "__main__":
    main(sync=sync, disable=disable)
