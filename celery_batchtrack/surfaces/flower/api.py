"""REST: what the pages show as JSON, under ``/api/batchtrack/``, and what their buttons do."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tornado.routing import URLSpec
from tornado.web import authenticated

from celery_batchtrack.store import Store
from celery_batchtrack.store.views import VIEWS
from celery_batchtrack.surfaces import reading
from celery_batchtrack.surfaces.flower import actions, table
from celery_batchtrack.surfaces.flower.base import ApiHandler, Problem, answering
from celery_batchtrack.surfaces.flower.handlers import SCAN, SCAN_KEPT, child_filters
from celery_batchtrack.surfaces.flower.table import PATIENCE

MOST_ROWS = 10_000


class Batches(ApiHandler):
    @authenticated
    @answering
    async def get(self) -> None:
        chip, search, after = self.asked("chip") or "all", self.asked("search") or "", self.asked("after")
        if chip not in reading.CHIPS:
            raise Problem(400, "", f"chip is one of {', '.join(reading.CHIPS)}, not {chip[:40]!r}")
        limit = self.asked_limit(25, 500)
        found = await self.reading(
            ("batches", chip, search, after, limit),
            lambda store: reading.batch_list(store, chip=chip, search=search, after=after, limit=limit),
        )
        self.answer(found)


class OneBatch(ApiHandler):
    @authenticated
    @answering
    async def get(self, text: str) -> None:
        batch_id = await self.batch_id(text)
        self.answer(await self.reading(("json", batch_id), lambda store: reading.batch_page(store, batch_id)))


class Signatures(ApiHandler):
    @authenticated
    @answering
    async def get(self, text: str) -> None:
        batch_id = await self.batch_id(text)
        page = await self.reading(("json", batch_id), lambda store: reading.batch_page(store, batch_id))
        self.answer(page["signatures"])


class Children(ApiHandler):
    @authenticated
    @answering
    async def get(self, text: str) -> None:
        batch_id, chosen = await self.batch_id(text), child_filters(self)
        if self.asked("format") == "csv":
            await table.send_children(self, batch_id, chosen)
            return
        limit = self.asked_limit(50, MOST_ROWS)
        found = await self.reading(
            ("children", batch_id, limit, *chosen.values()), lambda store: _children(store, batch_id, chosen, limit)
        )
        self.answer(found)


def _children(store: Store, batch_id: uuid.UUID, chosen: Mapping[str, Any], limit: int) -> Any:
    found = reading.child_list(store, batch_id, **chosen, limit=limit)
    if not found["children"]:
        store.progress(batch_id)  # raises BatchNotFound
    return found


class OneChild(ApiHandler):
    @authenticated
    @answering
    async def get(self, text: str, number: str) -> None:
        key = await self.child_key(text, number)
        self.answer(
            await self.reading(
                ("child json", key), lambda store: reading.child_page(store, key.batch_id, key.position)
            )
        )


class Crashes(ApiHandler):
    @authenticated
    @answering
    async def get(self) -> None:
        chosen = {name: self.asked(name) for name in ("task", "signal", "host")}
        self.answer(
            await self.reading(("crashes json", *chosen.values()), lambda store: reading.crashes(store, **chosen))
        )


class Workers(ApiHandler):
    @authenticated
    @answering
    async def get(self) -> None:
        self.answer(await self.reading(("workers json",), reading.workers))


class Health(ApiHandler):
    """200 or 503, for probes that may authenticate."""

    @authenticated
    @answering
    async def get(self) -> None:
        settings = self.extension.settings
        found = await self.reading(("health json",), lambda store: reading.health(store, settings))
        self.answer(found, 200 if found["ok"] else 503)


class Invariants(ApiHandler):
    """A scan of all rows, at most every five minutes."""

    @authenticated
    @answering
    async def get(self) -> None:
        self.answer(await self.reading(SCAN, reading.invariants, keep=SCAN_KEPT, patience=PATIENCE))


class Views(ApiHandler):
    @authenticated
    @answering
    async def get(self) -> None:
        self.answer(
            [
                {"name": f"batchtrack_{view.name}", "summary": view.summary, "columns": list(view.columns)}
                for view in VIEWS.values()
            ]
        )


class OneView(ApiHandler):
    """Rows of a view. Any column is a parameter that they must equal; `limit`, `order_by`, `format=csv`."""

    @authenticated
    @answering
    async def get(self, name: str) -> None:
        name = name.removeprefix("batchtrack_")
        if name not in VIEWS:
            raise Problem(404, "", f"no view batchtrack_{name}: there are {', '.join(sorted(VIEWS))}")
        columns = list(VIEWS[name].columns)
        limit = self.asked_limit(100, MOST_ROWS)
        order = tuple(each for each in (self.asked("order_by") or "").split(",") if each)
        where = self._where(columns)
        rows = await self.reading(
            ("view", name, limit, order, *sorted((key, str(value)) for key, value in where.items())),
            lambda store: store.view(name, where, order_by=order, limit=limit),
        )
        if self.asked("format") == "csv":
            await table.send(self, f"batchtrack_{name}.csv", rows, columns)
        else:
            self.answer(rows)

    def _where(self, columns: list[str]) -> dict[str, Any]:
        known = {"limit", "order_by", "format"}
        asked = [name for name in self.request.query_arguments if name not in known]
        unknown = [name for name in asked if name not in columns]
        if unknown:
            raise Problem(400, "", f"the view has no column {unknown[0][:60]!r}: {', '.join(columns)}")
        return {name: typed(name, self.asked(name) or "") for name in asked}


#: Columns of text. Those that end so are ids, or moments; what else there is, is a number.
_TEXT = frozenset((
    "name", "status", "reason", "batch_name", "task", "task_id", "item", "signal", "cause", "python_frame", "stack",
    "message", "note", "outcome", "worker", "hostname", "queue", "detected_by", "verdict", "fingerprint", "exception",
    "traceback", "last_item", "kind", "pool", "version", "state", "lost_by", "slot", "worker_state", "detail",
    "check_name", "parent_task", "parent_task_id", "description", "pause_reason",
))  # fmt: skip
_IDS = ("batch_id", "worker_id", "incident_id", "parent_batch", "waits_on_batch")
_MOMENTS = ("_at", "time", "since", "not_before")
_NOT_COMPARED = ("items", "tags", "metadata")


def typed(name: str, text: str) -> Any:
    """A parameter's value as the column has it."""
    if name in _TEXT:
        return text
    if name in _NOT_COMPARED:
        raise Problem(400, "", f"{name} cannot be compared: ask with SQL")
    try:
        if name.endswith(_IDS):
            return uuid.UUID(text)
        if name.endswith(_MOMENTS):
            moment = datetime.fromisoformat(text)
            return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        if name.startswith("is_") or name == "isolated":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return _number(text)
    except (ValueError, KeyError, OverflowError):
        raise Problem(400, "", f"{name}={text[:60]!r} is nothing that {name} may be") from None


