"""``celery -A app batchtrack flower``: Flower's own command, with our pages in what it starts."""

from __future__ import annotations

from typing import Any

import click

from celery_batchtrack import errors
from celery_batchtrack.surfaces.console import Command, extension_of
from celery_batchtrack.surfaces.group import batchtrack


class LongCommand(Command):
    """Logs as Flower sets it up."""

    shows_warnings = False


@batchtrack.command("flower", cls=LongCommand, context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def flower_(ctx: click.Context, options: tuple[str, ...]) -> None:
    """Flower, with a tab of batches.

    OPTIONS are those of `celery flower`, such as --port=5555 or --basic-auth=user:password.
    """
    extension_of(ctx)  # says so at once if the application has no BatchTrack
    command, install = _flower()
    install()
    ctx.invoke(command, tornado_argv=options)


def _flower() -> tuple[click.Command, Any]:
    try:
        import flower.command
    except ModuleNotFoundError as error:
        raise errors.ImproperlyConfigured(
            f"Flower is not installed ({error.name} is missing): pip install 'celery-batchtrack[flower]'"
        ) from None
    from celery_batchtrack.surfaces.flower.install import install

    return flower.command.flower, install
