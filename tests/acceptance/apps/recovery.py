"""Tasks that walk over items, some of which kill. Broker and settings come from the environment.

An item is a mapping with an `id`, and what it does: ``{"id": 7, "does": "SIGSEGV"}``. Every item that is done writes
its id, and every run its pid, to `place`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from celery import Celery

from celery_batchtrack import BatchTrack, CrashPolicy, each_item, note, tracked

Docs = list[dict[str, Any]]

app = Celery("recovery", broker=os.environ["BATCHTRACK_TEST_BROKER_URL"], set_as_current=False)
app.conf.update(
    task_default_delivery_mode="transient", worker_hijack_root_logger=True, broker_connection_retry_on_startup=True
)
app.conf.update(json.loads(os.environ.get("BATCHTRACK_TEST_CONF", "{}")))
BatchTrack(app)

task = functools.partial(app.task, shared=False)


def tell(place: str, line: object) -> None:
    with Path(place).open("a") as file:
        file.write(f"{line}\n")


def kill_by(number: int, pid: Callable[[], int] = os.getpid) -> NoReturn:
    os.kill(pid(), number)
    while True:
        time.sleep(1)


def segfault_in_c() -> NoReturn:
    ctypes.string_at(0)
    raise AssertionError("survived")


def hang_with_the_gil() -> None:
    """A regular expression that backtracks for longer than the universe is old, in C."""
    re.match(r"(a|a)*$", "a" * 100 + "b")


def allocate() -> NoReturn:
    held = []
    while True:
        held.append(bytearray(16 * 1024 * 1024))


def wait_for(place: str) -> None:
    while not Path(f"{place}.go").exists():
        time.sleep(0.01)


DEEDS: dict[str, Callable[[], object]] = {
    "SIGSEGV": segfault_in_c,
    "SIGKILL": lambda: kill_by(signal.SIGKILL),
    "SIGABRT": os.abort,
    "exit": lambda: os._exit(7),
    "hang": hang_with_the_gil,
    "sleep": lambda: time.sleep(600),
    "nap": lambda: time.sleep(0.02),
    "allocate": allocate,
    "disable": faulthandler.disable,
    "kill the worker": lambda: kill_by(signal.SIGKILL, os.getppid),
}


def handle(doc: dict[str, Any], place: str) -> None:
    """What is done for one item; the function that a stack has to name."""
    does = doc.get("does")
    if does == "wait":
        tell(f"{place}.met-{doc['id']}", os.getpid())
        wait_for(place)
    elif does is not None and does.startswith("allocate in "):
        Path(does.removeprefix("allocate in "), "cgroup.procs").write_text(str(os.getpid()))
        allocate()
    elif does in DEEDS:
        DEEDS[does]()
    elif does == "raise":
        raise ValueError(f"cannot read {doc['id']}")


def walk(docs: Docs, place: str, done: str | None = None) -> list[Any]:
    tell(f"{place}.runs", os.getpid())
    found = []
    for doc in each_item(docs, done=done):
        note(f"before {doc['id']}")
        handle(doc, place)
        tell(place, doc["id"])
        found.append(doc["id"])
    return found


def _walking(name: str, done: str | None = None, *, celery: dict[str, Any] | None = None, **tracking: Any) -> Any:
    @task(name=f"recovery.{name}", **(celery or {}))
    @tracked(items="docs", item_id="id", **tracking)
    def walking(docs: Docs, place: str) -> list[Any]:
        return walk(docs, place, done)

    return walking


tasks = SimpleNamespace(
    record=_walking("record", on_crash="record"),
    retry=_walking("retry", on_crash="retry", merge="concat"),
    skip=_walking("skip", on_crash="skip", merge="concat"),
    bisect=_walking("bisect", on_crash="bisect", merge="concat"),
    resume=_walking("resume", "on_next", on_crash="resume", merge="concat"),
    listing=_walking("listing", on_crash="skip", merge="list"),
    isolated=_walking("isolated", on_crash=CrashPolicy(isolate=True)),
    isolated_skip=_walking("isolated_skip", on_crash=CrashPolicy("skip", isolate=True), merge="concat"),
    stalling=_walking("stalling", on_crash="skip", merge="concat", stall_timeout=1.0),
    bigger=_walking("bigger", on_crash=CrashPolicy(oom_queue="bigmem")),
    quarantining=_walking("quarantining", on_crash=CrashPolicy("skip", quarantine_after=2), merge="concat"),
    limited=_walking("limited", on_crash="bisect", merge="concat", celery={"time_limit": 1}),
)


@task(name="recovery.sorting")
@tracked(items="docs", on_crash="skip", merge="concat")
def sorting(docs: Docs, place: str) -> list[Any]:
    """Its items have no names, and it turns them round before it walks over them."""
    docs.sort(key=lambda doc: -doc["id"])
    return walk(docs, place)


@task(name="recovery.narrowing", bind=True, max_retries=3, default_retry_delay=0)
@tracked(items="docs", item_id="id", on_crash="skip", merge="concat")
def narrowing(self: Any, docs: Docs, place: str) -> list[Any]:
    """Asks for another attempt with its items turned round."""
    if docs[0]["id"] == 0:
        raise self.retry(args=(docs[::-1], place), countdown=0)
    return walk(docs, place)


@task(name="recovery.undecorated")
def undecorated(docs: Docs, place: str) -> list[Any]:
    return walk(docs, place)


@task(name="recovery.flat")
def flat(results: list[Any], place: str) -> list[Any]:
    """A body: one result for each header position."""
    tell(place, json.dumps(results))
    return results
