"""``celery -A app batchtrack metrics``: what Prometheus scrapes, in a process of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from celery.exceptions import CeleryCommandException

from celery_batchtrack.surfaces.console import EX_UNAVAILABLE, extension_of, put, put_json, say, until_stopped
from celery_batchtrack.surfaces.group import DURATION, as_json, command
from celery_batchtrack.surfaces.render import clean

if TYPE_CHECKING:
    from .metrics import Snapshot

#: That of celery-exporter, in whose place it often stands.
_PORT = 9808


@command("metrics")
@click.option("--port", type=click.IntRange(0, 65_535), default=_PORT, show_default=True, help="0: any that is free.")
@click.option("--address", default="0.0.0.0", show_default=True, help="Of the interface to listen on.")
@click.option("--every", default="10s", show_default=True, **DURATION, help="Time between two looks at the database.")
@click.option(
    "--invariants/--no-invariants", default=True, show_default=True,
    help="Also count what breaks a promise, every 5 minutes: that reads every row.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print them, and end.")
@as_json
def metrics(
    ctx: click.Context, port: int, address: str, every: float, invariants: bool, once: bool, as_json: bool
) -> None:
    """Serve metrics for Prometheus at /metrics, until SIGTERM or Ctrl-C.

    While the database cannot be read, celery_batchtrack_up is 0. With --once, they are printed instead; with --json
    (and --once) as JSON. Then the exit code is 69 if the database cannot be read, or not within 10 s (60 s for what
    breaks a promise).
    """
    from . import metrics as served

    extension = extension_of(ctx)
    if not every > 0:
        raise click.UsageError("--every must be more than 0", ctx)
    if once:
        _print(served.snapshots_of(extension, invariants=invariants, timeout=served.TIMEOUT), as_json)
        return
    if as_json:
        raise click.UsageError("--json is for --once: Prometheus reads its own format", ctx)
    extension.store  # noqa: B018 (wrong configuration is told now)
    try:
        endpoint = served.Endpoint(extension, port, address, invariants=invariants, every=every)
    except OSError as error:
        raise CeleryCommandException(clean(f"cannot listen on {address}:{port}: {error}"), EX_UNAVAILABLE) from None
    with until_stopped() as stop:
        say(ctx, f"metrics on http://{address}:{endpoint.port}/metrics")
        stop.wait()
    endpoint.close()


def _print(snapshots: Sequence[Snapshot], as_json: bool) -> None:
    from . import metrics as served

    for each in snapshots:
        each.refresh()
        if each.error is not None:
            break  # after the first nothing else is told, and who waited for a lock need not do so again
    if as_json:
        put_json(_samples(snapshots))
    else:
        put(served.text(snapshots))
    for each in snapshots:
        if each.error is not None:
            raise each.error


def _samples(snapshots: Sequence[Snapshot]) -> Iterator[dict[str, Any]]:
    from . import figures
    from . import metrics as served

    for metric, values in served.families(snapshots):
        for labels, value in values.items():
            told = {"metric": figures.PREFIX + metric.name, "labels": dict(zip(metric.labels, labels, strict=True))}
            if isinstance(value, figures.Distribution):
                yield {**told, "buckets": dict(figures.buckets(value)), "sum": value.sum, "count": value.upto[-1]}
            else:
                yield {**told, "value": value if math.isfinite(value) else None}
