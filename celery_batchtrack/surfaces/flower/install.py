"""The way into Flower: a subclass of its application in the place of the one that its command starts.

Flower has no plugins. What is used of it: `flower.app.Flower`, tornado's documented setting ``template_loader`` and
`Application.add_handlers`, and the name ``Flower`` in `flower.command`, which its command looks up when it runs.
"""

from __future__ import annotations

import contextlib
import shlex
from typing import Any

import click
import flower.app
import flower.command
from tornado.routing import URLSpec

from celery_batchtrack import errors
from celery_batchtrack.glue.extension import BatchTrack
from celery_batchtrack.surfaces import metrics
from celery_batchtrack.surfaces.flower import api, handlers
from celery_batchtrack.surfaces.flower.loader import loader_for
from celery_batchtrack.surfaces.flower.snapshots import Snapshots


def install() -> type[Any]:
    """Let Flower's command start an application that has our pages. Safe to call twice."""
    if not hasattr(flower.command.Flower, "batchtrack_pages"):
        flower.command.Flower = extended(flower.command.Flower)
    found: type[Any] = flower.command.Flower
    return found


def extended(base: type[Any]) -> type[Any]:
    """A class of Flower applications with our pages."""

    class BatchFlower(base):  # type: ignore[misc]
        batchtrack_pages = True

        def __init__(self, options: Any = None, **more: Any) -> None:
            more.setdefault("template_loader", loader_for(more))
            super().__init__(options=options, **more)
            self.snapshots = Snapshots()
            self.add_handlers(r".*", prefixed(handlers.urls() + api.urls(), self.options.url_prefix))
            self.capp.finalize()
            self.batchtrack_app = _named()
            self.has_our_metrics = False
            with contextlib.suppress(errors.BatchTrackError):  # each page says what is missing
                metrics.register(BatchTrack.of(self.capp))  # in Flower's own /metrics
                self.has_our_metrics = True

        def close_pages(self) -> None:
            self.snapshots.close()
            if self.has_our_metrics:
                metrics.unregister()

        def stop(self) -> None:
            self.close_pages()
            super().stop()

    return BatchFlower


def _named() -> str | None:
    """What ``-A`` names, for commands that people copy."""
    context = click.get_current_context(silent=True)
    named = None if context is None else context.find_root().params.get("app")
    return shlex.quote(named) if isinstance(named, str) else None


def prefixed(specs: list[URLSpec], prefix: str | None) -> list[Any]:
    return [flower.app.rewrite_handler(spec, prefix) for spec in specs] if prefix else list(specs)
