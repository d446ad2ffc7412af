"""Named places between two steps, where tests let a process die. No-ops in production.

`reach` names a moment after which the protocol promises that a sweep mends whatever was left undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_armed: dict[str, Callable[[], None]] = {}


def reach(name: str) -> None:
    """Do what a test asked for at this place; nothing if none did."""
    if _armed and name in _armed:
        _armed[name]()


@contextmanager
def armed(name: str, action: Callable[[], None]) -> Iterator[None]:
    """For tests: `action` runs whenever the place is reached, until the block ends."""
    _armed[name] = action
    try:
        yield
    finally:
        del _armed[name]
