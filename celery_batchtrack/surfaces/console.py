"""Between the commands and the terminal: the app, exit codes, logs, standard output."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
from celery.exceptions import CeleryCommandException
from celery.exceptions import ImproperlyConfigured as CeleryImproperlyConfigured

from celery_batchtrack import errors
from celery_batchtrack.surfaces import jsonio
from celery_batchtrack.surfaces.render import Screen, clean

if TYPE_CHECKING:
    from celery_batchtrack.glue.extension import BatchTrack
    from celery_batchtrack.store import Store

#: As in sysexits.h; 1 is for everything else.
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


#: What these commands say themselves need not be logged on the same terminal.
_SAID = {"pause": "action=batch_paused", "resume": "action=batch_resumed", "doctor": "%s is ignored"}


#: Seconds that a statement of a command that only reads may take, and of one that reads all rows.
READS, SCANS = 10.0, 30.0


class Command(click.Command):
    """Says what went wrong in one line on standard error, with an exit code that scripts can tell apart.

    `reads_for`: seconds after which a read is given up, so that nobody waits in silence for a lock. None for commands
    that act: they finish what they began.
    """

    #: Warnings of ours go to standard error where the application logs nowhere.
    shows_warnings = True

    def __init__(self, *args: Any, reads_for: float | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.reads_for = reads_for

    def invoke(self, ctx: click.Context) -> Any:
        with _logs_on_stderr(_SAID.get(self.name or "")) if self.shows_warnings else contextlib.nullcontext():
            try:
                with _reading(self.reads_for):
                    return super().invoke(ctx)
            except (errors.BatchTrackError, CeleryImproperlyConfigured) as error:
                code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
                raise CeleryCommandException(clean(error), code) from error


def _reading(seconds: float | None) -> contextlib.AbstractContextManager[None]:
    if seconds is None:
        return contextlib.nullcontext()
    from celery_batchtrack.store import reading_at_most

    return reading_at_most(seconds)


class _OneSafeLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return "\n".join(clean(line) for line in lines)


@contextlib.contextmanager
def _logs_on_stderr(said: str | None) -> Iterator[None]:
    """Warnings of ours, unless the application has set up logging itself."""
    logger = logging.getLogger("celery_batchtrack")
    if logger.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneSafeLine("%(levelname)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: said is None or not str(record.msg).startswith(said))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def age(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A duration with its unit: what deletes things does not guess whether 7 means days."""
    if value is not None and value.strip().replace(".", "").isdigit():
        raise click.BadParameter(
            f"{value!r} has no unit: write {value.strip()}d for days, {value.strip()}s for seconds", ctx, param
        )
    return duration(ctx, param, value)


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """An option's seconds, or text such as ``90s``, ``24h``, ``7d``."""
    from celery_batchtrack.vocabulary.settings import seconds

    if value is None:
        return None
    try:
        found = seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    if found > _CENTURY:
        raise click.BadParameter(f"{value!r} is more than a hundred years", ctx, param)
    return found


def storable(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An option's text as every database takes it."""
    return None if value is None else as_stored(value)


def storables(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Of an option that may be given several times."""
    return tuple(as_stored(value) for value in values)


def metadata(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """``KEY=VALUE``, several times: the value as JSON where it is some, else as text."""
    found: dict[str, Any] = {}
    for value in values:
        key, equals, text = as_stored(value).partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE", ctx, param)
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def as_stored(text: str) -> str:
    """Whatever bytes the shell passed, no lone surrogates."""
    return text.encode(errors="replace").decode()


def extension_of(ctx: click.Context) -> BatchTrack:
    """The BatchTrack of the app that ``-A`` names."""
    from celery_batchtrack.glue.extension import BatchTrack

    try:
        return BatchTrack.of(ctx.obj.app)
    except errors.ImproperlyConfigured as error:
        if ctx.find_root().params.get("app"):
            raise
        raise errors.ImproperlyConfigured(f"{error} (name your app: celery -A <app> batchtrack …)") from None


def app_name(ctx: click.Context) -> str | None:
    """What ``-A`` names; where the application itself started the command, the name it can be imported by."""
    named = ctx.find_root().params.get("app")
    if isinstance(named, str):
        return named
    for module, found in list(sys.modules.items()):
        for name, value in list(getattr(found, "__dict__", {}).items()):
            if value is ctx.obj.app and module != "__main__" and not module.startswith(("celery.", "_")):
                return f"{module}:{name}"
    return None


def not_there(text: object) -> CeleryCommandException:
    """What was asked for does not exist: a child, an incident, an item."""
    return CeleryCommandException(clean(text), EX_NOT_FOUND)


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


@contextlib.contextmanager
def until_stopped() -> Iterator[threading.Event]:
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
