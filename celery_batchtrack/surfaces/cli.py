"""``celery -A app batchtrack …``. Every `celery` command imports this module: what is heavy is imported late.

Exit codes: 0; 1 a check found violations, or the batch does not allow it; 2 wrong usage; 66 no such batch;
69 the tracking database cannot be reached or written; 78 wrong configuration, or tables of another version.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options
from celery.exceptions import CeleryCommandException
from celery.exceptions import ImproperlyConfigured as CeleryImproperlyConfigured
from click_didyoumean import DYMGroup

from .. import errors
from ..vocabulary.states import BatchStatus, Status
from . import jsonio, pages, views
from .render import Screen, clean

if TYPE_CHECKING:
    from ..behaviour.detector import Sweep
    from ..glue.extension import BatchTrack
    from ..store import Store

EX_NOT_FOUND, EX_UNAVAILABLE, EX_CONFIG = 66, 69, 78
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.BatchNotFound, EX_NOT_FOUND),
    (errors.DatabaseUnavailable, EX_UNAVAILABLE),
    (errors.ImproperlyConfigured, EX_CONFIG),
    (errors.SchemaError, EX_CONFIG),
    (CeleryImproperlyConfigured, EX_CONFIG),
    (errors.InvalidOption, 2),
)
_CENTURY = 100 * 366 * 86_400.0


# -- plumbing -------------------------------------------------------------------------------------


class Command(CeleryCommand):
    """Says what went wrong in one line on standard error, with an exit code that scripts can tell apart."""

    def invoke(self, ctx: click.Context) -> Any:
        with _logs_on_stderr():
            try:
                return super().invoke(ctx)
            except (errors.BatchTrackError, CeleryImproperlyConfigured) as error:
                code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
                raise CeleryCommandException(clean(error), code) from error


class _OneSafeLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return "\n".join(clean(line) for line in lines)


@contextlib.contextmanager
def _logs_on_stderr() -> Iterator[None]:
    """Warnings of ours, unless the application has set up logging itself."""
    logger = logging.getLogger("celery_batchtrack")
    if logger.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneSafeLine("%(levelname)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class Duration(click.ParamType):
    """Seconds, or text such as ``90s``, ``24h``, ``7d``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from ..vocabulary.settings import seconds

        try:
            found = seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not 0 <= found <= _CENTURY:
            self.fail(f"{value!r} must be between 0 and a hundred years", param, ctx)
        return found


class Text(click.ParamType):
    """Text that every database takes, whatever bytes the shell passed."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value).encode(errors="replace").decode()


def extension_of(ctx: click.Context) -> BatchTrack:
    """The BatchTrack of the app that ``-A`` names."""
    from ..glue.extension import BatchTrack

    try:
        return BatchTrack.of(ctx.obj.app)
    except errors.ImproperlyConfigured as error:
        if ctx.find_root().params.get("app"):
            raise
        raise errors.ImproperlyConfigured(f"{error} (name your app: celery -A <app> batchtrack …)") from None


def store_of(ctx: click.Context) -> Store:
    return extension_of(ctx).store


def acting(ctx: click.Context) -> BatchTrack:
    """The extension, with all tasks loaded as in a worker: what follows may publish callbacks."""
    extension = extension_of(ctx)
    extension.app.loader.import_default_modules()
    extension.app.finalize()
    return extension


def put(text: str) -> None:
    """To standard output, at once. (click.echo would write UTF-8 even where the encoding is another.)"""
    sys.stdout.write(text)
    sys.stdout.flush()


def put_json(objects: Iterable[Any]) -> None:
    for piece in jsonio.array(objects):
        sys.stdout.write(piece)
    sys.stdout.flush()


def put_lines(lines: Iterable[str], otherwise: str | None = None) -> None:
    """Lines, or one that says that there are none."""
    empty = True
    for line in lines:
        sys.stdout.write(line + "\n")
        empty = False
    if empty and otherwise:
        sys.stdout.write(otherwise + "\n")
    sys.stdout.flush()


def screen_of(ctx: click.Context) -> Screen:
    return Screen.of(sys.stdout, no_color=bool(ctx.obj.no_color))


def say(ctx: click.Context, text: str) -> None:
    put(screen_of(ctx).printable(clean(text)) + "\n")


as_json = click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON: ISO-8601 times in UTC, full ids.")


@click.group(cls=DYMGroup, short_help="Batches: progress, crashes, workers, and the crash detector.")
@click.pass_context
@handle_preload_options
def batchtrack(ctx: click.Context, **_: Any) -> None:
    """Look at tracked batches, and look after them.

    ID is a batch's id, or its beginning. With --json, standard output is one JSON array (`show`: one object).

    Exit codes: 1 a check found violations, 2 wrong usage, 66 no such batch, 69 the tracking database cannot be
    reached or written, 78 wrong configuration or tables of another version.
    """


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand that takes the context."""

    def register(function: Callable[..., Any]) -> click.Command:
        return batchtrack.command(name, cls=Command)(click.pass_context(function))

    return register


# -- looking --------------------------------------------------------------------------------------


@command("list")
@click.option("--status", "statuses", multiple=True, type=click.Choice([str(each) for each in BatchStatus]))
@click.option("--name", type=Text(), help="Only batches of exactly this name.")
@click.option("-n", "--limit", type=click.IntRange(1, 1_000_000), default=50, show_default=True)
@as_json
def list_(ctx: click.Context, statuses: tuple[str, ...], name: str | None, limit: int, as_json: bool) -> None:
    """Batches, newest first."""
    store = store_of(ctx)
    found = views.batches(store, store.list_batches(statuses=statuses, name=name, limit=limit))
    if as_json:
        put_json(found)
    else:
        put_lines(pages.batch_list(screen_of(ctx), list(found), store.current_time()), "no batches")


