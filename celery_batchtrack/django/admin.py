"""Read-only pages of batches, their children, incidents and workers.

Every page asks the database for what it shows and no more: progress comes from the tally, of all batches of a page at
once; pages are counted no further than `_COUNTED` rows; a batch's page shows its worst children, found by their
incidents, and not all of a million.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Paginator
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.functional import cached_property
from django.utils.html import format_html, format_html_join

from celery_batchtrack.vocabulary.states import BatchStatus, Kind, Status

from . import tables
from .models import Batch, Child, Incident, Worker

_COUNTED = 10_000
_SHOWN = 100
#: The time stamp of a time-ordered id, as the command line shows it.
_SHORT_ID = 13


class _Pages(Paginator):
    """Counts no more rows than anybody turns pages for."""

    @cached_property
    def count(self) -> int:
        return int(self.object_list.order_by()[:_COUNTED].count())


class _ReadOnly(admin.ModelAdmin):
    """Of a table in the tracking database; not there if that is none of Django's."""

    show_full_result_count = False
    paginator = _Pages
    list_per_page = 50
    actions = None

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).using(tables.tracking_alias())

    def has_module_permission(self, request: HttpRequest) -> bool:
        return tables.tracking_alias() is not None and super().has_module_permission(request)

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return tables.tracking_alias() is not None and super().has_view_permission(request, obj)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def _by(field: str, values: Iterable[Any], title: str | None = None) -> type[admin.SimpleListFilter]:
    """A filter by known values: Django's own would look through the table for them."""

    class _Filter(admin.SimpleListFilter):
        parameter_name = field

        def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
            return [(str(each), str(each)) for each in values]

        def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
            return queryset.filter(**{field: self.value()}) if self.value() else queryset

    _Filter.title = title or field
    return _Filter


def _ids_from(text: str) -> tuple[uuid.UUID, uuid.UUID] | None:
    """The first and the last id that begin so; None for what is no beginning of an id."""
    digits = text.replace("-", "").lower()
    if not 6 <= len(digits) <= 32 or set(digits) - set("0123456789abcdef"):
        return None
    return uuid.UUID(digits.ljust(32, "0")), uuid.UUID(digits.ljust(32, "f"))


# -- batches ---------------------------------------------------------------------------------------


class _BatchList(ChangeList):
    result_list: Any

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list = list(self.result_list)
        _with_progress(self.result_list)


def _with_progress(batches: list[Any]) -> None:
    """Counts of all of them, by one statement."""
    found = tables.extension()
    known: Mapping[uuid.UUID, Any] = {}
    if found is not None:
        known = {each.batch_id: each for each in found.store.progress_of([batch.pk for batch in batches])}
    for batch in batches:
        batch.counts = known.get(batch.pk)


def _count(name: str) -> Any:
    @admin.display(description=name)
    def count(self: Any, batch: Batch) -> Any:
        counts = getattr(batch, "counts", None)
        return None if counts is None else getattr(counts, name)

    return count


