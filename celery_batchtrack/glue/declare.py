"""`tracked`: what a task says of itself, and where that is found again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from celery.app.task import Task
from celery.local import Proxy

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.policies import ON_CRASH, ON_CRASH_LATER, RerunPolicy
from celery_batchtrack.vocabulary.settings import suggestion

F = TypeVar("F", bound=Callable[..., Any])

#: The mark that `tracked` leaves on a function.
MARK = "__batchtrack__"
#: The task attribute that holds the options; `task_annotations` may set it too.
ATTRIBUTE = "batchtrack"

_LONGEST_IDENTIFIER = 255


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of one task, validated."""

    items: str | Callable[..., Any] | None = None
    item_id: str | tuple[str, ...] | Callable[[Any], Any] | None = None
    on_crash: str = "as_acks"
    max_crashes: int | None = None
    store_arguments: bool = False

    @classmethod
    def validated(cls, options: Mapping[str, Any]) -> TaskOptions:
        """Raises InvalidOption for unknown names and wrong values."""
        known = list(cls.__slots__)
        for name in options:
            if name not in known:
                raise errors.InvalidOption(f"tracked() has no option {name!r}{suggestion(name, known)}")
        values = dict(options)
        if isinstance(values.get("item_id"), list):
            values["item_id"] = tuple(values["item_id"])
        made = cls(**values)
        made._check()
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
        if self.on_crash in ON_CRASH_LATER:
            raise errors.InvalidOption(
                f"on_crash={self.on_crash!r} is not supported by this version yet; use one of {ON_CRASH}"
            )
        if self.on_crash not in ON_CRASH:
            hint = suggestion(str(self.on_crash), list(ON_CRASH))
            raise errors.InvalidOption(f"on_crash must be one of {ON_CRASH}, not {self.on_crash!r}{hint}")
        crashes = self.max_crashes
        if crashes is not None and (isinstance(crashes, bool) or not isinstance(crashes, int) or crashes < 1):
            raise errors.InvalidOption(f"max_crashes must be a whole number of at least 1, not {crashes!r}")


@overload
def tracked(function: F, /) -> F: ...


@overload
def tracked(
    *, items: str | Callable[..., Any] | None = ..., item_id: str | Sequence[str] | Callable[[Any], Any] | None = ...,
    on_crash: str = ..., max_crashes: int | None = ..., store_arguments: bool = ...,
) -> Callable[[F], F]: ...  # fmt: skip


def tracked(function: Any = None, /, **options: Any) -> Any:
    """Declare what a task works on. Goes *below* ``@app.task``; returns the same function, marked.

    Arguments:
        items: name of the argument that holds the items, or ``callable(*args, **kwargs) -> items``.
        item_id: key(s) or attribute(s) of an item, or ``callable(item)``. Several are joined by ``:``,
            missing ones left out. Without it, items that are strings or numbers identify themselves.
        on_crash: ``"as_acks"`` (default: what the task told Celery by ``acks_late`` and
            ``reject_on_worker_lost``), ``"record"`` or ``"retry"``.
        max_crashes: the death that ends the child, under policies that run it again.
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
    if options.items not in parameters and not open_ended:
        raise errors.InvalidOption(
            f"{getattr(function, '__qualname__', function)} has no argument {options.items!r} "
            f"for items{suggestion(options.items, list(parameters))}"
        )


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


def _marked(task: Any) -> TaskOptions | None:
    for name in ("run", "_orig_run", "__wrapped__"):
        function = getattr(task, name, None)
        while function is not None:
            found = getattr(function, MARK, None)
            if isinstance(found, TaskOptions):
                return found
            function = getattr(function, "__wrapped__", None)
    return None


def policy_of(task: Any, max_crashes: int) -> RerunPolicy:
    """What happens to a child of this task when its process or worker dies."""
    options = options_of(task)
    return RerunPolicy.resolve(
        options.on_crash,
        options.max_crashes or max_crashes,
        acks_late=bool(task.acks_late),
        reject_on_worker_lost=bool(task.reject_on_worker_lost),
        retry_on_worker_lost=bool(getattr(task, "retry_on_worker_lost", False)),
        acks_on_timeout=bool(getattr(task, "acks_on_timeout", True)),
    )


def items_of(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """(identifiers, count) of a child's items; ((), 1) for a task that declared none.

    Raises InvalidOption where the argument is not there or cannot be read as items.
    """
    options = options_of(task)
    if options.items is None:
        return (), 1
    items = _items(task, options.items, args, kwargs)
    return tuple(_identifier(item, options.item_id, task, at) for at, item in enumerate(items)), len(items)


def _items(task: Any, declared: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    found = _called(task, declared, args, kwargs) if callable(declared) else _argument(task, declared, args, kwargs)
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


def _argument(task: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
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
        value = _identify(item, how)
    except Exception as error:
        raise errors.InvalidOption(
            f"{task.name}: item {at} has no identifier by item_id={how!r} ({type(error).__name__}: {error})"
        ) from error
    text = f"[{at}]" if value is None else str(value)
    text = text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
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
    if isinstance(item, Mapping):
        return item[key] if default is _REQUIRED else item.get(key, default)
    return getattr(item, key) if default is _REQUIRED else getattr(item, key, default)
