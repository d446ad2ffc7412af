"""A JSON parser in C without a depth limit: the crash that this library exists for.

PubAnnotation's uploads died of a document whose attributes were nested so deeply that a recursive parser
in C ran over the end of its stack. That is SIGSEGV: the process is gone, no ``except`` sees it, and a plain
Celery chord waits for ever.

Python's own parser is recursive C as well, but it counts its depth and raises RecursionError in time. What
follows is the well-known recipe of people whose documents that guard refuses: a higher recursion limit,
in a thread of its own. It takes the guard away and leaves the recursion. No signal is sent and no memory is
poked here; the machine's stack really overflows.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any, Never

NO_LIMIT = 10**7
_KIB = 1024
_STACKS = (256 * _KIB, 48 * _KIB)
"""Bytes, tried in this order. A level of nesting takes 128 bytes of C stack (measured on 3.11.7, 3.12.1 and
3.13.0, x86-64): the first overflows at about 2,000 levels, the second at about 320. The second is for Python
3.12.0 and 3.12.1, whose C code has a limit of 1,500 that `sys.setrecursionlimit` does not move: 256 KiB
suffice for that. It must be less than a quarter of the first, or glibc gives the new thread the first one's
stack again."""


def parse(line: str) -> dict[str, Any]:
    """Decodes one document. Raises ValueError for what is no JSON object.

    Up to about 900 levels of nesting are decoded on every Python, as is everything within the
    interpreter's own limit (1,000 levels less the caller's frames on 3.11, about 1,500 on 3.12.1, 10,000 on
    3.13). From there on the process may die of SIGSEGV, and from 50,000 levels on it always does, on
    Python 3.11 to 3.13. (Python 3.14 knows where the stack of a thread ends: there it is a ValueError.)
    """
    try:
        document = _DECODER.decode(line)
    except RecursionError:
        document = _decode_without_guard(line)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_process_wide_settings = threading.Lock()


def _decode_without_guard(line: str) -> Any:
    with _process_wide_settings:
        recursion_limit, stack_size = sys.getrecursionlimit(), threading.stack_size()
        sys.setrecursionlimit(NO_LIMIT)
        try:
            for size in _STACKS:
                threading.stack_size(size)
                try:
                    return _in_a_thread(line)
                except RecursionError:
                    continue
        finally:
            sys.setrecursionlimit(recursion_limit)
            threading.stack_size(stack_size)
    raise ValueError("nested deeper than this Python's parser goes")


def _in_a_thread(line: str) -> Any:
    decoded: list[Any] = []
    errors: list[ValueError | RecursionError] = []

    def decode() -> None:
        try:
            decoded.append(_DECODER.decode(line))
        except (ValueError, RecursionError) as error:
            errors.append(error)

    thread = threading.Thread(target=decode, name="parser")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return decoded[0]
