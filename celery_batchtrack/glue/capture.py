"""What goes along with a batch's messages: the context of who created it, whoever publishes them.

It is captured with the batch, and with a child only where that differs. A process that publishes re-establishes it, so
that what other packages do while a task is sent comes out as in the creator's process; what is captured is in the
message even where they are not loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.records import NewChild
from celery_batchtrack.vocabulary.settings import suggestion

from . import codec
from .contexts import BUILT_IN, BuiltIn
from .narrate import logger

#: In the signature of a child's row: what differs from its batch's, capture by capture; None for nothing.
KEY = "captured"
#: Under which the headers of plain callables are kept.
PLAIN = "headers"

#: Captured headers, capture by capture.
Captured = dict[str, dict[str, Any]]
Hook = Callable[[], Mapping[str, Any] | None]


@runtime_checkable
class Capture(Protocol):
    """A capture with two sides. Give it a `name` if there are several of its class."""

    def capture(self) -> Mapping[str, Any] | None:
        """Headers (JSON) of the present context. Called when a batch is created, and when a child is added."""

    def restore(self, headers: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """That context again, in the process that publishes; with no headers, one that says nothing of anybody."""


@dataclass(frozen=True)
class Carried:
    """Headers that go along with a message; `firm` are those that nobody else may write."""

    headers: dict[str, Any] = field(default_factory=dict)
    firm: dict[str, Any] = field(default_factory=dict)


class Captures:
    """The captures of one app."""

    def __init__(self, app: Any, given: Iterable[Hook | Capture | str] = ()) -> None:
        if isinstance(given, str):
            raise errors.ImproperlyConfigured(f"BatchTrack(app, capture=[{given!r}]): capture takes a list")
        given = list(given)
        names = [_known(each) for each in given if isinstance(each, str)]
        self._built_in = [made(app) for name, made in BUILT_IN.items() if name in names or not names]
        objects = [each for each in given if isinstance(each, Capture) and not isinstance(each, type)]
        self._objects = {_name(each): each for each in objects}
        if len(self._objects) < len(objects) or {*BUILT_IN, PLAIN} & self._objects.keys():
            raise errors.ImproperlyConfigured("captures need different names: give each a `name` of its own")
        self._hooks = [_hook(each) for each in given if not isinstance(each, str) and each not in objects]
        self._told: set[str] = set()

    # -- where a batch is created ----------------------------------------------------------------

    def take(self) -> Captured:
        """Headers of the present context."""
        taken: Captured = {}
        for each in self._built_in:
            taken[each.name] = self._of_built_in(each)
        for name, one in self._objects.items():
            taken[name] = dict(one.capture() or {})
        taken[PLAIN] = {}
        for hook in self._hooks:
            taken[PLAIN].update(hook() or {})
        return {name: headers for name, headers in taken.items() if headers}

    def _of_built_in(self, each: BuiltIn) -> dict[str, Any]:
        try:
            return dict(each.capture()) if each.loaded() else {}
        except Exception as error:  # noqa: BLE001 (anything that another package raises)
            self._trouble(each, error)
            return {}

    def _trouble(self, each: BuiltIn, error: Exception) -> None:
        """A trace that cannot be taken along is no reason to do without the batch."""
        if each.essential:
            raise error
        if each.name not in self._told:
            self._told.add(each.name)
            logger.warning(
                "action=no_context the context of %s does not go along with batches (%s: %s); "
                "BatchTrack(app, capture=[…]) with the names of others leaves it out", each.name,
                type(error).__name__, error,
            )  # fmt: skip

    def on(self, child: NewChild, batch: Captured) -> NewChild:
        """A child that is added now, with what differs from its batch's."""
        return kept_on(child, self.differing(batch))

    def differing(self, batch: Captured) -> dict[str, Any]:
        """What is captured now and is not its batch's; see `kept_on`."""
        now = self.take()
        return {name: now.get(name) for name in {**batch, **now} if now.get(name) != batch.get(name)}

    # -- where it is published -------------------------------------------------------------------

    def enter(self, captured: Captured, stack: contextlib.ExitStack) -> None:
        """Re-establish a context until the stack is closed. The creator's own process may be in it already."""
        for each in self._built_in:
            wanted = captured.get(each.name, {})
            try:
                if each.loaded() and not each.present(wanted):
                    stack.enter_context(each.restore(wanted))
            except Exception as error:  # noqa: BLE001 (anything that another package raises)
                self._trouble(each, error)
        for name, one in self._objects.items():
            stack.enter_context(one.restore(captured.get(name, {})))

    def carried(self, captured: Captured) -> Carried:
        """The headers of a message with this context."""
        lenient = {each.name for each in self._built_in if not each.firm} | self._objects.keys()
        headers: dict[str, Any] = {}
        firm: dict[str, Any] = {}
        for name, each in captured.items():
            both = [found for found in (headers.get("baggage"), each.get("baggage")) if isinstance(found, str)]
            headers.update(each)
            if len(both) > 1 and name != PLAIN:
                headers["baggage"] = ",".join(both)  # a list, to which every tracer adds its own
            if name not in lenient:
                firm.update(each)
        return Carried(headers, firm)


