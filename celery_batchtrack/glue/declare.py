"""`tracked`: what a task says of itself, and where that is found again."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, get_type_hints, overload

from celery.app.task import Task
from celery.local import Proxy

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.crash_policy import CrashPolicy, RowPolicy
from celery_batchtrack.vocabulary.ids import name_of_index
from celery_batchtrack.vocabulary.records import storable
from celery_batchtrack.vocabulary.settings import seconds, suggestion

F = TypeVar("F", bound=Callable[..., Any])

#: The mark that `tracked` leaves on a function.
MARK = "__batchtrack__"
#: The task attribute that holds the options; `task_annotations` may set it too.
ATTRIBUTE = "batchtrack"

_LONGEST_IDENTIFIER = 255
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
#: Ways to make one result of several that need no code.
MERGES = ("list", "concat", "sum")
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of one task, validated."""

    items: str | Callable[..., Any] | None = None
    item_id: str | tuple[str, ...] | Callable[[Any], Any] | None = None
    weight: str | Callable[..., Any] | None = None
    on_crash: str | CrashPolicy = "as_acks"
    max_crashes: int | None = None
    merge: str | None = None
    results: str = "store"
    stall_timeout: float | None = None
    store_arguments: bool = False
    #: What `on_crash` and `max_crashes` come to.
    policy: CrashPolicy = field(default_factory=CrashPolicy)

    @classmethod
    def validated(cls, options: Mapping[str, Any]) -> TaskOptions:
        """Raises InvalidOption for unknown names and wrong values."""
        known = [name for name in cls.__slots__ if name != "policy"]
        for name in options:
            if name not in known:
                hint = CrashPolicy.hint(name) or suggestion(name, known)
                raise errors.InvalidOption(f"tracked() has no option {name!r}{hint}")
        values = dict(options)
        if isinstance(values.get("item_id"), list):
            values["item_id"] = tuple(values["item_id"])
        values["policy"] = CrashPolicy.parse(values.get("on_crash", "as_acks"), values.get("max_crashes"))
        values["merge"] = _merge_path(values.get("merge"))
        values["stall_timeout"] = _stall_timeout(values.get("stall_timeout"))
        made = cls(**values)
        made._check()
        made.check_policy(made.policy, "tracked()")
        return made

    def _check(self) -> None:
        if not (self.items is None or isinstance(self.items, str) or callable(self.items)):
            raise errors.InvalidOption(f"items must be an argument's name or a callable, not {self.items!r}")
        keys = (self.item_id,) if isinstance(self.item_id, str) else self.item_id
        if isinstance(keys, tuple):
            if not keys or not all(isinstance(key, str) for key in keys):
                raise errors.InvalidOption(f"item_id must be names or a callable, not {self.item_id!r}")
        elif keys is not None and not callable(keys):
            raise errors.InvalidOption(f"item_id must be names or a callable, not {self.item_id!r}")
        if self.item_id is not None and self.items is None:
            raise errors.InvalidOption("item_id needs items: which argument holds the items?")
        if not (self.weight is None or isinstance(self.weight, str) or callable(self.weight)):
            raise errors.InvalidOption(f"weight must be a name or a callable, not {self.weight!r}")
        if self.results not in ("store", "none"):
            raise errors.InvalidOption(f"results must be 'store' or 'none', not {self.results!r}")

    def check_policy(self, policy: CrashPolicy, who: str, *, results: str = "store") -> None:
        """Whether a task with these options can follow a policy. `results`: those of its batch."""
        if (policy.splits or policy.quarantine_after is not None) and not isinstance(self.items, str):
            wanted = f"on_crash={policy.on_crash!r}" if policy.splits else "quarantine_after"
            raise errors.InvalidOption(
                f"{who}: {wanted} needs items= to name the argument that holds the items, so that they can be taken "
                "apart"
            )
        if policy.splits and self.merge is None and "none" not in (self.results, results):
            raise errors.InvalidOption(
                f"{who}: on_crash={policy.on_crash!r} splits a child, but its header position has one result: say "
                "how parts become one (merge='concat', 'sum', 'list', or the path of a callable), or that nobody "
                "reads results (results='none')"
            )


