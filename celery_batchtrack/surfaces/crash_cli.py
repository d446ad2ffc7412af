"""The commands about crashes: who died, of what, with what in hand, and how to see it again."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click_didyoumean import DYMGroup  # type: ignore[import-untyped, unused-ignore]

from celery_batchtrack.surfaces import crash_pages, jsonio, repro, views
from celery_batchtrack.surfaces.console import (
    READS,
    acting,
    app_name,
    as_stored,
    extension_of,
    not_there,
    put,
    put_json,
    put_lines,
    say,
    screen_of,
    storable,
    store_of,
)
from celery_batchtrack.surfaces.group import DURATION, as_json, batchtrack, command
from celery_batchtrack.surfaces.pages import short
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.states import Status

if TYPE_CHECKING:
    from celery_batchtrack.store import Store
    from celery_batchtrack.vocabulary.evidence import IncidentRow
    from celery_batchtrack.vocabulary.records import ChildRow

_POSITION = click.IntRange(0, 2**63 - 1)


# -- crashes --------------------------------------------------------------------------------------


@command("crashes", reads_for=READS)
@click.option("--batch", "id", metavar="ID", help="Only of this batch.")
@click.option("--since", **DURATION, help="Only those noticed in the last 24h, 7d, …")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, 1_000_000),
    help="Only the newest so many; of groups, those with the most deaths (1000).",
)
@click.option(
    "--group-by",
    "by",
    type=click.Choice(["fingerprint", "item", "signal", "host"]),
    help="Count deaths that have this in common; those that lack it are left out.",
)
@as_json
def crashes(
    ctx: click.Context, id: str | None, since: float | None, limit: int | None, by: str | None, as_json: bool
) -> None:
    """Deaths of children, oldest first.

    Also those after which the child ran again. Verdicts that were overturned (a silent worker came back, and its
    child had not died) are left out. A fingerprint is a task, a cause, and where in the code it was; frame, signal
    and the like of a group are those of its newest death.
    """
    store = store_of(ctx)
    batch_id = None if id is None else store.resolve(id)
    if by is not None:
        _crash_groups(ctx, by, batch_id, since, limit, as_json)
        return
    rows = store.incidents(batch_id, crashes_only=True, since=since, limit=limit, stacks=as_json)
    found = [views.incident(row) for row in rows]
    if as_json:
        put_json(found)
    else:
        put_lines(crash_pages.crash_list(screen_of(ctx), found), "no crashes")


def _crash_groups(
    ctx: click.Context, by: str, batch_id: uuid.UUID | None, since: float | None, limit: int | None, as_json: bool
) -> None:
    extension = extension_of(ctx)
    store, version = extension.store, extension.settings.app_version or ""
    groups = store.crash_groups(by, batch_id, since=since, limit=limit or 1000)
    withheld = store.quarantine_list() if by == "item" else []
    quarantined = {(each.task, each.item) for each in withheld if each.version == version}
    found = [views.crash_group(by, each, quarantined) for each in groups]
    if as_json:
        put_json(found)
    else:
        put_lines(crash_pages.crash_groups(screen_of(ctx), by, found, store.current_time()), "no crashes")


# -- one child --------------------------------------------------------------------------------------


def _child(store: Store, batch_id: uuid.UUID, position: int) -> ChildRow:
    row = store.child(ChildKey(batch_id, position))
    if row is None:
        raise not_there(f"batch {batch_id} has no child #{position}: see `batchtrack children {batch_id}`")
    return row


def _parts(store: Store, row: ChildRow) -> str:
    """Where the items of a split child went, for a message."""
    parts = store.parts_of(row)
    named = ", ".join(f"#{each.position} ({each.status})" for each in parts[:10])
    more = f" and {len(parts) - 10} more" if len(parts) > 10 else ""
    return f"#{row.position} was split, its items went to {named}{more}"


@command("stack", reads_for=READS)
@click.argument("id", metavar="BATCH")
@click.argument("position", type=_POSITION)
@click.option("--attempt", type=click.IntRange(0), help="Of this attempt; by default of the newest that has a stack.")
@as_json
def stack(ctx: click.Context, id: str, position: int, attempt: int | None, as_json: bool) -> None:
    """How a child died or failed, and its Python stack.

    All that is known of one attempt; for an exception, with its traceback.
    """
    store = store_of(ctx)
    batch_id = store.resolve(id)
    row = _child(store, batch_id, position)
    incidents = store.incidents(batch_id, position=position)
    chosen = _with_stack([each for each in incidents if attempt in (None, each.attempt)])
    if chosen is None:
        raise not_there(_no_incident(store, row, attempt, sorted({each.attempt for each in incidents})))
    found = views.incident(chosen)
    if as_json:
        put(jsonio.dumps(found, indent=2) + "\n")
        return
    screen, batch = screen_of(ctx), store.batch(batch_id)
    others = sorted({each.attempt for each in incidents} - {chosen.attempt})
    put_lines(crash_pages.dossier(screen, found, f"{batch.name if batch else ''} {batch_id}", others))
    text = chosen.stack or chosen.traceback
    put("\n")
    put_lines(crash_pages.stack(screen, text) if text else [crash_pages.why_no_stack(found)])


def _with_stack(incidents: list[IncidentRow]) -> IncidentRow | None:
    """The newest that has a stack or a traceback, else the newest; those overturned last."""
    standing = [each for each in incidents if each.overturned_at is None] or incidents
    telling = [each for each in standing if each.stack or each.traceback] or standing
    return telling[-1] if telling else None


def _no_incident(store: Store, row: ChildRow, attempt: int | None, known: list[int]) -> str:
    if known:
        return f"#{row.position} has no incident of attempt {attempt}, only of {', '.join(map(str, known))}"
    if row.status == Status.SPLIT:
        return f"{_parts(store, row)}: look there"
    return f"#{row.position} has no incident: nothing died or failed in it (it is {row.status})"


@command("repro", reads_for=READS)
@click.argument("id", metavar="BATCH")
@click.argument("position", type=_POSITION)
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="Default: ./repro-<batch>-<position>.")
@click.option("--all-items", "whole", is_flag=True, help="Not only the item in hand.")
@click.option("--run", "at_once", is_flag=True, help="Run it too, and say how it ended.")
@as_json
def repro_(
    ctx: click.Context, id: str, position: int, output: Path | None, whole: bool, at_once: bool, as_json: bool
) -> None:
    """Write a script that runs a child's task again, outside Celery.

    Its folder gets the child's arguments, reduced to the item that was in hand when it died, and a script that calls
    the task with them in a fresh process under faulthandler: no worker, no broker, no tracking. What the task does to
    the outside it does again.
    """
    extension = acting(ctx)
    store = extension.store
    batch_id = store.resolve(id)
    row = _child(store, batch_id, position)
    app = app_name(ctx)
    if app is None:
        raise click.UsageError("the script must import the application: name it (celery -A <app> batchtrack …)", ctx)
    repro.check_task(extension, app, row)
    if row.signature is None:
        raise not_there(_arguments_gone(store, row))
    incident = repro.incident_of(store.incidents(batch_id, position=position))
    try:
        call = repro.call_of(extension, row, incident, whole=whole)
    except repro.Unrepeatable as error:
        raise not_there(error) from error
    folder = output or Path(f"repro-{views.short_id(store, batch_id)}-{position}")
    try:
        script = repro.write(folder, app, row, incident, call)
    except OSError as error:
        raise click.UsageError(f"cannot write {folder}: {error} (--output names another folder)", ctx) from error
    made = repro.as_mapping(row, script.absolute() if as_json else script, call, incident)
    _tell_repro(ctx, made, script, incident, at_once, as_json)


def _tell_repro(
    ctx: click.Context, made: dict[str, object], script: Path, incident: IncidentRow | None, at_once: bool,
    as_json: bool,
) -> None:  # fmt: skip
    if not as_json:
        put_lines(crash_pages.repro_page(screen_of(ctx), made))
    if at_once:
        code = repro.run(script, output=2 if as_json else None)
        made.update(returncode=code, ended=repro.how_it_ended(code))
        if not as_json:
            say(ctx, f"it {repro.compared(code, incident)}")
    if as_json:
        put_json([made])


def _arguments_gone(store: Store, row: ChildRow) -> str:
    if row.status == Status.SPLIT:
        return f"{_parts(store, row)}: name one of those"
    if row.status == Status.COMPLETED:
        return (
            f"#{row.position} completed, and its arguments went with that (@tracked(store_arguments=True) keeps them)"
        )
    return f"the arguments of #{row.position} are gone (it is {row.status})"


# -- quarantine -------------------------------------------------------------------------------------


@batchtrack.group("quarantine", cls=DYMGroup)
def quarantine() -> None:
    """Items that killed too often, and are not sent any more.

    They count as crashed at once (cause `quarantined`). An item is known by its task, its identifier and the
    application's version: a new version sends it again.
    """


@command("list", quarantine, reads_for=READS)
@click.option("--all", "everything", is_flag=True, help="Also those released, and those that killed less often.")
@click.option("--task", callback=storable, help="Only of this task.")
@as_json
def quarantine_list(ctx: click.Context, everything: bool, task: str | None, as_json: bool) -> None:
    """Items in quarantine, newest first."""
    extension = extension_of(ctx)
    store, version = extension.store, extension.settings.app_version or ""
    found = [views.quarantined_item(row, version) for row in store.quarantine_list(all=everything, task=task)]
    if as_json:
        put_json(found)
    else:
        put_lines(crash_pages.quarantine_list(screen_of(ctx), found, store.current_time()), "nothing in quarantine")


@command("release", quarantine)
@click.argument("items", nargs=-1, metavar="[ITEM]...")
@click.option("--task", callback=storable, help="Only of this task.")
@click.option("--all", "everything", is_flag=True, help="All items, or all of the task.")
@as_json
def quarantine_release(
    ctx: click.Context, items: tuple[str, ...], task: str | None, everything: bool, as_json: bool
) -> None:
    """Let items be sent again; their deaths are counted anew.

    ITEM is an identifier. What has ended as crashed stays so.
    """
    if bool(items) is everything:
        what = "not both items and --all" if items else "the items to release, or --all (with --task: all of that task)"
        raise click.UsageError(f"name {what}; `batchtrack quarantine list` shows what there is", ctx)
    extension = extension_of(ctx)
    items = tuple(as_stored(each) for each in items)
    released = extension.store.release_from_quarantine(items=items, task=task)
    missing = [each for each in items if each not in {name for row in released for name in (row.item, row.item_hash)}]
    if missing and not released:
        raise not_there(f"not in quarantine{f' of {task}' if task else ''}: {', '.join(missing)}")
    for each in missing:
        click.echo(f"not in quarantine: {short(each)}", err=True)
    if as_json:
        version = extension.settings.app_version or ""
        put_json([views.quarantined_item(row, version) for row in released])
        return
    for row in released:
        say(ctx, f"released {row.item} of {row.task}" + (f" (version {row.version})" if row.version else ""))
    if not released:
        say(ctx, "nothing in quarantine")
