"""The tracking tables as models, to read from: ``Batch.objects.filter(status="failed")``. What is written in them is
written by the package.

Django makes and alters nothing here: its migrations hold these models as state only. Yet they are not
``managed = False``, since `flush`, by which a TransactionTestCase cleans up, would leave them out: batches would stay
from test to test, and PostgreSQL truncates no table of an owner while ours, which refers to it, is left.
"""

from __future__ import annotations

from django.db import models

from .fields import IdentifierField


class _OfTheTables(models.Model):
    class Meta:
        abstract = True
        default_permissions = ("view",)


class Batch(_OfTheTables):
    id = IdentifierField(primary_key=True)
    name = models.CharField(max_length=255)
    status = models.CharField(max_length=16)
    reason = models.CharField(max_length=16, null=True, blank=True)
    round = models.SmallIntegerField()
    parent = models.ForeignKey(
        "self", models.DO_NOTHING, db_column="parent_batch", db_constraint=False, null=True, blank=True,
        related_name="nested",
    )  # fmt: skip
    parent_task_id = models.CharField(max_length=255, null=True, blank=True)
    parent_task = models.CharField(max_length=255, null=True, blank=True)
    description = models.TextField(null=True, blank=True)
    tags = models.JSONField(null=True, blank=True)
    metadata = models.JSONField(null=True, blank=True)
    options = models.JSONField()
    deadline_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField()
    sealed_at = models.DateTimeField(null=True, blank=True)
    paused_at = models.DateTimeField(null=True, blank=True)
    pause_reason = models.CharField(max_length=255, null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta(_OfTheTables.Meta):
        db_table = "batchtrack_batch"
        verbose_name_plural = "batches"

    def __str__(self) -> str:
        return f"{self.name} {str(self.pk)[:8]}"


class Child(_OfTheTables):
    """Its key is (batch, position). Django is told another one: many of its versions have no such keys. Arguments and
    results, customers' data, are left out."""

    task_id = models.CharField(max_length=255, primary_key=True)
    batch = models.ForeignKey(Batch, models.DO_NOTHING, db_constraint=False, related_name="children")
    position = models.BigIntegerField()
    kind = models.CharField(max_length=16)
    round = models.SmallIntegerField()
    task = models.CharField(max_length=255)
    status = models.CharField(max_length=16)
    cause = models.CharField(max_length=32, null=True, blank=True)
    attempt = models.IntegerField()
    crashes = models.SmallIntegerField()
    items = models.JSONField(null=True, blank=True)
    item_count = models.IntegerField()
    queue = models.CharField(max_length=255, null=True, blank=True)
    created_at = models.DateTimeField()
    dispatched_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta(_OfTheTables.Meta):
        db_table = "batchtrack_child"
        verbose_name_plural = "children"
        ordering = ["batch_id", "position"]

    def __str__(self) -> str:
        return f"#{self.position} {self.task}"


class Incident(_OfTheTables):
    id = IdentifierField(primary_key=True)
    batch = models.ForeignKey(Batch, models.DO_NOTHING, db_constraint=False, related_name="incidents")
    position = models.BigIntegerField()
    attempt = models.IntegerField()
    outcome = models.CharField(max_length=16)
    cause = models.CharField(max_length=32)
    phase = models.CharField(max_length=16)
    signal = models.CharField(max_length=16, null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    message = models.TextField(null=True, blank=True)
    exception = models.CharField(max_length=255, null=True, blank=True)
    traceback = models.TextField(null=True, blank=True)
    stack = models.TextField(null=True, blank=True)
    python_frame = models.CharField(max_length=255, null=True, blank=True)
    item = models.CharField(max_length=255, null=True, blank=True)
    note = models.TextField(null=True, blank=True)
    hostname = models.CharField(max_length=255, null=True, blank=True)
    worker = models.CharField(max_length=255, null=True, blank=True)
    pid = models.BigIntegerField(null=True, blank=True)
    queue = models.CharField(max_length=255, null=True, blank=True)
    detected_by = models.CharField(max_length=16, null=True, blank=True)
    died_at = models.DateTimeField(null=True, blank=True)
    detected_at = models.DateTimeField()
    overturned_at = models.DateTimeField(null=True, blank=True)

    class Meta(_OfTheTables.Meta):
        db_table = "batchtrack_incident"

    def __str__(self) -> str:
        return f"#{self.position} {self.outcome}: {self.signal or self.cause}"


class Worker(_OfTheTables):
    id = IdentifierField(primary_key=True)
    kind = models.CharField(max_length=8)
    name = models.CharField(max_length=255)
    hostname = models.CharField(max_length=255)
    pid = models.BigIntegerField()
    pool = models.CharField(max_length=32)
    version = models.CharField(max_length=32)
    beat_at = models.DateTimeField()
    started_at = models.DateTimeField()
    stopped_at = models.DateTimeField(null=True, blank=True)
    lost_at = models.DateTimeField(null=True, blank=True)

    class Meta(_OfTheTables.Meta):
        db_table = "batchtrack_worker"

    def __str__(self) -> str:
        return str(self.name)


class Tally(_OfTheTables):
    """Counts, by shard: read them through `Batch.progress()` of the package."""

    batch_id = IdentifierField(primary_key=True)

    class Meta(_OfTheTables.Meta):
        db_table = "batchtrack_tally"


class Outcome(_OfTheTables):
    """Counts of what ended: read them through the view `batchtrack_outcome_per_hour`."""

    batch_id = IdentifierField(primary_key=True)

    class Meta(_OfTheTables.Meta):
        db_table = "batchtrack_outcome"


class QuarantinedItem(_OfTheTables):
    """Items that killed: read them by `batchtrack quarantine list`."""

    task = models.CharField(max_length=255, primary_key=True)

    class Meta(_OfTheTables.Meta):
        db_table = "batchtrack_quarantine"
