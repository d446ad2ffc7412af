"""``celery -A app batchtrack …``. Every `celery` command imports this module: what is heavy is imported late."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from celery_batchtrack import errors
from celery_batchtrack.surfaces import (
    crash_cli,
    doctor_cli,
    flower_cli,
    jsonio,
    life_cli,
    metrics_cli,
    pages,
    view_cli,
    views,
    watch_cli,
)
from celery_batchtrack.surfaces.console import (
    READS,
    SCANS,
    acting,
    age,
    app_name,
    extension_of,
    metadata,
    put,
    put_json,
    put_lines,
    say,
    screen_of,
    storable,
    storables,
    store_of,
    until_stopped,
)
from celery_batchtrack.surfaces.group import DURATION, as_json, batchtrack, command
from celery_batchtrack.vocabulary.states import BatchStatus, Status

if TYPE_CHECKING:
    from celery_batchtrack.behaviour.detector import Sweep
    from celery_batchtrack.glue.extension import BatchTrack
    from celery_batchtrack.store import Store
    from celery_batchtrack.vocabulary.records import ChildRow

__all__ = ["batchtrack", "crash_cli", "doctor_cli", "flower_cli", "life_cli", "metrics_cli", "view_cli", "watch_cli"]


# -- looking --------------------------------------------------------------------------------------


@command("list", reads_for=READS)
@click.option("--status", "statuses", multiple=True, type=click.Choice([str(each) for each in BatchStatus]))
@click.option("--name", callback=storable, help="Only batches of exactly this name.")
@click.option("--tag", "tags", multiple=True, callback=storables, help="Only batches with this tag; may be repeated.")
@click.option("--meta", multiple=True, callback=metadata, metavar="KEY=VALUE", help="Only with this in their metadata.")
@click.option("--parent", help="Only batches nested in this one.")
@click.option("--since", **DURATION, help="Only those created in the last 24h, 7d, …")
@click.option("-n", "--limit", type=click.IntRange(1, 1_000_000), default=50, show_default=True)
@as_json
def list_(
    ctx: click.Context, statuses: tuple[str, ...], name: str | None, tags: tuple[str, ...], meta: dict[str, object],
    parent: str | None, since: float | None, limit: int, as_json: bool,
) -> None:  # fmt: skip
    """Batches, newest first."""
    store = store_of(ctx)
    ids = store.list_batches(
        statuses=statuses, name=name, tags=tags, metadata=meta, limit=limit,
        parent=None if parent is None else store.resolve(parent), since=since,
    )  # fmt: skip
    found = views.batches(store, ids)
    if as_json:
        put_json(found)
    else:
        put_lines(pages.batch_list(screen_of(ctx), list(found), store.current_time()), "no batches")


@command("show", reads_for=READS)
@click.argument("id")
@as_json
def show(ctx: click.Context, id: str, as_json: bool) -> None:
    """One batch: counts, callbacks, and what did not complete."""
    store = store_of(ctx)
    found = views.batch_in_full(store, store.resolve(id), stacks=as_json)
    if as_json:
        put(jsonio.dumps(found, indent=2) + "\n")
    else:
        short = views.short_id(store, found["id"])
        put_lines(pages.batch_page(screen_of(ctx), found, short, app_name(ctx) or "<app>"))


@command("children", reads_for=READS)
@click.argument("id")
@click.option("--status", "statuses", multiple=True, type=click.Choice([str(each) for each in Status]))
@click.option("--item", callback=storable, help="Only those with this item.")
@click.option("--callbacks", is_flag=True, help="The callbacks' rows instead.")
@as_json
def children(
    ctx: click.Context, id: str, statuses: tuple[str, ...], item: str | None, callbacks: bool, as_json: bool
) -> None:
    """A batch's children, by position."""
    if item is not None and callbacks:
        raise click.UsageError("--callbacks goes without --item: callbacks have no items", ctx)
    store = store_of(ctx)
    batch_id = store.resolve(id)
    rows = store.children(batch_id, statuses=statuses, callbacks=callbacks)
    if item is not None:
        rows = (row for row in _with_item(store, batch_id, item) if not statuses or row.status in statuses)
    found = (views.child(row) for row in rows)
    if as_json:
        put_json(found)
    else:
        put_lines(pages.child_list(screen_of(ctx), found), "no such rows")


