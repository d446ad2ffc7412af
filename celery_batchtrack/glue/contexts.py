"""The contexts that other packages send along with a task: a trace, a tenant, what is bound to the logs.

A package counts only if the application has loaded it itself; nothing is imported for it here.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from celery_batchtrack import errors

from . import codec

Headers = Mapping[str, Any]


class BuiltIn:
    """One such package: what it would send from here, and its context for who sends elsewhere."""

    name: str
    #: Its headers win over what a publishing process writes under the same names.
    firm = False
    #: Trouble with it stops what is done. Of a trace or of log lines, it is only told.
    essential = False

    def __init__(self, app: Any) -> None:
        self.app = app

    def loaded(self) -> bool:
        raise NotImplementedError

    def capture(self) -> Headers:
        """Headers of the present context, empty where there is none. Asked only while it is `loaded`."""
        raise NotImplementedError

    def present(self, headers: Headers) -> bool:
        """Whether this is the context of these headers, as it is in the process of their creator."""
        return self.capture() == headers

    def restore(self, headers: Headers) -> contextlib.AbstractContextManager[Any]:
        """The context of these headers, in place of the present one; of none, a context that says nothing."""
        raise NotImplementedError


class OpenTelemetry(BuiltIn):
    """By the propagators that the application has set."""

    name = "opentelemetry"

    def loaded(self) -> bool:
        return "opentelemetry.propagate" in sys.modules

    def capture(self) -> Headers:
        carrier: dict[str, Any] = {}
        sys.modules["opentelemetry.propagate"].inject(carrier)
        return carrier

    @contextlib.contextmanager
    def restore(self, headers: Headers) -> Iterator[None]:
        context: Any = sys.modules["opentelemetry.context"]
        extract = sys.modules["opentelemetry.propagate"].extract
        token = context.attach(extract(headers, context=context.Context()))
        try:
            yield
        finally:
            context.detach(token)


class Sentry(BuiltIn):
    """The trace. User, tags and breadcrumbs stay with whom they belong to, as Sentry has it."""

    name = "sentry"

    def loaded(self) -> bool:
        if "sentry_sdk.integrations.celery" not in sys.modules:
            return False
        integration = sys.modules["sentry_sdk"].get_client().get_integration("celery")
        return integration is not None and bool(integration.propagate_traces)

    def capture(self) -> Headers:
        return dict(sys.modules["sentry_sdk"].get_current_scope().iter_trace_propagation_headers())

    @contextlib.contextmanager
    def restore(self, headers: Headers) -> Iterator[None]:
        scopes: Any = sys.modules["sentry_sdk.scope"]
        fresh = scopes.Scope(ty=scopes.ScopeType.ISOLATION)
        with scopes.use_isolation_scope(fresh):
            current = scopes.Scope.get_current_scope()
            current.clear()
            if headers:
                # Never started, never sent: it is what the spans of publishing belong to, with its sampling decision.
                continued = fresh.continue_trace(dict(headers), name="celery_batchtrack.publish")
                continued.sampled = continued.parent_sampled
                if not _streams_spans(scopes):
                    current.span = continued
            yield


def _streams_spans(scopes: Any) -> bool:
    streams = getattr(scopes, "has_span_streaming_enabled", None)  # of newer versions
    return bool(streams and streams(scopes.Scope.get_client().options))


class Structlog(BuiltIn):
    """What is bound in `structlog.contextvars`, under the name that django-structlog reads."""

    name = "structlog"
    HEADER = "__django_structlog__"

    def loaded(self) -> bool:
        return "structlog.contextvars" in sys.modules

    def capture(self) -> Headers:
        bound = self._bound()
        return {self.HEADER: {name: _plain(value) for name, value in bound.items()}} if bound else {}

    def _bound(self) -> dict[str, Any]:
        bound: dict[str, Any] = sys.modules["structlog.contextvars"].get_contextvars()
        if "task_id" in bound:  # as django-structlog sends it
            bound["parent_task_id"] = bound.pop("task_id")
        return bound

    def present(self, headers: Headers) -> bool:
        return bool(self._bound() == headers.get(self.HEADER, {}))  # and so as it can be sent

    @contextlib.contextmanager
    def restore(self, headers: Headers) -> Iterator[None]:
        bound: Any = sys.modules["structlog.contextvars"]
        before = bound.get_contextvars()
        bound.clear_contextvars()
        bound.bind_contextvars(**headers.get(self.HEADER, {}))
        try:
            yield
        finally:
            bound.clear_contextvars()
            bound.bind_contextvars(**before)


def _plain(value: Any) -> Any:
    """What a message can carry; of anything else its text, as in a log line."""
    try:
        codec.dumps(value)
    except errors.NotSerialisable:
        return repr(value)
    return value


class Tenant(BuiltIn):
    """The schema, of an app or of tasks that are tenant-schemas-celery's."""

    name = "tenant"
    firm = True
    essential = True
    HEADER = "_schema_name"

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._used = False

    def loaded(self) -> bool:
        if not self._used and "django.db" in sys.modules and "tenant_schemas_celery.task" in sys.modules:
            self._used = self._is_theirs()
        return self._used

    def _is_theirs(self) -> bool:
        theirs = getattr(sys.modules.get("tenant_schemas_celery.app"), "CeleryApp", ())
        task = sys.modules["tenant_schemas_celery.task"].TenantTask
        return isinstance(self.app, theirs) or any(isinstance(each, task) for each in self.app._tasks.values())

    def capture(self) -> Headers:
        schema = getattr(sys.modules["django.db"].connection, "schema_name", None)
        return {self.HEADER: schema} if schema else {}

    def restore(self, headers: Headers) -> contextlib.AbstractContextManager[Any]:
        theirs: Any = importlib.import_module("tenant_schemas_celery.compat")
        made: contextlib.AbstractContextManager[Any] = theirs.schema_context(
            headers.get(self.HEADER) or theirs.get_public_schema_name()
        )
        return made


BUILT_IN: dict[str, type[BuiltIn]] = {each.name: each for each in (OpenTelemetry, Sentry, Structlog, Tenant)}
