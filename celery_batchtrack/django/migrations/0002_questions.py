"""Counts of what ended, indexes and views; and tables that Django is to empty between two tests."""

from django.db import migrations, models

import celery_batchtrack.django.fields
from celery_batchtrack.django import tables

#: The newest of `celery_batchtrack/store/migrations` that this brings. A new one there needs a new migration here.
REVISION = "0005"


class Migration(migrations.Migration):
    dependencies = [("celery_batchtrack", "0001_initial")]

    operations = [
        migrations.RunPython(tables.migration_to(REVISION), tables.nothing),
        # As state only: the tables are there by now.
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.CreateModel(
                    name="Outcome",
                    fields=[
                        (
                            "batch_id",
                            celery_batchtrack.django.fields.IdentifierField(primary_key=True, serialize=False),
                        ),
                    ],
                    options={
                        "db_table": "batchtrack_outcome",
                        "default_permissions": ("view",),
                    },
                ),
                migrations.CreateModel(
                    name="QuarantinedItem",
                    fields=[
                        ("task", models.CharField(max_length=255, primary_key=True, serialize=False)),
                    ],
                    options={
                        "db_table": "batchtrack_quarantine",
                        "default_permissions": ("view",),
                    },
                ),
            ],
        ),
    ]
