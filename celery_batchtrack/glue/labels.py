"""Messages say which batch and child they belong to where Flower shows keyword arguments, so that its Tasks tab finds
them: `kwargsrepr` is for people alone, a task's own arguments stay as they are."""

from __future__ import annotations

import weakref
from typing import Any

from celery import signals

from celery_batchtrack.vocabulary.ids import HEADER, Ticket

#: Those of this process. One receiver for all of them: a signal keeps what it knows for ever.
_extensions: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(extension: Any) -> None:
    """Label what this app sends of its batches, retries of theirs included."""
    _extensions.add(extension)
    signals.before_task_publish.connect(_label, dispatch_uid="batchtrack-labels")


def _label(sender: Any = None, headers: Any = None, **_: Any) -> None:
    if not isinstance(headers, dict):
        return
    ticket = Ticket.from_header(headers.get(HEADER))
    if ticket is not None and any(each.labels_messages(ticket.store_id) for each in list(_extensions)):
        headers["kwargsrepr"] = labelled(ticket, headers.get("kwargsrepr"))


def labelled(ticket: Ticket, shown: str | None) -> str:
    """As a mapping, which Flower's search for one of its keys reads. What hides the arguments goes on hiding them."""
    label = f"'bt_batch': '{ticket.key.batch_id}', 'bt_child': {ticket.key.position}"
    shown = str(shown or "{}")
    if not shown.startswith("{"):
        return f"{{{label}}} {shown}"
    return f"{{{label}}}" if shown == "{}" else f"{{{label}, {shown[1:]}"
