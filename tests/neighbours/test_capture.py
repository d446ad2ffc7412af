"""What is captured where a batch is created, and is in its messages whoever publishes them."""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, group, signals
from celery.result import AsyncResult

from celery_batchtrack import Batch, BatchTrack, current_batch, current_child, errors, tracked
from celery_batchtrack.behaviour import dispatch
from celery_batchtrack.behaviour.handover import items_of
from celery_batchtrack.glue import codec
from celery_batchtrack.glue.capture import of_signature
from celery_batchtrack.glue.contexts import BUILT_IN, OpenTelemetry, Tenant
from tests.neighbours.apps.kit import unsent

#: Whose work is done here.
customer: ContextVar[str] = ContextVar("customer", default="nobody")
Make = Callable[..., Celery]


@contextlib.contextmanager
def being(name: str) -> Iterator[None]:
    token = customer.set(name)
    try:
        yield
    finally:
        customer.reset(token)


def hook() -> dict[str, Any]:
    return {"customer": customer.get()}


class Restoring:
    """Two-sided: the header itself is written by who listens to `before_task_publish`."""

    def __init__(self) -> None:
        self.entered: list[str | None] = []

    def capture(self) -> Mapping[str, Any] | None:
        return {"customer": customer.get()} if customer.get() != "nobody" else None

    @contextlib.contextmanager
    def restore(self, headers: Mapping[str, Any]) -> Iterator[None]:
        self.entered.append(headers.get("customer"))
        with being(headers.get("customer", "nobody")):
            yield


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """An app on a broker of its own, with one task."""
    made = []

    def build(*, cls: type[Celery] = Celery, **options: Any) -> Celery:
        name = f"capture-{uuid.uuid4().hex}"
        app = cls("capture", broker="memory://", set_as_current=False)
        app.conf.update(
            batchtrack_database_url=f"sqlite:///{tmp_path / name}.db", batchtrack_auto_migrate=True,
            task_default_queue=name,
        )  # fmt: skip
        BatchTrack(app, **options)
        app.task(name="capture.see", bind=True, shared=False)(see)
        made.append(app)
        return app

    yield build
    for app in made:
        app.batchtrack.reset()


def see(self: Task, name: str = "") -> Any:
    return self.request.get("customer") or (self.request.headers or {}).get("customer")


def task(app: Celery) -> Any:
    return app.tasks["capture.see"]


def sent(app: Celery) -> list[dict[str, Any]]:
    """Headers of the messages that wait."""
    found = []
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(app.conf.task_default_queue)
        with contextlib.suppress(queue.Empty):
            while True:
                message = queue.get(block=False)
                message.ack()
                found.append(message.headers)
        queue.close()
    return found


def customers(app: Celery) -> list[Any]:
    return [headers.get("customer") for headers in sent(app)]


@pytest.fixture
def listener() -> Iterator[None]:
    """Somebody's, who writes the present context into each message, as instrumentation does."""

    def write(headers: dict[str, Any], **_: Any) -> None:
        headers["customer"] = customer.get()
        headers["theirs"] = "kept"

    signals.before_task_publish.connect(write)
    yield
    signals.before_task_publish.disconnect(write)


# -- hooks -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("listener")
def test_headers_of_a_callable_win_over_what_the_publishing_process_writes(make: Make) -> None:
    app = make(capture=[hook])
    with being("creator"), unsent():
        Batch.create("b", [task(app).s(), task(app).s().set(headers={"customer": "my own"})], app=app)
    with being("publisher"):
        app.batchtrack.sweep()
    found = sent(app)
    assert [headers["customer"] for headers in found] == ["creator", "my own"], "below the user's own"
    assert {headers["theirs"] for headers in found} == {"kept"}


