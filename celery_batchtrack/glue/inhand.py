"""`each_item` and `note`: what a running child says of the item in its hand. Outside a batch they do nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from celery_batchtrack import errors
from celery_batchtrack.behaviour import blackbox
from celery_batchtrack.behaviour.blackbox import Page

from . import declare
from .tracked_task import CurrentRun, Place, current_run

T = TypeVar("T")


def each_item(items: Iterable[T], *, done: str | None = None) -> Iterator[T]:
    """Iterate over the items of this child, remembering the one in hand: if the process dies, the incident names it.

    A memory store per item, no I/O, no SQL. The index counts from 0; the identifier is that of the task's ``item_id``.
    Inside another `each_item` of the same run, only progress is noted.

    Arguments:
        items: any iterable; best the very argument that the task declares by ``items=``: of another one the order is
            not known, so that `done` does not count. While a generator makes its next item, none is in hand.
        done: ``"on_next"`` promises that what was done for an item is durable when the next one is asked for. Under
            ``on_crash="resume"`` items before a crash are not run again, so it must be given there.

    Errors: InvalidOption for another `done`, and under ``resume`` without it.
    """
    if done not in (None, "on_next"):
        raise errors.InvalidOption(f"each_item(…, done=…) knows 'on_next' only, not {done!r}")
    current = current_run()
    if current is None:
        return iter(items)
    page = current.run.page
    if current.walking:
        return _noting_progress(items, page)
    if current.policy.on_crash == "resume" and done is None:
        raise errors.InvalidOption(
            f"{current.task.name} has on_crash='resume', by which items before a crash are not run again: write "
            "each_item(…, done='on_next') and make each item's effects durable before the next is asked for, "
            "or use on_crash='skip'"
        )
    flags = blackbox.PROMISED if done else 0
    if current.goes_over_declared(items):
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
        current.run.page.note(text if type(text) is str else _told(text))


def _told(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 (what cannot be told must not end the child)
        return type(value).__name__


#: So many frames lie at most between a loop over items and who wrote it (progress bars, `map`, generators).
_CALLERS = 20

#: Asking these for the next one runs no code that could die.
_AT_HAND = (list, tuple, range)


def _remembering(
    items: Iterable[T], current: CurrentRun, write: Callable[[int, bytes], None], flags: int
) -> Iterator[T]:
    page, identify = current.run.page, _identifying(declare.options_of(current.task).item_id)
    if current.walking:  # asked for before the loop that it turned out to be in
        yield from _noting_progress(items, page)
        return
    # What is resumed or collected late, when the next run is in this slot, or in a forked process, writes nothing.
    generation, finished, at_hand = page.generation, 0, type(items) in _AT_HAND
    current.walking = True
    try:
        for index, item in enumerate(items):
            try:
                name = identify(item, index)
            except Exception:  # noqa: BLE001 (an item that cannot be named is known by its index)
                name = b""
            if page.generation == generation:
                write(index, name)
            yield item
            finished = index + 1
            if not at_hand and page.generation == generation:
                page.no_item(finished, flags)
    except GeneratorExit:
        if page.generation == generation:
            page.item_left()
            current.left_at = _callers(sys._getframe(1))
        raise
    else:
        if page.generation == generation:
            page.no_item(finished, flags)
    finally:
        current.walking = False


def _callers(frame: FrameType | None) -> tuple[Place, ...]:
    """Who was in the loop, directly or through what it is wrapped in."""
    found: list[Place] = []
    while frame is not None and len(found) < _CALLERS:
        found.append(Place(id(frame), frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def _noting_progress(items: Iterable[T], page: Page) -> Iterator[T]:
    generation = page.generation
    for item in items:
        if page.generation == generation:
            page.touch()
        yield item


def _identifying(how: Any) -> Callable[[Any, int], bytes]:
    """`declare.identifier` in UTF-8, with the common cases first: it is called for every item."""
    quick = _quick(how)

    def named(item: Any, at: int) -> bytes:
        text = quick(item)
        if type(text) is str and len(text) < 256 and "\0" not in text:
            try:
                return text.encode()
            except UnicodeEncodeError:  # lone surrogates
                pass
        return declare.identifier(item, how, at).encode()

    def named_by_itself(item: Any, at: int) -> bytes:
        return b"[%d]" % at if type(item) is dict else named(item, at)

    return named if how is not None else named_by_itself


def _quick(how: Any) -> Callable[[Any], Any]:
    """What may be an item's name; anything but text says that it is to be looked at closely."""
    if how is None:
        return lambda item: item
    if isinstance(how, str):
        return lambda item: item[how] if type(item) is dict else None
    if isinstance(how, tuple) and how:
        return _joined(how)
    return lambda item: None


def _joined(keys: tuple[str, ...]) -> Callable[[Any], str | None]:
    first, *others = keys

    def joined(item: Any) -> str | None:
        if type(item) is not dict or (text := item.get(first)) is None:
            return None
        text = str(text)
        for key in others:
            if (part := item.get(key)) is not None:
                text = f"{text}:{part}"
        return text

    return joined