@command("show")
@click.argument("id")
@as_json
def show(ctx: click.Context, id: str, as_json: bool) -> None:
    """One batch: counts, callbacks, and what did not complete."""
    store = store_of(ctx)
    found = views.batch_in_full(store, store.resolve(id))
    if as_json:
        put(jsonio.dumps(found, indent=2) + "\n")
    else:
        put_lines(pages.batch_page(screen_of(ctx), found))


@command("children")
@click.argument("id")
@click.option("--status", "statuses", multiple=True, type=click.Choice([str(each) for each in Status]))
@click.option("--callbacks", is_flag=True, help="The callbacks' rows instead.")
@as_json
def children(ctx: click.Context, id: str, statuses: tuple[str, ...], callbacks: bool, as_json: bool) -> None:
    """A batch's children, by position."""
    store = store_of(ctx)
    rows = store.children(store.resolve(id), statuses=statuses, callbacks=callbacks)
    found = (views.child(row) for row in rows)
    if as_json:
        put_json(found)
    else:
        put_lines(pages.child_list(screen_of(ctx), found), "no such rows")


@command("crashes")
@click.option("--batch", "id", metavar="ID", help="Only of this batch.")
@click.option("--since", type=Duration(), help="Only those noticed in the last 24h, 7d, …")
@click.option("-n", "--limit", type=click.IntRange(1, 1_000_000), help="Only the newest so many.")
@as_json
def crashes(ctx: click.Context, id: str | None, since: float | None, limit: int | None, as_json: bool) -> None:
    """Deaths of children, oldest first: also those after which the child ran again.

    Verdicts that were overturned (a silent worker came back, and its child had not died) are left out.
    """
    store = store_of(ctx)
    batch_id = None if id is None else store.resolve(id)
    found = [
        views.incident(row)
        for row in store.incidents(batch_id, crashes_only=True, since=since, limit=limit)
    ]
    if as_json:
        put_json(found)
    else:
        put_lines(pages.crash_list(screen_of(ctx), found), "no crashes")


@command("workers")
@click.option("--all", "everyone", is_flag=True, help="Also those that stopped or were lost.")
@as_json
def workers(ctx: click.Context, everyone: bool, as_json: bool) -> None:
    """Workers, and processes that hold a batch open: newest first.

    State: alive; suspected (silent for longer than its lease); lost (found dead); stopped (ended in order).
    """
    store = store_of(ctx)
    now = store.current_time()
    found = [views.worker(row, now) for row in store.workers(all=everyone)]
    if as_json:
        put_json(found)
    else:
        put_lines(pages.worker_list(screen_of(ctx), found, now), "no workers")


@command("verify")
@click.option("--grace", type=Duration(), help="Time that detection may take; by default from leases and sweeps.")
@as_json
def verify(ctx: click.Context, grace: float | None, as_json: bool) -> None:
    """Prove the promises on the data itself: exit code 1 if any check finds violations."""
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
    """Bring the tracking database to this version's schema. Safe to run twice, and by two at once."""
    store = store_of(ctx)
    before = store.schema_state().name.lower()
    store.migrate()
    if as_json:
        put_json([{"database": store.shown_url, "before": before, "changed": before != "current"}])
        return
    did = {"empty": "tables created", "current": "nothing to do, the schema is current"}
    say(ctx, f"{store.shown_url}: {did.get(before, 'schema brought up to date')}")


@command("detect")
@click.option("--every", type=Duration(), help="Go on, with a sweep every so many seconds, until SIGTERM or Ctrl-C.")
@as_json
def detect(ctx: click.Context, every: float | None, as_json: bool) -> None:
    """One sweep of the crash detector; says what it did.

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
            f"--every must be more than 0 and at most twice batchtrack_detect_every ({extension.settings.detect_every:g} "
            "s): a sweep that comes later cannot tell a worker that is silent from a database that was away", ctx
        )  # fmt: skip
    with _until_stopped() as stop:
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


@contextlib.contextmanager
def _until_stopped() -> Iterator[threading.Event]:
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command("prune")
@click.option("--older-than", type=Duration(), help="Whatever their outcome; by default as `batchtrack_retention` says.")
@as_json
def prune(ctx: click.Context, older_than: float | None, as_json: bool) -> None:
    """Delete batches that ended long ago, with their children and incidents.

    Batches whose callbacks are not done stay.
    """
    extension = extension_of(ctx)
    retention = dict(extension.settings.retention)
    if older_than is not None:
        retention = dict.fromkeys(retention, older_than)
    batches = extension.store.prune(**retention)
    gone = extension.store.prune_workers(max(retention.values()))
    if as_json:
        put_json([{"batches": batches, "workers": gone}])
    else:
        say(ctx, f"deleted {batches} batches, and {gone} workers that ended before")


@command("cancel")
@click.argument("id")
@click.option("--terminate/--no-terminate", default=True, show_default=True, help="Also end what runs.")
@as_json
def cancel(ctx: click.Context, id: str, terminate: bool, as_json: bool) -> None:
    """End a batch now: pending children never start. One that has ended already stays as it is."""
    from ..behaviour import finish

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