def _with_item(store: Store, batch_id: uuid.UUID, item: str) -> Iterator[ChildRow]:
    after: int | None = -1
    while after is not None:
        page = store.browse_children(batch_id, item=item, after=after, limit=500)
        yield from page.rows
        after = page.next


@command("workers", reads_for=READS)
@click.option("--all", "everyone", is_flag=True, help="Also those that stopped or were lost.")
@as_json
def workers(ctx: click.Context, everyone: bool, as_json: bool) -> None:
    """Workers, newest first.

    Clients are processes that fill a batch, or run one inline. State: alive; suspected (silent for longer than its
    lease); lost (found dead); stopped (ended in order).
    """
    store = store_of(ctx)
    now = store.current_time()
    told = {row["worker_id"]: row for row in store.view("worker_liveness", order_by=["-started_at"], limit=1000)}
    nothing = {"running": 0, "crashes_24h": 0}
    found = [
        {**views.worker(row, now), **{name: told.get(row.id, nothing)[name] for name in nothing}}
        for row in store.workers(all=everyone)
    ]
    if as_json:
        put_json(found)
    else:
        put_lines(pages.worker_list(screen_of(ctx), found, now), "no workers")


@command("verify", reads_for=SCANS)
@click.option("--grace", **DURATION, help="Time that detection may take; by default from leases and sweeps.")
@as_json
def verify(ctx: click.Context, grace: float | None, as_json: bool) -> None:
    """Prove the promises on the data itself.

    Exit code 1 if any check finds violations.
    """
    extension = extension_of(ctx)
    grace = views.grace(extension.settings) if grace is None else grace
    found = [views.violation(each) for each in extension.store.verify(grace)]
    if as_json:
        put_json(found)
    else:
        put_lines(pages.check_list(screen_of(ctx), found))
    if any(each["violations"] for each in found):
        ctx.exit(1)


# -- acting ---------------------------------------------------------------------------------------


@command("migrate")
@as_json
def migrate(ctx: click.Context, as_json: bool) -> None:
    """Bring the database to this version's schema.

    Safe to run twice, and by two at once.
    """
    store = store_of(ctx)
    before = store.schema_state().name.lower()
    store.migrate()
    if as_json:
        put_json([{"database": store.shown_url, "before": before, "changed": before != "current"}])
        return
    did = {"empty": "tables created", "current": "nothing to do, the schema is current"}
    say(ctx, f"{store.shown_url}: {did.get(before, 'schema brought up to date')}")


@command("detect")
@click.option("--every", **DURATION, help="Go on, with a sweep every so many seconds, until SIGTERM or Ctrl-C.")
@as_json
def detect(ctx: click.Context, every: float | None, as_json: bool) -> None:
    """One sweep of the crash detector.

    A worker that is merely silent is taken for lost only by a sweep that follows another one closely: at most
    twice `batchtrack_detect_every`. With --every and --json, each sweep prints one object on a line.
    """
    extension = acting(ctx)
    if every is not None:
        _sweep_until_stopped(ctx, extension, every, as_json)
        return
    done = extension.sweep().as_dict()
    if as_json:
        put_json([done])
    else:
        say(ctx, pages.sweep_line(done))


