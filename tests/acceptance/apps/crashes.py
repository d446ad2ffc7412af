"""Tasks that end in every way there is. Broker and settings come from the environment.

Every task writes a line to `place` for each of its runs, so that a test knows how often, and in which
process, it really ran. Tests load this module once more for their own side: see `tests.acceptance.scene`.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import kombu.serialization
from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

from celery_batchtrack import BatchTrack, tracked

Docs = list[dict[str, Any]]
ITEM_ID = ("db", "id")


# -- the ends ---------------------------------------------------------------------------------------


def lines(place: str) -> list[str]:
    return Path(place).read_text().splitlines() if place and Path(place).exists() else []


def note(place: str, line: Any) -> None:
    """Atomic, so that several processes may note in one place."""
    if place:
        with Path(place).open("a") as file:
            file.write(f"{line}\n")


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = open(os.devnull)  # noqa: SIM115, PTH123


def segfault() -> NoReturn:
    ctypes.string_at(0)
    raise AssertionError("survived")


def kill_self(number: int) -> NoReturn:
    os.kill(os.getpid(), number)
    while True:
        time.sleep(1)


def busy() -> NoReturn:
    while True:
        time.sleep(0.01)


def raises(error: BaseException) -> NoReturn:
    raise error


ENDS = {
    "SIGSEGV": segfault,
    "SIGKILL": lambda: kill_self(signal.SIGKILL),
    "SIGABRT": os.abort,
    "SIGBUS": lambda: kill_self(signal.SIGBUS),
    "exit 0": lambda: os._exit(0),
    "exit 7": lambda: os._exit(7),
    "busy": busy,
    "sys.exit": lambda: sys.exit(3),
    "KeyboardInterrupt": lambda: raises(KeyboardInterrupt()),
    "MemoryError": lambda: raises(MemoryError("as if")),
    "ValueError": lambda: raises(ValueError("no value")),
    "unpicklable": lambda: raises(Unpicklable("holds a file")),
    "Ignore": lambda: raises(Ignore("not today")),
    "Reject": lambda: raises(Reject("not mine")),
    "requeue": lambda: raises(Reject("again", requeue=True)),
    "unserialisable": lambda: object(),
    "ok": lambda: "ok",
    "nap": lambda: time.sleep(0.1),
}


def end(how: str, place: str, times: int | None = None) -> Any:
    """End as `how` says; with `times`, only that often, and then well."""
    note(place, os.getpid())
    if times is not None and len(lines(place)) > times:
        return "survived"
    return ENDS[how]()


# -- the app ----------------------------------------------------------------------------------------

app = Celery("crashes", broker=os.environ["BATCHTRACK_TEST_BROKER_URL"], set_as_current=False)
app.conf.update(
    accept_content=["json", "deadly", "broken"],
    task_default_delivery_mode="transient",
    worker_hijack_root_logger=True,
    broker_connection_retry_on_startup=True,
)
app.conf.update(json.loads(os.environ.get("BATCHTRACK_TEST_CONF", "{}")))


class Elsewhere:
    """Stands for the `socket` module in `hosts`: this process is on another host."""

    def __init__(self, name: str) -> None:
        self.name = name

    def gethostname(self) -> str:
        return self.name

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)


if "BATCHTRACK_TEST_HOSTNAME" in os.environ:
    from celery_batchtrack.behaviour import hosts

    hosts.socket = Elsewhere(os.environ["BATCHTRACK_TEST_HOSTNAME"])  # type: ignore[attr-defined]

if "BATCHTRACK_TEST_DEAF" in os.environ:
    from celery_batchtrack.glue import request

    request._died = lambda *args, **kwargs: None  # as if billiard had told no request

BatchTrack(app)

#: `shared=False`: a test process loads this module several times, and its other apps must not get these tasks.
task = functools.partial(app.task, shared=False)

VARIANTS: dict[str, dict[str, Any]] = {
    "early": {},
    "early_reject": {"reject_on_worker_lost": True},
    "late": {"acks_late": True},
    "late_reject": {"acks_late": True, "reject_on_worker_lost": True},
    "retry_lost": {"retry_on_worker_lost": True, "default_retry_delay": 0},
    "ignoring": {"ignore_result": True},
    "limited": {"time_limit": 1},
    "late_limited": {"acks_late": True, "time_limit": 1},
    "soft": {"soft_time_limit": 1},
}


def _variant(name: str, options: dict[str, Any]) -> Any:
    @task(name=f"crashes.{name}", **options)
    @tracked(items="docs", item_id=ITEM_ID)
    def variant(docs: Docs, how: str, place: str = "", times: int | None = None) -> Any:
        return end(how, place, times)

    return variant


tasks = SimpleNamespace(**{name: _variant(name, options) for name, options in VARIANTS.items()})


@task(name="crashes.record", acks_late=True, reject_on_worker_lost=True)
@tracked(items="docs", item_id=ITEM_ID, on_crash="record")
def record(docs: Docs, how: str, place: str = "", times: int | None = None) -> Any:
    return end(how, place, times)


@task(name="crashes.retry")
@tracked(items="docs", item_id=ITEM_ID, on_crash="retry")
def retry(docs: Docs, how: str, place: str = "", times: int | None = None) -> Any:
    return end(how, place, times)


@task(name="crashes.limited_retry", time_limit=1)
@tracked(items="docs", item_id=ITEM_ID, on_crash="retry", max_crashes=2)
def limited_retry(docs: Docs, how: str, place: str = "", times: int | None = None) -> Any:
    return end(how, place, times)


@task(name="crashes.bound", bind=True)
@tracked(items="docs", item_id=ITEM_ID)
def bound(self: Task, docs: Docs, how: str, place: str = "") -> Any:
    return end(how, place)


class Own(Task):
    """A user's base class whose `__call__` goes past everything below it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


