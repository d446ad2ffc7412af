"""Celery signatures: into rows when a child is created, and out of them when it is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from celery.app.task import Task
from celery.canvas import Signature, _chain, group, maybe_signature
from celery.canvas import chord as celery_chord
from kombu import Queue

from celery_batchtrack import errors

from . import codec, declare

#: Options of a signature that describe one sending, not the task: they live in columns of the row.
_OWN_COLUMNS = ("task_id", "countdown", "eta", "expires", "group_id", "group_index", "chord", "chain", "reply_to")
#: Options by which Celery's own chord knows one of its parts.
CHORD_OPTIONS = ("chord", "group_id", "group_index")
#: Options that cannot be kept in a row.
NOT_KEPT = ("producer", "publisher", "connection", "router", "result_cls", "add_to_parent")


def signature_of(app: Any, value: Any, role: str) -> Signature:
    """What somebody gave as a signature, as one; a task stands for its call without arguments, as with Celery.
    Raises UnsupportedCanvas for what is none."""
    if isinstance(value, Task):
        return value.s()
    if not isinstance(value, Mapping):
        raise errors.UnsupportedCanvas(f"{role} must be a signature such as task.s(…), not {value!r:.100}")
    try:
        made = maybe_signature(value, app=app)
    except LookupError as error:
        raise errors.UnsupportedCanvas(f"{role} is no signature that this version of Celery knows: {error}") from None
    if not isinstance(made.get("task"), str) or not made["task"]:
        raise errors.UnsupportedCanvas(f"{role} names no task: {value!r:.100}")
    return made


def plain_signature(app: Any, value: Any, role: str) -> Signature:
    """A signature of one task. Raises UnsupportedCanvas for other shapes, and for what is none."""
    made = signature_of(app, value, role)
    if made.get("subtask_type") in ("chunks", "xmap", "xstarmap"):
        raise errors.UnsupportedCanvas(f"{role} is {made['subtask_type']}: use .group() of it, or a task of your own")
    if isinstance(made, (_chain, group, celery_chord)):
        raise errors.UnsupportedCanvas(f"{role} must be a single task, not {made!r:.100}")
    refuse_own_strategy(app, made["task"])
    return made


def refuse_own_strategy(app: Any, name: str) -> None:
    """Tasks whose running bypasses Celery's usual way would run untracked."""
    task = app.tasks.get(name)
    if task is None:
        return
    if str(task.Strategy) != "celery.worker.strategy:default":
        raise errors.UnsupportedCanvas(
            f"{name} has its own worker strategy ({task.Strategy}), which a batch cannot follow"
        )


def own_apply_async(task: Any) -> str | None:
    """Who gives this task an `apply_async` of its own, such as celery-once's QueueOnce; None if it has Celery's."""
    if "apply_async" in vars(task):
        return "set on the task itself"
    if type(task).apply_async is Task.apply_async:  # which may have been replaced, by Sentry for one
        return None
    return next(each.__name__ for each in type(task).__mro__ if "apply_async" in vars(each))


def stored(
    signature: Mapping[str, Any], chain: Sequence[Mapping[str, Any]] = (), *, part_of_chord: bool = False
) -> str:
    """The JSON that a row keeps: arguments, options, immutability; compact. `chain`: the tasks that follow it.

    `part_of_chord`: a chord of Celery's own waits for it, as its options say.
    """
    options = {
        name: _plain_option(value)
        for name, value in (signature.get("options") or {}).items()
        if (name not in _OWN_COLUMNS or (part_of_chord and name in CHORD_OPTIONS))
        and name not in NOT_KEPT and value is not None
    }  # fmt: skip
    kept: dict[str, Any] = {"args": list(signature.get("args") or ()), "kwargs": dict(signature.get("kwargs") or {})}
    if options:
        kept["options"] = options
    if signature.get("immutable"):
        kept["immutable"] = True
    if chain:
        kept["chain"] = list(chain)
    try:
        return codec.dumps(kept)
    except errors.NotSerialisable as error:
        raise errors.NotSerialisable(
            f"the arguments of {signature['task']} cannot be stored: {error.__cause__ or error}. "
            "A child's arguments must be JSON (datetime, Decimal and UUID included)"
        ) from error


def _plain_option(value: Any) -> Any:
    return value.name if isinstance(value, Queue) else value


def check_policy(
    task: Any, role: str, batch: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], count: int
) -> None:
    """A batch's own crash policy may ask of a task what it did not declare, and any that splits asks for items that
    can be taken apart."""
    if task is None:
        return
    options = declare.options_of(task)
    policy = options.policy.overridden(batch.get("on_crash"))
    if batch.get("on_crash"):
        options.check_policy(policy, f"{role} ({task.name})", results=batch.get("results", "store"))
    if policy.splits and count > 1 and declare.items_in(task, args, kwargs) is None:
        raise errors.InvalidOption(
            f"{role} ({task.name}): on_crash={policy.on_crash!r} takes the items apart, so {options.items!r} must be "
            "given in the call, as a list"
        )


def checked(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What Celery's `apply_async` does before sending: check the arguments, dump pydantic models."""
    if task is None:
        return args, kwargs
    if task.typing and hasattr(task, "__header__"):
        task.__header__(*args, **kwargs)
    dump = getattr(task, "_dump_pydantic_arguments", None)
    return dump(args, kwargs) if dump is not None else (args, kwargs)


def moment(relative: Any, value: Any, name: str) -> tuple[float | None, datetime | None]:
    if relative is not None:
        return float(relative), None
    if value is None:
        return None, None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value), None
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        raise errors.InvalidOption(f"{name} must be a datetime or seconds, not {value!r}")
    return None, value if value.tzinfo else value.replace(tzinfo=UTC)


def route(app: Any, name: str, args: Any, kwargs: Any, options: Mapping[str, Any]) -> str | None:
    """Name of the queue that Celery would send this task to, as far as that is one queue."""
    task = app.tasks.get(name)
    wanted = {key: options[key] for key in ("queue", "exchange", "routing_key") if options.get(key)}
    if task is not None:
        defaults = {key: getattr(task, key, None) for key in ("queue", "exchange", "routing_key")}
        wanted = {**{key: value for key, value in defaults.items() if value}, **wanted}
    found = app.amqp.router.route(wanted, name, args, kwargs, task)
    queue = found.get("queue")
    return str(queue.name if isinstance(queue, Queue) else queue) if queue else None


def check_lengths(*names: str | None) -> None:
    for name in names:
        if name is not None and len(name) > 255:
            raise errors.InvalidOption(
                f"a task's name, id and queue have at most 255 characters, not {len(name)}: {name:.60}…"
            )


def callbacks_json(callbacks: Mapping[str, list[dict[str, Any]]]) -> str:
    return json.dumps({kind: entries for kind, entries in callbacks.items() if entries})


def parsed(text: str | None) -> dict[str, Any]:
    """A row's signature: {"args", "kwargs", "options"?, "immutable"?, "chain"?, "captured"?}, or, of a group or chord,
    {"canvas", "args", "kwargs", "chain"?, "captured"?}."""
    value = codec.loads(text) if text else {}
    return value if isinstance(value, dict) else {}