def _sweep_until_stopped(ctx: click.Context, extension: BatchTrack, every: float, as_json: bool) -> None:
    if not 0 < every <= 2 * extension.settings.detect_every:
        raise click.UsageError(
            f"--every must be more than 0 and at most twice batchtrack_detect_every "
            f"({extension.settings.detect_every:g} s): a sweep that comes later cannot tell a silent worker "
            "from a database that was away",
            ctx,
        )
    with until_stopped() as stop:
        while not stop.is_set():
            try:
                _tell(ctx, extension.sweep(), as_json)
            except errors.DatabaseUnavailable as error:
                logging.getLogger("celery_batchtrack").error("action=sweep_waits %s", error)
            stop.wait(every)


def _tell(ctx: click.Context, sweep: Sweep, as_json: bool) -> None:
    done = sweep.as_dict()
    if as_json:
        put(jsonio.dumps(done) + "\n")
    elif any(done.values()):
        say(ctx, pages.sweep_line(done))


@command("prune")
@click.option(
    "--older-than",
    metavar="DURATION",
    callback=age,
    help="With its unit, e.g. 7d; whatever their outcome. Default: batchtrack_retention.",
)
@as_json
def prune(ctx: click.Context, older_than: float | None, as_json: bool) -> None:
    """Delete batches that ended long ago.

    Their children and incidents go with them; batches whose callbacks are not done stay.
    """
    from celery_batchtrack.behaviour import retention

    keep = None if older_than is None else {"completed": older_than, "other": older_than}
    batches, gone = retention.prune(extension_of(ctx).tracker, keep)
    if as_json:
        put_json([{"batches": batches, "workers": gone}])
    else:
        say(ctx, f"batches deleted: {batches}; workers that ended before: {gone}")


@command("cancel")
@click.argument("id")
@click.option("--terminate/--no-terminate", default=True, show_default=True, help="Also end what runs.")
@as_json
def cancel(ctx: click.Context, id: str, terminate: bool, as_json: bool) -> None:
    """End a batch now.

    Pending children never start. A batch that has ended already stays as it is.
    """
    from celery_batchtrack.behaviour import finish

    extension = acting(ctx)
    batch_id = extension.store.resolve(id)
    done = finish.cancel(extension.tracker, batch_id, terminate=terminate)
    row = extension.store.progress(batch_id)
    if as_json:
        put_json([{"id": row.batch_id, "name": row.name, "status": row.status, "cancelled": done is not None}])
    elif done is None:
        say(ctx, f"{row.name} {row.batch_id} had ended already: {row.status}")
    else:
        say(ctx, f"cancelled {row.name} {row.batch_id}: {row.cancelled} children, {row.completed} had completed")


@command("pause")
@click.argument("id")
@as_json
def pause(ctx: click.Context, id: str, as_json: bool) -> None:
    """Start no more children of a batch.

    What runs goes on, what waits goes on waiting until `resume`.
    """
    from celery_batchtrack.behaviour import finish

    extension = acting(ctx)
    batch_id = extension.store.resolve(id)
    _paused_or_resumed(ctx, extension, batch_id, "paused", finish.pause(extension.tracker, batch_id), as_json)


@command("resume")
@click.argument("id")
@as_json
def resume(ctx: click.Context, id: str, as_json: bool) -> None:
    """Go on with a batch that was paused, by hand or by its breaker."""
    from celery_batchtrack.behaviour import finish

    extension = acting(ctx)
    batch_id = extension.store.resolve(id)
    _paused_or_resumed(ctx, extension, batch_id, "resumed", finish.resume(extension.tracker, batch_id), as_json)


def _paused_or_resumed(
    ctx: click.Context, extension: BatchTrack, batch_id: uuid.UUID, what: str, done: bool, as_json: bool
) -> None:
    found = next(views.batches(extension.store, [batch_id]), None)
    if found is None:
        raise errors.BatchNotFound(f"batch {batch_id} is gone from {extension.store.shown_url}")
    if as_json:
        told = {name: found[name] for name in ("id", "name", "status", "paused_at", "pause_reason")}
        put_json([{**told, what: done}])
    else:
        say(ctx, pages.pause_line(found, what, done))
