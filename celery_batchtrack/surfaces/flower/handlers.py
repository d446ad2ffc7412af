"""The pages: batches, one batch, one child, crashes, workers, health; and the buttons on them."""

from __future__ import annotations

from typing import Any

from tornado.routing import URLSpec
from tornado.web import StaticFileHandler, authenticated

from celery_batchtrack import errors
from celery_batchtrack.store import Store
from celery_batchtrack.surfaces import jsonio, reading
from celery_batchtrack.surfaces.flower import actions, table
from celery_batchtrack.surfaces.flower.base import STATIC, PageHandler, Problem, answering
from celery_batchtrack.vocabulary.states import Status

#: Seconds between two refreshes of a page, while somebody looks at it.
LIVE, SLOW = 2.0, 5.0
#: Seconds that the findings of a scan are shown, and that one may take.
SCAN_KEPT, SCAN_PATIENCE = 300.0, 1.0
BATCHES_PER_PAGE, CHILDREN_PER_PAGE = 25, 50
FILTERS = ("status", "item", "worker", "fingerprint")
SCAN = ("invariants",)


class Batches(PageHandler):
    name = "batches"

    @authenticated
    @answering
    async def get(self) -> None:
        chip, search = self.asked("chip") or "attention", (self.asked("search") or "").strip()[:500]
        if chip not in reading.CHIPS:
            raise Problem(404, "Not found", f"There is no list {chip[:40]!r}: there are {', '.join(reading.CHIPS)}.")
        after = self.asked("after")
        found, now = await self.reading(
            ("batches", chip, search, after),
            lambda store: (
                reading.batch_list(store, chip=chip, search=search, after=after, limit=BATCHES_PER_PAGE),
                store.current_time(),
            ),
        )
        self.show("Batches", every=LIVE if after is None else SLOW, found=found, now=now, chips=reading.CHIPS)


class OneBatch(PageHandler):
    name = "batch"

    @authenticated
    @answering
    async def get(self, text: str) -> None:
        batch_id = await self.batch_id(text)
        chosen = child_filters(self)
        key = ("batch", batch_id, *chosen.values())

        def read(store: Store) -> Any:
            children = reading.child_list(store, batch_id, **chosen, limit=CHILDREN_PER_PAGE)
            return reading.batch_page(store, batch_id), children, store.current_time()

        page, children, now = await self.reading(key, read)
        batch = page["batch"]
        busy = batch["finished_at"] is None or any(each["finished_at"] is None for each in page["callbacks"])
        self.show(
            str(batch["name"]), every=LIVE if busy else 0.0, page=page, batch=batch, children=children, now=now,
            chosen={name: value for name, value in chosen.items() if name != "after" and value},
            statuses=[str(each) for each in Status], confirm=self.asked("confirm"),
        )  # fmt: skip

    @authenticated
    @answering
    async def post(self, text: str) -> None:
        self.guard_action()
        batch_id = await self.batch_id(text)
        name = self.get_body_argument("action", "")
        if name not in actions.ON_BATCH:
            raise Problem(400, "Not understood", f"There is no action {name[:40]!r}.")
        options = {key: ",".join(self.get_body_arguments(key)) for key in ("only", "queue")}
        if self.asked("callbacks"):
            options = {"callbacks": "1"}
        extension, who = self.extension, self.who
        try:
            done = await self.snapshots.act(lambda: actions.on_batch(extension, name, batch_id, options, who))
        except (errors.BatchStateError, errors.InvalidOption) as error:
            self.leave_message("refused", f"Not done: {error}")
        else:
            self.leave_message("done" if done.changed else "refused", done.text)
        self.redirect(self.reverse_url("bt_batch", str(batch_id)), status=303)


def child_filters(handler: Any) -> dict[str, Any]:
    """What a list of children is narrowed down by, from the address."""
    chosen: dict[str, Any] = {name: handler.asked(name) for name in FILTERS}
    if chosen["status"] is not None and chosen["status"] not in list(Status):
        raise Problem(400, "Not understood", f"There is no status {chosen['status'][:40]!r}.")
    return {**chosen, "after": handler.asked_number("after")}


class BatchJson(PageHandler):
    """All that the page of a batch shows."""

    @authenticated
    @answering
    async def get(self, text: str) -> None:
        batch_id = await self.batch_id(text)
        found = await self.reading(("json", batch_id), lambda store: reading.batch_page(store, batch_id))
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.finish(jsonio.dumps(found, indent=2) + "\n")