@task(name="crashes.own_base", base=Own)
@tracked(items="docs", item_id=ITEM_ID)
def own_base(docs: Docs, how: str, place: str = "") -> Any:
    return end(how, place)


class ClassBased(Task):
    name = "crashes.class_based"

    @tracked(items="docs", item_id=ITEM_ID)
    def run(self, docs: Docs, how: str, place: str = "") -> Any:
        return end(how, place)


class_based = app.register_task(ClassBased())


class Order(BaseModel):
    docs: Docs
    how: str
    place: str = ""


@task(name="crashes.pydantic", pydantic=True)
@tracked(items=lambda order: order["docs"], item_id=ITEM_ID)
def pydantic(order: Order) -> Any:
    return end(order.how, order.place)


@task(name="crashes.autoretry", autoretry_for=(ValueError,), max_retries=2, default_retry_delay=0)
@tracked(items="docs", item_id=ITEM_ID)
def autoretry(docs: Docs, how: str, place: str = "", times: int | None = None) -> Any:
    return end(how, place, times)


@task(name="crashes.retrying", bind=True, max_retries=1)
@tracked(items="docs", item_id=ITEM_ID)
def retrying(self: Task, docs: Docs, countdown: float, place: str = "", times: int = 1) -> Any:
    note(place, os.getpid())
    if len(lines(place)) > times:
        return "survived"
    raise self.retry(countdown=countdown, exc=ValueError("not yet"))


@task(name="crashes.undecorated")
def undecorated(how: str, place: str = "") -> Any:
    return end(how, place)


from tests.acceptance.apps.shared import shared  # noqa: E402, F401 (its home must not import this module)

# -- meeting a test -----------------------------------------------------------------------------------


def wait_for(place: str) -> str:
    """Say that it runs, then wait until a test makes `<place>.go`."""
    note(place, os.getpid())
    while not Path(f"{place}.go").exists():
        time.sleep(0.01)
    return f"met {Path(place).name}"


def _meeting(name: str, options: dict[str, Any], **tracking: Any) -> Any:
    @task(name=f"crashes.meet_{name}", **options)
    @tracked(**tracking)
    def meet(place: str) -> str:
        return wait_for(place)

    return meet


tasks.meet = _meeting("early", {})
tasks.meet_late = _meeting("late", {"acks_late": True})
tasks.meet_retry = _meeting("retry", {}, on_crash="retry")


@task(name="crashes.compute")
def compute(place: str) -> str:
    """As `wait_for`, but never lets go of the processor."""
    note(place, os.getpid())
    while not Path(f"{place}.go").exists():
        sum(range(20_000))
    return "computed"


@task(name="crashes.add")
@tracked
def add(left: int, right: int) -> int:
    return left + right


@task(name="crashes.called")
def called(argument: Any, place: str) -> int:
    """A callback: notes what it got, one line for each start."""
    note(place, json.dumps(argument))
    return len(lines(place))


@task(name="crashes.called_bare")
def called_bare(place: str) -> None:
    note(place, "called")


# -- messages that kill or cannot be decoded ------------------------------------------------------------

_in_pool = False


@signals.worker_process_init.connect(weak=False)
def _forked(**_: Any) -> None:
    global _in_pool
    _in_pool = True


def _decode_deadly(body: Any) -> Any:
    """Decodes as JSON, but a pool process does not survive it: a main process does."""
    text = body.decode() if isinstance(body, bytes) else body
    if _in_pool:
        (args, _, _) = json.loads(text)
        note(args[2], os.getpid())
        times = args[3] if len(args) > 3 else None
        if times is None or len(lines(args[2])) <= times:
            os.kill(os.getpid(), signal.SIGSEGV)
    return json.loads(text)


kombu.serialization.register("deadly", json.dumps, _decode_deadly, "application/x-deadly", "utf-8")
kombu.serialization.register(
    "broken", json.dumps, lambda body: raises(ValueError("not what it seems")), "application/x-broken", "utf-8"
)
