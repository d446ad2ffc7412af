"""The tables, to the step of ours that is named here, and what Django is to know of them."""

import django.db.models.deletion
from django.db import migrations, models

import celery_batchtrack.django.fields
from celery_batchtrack.django import tables

#: The newest of `celery_batchtrack/store/migrations` that this brings. A new one there needs a new migration here.
REVISION = "0004"


class Migration(migrations.Migration):
    initial = True

    dependencies: list[tuple[str, str]] = []

    operations = [
        migrations.RunPython(tables.migration_to(REVISION), tables.nothing),
        # As state only: the tables are there by now.
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.CreateModel(
                    name="Tally",
                    fields=[
                        (
                            "batch_id",
                            celery_batchtrack.django.fields.IdentifierField(primary_key=True, serialize=False),
                        ),
                    ],
                    options={
                        "db_table": "batchtrack_tally",
                        "default_permissions": ("view",),
                    },
                ),
                migrations.CreateModel(
                    name="Worker",
                    fields=[
                        ("id", celery_batchtrack.django.fields.IdentifierField(primary_key=True, serialize=False)),
                        ("kind", models.CharField(max_length=8)),
                        ("name", models.CharField(max_length=255)),
                        ("hostname", models.CharField(max_length=255)),
                        ("pid", models.BigIntegerField()),
                        ("pool", models.CharField(max_length=32)),
                        ("version", models.CharField(max_length=32)),
                        ("beat_at", models.DateTimeField()),
                        ("started_at", models.DateTimeField()),
                        ("stopped_at", models.DateTimeField(blank=True, null=True)),
                        ("lost_at", models.DateTimeField(blank=True, null=True)),
                    ],
                    options={
                        "db_table": "batchtrack_worker",
                        "default_permissions": ("view",),
                    },
                ),
                migrations.CreateModel(
                    name="Batch",
                    fields=[
                        ("id", celery_batchtrack.django.fields.IdentifierField(primary_key=True, serialize=False)),
                        ("name", models.CharField(max_length=255)),
                        ("status", models.CharField(max_length=16)),
                        ("reason", models.CharField(blank=True, max_length=16, null=True)),
                        ("round", models.SmallIntegerField()),
                        ("parent_task_id", models.CharField(blank=True, max_length=255, null=True)),
                        ("parent_task", models.CharField(blank=True, max_length=255, null=True)),
                        ("description", models.TextField(blank=True, null=True)),
                        ("tags", models.JSONField(blank=True, null=True)),
                        ("metadata", models.JSONField(blank=True, null=True)),
                        ("options", models.JSONField()),
                        ("deadline_at", models.DateTimeField(blank=True, null=True)),
                        ("created_at", models.DateTimeField()),
                        ("sealed_at", models.DateTimeField(blank=True, null=True)),
                        ("paused_at", models.DateTimeField(blank=True, null=True)),
                        ("pause_reason", models.CharField(blank=True, max_length=255, null=True)),
                        ("started_at", models.DateTimeField(blank=True, null=True)),
                        ("finished_at", models.DateTimeField(blank=True, null=True)),
                        (
                            "parent",
                            models.ForeignKey(
                                blank=True,
                                db_column="parent_batch",
                                db_constraint=False,
                                null=True,
                                on_delete=django.db.models.deletion.DO_NOTHING,
                                related_name="nested",
                                to="celery_batchtrack.batch",
                            ),
                        ),
                    ],
                    options={
                        "verbose_name_plural": "batches",
                        "db_table": "batchtrack_batch",
                        "default_permissions": ("view",),
                    },
                ),
                migrations.CreateModel(
                    name="Child",
                    fields=[
                        ("task_id", models.CharField(max_length=255, primary_key=True, serialize=False)),
                        ("position", models.BigIntegerField()),
                        ("kind", models.CharField(max_length=16)),
                        ("round", models.SmallIntegerField()),
                        ("task", models.CharField(max_length=255)),
                        ("status", models.CharField(max_length=16)),
                        ("cause", models.CharField(blank=True, max_length=32, null=True)),
                        ("attempt", models.IntegerField()),
                        ("crashes", models.SmallIntegerField()),
                        ("items", models.JSONField(blank=True, null=True)),
                        ("item_count", models.IntegerField()),
                        ("queue", models.CharField(blank=True, max_length=255, null=True)),
                        ("created_at", models.DateTimeField()),
                        ("dispatched_at", models.DateTimeField(blank=True, null=True)),
                        ("started_at", models.DateTimeField(blank=True, null=True)),
                        ("finished_at", models.DateTimeField(blank=True, null=True)),
                        (
                            "batch",
                            models.ForeignKey(
                                db_constraint=False,
                                on_delete=django.db.models.deletion.DO_NOTHING,
                                related_name="children",
                                to="celery_batchtrack.batch",
                            ),
                        ),
                    ],
                    options={
                        "verbose_name_plural": "children",
                        "db_table": "batchtrack_child",
                        "ordering": ["batch_id", "position"],
                        "default_permissions": ("view",),
                    },
                ),
                migrations.CreateModel(
                    name="Incident",
                    fields=[
                        ("id", celery_batchtrack.django.fields.IdentifierField(primary_key=True, serialize=False)),
                        ("position", models.BigIntegerField()),
                        ("attempt", models.IntegerField()),
                        ("outcome", models.CharField(max_length=16)),
                        ("cause", models.CharField(max_length=32)),
                        ("phase", models.CharField(max_length=16)),
                        ("signal", models.CharField(blank=True, max_length=16, null=True)),
                        ("exit_code", models.IntegerField(blank=True, null=True)),
                        ("message", models.TextField(blank=True, null=True)),
                        ("exception", models.CharField(blank=True, max_length=255, null=True)),
                        ("traceback", models.TextField(blank=True, null=True)),
                        ("stack", models.TextField(blank=True, null=True)),
                        ("python_frame", models.CharField(blank=True, max_length=255, null=True)),
                        ("item", models.CharField(blank=True, max_length=255, null=True)),
                        ("note", models.TextField(blank=True, null=True)),
                        ("hostname", models.CharField(blank=True, max_length=255, null=True)),
                        ("worker", models.CharField(blank=True, max_length=255, null=True)),
                        ("pid", models.BigIntegerField(blank=True, null=True)),
                        ("queue", models.CharField(blank=True, max_length=255, null=True)),
                        ("detected_by", models.CharField(blank=True, max_length=16, null=True)),
                        ("died_at", models.DateTimeField(blank=True, null=True)),
                        ("detected_at", models.DateTimeField()),
                        ("overturned_at", models.DateTimeField(blank=True, null=True)),
                        (
                            "batch",
                            models.ForeignKey(
                                db_constraint=False,
                                on_delete=django.db.models.deletion.DO_NOTHING,
                                related_name="incidents",
                                to="celery_batchtrack.batch",
                            ),
                        ),
                    ],
                    options={
                        "db_table": "batchtrack_incident",
                        "default_permissions": ("view",),
                    },
                ),
            ]
        ),
    ]
