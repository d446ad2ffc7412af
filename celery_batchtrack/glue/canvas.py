"""Celery's canvas taken apart: what a chain's links are, what a header's elements are, by which id a result is known.

A child runs its links one after the other; a link that is a group or a chord becomes a batch of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from celery.canvas import Signature, _chain, group, maybe_signature
from celery.canvas import chord as celery_chord
from celery.utils.functional import maybe_list

from celery_batchtrack import errors

from . import signatures

#: Options that freezing leaves on the parts of a chord or group, and that belong to Celery's own way of joining them.
_JOINING = (*signatures.CHORD_OPTIONS, "reply_to")


def links_of(app: Any, value: Any, role: str) -> list[Signature]:
    """The tasks of one signature, in the order in which they run: one, or those of a chain; each a single task, a group
    or a chord.

    Errors: UnsupportedCanvas for what is no signature, or an empty chain; InvalidOption where a canvas contains itself.
    """
    try:
        made = signatures.signature_of(app, value, role).clone()
        links = _links_of_chain(app, made, role) if isinstance(made, _chain) else [_alone(made)]
    except RecursionError:
        raise errors.InvalidOption(f"{role} is nested too deep: it contains itself, or too many others") from None
    for link in links:
        if not isinstance(link, (group, celery_chord)):
            signatures.plain_signature(app, link, role)
    return links


def _links_of_chain(app: Any, chain: Any, role: str) -> list[Signature]:
    if not chain.tasks:
        raise errors.UnsupportedCanvas(f"{role} is an empty chain")
    options = dict(chain.options)
    link, link_error, last_id = (options.pop(name, None) for name in ("link", "link_error", "task_id"))
    for name in signatures.CHORD_OPTIONS:
        options.pop(name, None)
    chain._use_link = False  # task_protocol = 1 would have each link send the next one
    prepared, _ = chain.prepare_steps(
        chain.args, {}, chain.tasks, None, None, link_error, app, last_task_id=last_id
    )
    links = [_alone(each) for each in reversed(prepared)]
    for each, after in itertools.pairwise(links):
        _unlink(each, result_id(after) if isinstance(after, celery_chord) else after.options.get("task_id"))
    for callback in maybe_list(link) or []:
        links[-1].link(callback)
    links[0].options.update(options)
    return links


def _unlink(signature: Any, task_id: str | None) -> None:
    """Drop the callback that an earlier freezing, under ``task_protocol = 1``, made of the next link."""
    while isinstance(signature, celery_chord):
        signature = signature.body
    callbacks = maybe_list((signature.get("options") or {}).get("link")) or []
    kept = [each for each in callbacks if result_id(each) != task_id]
    if task_id is not None and len(kept) < len(callbacks):
        signature["options"]["link"] = kept


def _alone(signature: Signature) -> Signature:
    """A group of one is that one, as Celery has it."""
    if isinstance(signature, group) and isinstance(signature.tasks, (list, tuple)) and len(signature.tasks) == 1:
        return maybe_signature(signature.tasks[0], app=signature._app)
    return signature


def elements(app: Any, tasks: Any, role: str = "header element") -> Iterator[Signature]:
    """What a header, or a group, runs side by side: groups within it are unrolled, empty chains left out. A generator
    is read as it is asked."""
    tasks = tasks.tasks if isinstance(tasks, group) else tasks
    for at, each in enumerate(tasks if tasks is not None else ()):
        made = signatures.signature_of(app, each, f"{role} {at}")
        if isinstance(made, group):
            yield from elements(app, made, role)
        elif not isinstance(made, _chain) or made.tasks:
            yield made


def given(element: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A copy of a header's element with more arguments and options, as Celery's group gives them: a chain's first task
    gets the arguments, a chord's header does."""
    if isinstance(element, group):
        made = element.clone()
        made.tasks = [given(each, args, kwargs, {}) for each in elements(made._app, made)]
    elif isinstance(element, _chain):
        made = element.clone()
        first = next((at for at, each in enumerate(made.tasks) if not _is_empty(each)), None)
        if first is not None and not made.immutable:
            made.tasks[first] = given(made.tasks[first], (*args, *made.args), kwargs, {})
            made.args = ()
    elif isinstance(element, celery_chord):
        made = element.clone()
        if args and not made.immutable:
            made.args = (*args, *made.args)
        made.kwargs["kwargs"] = {**(made.kwargs.get("kwargs") or {}), **kwargs}
    else:
        made = element.clone(args, dict(kwargs))
    made.options.update(options)
    return made


