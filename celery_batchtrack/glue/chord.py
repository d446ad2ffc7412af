"""`chord`: Celery's, tracked as a batch.

A subclass of Celery's chord, so that Celery's canvas takes it for one wherever it looks; only what starting it means
is another. Serialised it is one of Celery's, with one more key among its ``kwargs`` that Celery carries along and does
not read: who does not know this package runs it as Celery's own.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from types import GeneratorType
from typing import Any

from celery.canvas import Signature, _chain, group, maybe_signature
from celery.canvas import chord as celery_chord
from celery.utils.functional import _regen, maybe_list
from kombu.utils.uuid import uuid as new_task_id

from celery_batchtrack import errors

from . import batch, canvas, options, rows, signatures
from .backend import note_chord
from .chord_result import body_result, frozen_header, header_result
from .extension import INSTALLERS, BatchTrack
from .narrate import logger

#: Among a chord's ``kwargs``: the options of its batch. That it is there says whose chord it is.
KEY = "batchtrack"
#: A header that is a generator is started while it is read: a child waits no longer than this for company (s).
_LONGEST_WAIT = 0.2


class chord(celery_chord):  # type: ignore[misc]
    """``chord(header)(body)``: run the header's tasks, then the body with their results in order.

    Everything that Celery's chord is, and a batch: ``batch={…}`` takes the options of one (`BatchOptions`). The body
    runs when the batch ends `completed` or `partial`; otherwise its errbacks do. With ``batchtrack_enabled = False``
    it is Celery's.

    Arguments:
        header: signatures of any shape: a list, a group, a single one; or a generator, which is read while its first
            tasks run already (``start="now"``). None at all: the body runs with ``[]``.
        body: a signature of any shape; may be given at the call.
        batch: options of the batch; unknown ones are an error at the call.

    Errors: UnsupportedCanvas for what is no signature, InvalidOption for wrong options, both at the call.
    """

    def __init__(
        self, header: Any = (), body: Any = None, task: str = "celery.chord", args: Any = None, kwargs: Any = None,
        app: Any = None, *, batch: Mapping[str, Any] | None = None, **given: Any,
    ) -> None:  # fmt: skip
        kwargs = dict(kwargs) if kwargs else {"kwargs": {}}
        if batch is None:
            batch = kwargs.pop(KEY, None)
        if batch is not None and not isinstance(batch, Mapping):
            raise errors.InvalidOption(f"batch= takes a mapping of options, not {batch!r:.100}")
        wanted = dict(batch or {})
        if "on_success" in wanted:
            raise errors.InvalidOption("a chord's on_success is its body: leave it out of batch={…}, or use Batch(…)")
        options.validated(wanted, "chord")
        super().__init__(
            _checked(header, app), body, task=task, args=args, kwargs={**kwargs, KEY: options.plain(wanted)}, app=app,
            **given,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, d: Any, app: Any = None) -> Any:
        """The serialised form of one of ours; one of Celery's own is left to Celery."""
        if KEY not in d["kwargs"]:
            return celery_chord.from_dict(d, app=app)
        return super().from_dict(d, app=app)

    def apply_async(self, args: Any = None, kwargs: Any = None, **given: Any) -> Any:
        """Start the chord. `args` and `kwargs` are added to each header task's own; options go to the header's tasks
        and the body, as with Celery's. Returns a result with the handle of its batch in ``.batch``."""
        if "batch" in given or KEY in given:  # would go to the broker with each message, and be lost
            raise errors.InvalidOption("batch= belongs to the chord, not to its call: chord(header, batch={…})(body)")
        return start(self, args, kwargs, given)

    def freeze(self, *args: Any, **kwargs: Any) -> Any:
        """Give ids to header and body, as Celery's. Returns the body's result."""
        return _with_frozen_header(self, super().freeze(*args, **kwargs))

    def link_error(self, errback: Any) -> Any:
        """An errback of the chord, called once: for a header that failed, and for a body that did; with
        `task_allow_error_cb_on_chord_header` also for each header task that does.

        Celery's also gives it to chords in the header, whose failure would call it twice.
        """
        return _link_error(self, errback)

    def apply(self, args: Any = None, kwargs: Any = None, **given: Any) -> Any:
        """Run it in this process; tracked where `task_always_eager` is on, or else as Celery's own."""
        app = self._get_app(self.body)
        if not app.conf.task_always_eager or not BatchTrack.of(app).enabled:
            return super().apply(args, kwargs, **given)
        return start(self, args, kwargs, given)