def test_headers_of_a_callable_win_over_a_patched_send_task(make: Make) -> None:
    class Patched(Celery):
        def send_task(self, *args: Any, **options: Any) -> Any:
            given = options.get("headers") or {}
            mine = {"customer": customer.get()}
            options["headers"] = {**given, **mine, "headers": {**given, **mine}}  # as Sentry repeats them
            return super().send_task(*args, **options)

    app = make(capture=[hook], cls=Patched)
    with being("creator"), unsent():
        Batch.create("b", [task(app).s()], app=app)
    with being("publisher"):
        app.batchtrack.sweep()
    (headers,) = sent(app)
    assert [headers["customer"], headers["headers"]["customer"]] == ["creator", "creator"]


@pytest.mark.usefixtures("listener")
def test_a_capture_of_two_sides_is_restored_around_each_run_of_equal_ones(make: Make) -> None:
    both = Restoring()
    app = make(capture=[both])
    with being("creator"), unsent(), Batch("b", app=app) as batch:
        for name in ("creator", "creator", "other", "other", "nobody"):
            with being(name):
                batch.add(task(app).s())
    with being("publisher"):
        app.batchtrack.sweep()
        assert customer.get() == "publisher"
    assert customers(app) == ["creator", "creator", "other", "other", "nobody"]
    assert both.entered == ["creator", "other", None], "once for those that are alike; of nothing, a neutral one"


def test_what_is_captured_is_in_the_message_where_its_capture_is_unknown(make: Make) -> None:
    app = make(capture=[Restoring()])
    with being("creator"), unsent():
        Batch.create("b", [task(app).s()], app=app)
    other = Celery("other", broker="memory://", set_as_current=False)
    other.conf.update(app.conf.changes)
    BatchTrack(other)
    other.batchtrack.sweep()
    assert customers(app) == ["creator"]
    other.batchtrack.reset()


def test_children_of_every_shape_carry_what_they_were_added_with(make: Make) -> None:
    app = make(capture=[hook])
    app.conf.task_always_eager = True
    with being("one"), unsent(), Batch("b", app=app, on_success=task(app).si("callback")) as batch:
        batch.add(task(app).s())
        with being("two"):
            batch.add(task(app).s() | task(app).si() | task(app).si())
            batch.add(group([task(app).s(), task(app).s()]))
    with being("publisher"):
        app.batchtrack.sweep()
    assert list(batch.results()) == ["one", "two", ["two", "two"]]
    assert [child.result for child in batch.children(kind="callbacks")] == ["one"]
    (nested,) = batch.nested()
    assert nested.row.headers is not None and "two" in nested.row.headers


def test_children_that_a_child_adds_carry_the_context_of_that_child(make: Make) -> None:
    app = make(capture=[hook])
    app.conf.task_always_eager = True

    @app.task(name="capture.grow", bind=True, shared=False)
    def grow(self: Task) -> str:
        batch = current_batch()
        assert batch is not None
        with being("grown"), batch.extend() as more:
            more.add(task(app).s())
        with being("added"):
            self.add_to_chord(task(app).s())
        return "grew"

    with being("one"):
        batch = Batch.create("b", [grow.s()], app=app)
    assert list(batch.results()) == ["grew", "grown", "added"]


def test_a_retry_with_other_arguments_keeps_what_its_child_was_added_with(make: Make) -> None:
    app = make(capture=[hook])
    app.conf.task_always_eager = True

    @app.task(name="capture.again", bind=True, shared=False)
    def again(self: Task, first: bool) -> Any:
        if first:
            raise self.retry(args=[False], countdown=0)
        child = current_child()
        assert child is not None
        return [self.request.headers["customer"], of_signature(child.row.signature)]

    with being("one"), unsent(), Batch("b", app=app) as batch, being("two"):
        batch.add(again.s(True))
    with being("publisher"):
        app.batchtrack.sweep()
    assert list(batch.results()) == [["two", {"headers": {"customer": "two"}}]], "in the message, and in the row"


