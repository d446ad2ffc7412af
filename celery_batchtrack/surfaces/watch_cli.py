"""``celery -A app batchtrack watch``: progress, live on a terminal, as lines or as NDJSON elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import click

from celery_batchtrack import errors
from celery_batchtrack.surfaces import jsonio
from celery_batchtrack.surfaces.console import READS, put, say, screen_of, storables, store_of
from celery_batchtrack.surfaces.group import DURATION, as_json, command
from celery_batchtrack.surfaces.render import clean, duration
from celery_batchtrack.surfaces.watching import Object, Watch, Watched, crash_line, line_of, pairs

#: As `timeout` and the shell have them.
TIMED_OUT, INTERRUPTED, TERMINATED = 124, 130, 143
_FASTEST = 0.1
#: Seconds that a look waits for the database at least, however little time is left.
_LOOK_AT_LEAST = 1.0


class _View(Protocol):
    """Where the looks go."""

    def show(self, watch: Watch, changed: Sequence[Watched], crashes: Sequence[Object]) -> None: ...

    def away(self, watch: Watch, error: Exception, seconds: float) -> None: ...

    def back(self, watch: Watch, seconds: float) -> None: ...


@command("watch")
@click.argument("ids", nargs=-1, metavar="[ID]...", callback=storables)
@click.option("--every", metavar="DURATION", callback=DURATION["callback"], default="1s", show_default=True,
              help="Time between two looks.")  # fmt: skip
@click.option("--timeout", **DURATION, help="Stop watching after this time, with exit code 124. The batches go on.")
@click.option("--allow-partial", is_flag=True, help="Exit code 0 for batches that ended `partial`, too.")
@as_json
def watch(
    ctx: click.Context, ids: tuple[str, ...], every: float, timeout: float | None, allow_partial: bool, as_json: bool
) -> None:
    """Watch batches until they are over: all children and all callbacks.

    ID is a batch's id, its beginning, or a name: then all batches of that name that run, or else the newest of that
    name. Without any, all that run are watched, and those that begin meanwhile.

    On a terminal (with rich installed: the extra `progress`) one row for each batch, and the newest deaths below.
    Elsewhere one line of key=value for each change; with --json one object on a line for each change, with the keys of
    `list --json`. While the database is away it says so, and goes on; not so if it is away at the beginning.

    Exit codes: 0 all of them completed, callbacks included; 1 one ended otherwise (failed, cancelled, partial), lost a
    callback, or was deleted meanwhile; 124 time-out; 130 Ctrl-C, which leaves the last frame.
    """
    if every < _FASTEST:
        raise click.UsageError(f"--every must be at least {_FASTEST:g} s: each look is a query", ctx)
    watched = Watch(store_of(ctx), ids)
    began = time.monotonic()
    until = None if timeout is None else began + timeout
    try:
        with _given_up_in_time(until):
            watched.begin()
        with _terminated_by(signal.SIGTERM), _view(ctx, as_json) as view:
            over = _follow(watched, view, every, until)
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)
    except errors.DatabaseUnavailable as error:
        if until is None or time.monotonic() < max(until, began + _LOOK_AT_LEAST):
            raise
        click.echo(clean(f"not over after {duration(timeout)}: the database is away: {error}"), err=True)
        ctx.exit(TIMED_OUT)
    if not watched.batches and not as_json and not ids:
        say(ctx, "nothing runs")
    if not over:
        left = sum(not each.over for each in watched.batches.values())
        click.echo(f"not over after {duration(timeout)}: {left} of {len(watched.batches)}", err=True)
        ctx.exit(TIMED_OUT)
    ctx.exit(0 if watched.ended_well(partial=allow_partial) else 1)


@contextlib.contextmanager
def _given_up_in_time(until: float | None) -> Iterator[None]:
    """A look at a database that is locked ends, so that it can be told, and so that time can run out."""
    from celery_batchtrack.store import reading_at_most

    left = READS if until is None else min(READS, until - time.monotonic())
    with reading_at_most(max(_LOOK_AT_LEAST, left)):
        yield


def _follow(watched: Watch, view: _View, every: float, until: float | None) -> bool:
    """Look again and again; False if time ran out first. A database that is away at the first look is an error."""
    with _given_up_in_time(until):
        changed, crashes = watched.look()
    view.show(watched, changed, crashes)
    away: float | None = None
    while away is not None or not watched.over:
        left = every if until is None else min(every, until - time.monotonic())
        if left <= 0:
            return False
        time.sleep(left)
        try:
            with _given_up_in_time(until):
                changed, crashes = watched.look()
        except errors.DatabaseUnavailable as error:
            away = away or time.monotonic()
            view.away(watched, error, time.monotonic() - away)
            continue
        if away is not None:
            view.back(watched, time.monotonic() - away)
            away = None
        view.show(watched, changed, crashes)
    return True


@contextlib.contextmanager
def _terminated_by(number: int) -> Iterator[None]:
    """An exit in order, so that the terminal gets its cursor back."""

    def leave(*_: Any) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def _view(ctx: click.Context, as_json: bool) -> Iterator[_View]:
    if as_json:
        yield _Json()
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.live import Live

        console = Console(file=sys.stdout, no_color=bool(ctx.obj.no_color) or None, highlight=False, markup=False)
        with Live(console=console, auto_refresh=False) as live:
            yield _Screen(console, live)
    else:
        yield _Lines(screen_of(ctx).printable)


class _Screen:
    """A frame that is drawn anew at each look."""

    def __init__(self, console: Any, live: Any) -> None:
        self._console, self._live = console, live

    def show(self, watch: Watch, changed: Sequence[Watched], crashes: Sequence[Object]) -> None:
        self._draw(watch, None)

    def away(self, watch: Watch, error: Exception, seconds: float) -> None:
        self._draw(watch, f"no news for {duration(seconds)}, trying on: {error}")

    def back(self, watch: Watch, seconds: float) -> None:
        """The next frame says it."""

    def _draw(self, watch: Watch, trouble: str | None) -> None:
        from celery_batchtrack.surfaces.watch_screen import frame

        self._live.update(frame(self._console, watch, trouble), refresh=True)


class _Lines:
    """A line for each change."""

    def __init__(self, printable: Callable[[str], str]) -> None:
        self._printable, self._away = printable, False

    def show(self, watch: Watch, changed: Sequence[Watched], crashes: Sequence[Object]) -> None:
        for text in (*map(crash_line, crashes), *map(line_of, changed)):
            self._put(text)

    def away(self, watch: Watch, error: Exception, seconds: float) -> None:
        if not self._away:
            self._put(pairs([("database", "away"), ("error", str(error))]))
        self._away = True

    def back(self, watch: Watch, seconds: float) -> None:
        self._put(pairs([("database", "back"), ("after", duration(seconds))]))
        self._away = False

    def _put(self, text: str) -> None:
        put(self._printable(text) + "\n")


class _Json:
    """An object on a line for each change; what is no batch goes to standard error."""

    def __init__(self) -> None:
        self._away = False

    def show(self, watch: Watch, changed: Sequence[Watched], crashes: Sequence[Object]) -> None:
        for each in changed:
            put(jsonio.dumps(each.batch) + "\n")

    def away(self, watch: Watch, error: Exception, seconds: float) -> None:
        if not self._away:
            click.echo(clean(f"the database is away, trying on: {error}"), err=True)
        self._away = True

    def back(self, watch: Watch, seconds: float) -> None:
        click.echo(f"the database is back after {duration(seconds)}", err=True)
        self._away = False