def _with_frozen_header(signature: Any, result: Any) -> Any:
    if isinstance(signature.tasks, group) and signature.tasks.id:
        frozen_header(result, signature.tasks.id)
    return result


def _link_error(signature: Any, errback: Any) -> Any:
    errback = maybe_signature(errback)
    if signature.app.conf.task_allow_error_cb_on_chord_header:
        for task in maybe_list(signature.tasks) or []:
            task.link_error(errback.clone(immutable=True))
    signature.body.link_error(errback)
    return errback


# Celery makes ours of what is serialised as ours.
Signature.register_type(name="chord")(chord)
_apply_celerys, _run_celerys, _link_celerys = celery_chord.apply_async, celery_chord.apply, celery_chord.link_error
_freeze_celerys = celery_chord.freeze


def _is_replaced(signature: Any, kwargs: Any) -> bool:
    body = (kwargs or {}).get("body") or signature.kwargs.get("body")
    extension = getattr(signature._get_app(body), "batchtrack", None) if body is not None else None
    return extension is not None and extension.replace_celery_chord and extension.enabled


@functools.wraps(_apply_celerys)
def _apply_async(self: Any, args: Any = None, kwargs: Any = None, **given: Any) -> Any:
    if _is_replaced(self, kwargs):
        return start(self, args, kwargs, given)
    return _apply_celerys(self, args, kwargs, **given)


@functools.wraps(_run_celerys)
def _apply(self: Any, args: Any = None, kwargs: Any = None, **given: Any) -> Any:
    if type(self) is celery_chord and _is_replaced(self, kwargs) and self._get_app().conf.task_always_eager:
        return start(self, args, kwargs, given)
    return _run_celerys(self, args, kwargs, **given)


@functools.wraps(_link_celerys)
def _link(self: Any, errback: Any) -> Any:
    return _link_error(self, errback) if _is_replaced(self, None) else _link_celerys(self, errback)


@functools.wraps(_freeze_celerys)
def _freeze(self: Any, *args: Any, **kwargs: Any) -> Any:
    result = _freeze_celerys(self, *args, **kwargs)
    return _with_frozen_header(self, result) if _is_replaced(self, None) else result


def _replace_celerys(extension: BatchTrack) -> None:
    """Route Celery's own chords through ours, in apps whose ``BatchTrack(app, replace_celery_chord=True)`` asks for
    it; each app decides for itself."""
    if not extension.replace_celery_chord:
        return
    celery_chord.apply_async, celery_chord.apply, celery_chord.link_error = _apply_async, _apply, _link
    celery_chord.freeze = _freeze


INSTALLERS.append(_replace_celerys)


def start(signature: Any, args: Any, kwargs: Any, given: Mapping[str, Any]) -> Any:
    """Start a chord, ours or Celery's, as a batch."""
    try:
        return _started(signature, args, dict(kwargs or {}), given)
    except RecursionError:
        raise errors.InvalidOption("the chord is nested too deep: it contains itself, or too many others") from None


