"""Batches and deaths as OpenTelemetry spans, in the trace of who created the batch.

Only where the application has loaded OpenTelemetry and set up its SDK in this process; nothing is imported for it here.
A process that dies takes its open span along, so whoever notices tells of the death with a span of its own.
"""

from __future__ import annotations

import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from celery.exceptions import SoftTimeLimitExceeded

from celery_batchtrack import __version__
from celery_batchtrack.behaviour.run import Run
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.states import BatchStatus

from . import capture
from .contexts import OpenTelemetry

if TYPE_CHECKING:
    from celery_batchtrack.behaviour.tracker import Tracker

#: Of so many batches a process remembers who created them.
_REMEMBERED = 256
_COUNTS = ("total", "completed", "failed", "crashed", "cancelled")


class Spans:
    """Trouble with them is told once, and never anybody else's."""

    def __init__(self, tracker: Callable[[], Tracker]) -> None:
        self._tracker = tracker
        self._creators: OrderedDict[uuid.UUID, Any] = OrderedDict()
        self._told = False

    def _on(self) -> bool:
        """Whether spans go anywhere from this process."""
        trace: Any = sys.modules.get("opentelemetry.trace")
        if trace is None or "opentelemetry.propagate" not in sys.modules or not self._tracker().settings.otel:
            return False
        provider = trace.get_tracer_provider()
        return not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider))

    def hear(self, event: events.Event) -> None:
        """A batch that ended, or a run that died."""
        if not isinstance(event, (events.BatchEnded, events.ChildCrashed)):
            return
        try:
            if self._on():
                self._batch(event) if isinstance(event, events.BatchEnded) else self._death(event)
        except Exception as error:  # noqa: BLE001 (of another package, or of a database that is away)
            self._trouble(error)

    def mark(self, run: Run, request: Any) -> None:
        """The span of a run, which is its instrumentation's: what of a batch it is, and a link to who created that."""
        if request.is_eager or "opentelemetry.trace" not in sys.modules:
            return  # the present span is the caller's
        try:
            span = sys.modules["opentelemetry.trace"].get_current_span()
            if span.is_recording() and self._on():
                key = run.ticket.key
                span.set_attributes(
                    {**_of_child(key.batch_id, key.position, run.attempt), "batchtrack.kind": run.claimed.kind}
                )
                creator = self._creator(key.batch_id)
                if creator is not None:
                    span.add_link(creator)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # noqa: BLE001
            self._trouble(error)

    def _trouble(self, error: Exception) -> None:
        from .narrate import logger

        if not self._told:
            self._told = True
            logger.warning(
                "action=no_spans batches are not told to OpenTelemetry (%s: %s); batchtrack_otel = False does without",
                type(error).__name__, error,
            )  # fmt: skip

    # -- a batch ---------------------------------------------------------------------------------

    def _batch(self, event: events.BatchEnded) -> None:
        store = self._tracker().store
        row, progress = store.batch(event.batch_id), store.progress(event.batch_id)
        if row is None:
            return
        counts = {f"batchtrack.children.{name}": getattr(progress, name) for name in _COUNTS}
        attributes = {
            "batchtrack.batch_id": str(row.id), "batchtrack.batch_name": row.name, "batchtrack.round": row.round,
            "batchtrack.status": event.status, "batchtrack.reason": event.reason, **counts,
            "batchtrack.parent_batch_id": row.parent_batch and str(row.parent_batch),
        }  # fmt: skip
        failed = f"{progress.failed + progress.crashed} children did not complete"
        self._tell(
            f"batch/{row.name}", capture.of_batch(row.headers), attributes, row.started_at or row.created_at,
            row.finished_at, failed if event.status == BatchStatus.FAILED else None,
        )  # fmt: skip

    # -- a death ---------------------------------------------------------------------------------

    def _death(self, event: events.ChildCrashed) -> None:
        store, evidence = self._tracker().store, event.evidence
        batch, child = store.batch(event.key.batch_id), store.child(event.key)
        headers = None if batch is None else batch.headers
        captured = capture.of_child(headers, capture.of_signature(None if child is None else child.signature))
        attributes = {
            **_of_child(event.key.batch_id, event.key.position, event.attempt),
            "batchtrack.batch_name": batch and batch.name, "celery.task_name": event.task,
            "batchtrack.runs_again": event.runs_again, **_of_evidence(evidence),
        }  # fmt: skip
        how = str(evidence.signal or evidence.cause)
        told = {
            "exception.type": how, "exception.message": evidence.message, "exception.stacktrace": evidence.stack
        }  # fmt: skip
        self._tell(
            f"crash/{event.task}", captured, {**attributes, "error.type": how}, event.started_at, evidence.died_at,
            f"died of {how}", told,
        )  # fmt: skip

    # -- spans -----------------------------------------------------------------------------------

    def _tell(
        self, name: str, captured: capture.Captured, attributes: Mapping[str, Any], began: datetime | None,
        ended: datetime | None, error: str | None, exception: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """A span that is over, in the context that was captured."""
        trace: Any = sys.modules["opentelemetry.trace"]
        span = trace.get_tracer("celery_batchtrack", __version__).start_span(
            name, context=_context(captured), attributes=_known(attributes), start_time=_nanoseconds(began)
        )
        if exception is not None:
            span.add_event("exception", _known(exception))
        if error is not None:
            span.set_status(trace.StatusCode.ERROR, error)
        if ended is not None and began is not None:
            ended = max(began, ended)  # a worker's last beat may be older than its last child
        span.end(_nanoseconds(ended))

    def _creator(self, batch_id: uuid.UUID) -> Any:
        """The span in which a batch was created: read once in each process."""
        if batch_id not in self._creators:
            row = self._tracker().store.batch(batch_id)
            trace: Any = sys.modules["opentelemetry.trace"]
            context = _context(capture.of_batch(None if row is None else row.headers))
            found = trace.get_current_span(context).get_span_context()
            self._creators[batch_id] = found if found.is_valid else None
            while len(self._creators) > _REMEMBERED:
                self._creators.popitem(last=False)
        return self._creators[batch_id]


def _context(captured: capture.Captured) -> Any:
    context: Any = sys.modules["opentelemetry.context"]
    headers = captured.get(OpenTelemetry.name, {})
    return sys.modules["opentelemetry.propagate"].extract(headers, context=context.Context())


def _of_child(batch_id: uuid.UUID, position: int, attempt: int) -> dict[str, Any]:
    return {
        "batchtrack.batch_id": str(batch_id), "batchtrack.position": position, "batchtrack.attempt": attempt
    }  # fmt: skip


def _of_evidence(evidence: Evidence) -> dict[str, Any]:
    names = ("cause", "signal", "exit_code", "item", "note", "python_frame", "detected_by", "peak_memory", "worker")
    return {
        **{f"batchtrack.{name}": getattr(evidence, name) for name in names},
        "host.name": evidence.hostname, "process.pid": evidence.pid,
    }  # fmt: skip


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float)
    return {
        name: value if type(value) in plain else str(value) for name, value in attributes.items() if value is not None
    }


def _nanoseconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1_000_000) * 1000


__all__ = ["Spans"]