def _number(text: str) -> int | float:
    value = float(text)
    if abs(value) >= 2**31:  # more than the smallest of the columns can hold
        raise ValueError(text)
    return int(value) if value.is_integer() else value


class Act(ApiHandler):
    @authenticated
    @answering
    async def post(self, text: str, name: str) -> None:
        self.guard_action()
        batch_id = await self.batch_id(text)
        options = self.given(actions.OPTIONS)
        extension, who = self.extension, self.who
        done = await self.snapshots.act(lambda: actions.on_batch(extension, name, batch_id, options, who))
        self.answer({"message": done.text, **done.data})


class Release(ApiHandler):
    @authenticated
    @answering
    async def post(self) -> None:
        self.guard_action()
        options = self.given(("item", "task"))
        extension, who = self.extension, self.who
        done = await self.snapshots.act(lambda: actions.release_item(extension, options, who))
        self.answer({"message": done.text, **done.data}, 200 if done.changed else 404)


class Nothing(ApiHandler):
    @authenticated
    @answering
    async def get(self, rest: str) -> None:
        raise Problem(404, "", f"there is no /api/batchtrack/{rest[:80]}: see docs/flower.md")


def urls() -> list[URLSpec]:
    base = r"/api/batchtrack"
    batch = base + r"/batches/([^/]+)"
    return [
        URLSpec(base + r"/batches", Batches),
        URLSpec(batch, OneBatch),
        URLSpec(batch + r"/signatures", Signatures),
        URLSpec(batch + r"/children", Children),
        URLSpec(batch + r"/children/([0-9]+)", OneChild),
        URLSpec(batch + r"/(retry|cancel|pause|resume)", Act),
        URLSpec(base + r"/quarantine/release", Release),
        URLSpec(base + r"/crashes", Crashes),
        URLSpec(base + r"/workers", Workers),
        URLSpec(base + r"/health", Health),
        URLSpec(base + r"/invariants", Invariants),
        URLSpec(base + r"/views", Views),
        URLSpec(base + r"/views/([a-z_]+)", OneView),
        URLSpec(base + r"/(.*)", Nothing),
    ]
