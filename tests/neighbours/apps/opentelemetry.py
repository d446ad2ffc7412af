"""Traced by OpenTelemetry's instrumentation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from celery import Celery, Task
from celery.signals import worker_process_init
from opentelemetry import baggage, context, trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from celery_batchtrack import Batch, BatchTrack
from celery_batchtrack.behaviour import hosts
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import NewWorker
from tests.neighbours.apps.kit import configured, filled, main, swept

app = configured(Celery("traced", set_as_current=False))
BatchTrack(app)
spans = InMemorySpanExporter()


def instrument(**_: Any) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument(tracer_provider=provider)


worker_process_init.connect(instrument, weak=False)


@app.task(bind=True, name="traced.see", shared=False)
def see(self: Task, name: str) -> dict[str, Any]:
    here: Any = trace.get_current_span()
    return {
        "trace": f"{here.get_span_context().trace_id:032x}",
        "span": here.name,
        "parent": f"{here.parent.span_id:016x}",
        "customer": baggage.get_baggage("customer"),
        "batchtrack": {name: value for name, value in here.attributes.items() if name.startswith("batchtrack.")},
        "links": [f"{each.context.span_id:016x}" for each in here.links],
    }


@contextlib.contextmanager
def request(name: str, found: dict[str, Any]) -> Iterator[None]:
    """As a web framework's instrumentation."""
    token = context.attach(baggage.set_baggage("customer", name, context.Context()))
    with trace.get_tracer("web").start_as_current_span(name) as span:
        found[name] = f"{span.get_span_context().trace_id:032x}"
        found[f"{name} span"] = f"{span.get_span_context().span_id:016x}"
        yield
    context.detach(token)


def published() -> dict[str, str]:
    """Span to trace, of what was sent from here."""
    sent = [each for each in spans.get_finished_spans() if each.name == "apply_async/traced.see"]
    return {f"{each.context.span_id:016x}": f"{each.context.trace_id:032x}" for each in sent}


def create(sweep: bool = True) -> dict[str, Any]:
    spans.clear()
    found: dict[str, Any] = {}
    batch = filled(app, see, lambda: request("one", found), lambda: request("two", found))
    if sweep:
        swept(app, batch, lambda: request("other", found))
    return {"batch": str(batch.id), "traces": found, "published": published()}


def unswept() -> dict[str, Any]:
    return create(sweep=False)


def untraced() -> dict[str, Any]:
    """Created where there is no trace, and sent in somebody's."""
    found: dict[str, Any] = {}
    batch = filled(app, see, contextlib.nullcontext, contextlib.nullcontext)
    swept(app, batch, lambda: request("other", found))
    return {"batch": str(batch.id), "traces": found}


def ordinary() -> dict[str, Any]:
    """Sent by its creator."""
    spans.clear()
    found: dict[str, Any] = {}
    with request("one", found):
        batch = Batch.create("own", [see.si("own")], app=app)
        see.delay("of no batch")
    parents = [each.parent.span_id for each in spans.get_finished_spans() if each.name == "apply_async/traced.see"]
    (web,) = [each for each in spans.get_finished_spans() if each.name == "one"]
    return {"batch": str(batch.id), "traces": found, "below": [each == web.context.span_id for each in parents]}


def told() -> dict[str, Any]:
    """A child dies with a worker that is gone, and its batch is cancelled, both noticed in somebody else's trace."""
    found: dict[str, Any] = {}
    store = app.batchtrack.store
    with request("one", found):
        batch = Batch.create("told", [see.si("a"), see.si("b")], app=app, queue="nobodys")
        key = ChildKey(batch.id, 0)
    gone = NewWorker(uuid7(), "worker", "w9@here", hosts.identity(), 2**22 + 1, 1, "prefork", 60.0, "0")
    store.register(gone)
    store.claim(key, 0, new_token(), gone.id, "4194305:1:1:0")
    spans.clear()
    with request("other", found):
        app.batchtrack.sweep()
        batch.cancel()
    kept = [each for each in spans.get_finished_spans() if each.name in ("crash/traced.see", "batch/told")]
    return {"batch": str(batch.id), "traces": found, "spans": [shown(each) for each in kept]}


def shown(span: Any) -> dict[str, Any]:
    return {
        "name": span.name, "trace": f"{span.context.trace_id:032x}", "parent": f"{span.parent.span_id:016x}",
        "attributes": dict(span.attributes), "status": span.status.status_code.name,
        "events": {each.name: dict(each.attributes) for each in span.events},
        "forwards": span.start_time <= span.end_time,
    }  # fmt: skip


def silent() -> dict[str, Any]:
    app.conf.batchtrack_otel = False
    app.batchtrack.reset()
    return told()


if __name__ == "__main__":
    instrument()
    main(create=create, unswept=unswept, untraced=untraced, ordinary=ordinary, told=told, silent=silent)
