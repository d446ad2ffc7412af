"""With django-celery-results as result backend."""

from __future__ import annotations

import os
from typing import Any

import django
from celery import Celery
from django.conf import settings

settings.configure(
    INSTALLED_APPS=["django_celery_results"], USE_TZ=True, DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    MIGRATION_MODULES={"django_celery_results": None},
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["SHOP_DATABASE"]}},
)  # fmt: skip
django.setup()

from django.core.management import call_command  # noqa: E402
from django_celery_results.models import TaskResult  # noqa: E402

from celery_batchtrack import Batch, BatchTrack, chord  # noqa: E402
from tests.neighbours.apps.kit import configured, main  # noqa: E402

app = configured(Celery("stored", backend="django-db", set_as_current=False))
BatchTrack(app)


@app.task(name="stored.double", shared=False)
def double(number: int) -> int:
    return 2 * number


@app.task(name="stored.total", shared=False)
def total(numbers: list[int]) -> int:
    return sum(numbers)


def setup() -> None:
    call_command("migrate", run_syncdb=True, verbosity=0)


def run() -> dict[str, Any]:
    ordinary = double.delay(1)
    plain = chord([double.s(1), double.s(2)])(total.s())
    kept = Batch.create("kept", [double.s(3)], app=app, results="backend")
    found = {"ordinary": ordinary.get(timeout=20), "body": plain.get(timeout=20)}
    kept.wait(20)
    rows = {row.task_id: [row.status, row.result] for row in TaskResult.objects.all()}
    return {
        **found,
        "row of an ordinary task": rows.get(ordinary.id),
        "row of a body": rows.get(plain.id),
        "rows of children": [rows.get(child.task_id) for child in plain.batch.children()],
        "rows of children with results=backend": [rows.get(child.task_id) for child in kept.children()],
    }


if __name__ == "__main__":
    main(setup=setup, run=run)