@admin.register(Batch)
class BatchAdmin(_ReadOnly):
    list_display = ("name", "short_id", "status", "progress", "total", "failed", "crashed", "created_at", "finished_at")
    list_filter = (_by("status", BatchStatus), "created_at")
    search_fields = ("name",)
    search_help_text = "Name, tag, or the first digits of an id"
    ordering = ("-created_at",)
    fields = (
        "name", "id", "status", "reason", "progress", "total", "completed", "failed", "crashed", "cancelled", "round",
        "parent", "parent_task", "parent_task_id", "description", "tags", "metadata", "options", "created_at",
        "started_at", "finished_at", "deadline_at", "paused_at", "pause_reason", "worst_children", "incidents",
    )  # fmt: skip
    readonly_fields = (
        "progress", "total", "completed", "failed", "crashed", "cancelled", "worst_children", "incidents"
    )  # fmt: skip
    total, completed, failed = _count("total"), _count("completed"), _count("failed")
    crashed, cancelled = _count("crashed"), _count("cancelled")

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return _BatchList

    def get_object(self, request: HttpRequest, object_id: str, from_field: Any = None) -> Any:
        found = super().get_object(request, object_id, from_field)
        if found is not None:
            _with_progress([found])
        return found

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        term = search_term.strip()
        if not term:
            return queryset, False
        wanted = Q(name__icontains=term) | Q(pk__in=self._tagged(term))
        ids = _ids_from(term)
        if ids is not None:
            wanted |= Q(pk__gte=ids[0], pk__lte=ids[1])
        return queryset.filter(wanted), False

    def _tagged(self, tag: str) -> list[uuid.UUID]:
        found = tables.extension()
        return [] if found is None else found.store.list_batches(tags=(tag,), limit=_SHOWN)

    @admin.display(description="id", ordering="id")
    def short_id(self, batch: Batch) -> str:
        return str(batch.pk)[:_SHORT_ID]

    @admin.display(description="progress")
    def progress(self, batch: Any) -> Any:
        counts = getattr(batch, "counts", None)
        if counts is None:
            return None
        return format_html('<progress value="{0}" max="100"></progress> {0} %', counts.percent)

    @admin.display(description="children")
    def worst_children(self, batch: Batch) -> Any:
        shown = _worst(batch)
        rows = ((_child_link(each), each.status, each.cause or "", _short(each.items)) for each in shown)
        table = format_html_join("", "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>", rows)
        everything = f"{reverse('admin:celery_batchtrack_child_changelist')}?batch_id={batch.pk}"
        return format_html('<table>{}</table><a href="{}">all children</a>', table, everything)

    @admin.display(description="incidents")
    def incidents(self, batch: Any) -> Any:
        found = batch.incidents.defer(*_LONG).order_by("detected_at")[:_SHOWN]
        rows = (
            (_incident_link(each), each.outcome, each.signal or each.cause, each.item or "", each.python_frame or "")
            for each in found
        )
        return format_html(
            "<table>{}</table>",
            format_html_join("", "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>", rows),
        )


#: How children are ordered on their batch's page.
_WORST_FIRST = [Status.CRASHED, Status.FAILED, Status.CANCELLED, Status.RUNNING, Status.PENDING]


def _worst(batch: Any) -> list[Any]:
    """Some children: those with incidents, those that run, and the first ones."""
    unhappy = batch.incidents.values_list("position", flat=True).order_by("position").distinct()[:_SHOWN]
    # In no order: else the index of what is open would not be used.
    running = batch.children.filter(kind=Kind.CHILD, status=Status.RUNNING).order_by()[:_SHOWN]
    found = {each.position: each for each in batch.children.filter(position__in=list(unhappy))}
    found.update((each.position, each) for each in running)
    found.update((each.position, each) for each in batch.children.filter(kind=Kind.CHILD)[:20])
    rank = {str(status): at for at, status in enumerate(_WORST_FIRST)}
    ordered = sorted(found.values(), key=lambda each: (rank.get(each.status, len(rank)), each.position))
    return ordered[:_SHOWN]


def _short(items: Any) -> str:
    text = ", ".join(map(str, items or ()))
    return text if len(text) <= 80 else f"{text[:79]}…"


def _child_link(child: Any) -> Any:
    key = f"{child.batch_id}-{child.position}"
    return format_html('<a href="{}">{}</a>', reverse("admin:celery_batchtrack_child_change", args=[key]), child)


def _incident_link(incident: Any) -> Any:
    place = reverse("admin:celery_batchtrack_incident_change", args=[incident.pk])
    return format_html('<a href="{}">#{}</a>', place, incident.position)


# -- what is in them -------------------------------------------------------------------------------


def _batch_link(row: Any) -> Any:
    place = reverse("admin:celery_batchtrack_batch_change", args=[row.batch_id])
    return format_html('<a href="{}">{}</a>', place, str(row.batch_id)[:_SHORT_ID])


