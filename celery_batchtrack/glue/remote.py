"""What a worker tells of itself through Celery's remote control: ``celery -A app inspect batchtrack``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from celery.app.task import Task
from celery.worker.control import inspect_command

from celery_batchtrack import __version__, errors
from celery_batchtrack.vocabulary.settings import Settings

from .tracked_task import TrackedTask

COMMAND = "batchtrack"
#: May hold passwords, or objects of any kind.
_UNTOLD = ("database_url", "engine_options")


def untracked(app: Any) -> list[str]:
    """Names of tasks that have not got our wrapper: as children they would run unseen."""
    tasks: Iterable[tuple[str, Any]] = list(app._tasks.items())
    return sorted(name for name, task in tasks if not (isinstance(task, Task) and isinstance(task, TrackedTask)))


def told_settings(settings: Settings) -> dict[str, Any]:
    """As JSON has them, without what is nobody's business."""
    return {name: value for name, value in asdict(settings).items() if name not in _UNTOLD}


@inspect_command(name=COMMAND)  # type: ignore[untyped-decorator, unused-ignore]
def batchtrack(state: Any, **_: Any) -> dict[str, Any]:
    """Tracking database, version, settings and clock of celery-batchtrack."""
    extension = getattr(state.app, "batchtrack", None)
    told: dict[str, Any] = {"version": __version__, "time": time.time(), **_of_the_pool(state)}
    if extension is None:
        return {**told, "installed": False}
    try:
        return {**told, "installed": True, **_of_the_extension(extension)}
    except errors.BatchTrackError as error:
        return {**told, "installed": True, "trouble": str(error)}


def _of_the_pool(state: Any) -> dict[str, Any]:
    controller = state.consumer.controller
    return {
        "pool": str(controller.pool_cls.__module__).rsplit(".", 1)[-1],
        "processes": int(controller.max_concurrency or controller.concurrency or 1),
        "time_limit": controller.time_limit,
        "queues": sorted(state.app.amqp.queues.consume_from),
    }


def _of_the_extension(extension: Any) -> dict[str, Any]:
    """Nothing here asks the database: it is the worker's own loop that answers."""
    store, taking_part = extension.store, extension.own_worker
    told = {
        "takes_part": taking_part is not None,
        "store_id": None if store.known_store_id is None else str(store.known_store_id),
        "database": store.shown_url, "settings": told_settings(extension.settings),
        "untracked": untracked(extension.app),
    }  # fmt: skip
    if taking_part is not None:
        identity, boxes = taking_part
        folder = None if boxes.folder is None else str(boxes.base)
        told.update(worker_id=str(identity.id), hostname=identity.host.hostname, boot_id=identity.host.boot_id,
                    blackbox=folder, blackbox_trouble=boxes.trouble)  # fmt: skip
    return told
