"""`each_item` and `note`: what a running child says of the item in its hand. Outside a batch they do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from celery_batchtrack import errors
from celery_batchtrack.behaviour import blackbox
from celery_batchtrack.behaviour.blackbox import Page

from . import declare
from .tracked_task import CurrentRun, current_run

T = TypeVar("T")

_LONGEST = blackbox.IDENTIFIER_SIZE


def each_item(items: Iterable[T], *, done: str | None = None) -> Iterator[T]:
    """Iterate over the items of this child, remembering the one in hand: if the process dies, the incident names it.

    A memory store per item, no I/O, no SQL. The index counts from 0; the identifier is that of the task's ``item_id``.
    Inside another `each_item` of the same run, only progress is noted.

    Arguments:
        items: any iterable; best the very argument that the task declares by ``items=``.
        done: ``"on_next"`` promises that what was done for an item is durable when the next one is asked for. Under
            ``on_crash="resume"`` items before a crash are not run again, so it must be given there.

    Errors: InvalidOption for another `done`, and under ``resume`` without it.
    """
    if done not in (None, "on_next"):
        raise errors.InvalidOption(f"each_item(…, done=…) knows 'on_next' only, not {done!r}")
    current = current_run()
    if current is None:
        return iter(items)
    if current.policy.on_crash == "resume" and done is None:
        raise errors.InvalidOption(
            f"{current.task.name} has on_crash='resume', by which items before a crash are not run again: write "
            "each_item(…, done='on_next') and make each item's effects durable before the next is asked for, "
            "or use on_crash='skip'"
        )
    page = current.run.page
    if current.walking:
        return _noting_progress(items, page)
    flags = blackbox.PROMISED if done else 0
    if current.declared_items() is items:
        flags |= blackbox.DECLARED
    write = page.item_writer(flags)
    if write is None:
        return iter(items)
    return _remembering(items, current, write, flags)


def note(text: object) -> None:
    """Keep a short note (the first 512 bytes) of what this child is doing; the last one is told by its incident.

    A memory store; outside a batch it does nothing.
    """
    current = current_run()
    if current is not None:
        current.run.page.note(str(text))


def _remembering(
    items: Iterable[T], current: CurrentRun, write: Callable[[int, bytes], None], flags: int
) -> Iterator[T]:
    page, identify = current.run.page, _identifying(declare.options_of(current.task).item_id)
    generation, finished = page.generation, 0
    current.walking = True
    try:
        for index, item in enumerate(items):
            try:
                name = identify(item, index).encode("utf-8", "backslashreplace")
            except Exception:  # noqa: BLE001 (an item that cannot be named is known by its index)
                name = b""
            write(index, name if len(name) <= _LONGEST else name[:_LONGEST])
            yield item
            finished = index + 1
    except GeneratorExit:
        if page.generation == generation:  # not collected so late that the next run is in this slot
            page.item_left()
        raise
    else:
        page.no_item(finished, flags)
    finally:
        current.walking = False


def _noting_progress(items: Iterable[T], page: Page) -> Iterator[T]:
    for item in items:
        page.touch()
        yield item


def _identifying(how: Any) -> Callable[[Any, int], str]:
    """`declare.identifier` with the common cases first: it is called for every item."""
    if isinstance(how, str):

        def by_key(item: Any, at: int) -> str:
            if type(item) is dict:
                text = item[how]
                if type(text) is str and len(text) < 256 and "\0" not in text:
                    return text
            return declare.identifier(item, how, at)

        return by_key
    return lambda item, at: declare.identifier(item, how, at)
