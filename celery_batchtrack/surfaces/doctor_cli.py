"""``celery -A app batchtrack doctor``: settings and states that lose work, and what to do about each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from celery_batchtrack.surfaces.console import extension_of, put_json, put_lines, screen_of
from celery_batchtrack.surfaces.group import DURATION, as_json, command
from celery_batchtrack.surfaces.render import Screen, clean

if TYPE_CHECKING:
    from celery_batchtrack.surfaces.doctor.facts import Facts, Finding

_SHOWN = {"ok": ("ok", "green"), "warn": ("WARN", "yellow"), "fail": ("FAIL", "red")}
_ORDER = ("ok", "warn", "fail")


@command("doctor")
@click.option("--timeout", metavar="DURATION", callback=DURATION["callback"], default="5s", show_default=True,
              help="How long database, broker and workers may take to answer.")  # fmt: skip
@as_json
def doctor(ctx: click.Context, timeout: float, as_json: bool) -> None:
    """Look for what loses work: settings, database, broker, workers, clocks; and say what to do.

    Changes nothing. Workers are asked through Celery's remote control. A database or broker that is down is a finding,
    too. With --json an array of objects: check, level (ok, warn, fail), message, advice.

    Exit code 1 if anything fails.
    """
    from celery_batchtrack.surfaces.doctor import gathering

    if timeout <= 0:
        raise click.UsageError("--timeout must be more than 0 s", ctx)
    found = findings(gathering.facts(extension_of(ctx), timeout))
    if as_json:
        put_json(each.as_dict() for each in found)
    else:
        put_lines(_lines(screen_of(ctx), found))
    if any(each.level == "fail" for each in found):
        ctx.exit(1)


def findings(facts: Facts) -> Sequence[Finding]:
    """What every check says of the facts; the worst comes last, where a terminal's reader looks first."""
    from celery_batchtrack.surfaces.doctor import checks_application, checks_database, checks_running

    checks = (*checks_database.CHECKS, *checks_running.CHECKS, *checks_application.CHECKS)
    found = [finding for check in checks for finding in check(facts)]
    return sorted(found, key=lambda each: _ORDER.index(each.level))


def _lines(screen: Screen, found: Sequence[Finding]) -> Iterator[str]:
    width = max(len(each.check) for each in found)
    for each in found:
        word, colour = _SHOWN[each.level]
        advice = f" → {clean(each.advice)}" if each.advice else ""
        text = f"{each.check:<{width}}  {clean(each.message)}{advice}"
        yield f"{screen.style(f'{word:<4}', colour)}  {screen.printable(text)}"