def _is_empty(value: Any) -> bool:
    return isinstance(value, group) and isinstance(value.tasks, (list, tuple)) and not value.tasks


def without_joints(value: Any) -> Any:
    """A signature as plain data, without what freezing put there for Celery's own joining of parts: header tasks then
    carry a copy of their chord's body each."""
    if isinstance(value, group) or _is(value, "group"):
        tasks = [without_joints(each) for each in value["kwargs"]["tasks"] or ()]
        return {**_bare(value), "kwargs": {**value["kwargs"], "tasks": tasks}}
    if _is(value, "chain"):
        tasks = [without_joints(each) for each in value["kwargs"]["tasks"] or ()]
        return {**_bare(value), "kwargs": {**value["kwargs"], "tasks": tasks}}
    if _is(value, "chord"):
        kwargs = value["kwargs"]
        header = kwargs["header"]
        header = header["kwargs"]["tasks"] if isinstance(header, Mapping) and _is(header, "group") else header
        body = None if kwargs.get("body") is None else without_joints(kwargs["body"])
        return {
            **_bare(value), "kwargs": {**kwargs, "header": [without_joints(each) for each in header], "body": body}
        }  # fmt: skip
    return _bare(value)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, Mapping) and value.get("subtask_type") == kind


def _bare(value: Mapping[str, Any]) -> dict[str, Any]:
    options = {
        name: each for name, each in (value.get("options") or {}).items()
        if name not in _JOINING and name not in signatures.NOT_KEPT
    }  # fmt: skip
    return {**value, "options": options}


def result_id(value: Any) -> str | None:
    """The id by which a signature's result is known, once it is frozen: a chain's is its last link's, a chord's its
    body's, a group's its own."""
    if value is None:
        return None
    if _is(value, "chain") and value["kwargs"]["tasks"]:
        return (value.get("options") or {}).get("task_id") or result_id(value["kwargs"]["tasks"][-1])
    if _is(value, "chord"):
        return result_id(value["kwargs"].get("body"))
    found = (value.get("options") or {}).get("task_id")
    return None if found is None else str(found)


def result_ids(value: Any) -> list[str]:
    """Of all that waits for a signature's result: of each link of a chain, of each task of a group, of bodies."""
    if value is None:
        return []
    if _is(value, "chain") or _is(value, "group"):
        return [found for each in value["kwargs"]["tasks"] or () for found in result_ids(each)]
    if _is(value, "chord"):
        return result_ids(value["kwargs"].get("body"))
    found = result_id(value)
    return [] if found is None else [found]


def ends_in_group(value: Any) -> bool:
    """Whether several tasks are the last of a signature."""
    if _is(value, "chain") and value["kwargs"]["tasks"]:
        return ends_in_group(value["kwargs"]["tasks"][-1])
    return ends_in_group(value["kwargs"].get("body")) if _is(value, "chord") else _is(value, "group")


def errbacks_of(value: Any) -> list[tuple[Any, str]]:
    """Errbacks of a frozen body that are called when what comes before keeps it from running, each with the id of whose
    failure it is told: the body's, or of a group, each task's own."""
    if value is None:
        return []
    known = result_id(value) or ""
    found = [(errback, known) for errback in maybe_list((value.get("options") or {}).get("link_error")) or []]
    if _is(value, "chord"):
        found += errbacks_of(value["kwargs"].get("body"))
    if _is(value, "group"):
        found += [pair for each in value["kwargs"]["tasks"] or () for pair in errbacks_of(each)]
    return found
