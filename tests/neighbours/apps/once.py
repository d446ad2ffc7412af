"""Tasks of celery-once and of celery-singleton, with their locks in Redis."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery import Celery
from celery_once import QueueOnce
from celery_singleton import Singleton

from celery_batchtrack import BatchTrack, tracked
from tests.acceptance.apps.crashes import lines, note
from tests.helpers import eventually
from tests.neighbours.apps.kit import configured

LOCKS = os.environ["LOCKS_URL"]
app = configured(Celery("once", set_as_current=False))
app.conf.update(
    ONCE={"backend": "celery_once.backends.Redis", "settings": {"url": LOCKS, "default_timeout": 300}},
    singleton_backend_url=LOCKS, singleton_lock_expiry=300,
)  # fmt: skip
BatchTrack(app)


def wait_for_go(place: str) -> None:
    note(place, os.getpid())
    eventually(Path(f"{place}.go").exists, 30, what=f"{place}.go")


def dies_first(place: str) -> str:
    note(place, os.getpid())
    if len(lines(place)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "in the end"


def define(name: str, base: type) -> tuple[Any, ...]:
    @app.task(name=f"{name}.wait", base=base, shared=False)
    def wait(place: str) -> str:
        wait_for_go(place)
        return place

    @app.task(name=f"{name}.die", base=base, shared=False)
    @tracked(on_crash="retry")
    def die(place: str) -> str:
        return dies_first(place)

    @app.task(name=f"{name}.run", base=base, shared=False)
    def run(place: str) -> str:
        note(place, os.getpid())
        return place

    return wait, die, run


once_wait, once_die, once_run = define("once", QueueOnce)
single_wait, single_die, single_run = define("single", Singleton)


@app.task(name="once.graceful", base=QueueOnce, once={"graceful": True}, shared=False)
def graceful(place: str) -> str:
    return place


@app.task(name="once.pass_on", shared=False)
def pass_on(place: str) -> str:
    return place


@app.task(name="single.again", base=Singleton, bind=True, shared=False)
def single_again(self: Any, place: str) -> str:
    note(place, os.getpid())
    if len(lines(place)) == 1:
        raise self.retry(countdown=0)
    return place