class _OfOneBatch(admin.SimpleListFilter):
    title, parameter_name = "batch", "batch_id"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(self.value() or "", f"batch {self.value()}")] if self.value() else []

    def has_output(self) -> bool:
        return bool(self.value())

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if not self.value():
            return queryset
        with contextlib.suppress(ValueError):
            return queryset.filter(batch_id=uuid.UUID(str(self.value())))
        return queryset.none()

    def choices(self, changelist: Any) -> Any:
        return super().choices(changelist) if self.value() else iter(())


class _OfABatch(_ReadOnly):
    @admin.display(description="batch")
    def of_batch(self, row: Any) -> Any:
        return _batch_link(row)


@admin.register(Child)
class ChildAdmin(_OfABatch):
    """Found by batch and position, which have an index; task ids have none."""

    list_display = ("link", "of_batch", "kind", "status", "cause", "attempt", "crashes", "started_at", "finished_at")
    list_display_links = None
    list_filter = (_OfOneBatch, _by("status", Status))
    fields = (
        "of_batch", "position", "task", "task_id", "kind", "status", "cause", "round", "attempt", "crashes", "items",
        "item_count", "queue", "created_at", "dispatched_at", "started_at", "finished_at",
        "incidents",
    )  # fmt: skip
    readonly_fields = ("of_batch", "incidents")

    def get_ordering(self, request: HttpRequest) -> tuple[str, ...]:
        """As the primary key has them, so that nothing is sorted."""
        return ("batch_id", "position") if request.GET.get("batch_id") else ("-batch_id", "-position")

    def get_object(self, request: HttpRequest, object_id: str, from_field: Any = None) -> Any:
        batch_id, _, position = object_id.rpartition("-")
        with contextlib.suppress(ValueError):
            return self.get_queryset(request).filter(batch_id=uuid.UUID(batch_id), position=int(position)).first()
        return None

    @admin.display(description="child")
    def link(self, child: Child) -> Any:
        return _child_link(child)

    @admin.display(description="incidents")
    def incidents(self, child: Any) -> Any:
        found = child.batch.incidents.defer(*_LONG).filter(position=child.position).order_by("detected_at")
        return format_html_join(", ", "{}", ((format_html("{} {}", _incident_link(each), each),) for each in found))


#: Some 20 kB each: only an incident's own page shows them.
_LONG = ("stack", "traceback")


@admin.register(Incident)
class IncidentAdmin(_OfABatch):
    list_display = ("__str__", "of_batch", "item", "python_frame", "hostname", "detected_by", "detected_at")
    list_filter = (
        _OfOneBatch, _by("outcome", (Status.CRASHED, Status.FAILED, Status.CANCELLED, Status.PENDING)), "detected_at"
    )  # fmt: skip
    search_fields = ("item", "python_frame")
    ordering = ("-detected_at",)
    fields = (
        "of_batch", "of_child", "outcome", "cause", "signal", "exit_code", "item", "python_frame", "message",
        "exception", "note", "attempt", "phase", "hostname", "worker", "pid", "queue", "detected_by", "died_at",
        "detected_at", "overturned_at", "stack", "traceback",
    )  # fmt: skip
    readonly_fields = ("of_batch", "of_child")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).defer(*_LONG)

    @admin.display(description="child")
    def of_child(self, incident: Any) -> Any:
        place = reverse("admin:celery_batchtrack_child_change", args=[f"{incident.batch_id}-{incident.position}"])
        return format_html('<a href="{}">#{}</a>', place, incident.position)


@admin.register(Worker)
class WorkerAdmin(_ReadOnly):
    list_display = ("name", "kind", "hostname", "pid", "pool", "beat_at", "started_at", "stopped_at", "lost_at")
    list_filter = (_by("kind", ("worker", "client")),)
    search_fields = ("name", "hostname")
    ordering = ("-started_at",)
