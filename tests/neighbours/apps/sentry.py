"""With Sentry, whose events go to a file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentry_sdk
from celery import Celery, Task
from celery.signals import before_task_publish
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport

from celery_batchtrack import Batch, BatchTrack
from tests.neighbours.apps.kit import configured, filled, main, swept

EVENTS = Path(os.environ["SENTRY_EVENTS"])


class ToFile(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event() or envelope.get_transaction_event()
        if event:
            with EVENTS.open("a") as file:
                file.write(json.dumps(event, default=repr) + "\n")


app = configured(Celery("watched", set_as_current=False))
BatchTrack(app)
sentry_sdk.init(
    "http://key@127.0.0.1:1/1", transport=ToFile, integrations=[CeleryIntegration()], default_integrations=False,
    traces_sample_rate=float(os.environ.get("SENTRY_RATE", "0")) or None,
)  # fmt: skip


@app.task(bind=True, name="watched.see", shared=False)
def see(self: Task, name: str) -> dict[str, Any]:
    scope = sentry_sdk.get_current_scope()
    span: Any = scope.span
    return {"trace": scope.get_trace_context()["trace_id"], "sampled": span and span.containing_transaction.sampled}


@app.task(name="watched.fail", shared=False)
def fail() -> None:
    raise ValueError("on purpose")


@contextlib.contextmanager
def request(name: str, found: dict[str, Any]) -> Iterator[None]:
    """As a web framework's integration."""
    with sentry_sdk.isolation_scope() as scope:
        scope.set_user({"id": name})
        scope.set_new_propagation_context()
        with sentry_sdk.start_transaction(name=name, sampled=True):
            found[name] = str(sentry_sdk.get_traceparent()).partition("-")[0]
            yield


def create() -> dict[str, Any]:
    found: dict[str, Any] = {}
    users: list[Any] = []

    def note_user(**_: Any) -> None:
        users.append(sentry_sdk.get_isolation_scope()._user)

    before_task_publish.connect(note_user)
    batch = filled(app, see, lambda: request("one", found), lambda: request("two", found))
    swept(app, batch, lambda: request("other", found))
    return {"batch": str(batch.id), "traces": found, "users": users}


def uncaptured() -> dict[str, Any]:
    """Created where Sentry is not, and sent in somebody's trace."""
    found: dict[str, Any] = {}
    take, app.batchtrack.captures.take = app.batchtrack.captures.take, dict
    batch = filled(app, see, contextlib.nullcontext, contextlib.nullcontext)
    app.batchtrack.captures.take = take
    swept(app, batch, lambda: request("other", found))
    return {"batch": str(batch.id), "traces": found}


def ordinary() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with request("one", found):
        batch = Batch.create("own", [see.si("own"), fail.si()], app=app, tolerance=1)
        fail.delay()
    sentry_sdk.flush()
    return {"batch": str(batch.id), "traces": found}


if __name__ == "__main__":
    main(create=create, ordinary=ordinary, uncaptured=uncaptured)