def test_another_round_carries_the_same(make: Make) -> None:
    app = make(capture=[hook])
    with being("one"), unsent(), Batch("b", app=app) as batch, being("two"):
        batch.add(task(app).s())
    app.batchtrack.sweep()
    assert customers(app) == ["two"]
    batch.cancel()
    with being("who asks"):
        assert batch.retry(overrides={"headers": {"more": 1}}) == 1
    (headers,) = sent(app)
    assert [headers["customer"], headers["more"]] == ["two", 1]


def test_parts_of_a_child_that_is_split_carry_the_same(make: Make) -> None:
    app = make(capture=[hook])

    @app.task(name="capture.docs", shared=False)
    @tracked(items="docs")
    def read(docs: list[str]) -> int:
        return len(docs)

    with being("one"), unsent(), Batch("b", app=app) as batch, being("two"):
        batch.add(read.s(["a", "b"]))
    (child,) = batch.children()
    items = items_of(child.row, ("args", 0), codec)
    assert items is not None
    _, part = items.chosen([1], codec)
    assert of_signature(part) == {"headers": {"customer": "two"}}


def test_what_is_alike_is_kept_once_with_the_batch(make: Make) -> None:
    app = make(capture=[hook])
    with being("one"), unsent(), Batch("b", app=app) as batch:
        batch.add_many(task(app).s() for _ in range(3))
    assert not [child for child in batch.children() if "one" in (child.row.signature or "")]
    assert batch.row.headers == '{"headers": {"customer": "one"}}'


def test_an_application_without_any_context_keeps_nothing(make: Make) -> None:
    app = make()
    batch = Batch.create("b", [task(app).s()], app=app)
    assert batch.row.headers is None
    (headers,) = sent(app)
    assert headers["batchtrack"]


# -- built-in ones -----------------------------------------------------------------------------------------


def test_naming_built_in_captures_leaves_out_the_others(make: Make) -> None:
    assert [each.name for each in make().batchtrack.captures._built_in] == list(BUILT_IN)
    assert [each.name for each in make(capture=[hook]).batchtrack.captures._built_in] == list(BUILT_IN)
    assert [each.name for each in make(capture=["tenant", hook]).batchtrack.captures._built_in] == ["tenant"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tenants"], "there is no such capture: did you mean 'tenant'?"),
        ("tenant", r"capture takes a list"),
        ([3], "a capture is a callable that returns headers, an object with"),
        ([Restoring], "a capture is a callable"),
        ([Restoring(), Restoring()], "give each a `name` of its own"),
    ],
)
def test_a_wrong_capture_is_a_clear_error(make: Make, given: Any, said: str) -> None:
    with pytest.raises(errors.ImproperlyConfigured, match=said.replace("?", r"\?")):
        make(capture=given)


def test_an_object_with_one_side_is_as_good_as_a_callable(make: Make) -> None:
    class OneSide:
        def capture(self) -> dict[str, Any]:
            return hook()

    app = make(capture=[OneSide()])
    with being("creator"):
        Batch.create("b", [task(app).s()], app=app)
    assert customers(app) == ["creator"]