def _known(name: str) -> str:
    if name not in BUILT_IN:
        raise errors.ImproperlyConfigured(
            f"BatchTrack(app, capture=[{name!r}]): there is no such capture{suggestion(name, list(BUILT_IN))} "
            f"(built in are {', '.join(BUILT_IN)})"
        )
    return name


def _name(each: Any) -> str:
    return str(getattr(each, "name", None) or f"{type(each).__module__}.{type(each).__qualname__}")


def _hook(each: Any) -> Hook:
    """A plain callable, or the one side of an object that has no other."""
    made: Hook = getattr(each, "capture", each)
    if not callable(made) or (isinstance(each, type) and made is not each):
        raise errors.ImproperlyConfigured(
            f"BatchTrack(app, capture=[{each!r}]): a capture is a callable that returns headers, an object with "
            "capture() and restore(headers), or the name of a built-in one"
        )
    return made


# -- as it is kept -----------------------------------------------------------------------------------------


def as_text(captured: Captured) -> str | None:
    """As a batch keeps it. Raises NotSerialisable for headers that are no JSON."""
    return codec.dumps(captured) if captured else None


def of_batch(headers: str | None) -> Captured:
    found = codec.loads(headers) if headers else {}
    if not isinstance(found, dict):
        return {}
    whole = all(isinstance(each, dict) for each in found.values())
    return found if whole else {PLAIN: found}  # of the first schema: the headers themselves


def kept_on(child: NewChild, differing: Mapping[str, Any]) -> NewChild:
    return replace(child, signature=kept_in(child.signature, differing)) if differing else child


def kept_in(signature: str, differing: Mapping[str, Any]) -> str:
    """A row's signature with what differs from its batch's."""
    return codec.dumps({**codec.loads(signature), KEY: dict(differing)}) if differing else signature


def of_signature(signature: str | None) -> dict[str, Any]:
    """What of a child differs from its batch's."""
    if signature is None or f'"{KEY}"' not in signature:
        return {}
    found = codec.loads(signature)
    return dict(found.get(KEY) or {}) if isinstance(found, dict) else {}


def of_child(headers: str | None, differing: Mapping[str, Any]) -> Captured:
    """What a child carries: its batch's, but for what differs."""
    return {name: each for name, each in {**of_batch(headers), **differing}.items() if each}


class Publishing(contextlib.AbstractContextManager["Publishing"]):
    """The contexts in which rows are published, one after another; what is alike is entered once."""

    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self._stack = contextlib.ExitStack()
        self._last: tuple[str | None, dict[str, Any]] | None = None
        self._inside: Captured | None = None
        self._carried = Carried()

    def enter(self, headers: str | None, signature: str | None) -> Carried:
        """Be in the context of a row, by what its batch and its own signature keep."""
        wanted = (headers, of_signature(signature))
        if wanted != self._last:
            self._last = None
            captured = of_child(*wanted)
            contexts = {name: each for name, each in captured.items() if name != PLAIN}
            if contexts != self._inside:
                self._leave()
                self._captures.enter(captured, self._stack)
                self._inside = contexts
            self._carried, self._last = self._captures.carried(captured), wanted
        return self._carried

    def _leave(self) -> None:
        self._inside = None
        self._stack.close()

    def __exit__(self, *error: object) -> None:
        self._leave()
