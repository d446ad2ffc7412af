"""Signatures into rows: children, batches, callbacks, and the next step of a child."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from celery import current_task
from celery.backends.base import DisabledBackend
from celery.canvas import Signature, group, maybe_signature
from celery.canvas import chord as celery_chord
from celery.utils.functional import maybe_list
from kombu.utils.uuid import uuid as new_task_id

from celery_batchtrack.vocabulary.ids import uuid7
from celery_batchtrack.vocabulary.pacing import Pace
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, NewBatch, NewChild, Step
from celery_batchtrack.vocabulary.settings import Settings
from celery_batchtrack.vocabulary.states import Kind

from . import canvas, capture, codec, declare, options, owner, signatures
from .options import ValidOptions


@dataclass(frozen=True, slots=True)
class _Made:
    """The present step of a child, as its row has it."""

    task: str
    task_id: str
    signature: str
    items: tuple[str, ...]
    item_count: int
    weight: int | None
    queue: str | None
    countdown: float | None
    eta: datetime | None
    expires_in: float | None
    expires_at: datetime | None


#: Options of a signature that say where it goes.
_ROUTING = ("queue", "exchange", "routing_key")


def _made(
    app: Any, links: Sequence[Signature], role: str, batch: Mapping[str, Any], *, part_of_chord: bool = False,
    whole: bool = True,
) -> _Made:
    """`whole`: no arguments come before those that are there."""
    first, rest = links[0], [canvas.without_joints(each) for each in links[1:]]
    if part_of_chord and rest:
        rest[-1] = _with_joints(rest[-1], links[-1])
    if isinstance(first, (group, celery_chord)):
        return _made_of_canvas(first, rest, part_of_chord=part_of_chord)
    given = first.get("options") or {}
    if batch.get("queue") and not any(given.get(name) for name in _ROUTING):
        given = {**given, "queue": batch["queue"]}
        first = {**first, "options": given}
    args, kwargs = tuple(first.get("args") or ()), dict(first.get("kwargs") or {})
    task = app.tasks.get(first["task"])
    items: tuple[str, ...] = ()
    count, weight = 1, None
    if whole and task is not None:
        args, kwargs = signatures.checked(task, args, kwargs)
        items, count = declare.items_of(task, args, kwargs)
        weight = declare.weight_of(task, args, kwargs)
        signatures.check_policy(task, role, batch, args, kwargs, count)
    countdown, eta = signatures.moment(given.get("countdown"), given.get("eta"), "eta")
    expires_in, expires_at = signatures.moment(None, given.get("expires", getattr(task, "expires", None)), "expires")
    task_id = str(given.get("task_id") or new_task_id())
    queue = signatures.route(app, first["task"], args, kwargs, given)
    signatures.check_lengths(first["task"], task_id, queue)
    text = signatures.stored(
        {**first, "args": args, "kwargs": kwargs}, rest, part_of_chord=part_of_chord and not rest
    )  # fmt: skip
    return _Made(
        first["task"], task_id, text, items, count, weight, queue, countdown, eta, expires_in, expires_at
    )


def _made_of_canvas(first: Signature, rest: Sequence[Mapping[str, Any]], *, part_of_chord: bool) -> _Made:
    plain = canvas.without_joints(first)
    if part_of_chord and not rest:
        plain = _with_joints(plain, first)
    kept = {"canvas": {**plain, "args": []}, "args": list(first.args or ()), **({"chain": list(rest)} if rest else {})}
    given = first.get("options") or {}
    countdown, eta = signatures.moment(given.get("countdown"), given.get("eta"), "eta")
    name = "celery.group" if isinstance(first, group) else "celery.chord"
    return _Made(name, new_task_id(), codec.dumps(kept), (), 1, None, None, countdown, eta, None, None)


def _with_joints(plain: dict[str, Any], link: Any) -> dict[str, Any]:
    """A chord of Celery's own waits for this last link, or for its body if it is a chord."""
    if plain.get("subtask_type") == "chord":
        kwargs = plain["kwargs"]
        return {**plain, "kwargs": {**kwargs, "body": _with_joints(kwargs["body"], link["kwargs"]["body"])}}
    joints = {name: each for name, each in (link.get("options") or {}).items() if name in signatures.CHORD_OPTIONS}
    return {**plain, "options": {**(plain.get("options") or {}), **joints}}


