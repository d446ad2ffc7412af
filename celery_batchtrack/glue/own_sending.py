"""Tasks with their own `apply_async`, such as celery-once's and celery-singleton's: they are sent through it, once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_batchtrack.behaviour.tracker import Message, NotSent

from . import signatures


class NotTaken(Exception):
    """A task's own `apply_async` did not send it."""


#: Trouble of a lock's file, not of a broker.
OF_FILES = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


def wanted(message: Message, task: Any) -> bool:
    """Whether its task's own `apply_async` sends it: the first time only. Sent again, it is what a lock of that
    task's waits for; asked again, the lock would keep it back for ever. So it is with what ran in an earlier round,
    and may have died there."""
    row, later_round = message.row, message.batch.round > 1
    if task is None or row.dispatches > 1 or (later_round and row.attempt > 0):
        return False
    return signatures.own_apply_async(task) is not None


def send(message: Message, task: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> None:
    """Send by the task's own `apply_async`. Raises NotTaken if that sent something else, or nothing."""
    result = task.apply_async(args, kwargs, **options)
    found = getattr(result, "id", None)
    if found != message.row.task_id:
        other = "no task's id: it did not send it" if found is None else f"the id of another task, {found}"
        raise NotTaken(f"{whose(task)} returned {other}")


def whose(task: Any) -> str:
    return f"not sent: the own apply_async of {task.name} ({signatures.own_apply_async(task)})"


def run(message: Message, task: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> NotSent | None:
    """Run it by the task's own `apply_async`, where tasks are always eager."""
    try:
        send(message, task, args, kwargs, options)
    except NotTaken as error:
        return NotSent(message, str(error), final=True)
    except Exception as error:  # noqa: BLE001 (of its own: what the task itself raises is in the result)
        return NotSent(message, f"{whose(task)} raised {type(error).__name__}: {error}", final=True)
    return None