def _merge_path(value: Any) -> str | None:
    """The name or path of a `merge`. Raises InvalidOption."""
    if value is list or value is sum:
        return str(value.__name__)
    if callable(value):
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "<")
        if not module or "<" in name:
            raise errors.InvalidOption(f"merge must be importable by its path, which {value!r} is not")
        return f"{module}:{name}"
    if value is None or (isinstance(value, str) and (value in MERGES or _PATH.fullmatch(value))):
        return value
    hint = suggestion(str(value), list(MERGES))
    raise errors.InvalidOption(
        f"merge must be one of {MERGES} or a callable's path ('shop.tasks:join'), not {value!r}{hint}"
    )


def _stall_timeout(value: Any) -> float | None:
    if value is None:
        return None
    try:
        timeout = seconds(value)
    except ValueError as error:
        raise errors.InvalidOption(f"stall_timeout: {error}") from None
    if not 0 < timeout < math.inf:
        raise errors.InvalidOption(f"stall_timeout must be more than 0 seconds (None: never), not {value!r}")
    return timeout


@overload
def tracked(function: F, /) -> F: ...


@overload
def tracked(
    *, items: str | Callable[..., Any] | None = ..., item_id: str | Sequence[str] | Callable[[Any], Any] | None = ...,
    weight: str | Callable[..., Any] | None = ...,
    on_crash: str | CrashPolicy = ..., max_crashes: int | None = ...,
    merge: str | Callable[[list[Any]], Any] | None = ...,
    results: str = ..., stall_timeout: float | None = ..., store_arguments: bool = ...,
) -> Callable[[F], F]: ...  # fmt: skip


def tracked(function: Any = None, /, **options: Any) -> Any:
    """Declare what a task works on. Goes *below* ``@app.task``; returns the same function, marked.

    Arguments:
        items: name of the argument that holds the items, or ``callable(*args, **kwargs) -> items``.
        item_id: key(s) or attribute(s) of an item, or ``callable(item)``. Several are joined by ``:``,
            missing ones left out. Without it, items that are strings or numbers identify themselves.
        weight: what progress is measured by, instead of by items: a key or attribute of each item, or
            ``callable(item)``, summed; without `items`, the name of an argument, or ``callable(*args, **kwargs)``.
            Numbers of at least 0, rounded up to whole ones.
        on_crash: ``"as_acks"`` (default: what the task told Celery by ``acks_late`` and
            ``reject_on_worker_lost``), ``"record"``, ``"retry"``, ``"bisect"`` (the items go to two successors, again
            and again, until the one that kills is alone), ``"skip"`` (the item in hand alone is crashed, all others
            run again), ``"resume"`` (only those after it run; needs ``each_item(…, done="on_next")``), or a
            `CrashPolicy`.
        max_crashes: the death that ends the child, under policies that run it again.
        merge: how the results of a split child's parts become one: ``"list"``, ``"concat"``, ``"sum"``, or the path of
            a callable that takes them in a list, in the order of the items.
        results: ``"none"`` if nobody reads this task's results: then they are not kept.
        stall_timeout: seconds without an item or a note (`each_item`, `note`) after which the process is killed and
            the child crashed as ``stalled``; prefork only. Default: never.
        store_arguments: keep the stored arguments after the child completed.

    Outside a batch the task works as if undecorated. Errors: `errors.InvalidOption`.
    """
    if isinstance(function, (Task, Proxy)):
        raise errors.InvalidOption("tracked() goes below @app.task:\n    @app.task\n    @tracked(...)\n    def …")
    if inspect.isclass(function):
        raise errors.InvalidOption("tracked() marks a function, or the run() method of a Task class")
    made = TaskOptions.validated(options)
    if function is not None and not callable(function):
        raise errors.InvalidOption(f"tracked() takes its options by name, not {function!r}")

    def mark(target: F) -> F:
        if isinstance(target, (Task, Proxy)):
            return tracked(target)
        if inspect.isclass(target):
            return tracked(target)
        _check_items_argument(made, target)
        setattr(target, MARK, made)
        return target

    return mark if function is None else mark(function)


