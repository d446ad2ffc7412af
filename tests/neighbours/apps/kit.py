"""What the applications of these tests have in common. Broker and settings come from the environment, as for those of
the acceptance tests; each is run by a worker, and as a script by its test: see `tests.neighbours.kit`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from celery import Celery, group

from celery_batchtrack import Batch
from celery_batchtrack.glue import starting

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def configured(app: Celery) -> Any:
    app.conf.update(json.loads(os.environ["BATCHTRACK_TEST_CONF"]), broker_url=os.environ["BATCHTRACK_TEST_BROKER_URL"])
    return app


@contextlib.contextmanager
def unsent() -> Iterator[None]:
    """As if the creator died before it sent anything."""
    send = starting.send
    starting.send = lambda *_, **__: None
    try:
        yield
    finally:
        starting.send = send


def filled(app: Any, see: Any, one: Context, two: Context, **options: Any) -> Batch:
    """A batch of `one` with children that were added in `two`, of every shape; nothing is sent.

    Its callback is published by a run of `two`, if children run in order.
    """
    with unsent(), one(), Batch("contexts", on_success=see.si("callback"), app=app, **options) as batch:
        batch.add(see.si("one"))
        with two():
            batch.add(see.si("first") | see.si("second"))
            batch.add(group([see.si("nested"), see.si("nested")]))
    return batch


def swept(app: Any, batch: Batch, third: Context) -> None:
    """Sent by a sweep in another context."""
    with third():
        app.batchtrack.sweep()
    # A chain may be at its second link already, which is another message.
    assert all(each.dispatches or each.attempt or each.waits_on_batch for each in batch.children()), "it sent them"


def main(**steps: Callable[..., Any]) -> None:
    """``python -m <application> '{"<step>": [<arguments>], …}'``; prints what each step returns."""
    wanted = json.loads(sys.argv[1])
    print(json.dumps({name: steps[name](*arguments) for name, arguments in wanted.items()}))