def new_child(
    app: Any, value: Any, role: str, batch: Mapping[str, Any] | None = None, weight: int | None = None
) -> NewChild:
    """A header child's row; a chain's is at its first link. `batch`: what the batch keeps of its own options."""
    links = canvas.links_of(app, value, role)
    made = _made(app, links, role, batch or {})
    several = len(links) > 1 or isinstance(links[0], (group, celery_chord))
    return NewChild(
        task=made.task, task_id=made.task_id, signature=made.signature, items=made.items, item_count=made.item_count,
        weight=made.weight if weight is None else weight,
        result_id=(canvas.result_id(links[-1]) or new_task_id()) if several else None,
        queue=made.queue, countdown=made.countdown, eta=made.eta, expires_in=made.expires_in,
        expires_at=made.expires_at,
    )  # fmt: skip


def callback_entry(app: Any, value: Any, kind: Kind, errback_of: str | None = None, **more: Any) -> dict[str, Any]:
    """What a batch keeps of one callback, in its `callbacks` JSON."""
    links = canvas.links_of(app, value, kind.value)
    part_of_chord = kind is Kind.ON_SUCCESS
    made = _made(app, links, kind.value, {}, part_of_chord=part_of_chord, whole=False)
    entry = {
        "task": made.task,
        "task_id": made.task_id,
        "result_id": canvas.result_id(links[-1]),
        "signature": made.signature,
        "queue": made.queue,
        "countdown": made.countdown,
        "eta": made.eta.isoformat() if made.eta else None,
        "expires_in": made.expires_in,
        "expires_at": made.expires_at.isoformat() if made.expires_at else None,
        "errback": errback_of,
        "immutable": bool(links[0].get("immutable")) or None,
        **more,
    }
    return {name: each for name, each in entry.items() if each is not None}


def step(
    app: Any, links: Sequence[Signature], role: str, batch: Mapping[str, Any], *, part_of_chord: bool = False
) -> Step:
    """A child's next step, and what follows it."""
    made = _made(app, links, role, batch, part_of_chord=part_of_chord)
    task = app.tasks.get(made.task)
    told = task is not None and declare.options_of(task).items is not None
    return Step(
        made.task, made.task_id, made.signature, made.queue, made.countdown, made.eta, made.expires_in,
        made.expires_at, made.items if told else None,
    )  # fmt: skip


def new_batch(
    app: Any, settings: Settings, valid: ValidOptions, batch_id: uuid.UUID, headers: str | None,
    *, opened_by: uuid.UUID | None = None, body: Body | None = None, root_id: str | None = None,
    parent_id: str | None = None, parent_batch: uuid.UUID | None = None, parent_position: int | None = None,
    children: int | None = None, own: Mapping[str, Any] | None = None,
) -> NewBatch:  # fmt: skip
    """The row of a new batch, with its parent and callbacks.

    Arguments:
        body: of a chord; its errbacks are called where the header keeps it from running.
        own: options that the package itself sets.
        children: how many there are, where that is known.
    """
    callbacks = {
        kind.value: [callback_entry(app, each, kind) for each in declared]
        for kind, declared in valid.callbacks.items() if kind is not Kind.ON_PROGRESS
    }  # fmt: skip
    callbacks[Kind.ON_PROGRESS.value] = [
        callback_entry(app, each, Kind.ON_PROGRESS, percent=percent)
        for percent, each in zip(valid.milestones, valid.callbacks.get(Kind.ON_PROGRESS, ()), strict=True)
    ]
    stored, result_id = {**valid.stored, **(own or {})}, None
    if body is not None:
        entry = callback_entry(app, body.signature, Kind.ON_SUCCESS)
        result_id = str(canvas.result_id(body.signature) or entry.get("result_id") or entry["task_id"])
        callbacks[Kind.ON_SUCCESS.value] = [{**entry, "result_id": result_id}]
        callbacks[Kind.ON_FAILURE.value] += [
            callback_entry(app, errback, Kind.ON_FAILURE, errback_of=whose or result_id)
            for errback, whose in body.errbacks
        ]
        if not isinstance(app.backend, DisabledBackend):
            stored["tell"] = canvas.result_ids(body.signature)
    pace = Pace.parse(stored)
    running = current_task.request if current_task and not current_task.request.called_directly else None
    parent = running if parent_id is None and parent_batch is None else None
    return NewBatch(
        id=batch_id,
        name=valid.name,
        callbacks=signatures.callbacks_json(callbacks),
        options=stored,
        headers=headers,
        start_now=valid.start_now,
        shards=settings.shards if children is None else max(1, min(settings.shards, children)),
        parent_batch=valid.parent_batch if parent_batch is None else parent_batch,
        parent_position=parent_position,
        parent_task_id=parent_id or (parent.id if parent else None),
        parent_task=current_task.name if running is not None and parent else None,
        root_id=root_id or ((parent.root_id or parent.id) if parent else None),
        opened_by=opened_by,
        result_id=result_id,
        description=valid.description,
        tags=list(valid.tags) or None,
        metadata=valid.metadata,
        deadline_in=valid.deadline_in,
        deadline=valid.deadline,
        max_in_flight=pace.window,
        priority=pace.priority,
        owner=owner.owner_of(settings, valid.owner),
    )