def _check_items_argument(options: TaskOptions, function: Callable[..., Any]) -> None:
    if not isinstance(options.items, str):
        return
    parameters = inspect.signature(function).parameters
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if options.items not in parameters and not open_ended and options.items not in _fields_of_models(function):
        raise errors.InvalidOption(
            f"{getattr(function, '__qualname__', function)} has no argument {options.items!r} "
            f"for items{suggestion(options.items, list(parameters))}"
        )
    collecting = options.items in parameters and parameters[options.items].kind in _COLLECTING
    if collecting and (options.policy.splits or options.policy.quarantine_after is not None):
        raise errors.InvalidOption(
            f"{getattr(function, '__qualname__', function)}: items={options.items!r} collects arguments and cannot be "
            "taken apart: pass the items in one list"
        )


def _fields_of_models(function: Callable[..., Any]) -> set[str]:
    """Of its pydantic arguments, which are mappings on their way."""
    try:
        hints = get_type_hints(function)
    except Exception:  # noqa: BLE001 (annotations may be anything)
        return set()
    return {name for hint in hints.values() for name in getattr(hint, "model_fields", ())}


def options_of(task: Any) -> TaskOptions:
    """The options of a task: its `batchtrack` attribute (annotations), or the mark on its function."""
    annotated = getattr(task, ATTRIBUTE, None)
    if isinstance(annotated, TaskOptions):
        return annotated
    if isinstance(annotated, Mapping):
        made = TaskOptions.validated(annotated)
        setattr(task, ATTRIBUTE, made)
        return made
    return _marked(task) or TaskOptions()


def is_declared(task: Any) -> bool:
    """Whether it says anything of itself, by `tracked` or by annotations."""
    return getattr(task, ATTRIBUTE, None) is not None or _marked(task) is not None


def _marked(task: Any) -> TaskOptions | None:
    for name in ("run", "_orig_run", "__wrapped__"):
        function = getattr(task, name, None)
        while function is not None:
            found = getattr(function, MARK, None)
            if isinstance(found, TaskOptions):
                return found
            function = getattr(function, "__wrapped__", None)
    return None