def _started(signature: Any, args: Any, kwargs: dict[str, Any], given: Mapping[str, Any]) -> Any:
    body = kwargs.pop("body", None) or signature.kwargs.get("body")
    if body is None:
        raise errors.InvalidOption("a chord needs a body: chord(header)(body)")
    if isinstance(body, _chain) and not body.tasks:
        raise errors.UnsupportedCanvas("the body is an empty chain")
    app = signature._get_app(maybe_signature(body))
    extension = BatchTrack.of(app)
    body = signatures.signature_of(app, body, "the body")
    if not extension.enabled:
        return _as_celerys(signature, args, {**kwargs, "body": body}, given)
    common = {**(signature.options or {}), **{name: each for name, each in given.items() if each is not None}}
    args = tuple(args or ())
    args = (*args, *signature.args) if args and not signature.immutable else tuple(signature.args or ())
    if common.get("chord") and canvas.ends_in_group(body):
        logger.warning(
            "action=untracked_chord a chord of Celery's own waits for each task of the body %r: so this one is "
            "Celery's too", body,
        )  # fmt: skip
        return _apply_celerys(signature, args, {**kwargs, "body": body}, **given)
    note_chord(app)
    frozen = rows.frozen_body(app, body, common, given.get("task_id") or new_task_id())
    plain = options.validated(dict(signature.kwargs.get(KEY) or {}), _name(frozen.signature))
    header_kwargs = {**(signature.kwargs.get("kwargs") or {}), **kwargs}
    header = _Header(extension, signature.tasks, args, header_kwargs, common)
    made = _streamed(header, plain, frozen) if header.lazy else _whole(header, plain, frozen)
    group_id = _group_id(signature) or str(made.id)
    return body_result(frozen.result, made, header_result(made, group_id, made.task_ids, app), app)


def _as_celerys(signature: Any, args: Any, kwargs: dict[str, Any], given: Mapping[str, Any]) -> Any:
    """``batchtrack_enabled = False``: as if the import had never been changed."""
    wanted = signature.kwargs.get(KEY)
    if wanted:
        logger.warning("action=untracked_chord batchtrack_enabled is off: batch=%s has no effect", wanted)
    return _apply_celerys(signature, args, kwargs, **given)


def _name(body: Any) -> str:
    """A batch's default name: its body's task, the first of a chain."""
    while isinstance(body, (_chain, celery_chord)):
        body = body.tasks[0] if isinstance(body, _chain) else body.body
    return str(body.task)[:255]


def _group_id(signature: Any) -> str | None:
    header = signature.tasks
    found = header.options.get("task_id") if isinstance(header, group) else None
    return None if found is None else str(found)


class _Header:
    """A header's children, made as they are asked for."""

    def __init__(
        self, extension: BatchTrack, tasks: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any],
        common: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.extension, self.tasks, self.args, self.kwargs = extension, tasks, args, kwargs
        self.root_id, self.parent_id = common.get("root_id"), common.get("parent_id")
        self.options = rows.for_header(common)

    @property
    def lazy(self) -> bool:
        """A generator that nobody has read yet."""
        inner = self.tasks.tasks if isinstance(self.tasks, group) else self.tasks
        return isinstance(inner, _regen) and not getattr(inner, "_regen__done", True)

    def elements(self) -> Iterator[Any]:
        for each in canvas.elements(self.extension.app, self.tasks):
            yield canvas.given(each, self.args, self.kwargs, self.options)


def _whole(header: _Header, plain: options.ValidOptions, body: rows.Body) -> batch.Batch:
    """All rows in one transaction: no client, no pulse."""
    return batch.start(
        header.extension, plain, header.elements(), body=body, root_id=header.root_id, parent_id=header.parent_id
    )


def _streamed(header: _Header, plain: options.ValidOptions, body: rows.Body) -> batch.Batch:
    """Children start while the header is still being read, as with Celery's chord."""
    opened = batch.Batch._of(header.extension, plain, body=body, root_id=header.root_id, parent_id=header.parent_id)
    with opened:
        last = -math.inf
        for each in header.elements():
            opened.add(each)
            if time.monotonic() - last >= _LONGEST_WAIT:
                opened.flush()
                last = time.monotonic()
    return opened


def _checked(header: Any, app: Any) -> Any:
    """What Celery's chord would take for a task's name is an error at once; of a generator, when it is read."""
    if header is None:
        return []
    if isinstance(header, (Mapping, str)):
        return header if isinstance(header, Mapping) else _refused(header)
    if isinstance(header, GeneratorType):
        return (signatures.signature_of(app, each, f"header element {at}") for at, each in enumerate(header))
    if not isinstance(header, Iterable):
        return _refused(header)
    if isinstance(header, _regen):
        return header
    # Built once, here: a chord within a chord within … would be built twice at each depth.
    return [signatures.signature_of(app, each, f"header element {at}") for at, each in enumerate(header)]


def _refused(header: Any) -> Any:
    raise errors.UnsupportedCanvas(f"a header is signatures in a list, a generator or a group, not {header!r:.100}")

