"""``celery -A app batchtrack …``: another round for a batch, and an end for all of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from celery_batchtrack.surfaces import pages, views
from celery_batchtrack.surfaces.console import acting, put_json, put_lines, say, screen_of
from celery_batchtrack.surfaces.group import DURATION, as_json, command
from celery_batchtrack.vocabulary.states import NOT_COMPLETED

if TYPE_CHECKING:
    from celery_batchtrack.glue.extension import BatchTrack

#: Seconds between two looks of `drain`.
_LOOK_EVERY = 1.0


@command("retry")
@click.argument("id")
@click.option(
    "--only", multiple=True, type=click.Choice([str(each) for each in NOT_COMPLETED]),
    help="Only children that ended so; may be given twice.",
)  # fmt: skip
@click.option("--queue", help="Send them to this queue instead of their own.")
@click.option("--callbacks", is_flag=True, help="Call the callbacks that did not complete; no child runs again.")
@as_json
def retry(
    ctx: click.Context, id: str, only: tuple[str, ...], queue: str | None, callbacks: bool, as_json: bool
) -> None:
    """Run the children of an ended batch that did not complete again, in its next round.

    At its end the callbacks are called, with the results of all children. With --callbacks only those that did not
    complete are called once more, in the present round.
    """
    from celery_batchtrack.glue.batch import Batch

    if callbacks and (only or queue):
        raise click.UsageError("--callbacks goes alone: --only and --queue are for children", ctx)
    extension = acting(ctx)
    batch = Batch._handle(extension, extension.store.resolve(id))
    overrides = {"queue": queue} if queue else None
    done = batch.retry_callbacks() if callbacks else batch.retry(only or None, overrides=overrides)
    found = extension.store.progress(batch.id)
    if as_json:
        told = {"id": found.batch_id, "name": found.name, "status": found.status, "round": found.round}
        put_json([{**told, "retried": done}])
        return
    what = "callbacks" if callbacks else "children"
    say(ctx, f"{found.name} {batch.id}: {done} {what} run again, in round {found.round}" if done else
        f"{found.name} {batch.id}: no {what} to run again; it stays {found.status}")  # fmt: skip


@command("drain")
@click.option("--timeout", **DURATION, help="Give up after this time, with exit code 1. Default: never.")
@as_json
def drain(ctx: click.Context, timeout: float | None, as_json: bool) -> None:
    """Wait until no batch is open and no callback is left: before uninstalling, or a change of the database.

    Set `batchtrack_enabled = False` first, so that new chords go through Celery's own. Sweeps if nobody else does.
    """
    extension = acting(ctx)
    if extension.settings.enabled:
        click.echo("new batches still start: set batchtrack_enabled = False where chords are made", err=True)
    left = _wait_for_the_end(extension, timeout)
    found = list(views.batches(extension.store, left))
    if as_json:
        put_json(found)
    elif found:
        put_lines(pages.batch_list(screen_of(ctx), found, extension.store.current_time()))
    else:
        say(ctx, "nothing is open: every batch has ended, and every callback")
    if found:
        ctx.exit(1)


def _wait_for_the_end(extension: BatchTrack, timeout: float | None) -> list[Any]:
    until = None if timeout is None else time.monotonic() + timeout
    while True:
        left = extension.store.unsettled()
        if not left or (until is not None and time.monotonic() >= until):
            return left
        time.sleep(_LOOK_EVERY if until is None else max(0.0, min(_LOOK_EVERY, until - time.monotonic())))
        extension.sweep_if_overdue()