def chord_rows(
    app: Any, signature: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], inherited: Mapping[str, Any]
) -> tuple[list[NewChild], ValidOptions]:
    """The children of a chord or group that is started whole, and what it says of its batch. `inherited`: stored
    options that it has from elsewhere, unless it says otherwise."""
    plain = signature["kwargs"]
    if isinstance(signature, group):
        given, tasks, name = {}, plain["tasks"], "group"
    else:
        given, tasks = dict(plain.get("batchtrack") or {}), plain["header"]
        kwargs = {**(plain.get("kwargs") or {}), **kwargs}
        name = str(getattr(plain.get("body"), "task", None) or "chord")
    valid = options.validated(given, name)
    valid = replace(valid, stored={**inherited, **valid.stored})
    common = for_header(signature.options or {})
    children = [
        new_child(app, canvas.given(each, args, kwargs, common), f"header element {at}", valid.stored)
        for at, each in enumerate(canvas.elements(app, tasks))
    ]
    return children, valid


#: Options of a chord that are not those of its header's tasks.
NOT_FOR_HEADER = (
    "task_id", "link", "link_error", "chain", "chord", "group_id", "group_index", "reply_to", "root_id", "parent_id",
)  # fmt: skip


def for_header(common: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a chord's or group's options that its tasks have too."""
    return {name: each for name, each in common.items() if name not in (*signatures.NOT_KEPT, *NOT_FOR_HEADER)}


@dataclass(frozen=True, slots=True)
class Body:
    """A chord's body as it will run, the result that freezing it gave, and (errback, id) for a header that fails."""

    signature: Any
    result: Any
    errbacks: list[tuple[Any, str]]


def frozen_body(app: Any, body: Any, common: Mapping[str, Any], result_id: str | None = None) -> Body:
    """The body with the chord's own options, callbacks and what is chained behind it."""
    taken = {name: each for name, each in common.items() if name not in ("parent_id", "countdown", "eta")}
    chain, link, link_error = taken.pop("chain", None), taken.pop("link", None), taken.pop("link_error", None)
    for name in (*signatures.NOT_KEPT, "task_id", *(() if taken.get("chord") else signatures.CHORD_OPTIONS)):
        taken.pop(name, None)
    body = _with_callbacks(maybe_signature(body, app=app).clone(), link, link_error)
    joints = {name: taken.pop(name) for name in signatures.CHORD_OPTIONS if name in taken}
    body.options.update(taken)
    body._use_link = False  # of a chain, as in `canvas.links_of`
    body.freeze(None if chain else result_id)
    errbacks = canvas.errbacks_of(body)  # of the body alone: what is chained behind it has others
    for each in reversed(chain or ()):  # the worker's order is the last one first
        body |= maybe_signature(each, app=app)
    return Body(body, body.freeze(result_id, **joints), errbacks)


def _with_callbacks(body: Any, link: Any, link_error: Any) -> Any:
    """Callbacks of a chord are its body's; of a group that is a body, errbacks are those of each task."""
    if isinstance(body, group) and (link or link_error):
        body.tasks = [maybe_signature(each, app=body._app).clone() for each in body.tasks]
    for callback in maybe_list(link) or []:
        body.link(callback)
    for errback in maybe_list(link_error) or []:
        if isinstance(body, group):
            body.link_error(errback)
        else:
            body.append_to_list_option("link_error", errback)
    return body


#: Options that a group or chord within a child has from that child's batch, unless it says otherwise.
_INHERITED = ("on_crash", "max_in_flight", "max_running", "priority", "queue")


def _carrying(made: Step, kept: Mapping[str, Any]) -> Step:
    """The next step of a child carries what the one before did."""
    return replace(made, signature=capture.kept_in(made.signature, kept.get(capture.KEY) or {}))


class AppCanvas:
    """`behaviour.tracker.Canvas` for one app."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings

    def expand(self, row: ChildRow, batch: BatchRow, prefix: tuple[Any, ...]) -> tuple[NewBatch, list[NewChild]]:
        kept = signatures.parsed(row.signature)
        signature = maybe_signature(kept["canvas"], app=self.app)
        args = (*prefix, *(kept.get("args") or ()))
        inherited = {name: batch.options[name] for name in _INHERITED if batch.options.get(name) is not None}
        children, valid = chord_rows(self.app, signature, args, {}, inherited)
        body = None
        if not isinstance(signature, group):
            body = frozen_body(self.app, signature["kwargs"]["body"], signature.options)
        of_body = row.kind != Kind.CHILD and body is None
        own: dict[str, Any] = {"canvas": True}
        if of_body:  # who waits for the tasks of a group that is a body, waits in Celery's result backend
            own["results"] = "backend"
            children = [replace(each, result_id=each.result_id or each.task_id) for each in children]
        elif batch.options.get("results") == "none" and body is None:
            own["results"] = "none"
        headers = capture.as_text(capture.of_child(batch.headers, kept.get(capture.KEY) or {}))
        new = new_batch(
            self.app, self.settings, valid, uuid7(), headers, body=body,
            root_id=signature.options.get("root_id") or batch.root_id,
            parent_id=signature.options.get("parent_id") or batch.parent_task_id, parent_batch=row.batch_id,
            parent_position=row.position, children=len(children), own=own,
        )  # fmt: skip
        return new, children

    def next_step(self, row: ChildRow, batch: BatchRow, result: Any) -> Step | None:
        kept = signatures.parsed(row.signature)
        rest = self._rest(kept)
        if not rest:
            return None
        before = kept.get("options") or {}
        first = rest[0].clone()
        if not first.immutable:
            first.args = (result, *first.args)
        first.options["parent_id"] = row.task_id
        first.options["root_id"] = before.get("root_id") or batch.root_id or row.task_id
        part = row.kind == Kind.ON_SUCCESS
        made = step(self.app, [first, *rest[1:]], f"link {row.link + 1}", batch.options, part_of_chord=part)
        return _carrying(made, kept)

    def replacement(self, row: ChildRow, batch: BatchRow, signature: Any) -> Step:
        """What a task that replaces itself goes on as; the rest of its chain follows."""
        kept = signatures.parsed(row.signature)
        links = canvas.links_of(self.app, signature, f"what replaces {row.task}")
        rest = self._rest(kept)
        before = kept.get("options") or {}
        for name in ("parent_id", "root_id", *(signatures.CHORD_OPTIONS if row.kind == Kind.ON_SUCCESS else ())):
            if before.get(name) is not None:
                links[0 if name in ("parent_id", "root_id") else -1].options.setdefault(name, before[name])
        part = row.kind == Kind.ON_SUCCESS
        made = step(self.app, [*links, *rest], f"what replaces {row.task}", batch.options, part_of_chord=part)
        return _carrying(made, kept)

    def _rest(self, kept: Mapping[str, Any]) -> list[Signature]:
        """What follows in the chain of a stored signature."""
        return [maybe_signature(each, app=self.app) for each in kept.get("chain") or ()]
