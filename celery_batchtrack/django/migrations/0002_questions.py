"""Counts of what ended, indexes and views. Nothing that Django is to know of."""

from django.db import migrations

from celery_batchtrack.django import tables

#: The newest of `celery_batchtrack/store/migrations` that this brings. A new one there needs a new migration here.
REVISION = "0005"


class Migration(migrations.Migration):
    dependencies = [("celery_batchtrack", "0001_initial")]

    operations = [migrations.RunPython(tables.migration_to(REVISION), tables.nothing)]