def policy_of(
    task: Any, max_crashes: int, override: Mapping[str, Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> RowPolicy:
    """What happens to this child of the task when its process or worker dies. `override`: its batch's own policy."""
    options = options_of(task)
    declared = options.policy.overridden(override)
    needs_items = declared.splits or declared.quarantine_after is not None
    return RowPolicy.resolve(
        declared,
        max_crashes,
        acks_late=bool(task.acks_late),
        reject_on_worker_lost=bool(task.reject_on_worker_lost),
        retry_on_worker_lost=bool(getattr(task, "retry_on_worker_lost", False)),
        acks_on_timeout=bool(getattr(task, "acks_on_timeout", True)),
        items=items_path(task, args, kwargs) if needs_items else None,
        merge=options.merge,
        stall_timeout=options.stall_timeout,
    )


def items_path(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str | int, ...] | None:
    """Where the items stand in a call: ("args", 0), ("kwargs", "docs"), …; None where they are no list of its own."""
    name = options_of(task).items
    if not isinstance(name, str):
        return None
    if name in kwargs:
        return ("kwargs", name)
    positional = _positional(task.run)
    if name in positional[: len(args)]:
        return ("args", positional.index(name))
    for at, nested in enumerate(args):
        if isinstance(nested, dict) and name in nested:
            return ("args", at, name)
    holders = (key for key, nested in kwargs.items() if isinstance(nested, dict) and name in nested)
    return next((("kwargs", key, name) for key in holders), None)


@functools.lru_cache(maxsize=1024)
def _positional(function: Any) -> list[str]:
    """Names of the parameters that a call may fill by position."""
    return [
        each.name for each in inspect.signature(function).parameters.values()
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip


def items_in(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The items of a call; None where they are no list of its own."""
    path = items_path(task, args, kwargs)
    if path is None:
        return None
    found: Any = {"args": args, "kwargs": kwargs}
    for step in path:
        found = found[step]
    return tuple(found) if isinstance(found, list | tuple) else None


def items_of(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """(identifiers, count) of a child's items; ((), 1) for a task that declared none.

    Raises InvalidOption where the argument is not there or cannot be read as items.
    """
    options = options_of(task)
    if options.items is None:
        return (), 1
    items = _items(task, options.items, args, kwargs)
    return tuple(_identifier(item, options.item_id, task, at) for at, item in enumerate(items)), len(items)


def weight_of(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """What a child counts for in its batch's progress; None: as many as its items. Raises InvalidOption."""
    options = options_of(task)
    how = options.weight
    if how is None:
        return None
    if options.items is not None:
        items = _items(task, options.items, args, kwargs)
        return _rounded(task, how, sum(_weighed(task, how, partial(_part_or_call, item, how)) for item in items))
    read = partial(how, *args, **kwargs) if callable(how) else partial(argument, task, how, args, kwargs)
    return _rounded(task, how, _weighed(task, how, read))


def _part_or_call(item: Any, how: Any) -> Any:
    return how(item) if callable(how) else _part(item, how)


def _weighed(task: Any, how: Any, read: Callable[[], Any]) -> float:
    try:
        found = read()
        number = float(found)
    except errors.InvalidOption:
        raise
    except Exception as error:
        raise errors.InvalidOption(
            f"{task.name}: weight={how!r} cannot be read ({type(error).__name__}: {error})"
        ) from error
    if not 0 <= number < math.inf:
        raise errors.InvalidOption(f"{task.name}: weight={how!r} gives {found!r}: a weight is a number of at least 0")
    return number


_HEAVIEST = 2**53


def _rounded(task: Any, how: Any, weight: float) -> int:
    if weight > _HEAVIEST:
        raise errors.InvalidOption(f"{task.name}: weight={how!r} gives {weight:g}, more than {_HEAVIEST}")
    return math.ceil(weight)


def _items(task: Any, declared: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    found = _called(task, declared, args, kwargs) if callable(declared) else argument(task, declared, args, kwargs)
    if isinstance(found, (str, bytes)) or not hasattr(found, "__iter__"):
        return [found]  # one item
    return list(found)


def _called(task: Any, declared: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return declared(*args, **kwargs)
    except Exception as error:
        raise errors.InvalidOption(
            f"{task.name}: its items= callable failed: {type(error).__name__}: {error}"
        ) from error


def argument(task: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if name in kwargs:
        return kwargs[name]
    try:
        bound = inspect.signature(task.run).bind_partial(*args, **kwargs)
    except TypeError as error:
        raise errors.InvalidOption(f"{task.name}: {error}") from None
    bound.apply_defaults()
    if name in bound.arguments:
        return bound.arguments[name]
    for nested in bound.arguments.values():
        if isinstance(nested, dict) and name in nested:
            return nested[name]
    raise errors.InvalidOption(f"{task.name} is tracked by items={name!r}, but this call has no argument {name!r}")


def _identifier(item: Any, how: Any, task: Any, at: int) -> str:
    try:
        return identifier(item, how, at)
    except Exception as error:
        raise errors.InvalidOption(
            f"{task.name}: item {at} has no identifier by item_id={how!r} ({type(error).__name__}: {error})"
        ) from error


def identifier(item: Any, how: Any, at: int) -> str:
    """How an item is called: by `item_id`; by its index where it has no name. Raises what reading it raises."""
    value = _identify(item, how)
    text = name_of_index(at) if value is None else str(value)
    if "\0" in text or not text.isascii():
        text = storable(text)
    return text[:_LONGEST_IDENTIFIER]


def _identify(item: Any, how: Any) -> Any:
    if how is None:
        return item if isinstance(item, (str, int)) else None
    if callable(how):
        return how(item)
    if isinstance(how, str):
        return _part(item, how)
    parts = [_part(item, key, default=None) for key in how]
    known = [str(part) for part in parts if part is not None]
    if not known:
        raise KeyError(", ".join(how))
    return ":".join(known)


_REQUIRED = object()


def _part(item: Any, key: str, default: Any = _REQUIRED) -> Any:
    if type(item) is dict or isinstance(item, Mapping):
        return item[key] if default is _REQUIRED else item.get(key, default)
    return getattr(item, key) if default is _REQUIRED else getattr(item, key, default)