class ChildrenCsv(PageHandler):
    """The children of a batch that the filters leave."""

    @authenticated
    @answering
    async def get(self, text: str) -> None:
        batch_id = await self.batch_id(text)
        await table.send_children(self, batch_id, child_filters(self))


class OneChild(PageHandler):
    name = "child"

    @authenticated
    @answering
    async def get(self, text: str, number: str) -> None:
        key = await self.child_key(text, number)
        page, now = await self.reading(
            ("child", key),
            lambda store: (reading.child_page(store, key.batch_id, key.position), store.current_time()),
        )
        child = page["child"]
        page = {**page, "repro": page["repro"].replace("<app>", self.application.batchtrack_app or "<app>")}
        title = f"#{key.position} of {page['batch']['name']}"
        self.show(title, every=LIVE if child["finished_at"] is None else 0.0, page=page, child=child, now=now)


class Crashes(PageHandler):
    name = tab = "crashes"

    @authenticated
    @answering
    async def get(self) -> None:
        chosen = {name: self.asked(name) for name in ("task", "signal", "host")}
        found, now = await self.reading(
            ("crashes", *chosen.values()), lambda store: (reading.crashes(store, **chosen), store.current_time())
        )
        self.show("Crashes", every=SLOW, found=found, chosen=chosen, now=now)


class Release(PageHandler):
    @authenticated
    @answering
    async def post(self) -> None:
        self.guard_action()
        options = {name: self.get_body_argument(name, "", strip=False) for name in ("item", "task")}
        extension, who = self.extension, self.who
        done = await self.snapshots.act(lambda: actions.release_item(extension, options, who))
        self.leave_message("done" if done.changed else "refused", done.text)
        self.redirect(self.reverse_url("bt_crashes"), status=303)


class Workers(PageHandler):
    name = tab = "workers"

    @authenticated
    @answering
    async def get(self) -> None:
        everyone = self.asked("all") == "1"
        found, now = await self.reading(
            ("workers",), lambda store: (reading.workers(store)["workers"], store.current_time())
        )
        shown = [each for each in found if everyone or each["state"] in ("alive", "suspected")]
        self.show("Workers", every=SLOW, workers=shown, hidden=len(found) - len(shown), everyone=everyone, now=now)


class Health(PageHandler):
    name = tab = "health"

    @authenticated
    @answering
    async def get(self) -> None:
        settings = self.extension.settings
        found = await self.reading(("health",), lambda store: reading.health(store, settings))
        if self.asked("check") == "1":
            await self._scan()
        self.show(
            "Health", every=LIVE if self.snapshots.asked(SCAN) else SLOW, found=found, now=found["current_time"],
            scan=self.snapshots.peek(SCAN), scanning=self.snapshots.asked(SCAN),
        )  # fmt: skip

    async def _scan(self) -> None:
        """A look at all rows: on demand, for all who look, and nobody waits for it."""
        try:
            await self.reading(SCAN, reading.invariants, keep=SCAN_KEPT, patience=SCAN_PATIENCE)
        except errors.DatabaseUnavailable:
            if not self.snapshots.asked(SCAN):
                raise


class Sql(PageHandler):
    """The text of a view."""

    name = "sql"

    @authenticated
    @answering
    async def get(self, view: str) -> None:
        found = await self.reading(("sql", view), lambda store: store.view_query(view))
        self.show(f"batchtrack_{view}", view=view, text=found)


def urls() -> list[URLSpec]:
    return [
        URLSpec(r"/batches", Batches, name="bt_batches"),
        URLSpec(r"/batches/crashes", Crashes, name="bt_crashes"),
        URLSpec(r"/batches/release", Release, name="bt_release"),
        URLSpec(r"/batches/workers", Workers, name="bt_workers"),
        URLSpec(r"/batches/health", Health, name="bt_health"),
        URLSpec(r"/batches/sql/([a-z_]+)", Sql, name="bt_sql"),
        URLSpec(r"/batch/([^/]+)", OneBatch, name="bt_batch"),
        URLSpec(r"/batch/([^/]+)/json", BatchJson, name="bt_batch_json"),
        URLSpec(r"/batch/([^/]+)/children\.csv", ChildrenCsv, name="bt_children_csv"),
        URLSpec(r"/batch/([^/]+)/([0-9]+)", OneChild, name="bt_child"),
        URLSpec(r"/batchtrack/static/(.*)", StaticFileHandler, {"path": str(STATIC)}, name="bt_static"),
    ]


__all__ = ["child_filters", "urls"]
