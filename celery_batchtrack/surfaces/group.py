"""The click group behind ``celery -A app batchtrack``, and how a command joins it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from celery.bin.base import handle_preload_options
from click_didyoumean import DYMGroup  # type: ignore[import-untyped, unused-ignore]

from celery_batchtrack.surfaces.console import Command, duration

DURATION: Any = {"metavar": "DURATION", "callback": duration}
as_json = click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON: ISO-8601 times in UTC, full ids.")


def _group(ctx: click.Context, **_: Any) -> None:
    """Look at tracked batches, and look after them.

    ID is a batch's id, or its beginning. With --json, standard output is one JSON array (`show` and `stack`: one
    object; `watch` and `detect --every`: one object on a line, again and again).

    Exit codes: 1 something is wrong (`verify`, `doctor`, `stuck`), or a watched batch ended badly, 2 wrong usage, 66 no
    such batch, child, incident or item, 69 the tracking database cannot be reached or written, or does not answer in
    time (commands that only read wait 10 s, `verify` and `sql` 30 s, for each query, on PostgreSQL), 78 wrong
    configuration, or tables of another version, 124 `watch` ran out of time, 130 Ctrl-C.
    """


batchtrack: click.Group = click.group(
    "batchtrack", cls=DYMGroup, short_help="Batches: progress, crashes, workers, and the crash detector."
)(click.pass_context(handle_preload_options(_group)))  # type: ignore[no-untyped-call, unused-ignore]


def command(
    name: str, group: click.Group = batchtrack, *, reads_for: float | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand that takes the context. `reads_for`: of one that only reads; see `Command`."""

    def register(function: Callable[..., Any]) -> click.Command:
        return group.command(name, cls=Command, reads_for=reads_for)(click.pass_context(function))

    return register
