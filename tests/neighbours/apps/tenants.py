"""A shop with a schema for each customer: django-tenants, and tenant-schemas-celery's app."""

from __future__ import annotations

import os
from typing import Any

import django
import sqlalchemy as sa
from celery import Celery, Task
from django.conf import settings

url = sa.make_url(os.environ["SHOP_DATABASE"])
SHARED = ["django_tenants", "django.contrib.contenttypes", "tests.neighbours.apps.customers"]
settings.configure(
    INSTALLED_APPS=SHARED, SHARED_APPS=SHARED, TENANT_APPS=["django.contrib.contenttypes"],
    TENANT_MODEL="customers.Client", TENANT_DOMAIN_MODEL="customers.Domain",
    DATABASE_ROUTERS=("django_tenants.routers.TenantSyncRouter",), DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    DATABASES={
        "default": {
            "ENGINE": "django_tenants.postgresql_backend", "NAME": url.database, "USER": url.username,
            "HOST": url.host, "PORT": url.port,
        },
    },
)  # fmt: skip
django.setup()

from django.db import connection  # noqa: E402
from django_tenants.utils import schema_context  # noqa: E402
from tenant_schemas_celery.app import CeleryApp  # noqa: E402
from tenant_schemas_celery.task import TenantTask  # noqa: E402

from celery_batchtrack import Batch, BatchTrack  # noqa: E402
from tests.neighbours.apps.customers.models import Client, Domain  # noqa: E402
from tests.neighbours.apps.kit import configured, filled, main, swept  # noqa: E402

app = configured(CeleryApp("shop", set_as_current=False))
BatchTrack(app)


def current_schema() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_schema()")
        return str(cursor.fetchone()[0])


@app.task(bind=True, name="shop.see", shared=False)
def see(self: Task, name: str) -> list[Any]:
    """The schema that the database works in, and the one in the message."""
    return [current_schema(), self.request.get("_schema_name")]


@app.task(bind=True, name="shop.again", shared=False)
def again(self: Task, name: str) -> list[Any]:
    """Runs a second time."""
    if not self.request.retries:
        raise self.retry(countdown=0)
    return [current_schema(), self.request.get("_schema_name")]


def setup() -> None:
    with connection.schema_editor() as editor:
        editor.create_model(Client)
        editor.create_model(Domain)
    for name in ("one", "two", "third"):
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE SCHEMA {name}")
        Client(name=name, schema_name=name).save()


def create() -> str:
    batch = filled(app, see, lambda: schema_context("one"), lambda: schema_context("two"))
    swept(app, batch, lambda: schema_context("third"))
    return str(batch.id)


def public() -> str:
    """Created in the public schema, with a child of a tenant."""
    batch = filled(app, see, lambda: schema_context("public"), lambda: schema_context("two"))
    swept(app, batch, lambda: schema_context("third"))
    return str(batch.id)


def uncaptured() -> str:
    """Created where nothing is known of tenants."""
    take, app.batchtrack.captures.take = app.batchtrack.captures.take, dict
    batch = filled(app, see, lambda: schema_context("one"), lambda: schema_context("two"))
    app.batchtrack.captures.take = take
    swept(app, batch, lambda: schema_context("third"))
    return str(batch.id)


def mixed() -> str:
    """Children of two customers in one window of one: each is sent by the end of one of the other's."""
    with schema_context("one"), Batch("mixed", app=app, max_in_flight=1) as batch:
        for at in range(6):
            with schema_context("two" if at % 2 else "one"):
                batch.add(see.si("mixed"))
    return str(batch.id)


def ordinary() -> list[str]:
    with schema_context("one"):
        own = Batch.create("own", [see.si("own"), again.si("again")], app=app)
    app.conf.task_always_eager = True  # for the rest of this script
    with schema_context("two"):
        eager = Batch.create("eager", [see.si("own")], app=app)
    return [str(own.id), str(eager.id)]


def by_class() -> Any:
    """An app of Celery's own, with tasks of tenant-schemas-celery's class."""
    other = configured(Celery("other", set_as_current=False))
    BatchTrack(other)
    with schema_context("one"):
        before = other.batchtrack.captures.take()
        other.task(name="other.task", base=TenantTask, shared=False)(see.run)
        other.finalize()
        return [before, other.batchtrack.captures.take()]


if __name__ == "__main__":
    main(
        setup=setup, create=create, public=public, mixed=mixed, ordinary=ordinary, uncaptured=uncaptured,
        by_class=by_class,
    )  # fmt: skip