def test_trouble_with_a_trace_is_told_once_and_costs_no_batch(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise AttributeError("another version")

    monkeypatch.setattr(OpenTelemetry, "loaded", lambda _: True)
    monkeypatch.setattr(OpenTelemetry, "capture", broken)
    app = make()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Batch.create("b", [task(app).s()], app=app)
    assert len(sent(app)) == 2
    assert caplog.text.count("action=no_context the context of opentelemetry") == 1


def test_trouble_with_a_tenant_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise AttributeError("another version")

    app = make()
    monkeypatch.setattr(Tenant, "loaded", lambda _: True)
    monkeypatch.setattr(Tenant, "capture", broken)
    with pytest.raises(AttributeError, match="another version"):
        Batch.create("b", [task(app).s()], app=app)
    assert Batch.find(app=app) == []


# -- tasks with their own apply_async ----------------------------------------------------------------------


class Own(Task):  # type: ignore[misc]
    """What `apply_async` does is set by the test."""

    what: Callable[..., Any]

    def apply_async(self, *args: Any, **options: Any) -> Any:
        return type(self).what(super().apply_async, *args, **options)


def own_task(app: Celery, what: Callable[..., Any], **options: Any) -> Any:
    def run() -> None:
        pass

    Own.what = staticmethod(what)
    return app.task(name="capture.own", base=Own, shared=False, **options)(run)


def outcome(app: Celery, what: Callable[..., Any]) -> Batch:
    own = own_task(app, what)
    return Batch.create("b", [own.s(), task(app).s()], app=app, tolerance=1)


def refuse(error: BaseException) -> Callable[..., Any]:
    def raising(send: Any, *args: Any, **options: Any) -> Any:
        raise error

    return raising


@pytest.mark.parametrize("eager", [False, True], ids=["broker", "eager"])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        (refuse(RuntimeError("taken")), r"the own apply_async of capture.own \(Own\) raised RuntimeError: taken"),
        (refuse(PermissionError("/locks")), r"raised PermissionError: /locks"),
        (lambda send, *args, **options: None, "returned no task's id"),
        (lambda send, *args, **options: AsyncResult("own-id"), "another task, own-id"),
    ],
    ids=["raises", "raises of its file", "returns nothing", "returns another"],
)
def test_a_task_that_does_not_send_its_child_settles_it(make: Make, what: Any, said: str, eager: bool) -> None:
    app = make()
    app.conf.task_always_eager = eager
    batch = outcome(app, what)
    first, second = batch.children()
    assert [first.status, first.cause, first.dispatches] == ["failed", "not_sent", 1]
    (incident,) = batch.incidents()
    assert incident.message is not None
    assert re.search(said, incident.message)
    assert second.status == ("completed" if eager else "pending"), "the others are sent"
    assert dispatch.pump(app.batchtrack.tracker) == 0, "and nothing is tried again"


def test_a_broker_that_is_down_is_no_refusal(make: Make) -> None:
    app = make()
    batch = outcome(app, refuse(ConnectionError("away")))
    assert [child.status for child in batch.children()] == ["pending", "pending"]
    assert [child.dispatches for child in batch.children()] == [0, 0], "neither was tried"
    calls: list[Any] = []

    def send(real: Any, *args: Any, **options: Any) -> Any:
        calls.append(options["task_id"])
        return real(*args, **options)

    Own.what = staticmethod(send)
    assert dispatch.pump(app.batchtrack.tracker) == 2
    assert calls == [next(iter(batch.children())).task_id], "it is asked when it is really sent"


def test_what_may_have_reached_the_broker_is_sent_again_past_its_lock(make: Make) -> None:
    app = make()
    calls: list[Any] = []

    def send(real: Any, *args: Any, **options: Any) -> Any:
        calls.append(options["task_id"])
        real(*args, **options)
        raise ConnectionError("the answer was lost")

    batch = outcome(app, send)
    assert [child.dispatches for child in batch.children()] == [1, 0]
    assert dispatch.pump(app.batchtrack.tracker) == 2
    assert len(calls) == 1
    assert [child.dispatches for child in batch.children()] == [2, 1]


@pytest.mark.usefixtures("listener")
def test_a_task_that_sends_itself_carries_what_was_captured(make: Make) -> None:
    app = make(capture=[hook])
    own = own_task(app, lambda send, *args, **options: send(*args, **options), expires=30)
    with being("creator"), unsent():
        batch = Batch.create("b", [own.s(), own.s().set(expires=90), own.s().set(expires=None)], app=app)
    with being("publisher"):
        app.batchtrack.sweep()
    found = sent(app)
    assert [headers["customer"] for headers in found] == ["creator"] * 3
    assert [headers["id"] for headers in found] == [child.task_id for child in batch.children()]
    left = [child.expires_at for child in batch.children()]
    assert left[2] is found[2]["expires"] is None
    assert left[0] is not None and left[1] is not None
    assert 55 < (left[1] - left[0]).total_seconds() < 65, "as it is in the row, not once more from now"
