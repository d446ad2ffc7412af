"""With django-structlog's receivers and its step of the worker."""

from __future__ import annotations

from typing import Any

import django
import structlog
from celery import Celery, Task
from django.conf import settings
from django_structlog.celery.steps import DjangoStructLogInitStep

from celery_batchtrack import Batch, BatchTrack
from tests.neighbours.apps.kit import configured, filled, main, swept

settings.configure(INSTALLED_APPS=["django_structlog"], DJANGO_STRUCTLOG_CELERY_ENABLED=True)
django.setup()

app = configured(Celery("logged", set_as_current=False))
app.steps["worker"].add(DjangoStructLogInitStep)
BatchTrack(app)


@app.task(bind=True, name="logged.see", shared=False)
def see(self: Task, name: str) -> dict[str, Any]:
    return structlog.contextvars.get_contextvars()


class Odd:
    def __repr__(self) -> str:
        return "odd"


def request(name: str) -> Any:
    return structlog.contextvars.bound_contextvars(user=name, **{f"only_{name}": Odd()})


def create() -> dict[str, Any]:
    with structlog.contextvars.bound_contextvars(task_id="the parent"):
        batch = filled(app, see, lambda: request("one"), lambda: request("two"))
    swept(app, batch, lambda: request("other"))
    return {"batch": str(batch.id)}


def silent() -> dict[str, Any]:
    batch = filled(app, see, lambda: structlog.contextvars.bound_contextvars(), lambda: request("two"))
    swept(app, batch, lambda: request("other"))
    return {"batch": str(batch.id)}


def ordinary() -> dict[str, Any]:
    with request("one"):
        return {"batch": str(Batch.create("own", [see.si("own")], app=app).id)}


if __name__ == "__main__":
    main(create=create, silent=silent, ordinary=ordinary)
