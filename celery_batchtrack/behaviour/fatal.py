"""The Python stack of a fatal signal: written by `faulthandler` into a file of its own per process, read after death.

One process has one `faulthandler`. An application that enabled it itself keeps it, unless the setting says otherwise;
where only the environment asked for it (``PYTHONFAULTHANDLER``, ``-X faulthandler``), the file is ours, and the stack
is copied to the log (`echoed`).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from celery_batchtrack.vocabulary.evidence import application_frame, frames

#: Signals that faulthandler writes a stack for.
FATAL = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
#: Makes a process write its stack and live on; None where there are no such signals.
DUMP_SIGNAL: int | None = getattr(signal, "SIGRTMAX", 0) - 5 if hasattr(signal, "SIGRTMAX") else None

_NAMES = {
    "Segmentation fault": "SIGSEGV", "Aborted": "SIGABRT", "Bus error": "SIGBUS", "Illegal instruction": "SIGILL",
    "Floating point exception": "SIGFPE", "Floating-point exception": "SIGFPE",
}  # fmt: skip
_HEADER = re.compile(r"^Fatal Python error: (?P<what>[^\n]*)$", re.MULTILINE)
_THREAD = re.compile(r"^(?P<current>Current thread|Thread) 0x(?P<ident>[0-9a-f]+)[^\n]*$", re.MULTILINE)
_READ_LIMIT, _KEPT = 256 * 1024, 16_000
_ALTERNATE_STACK = 64 * 1024


# -- in the process that may die --------------------------------------------------------------------


@dataclass
class _Installed:
    file: BinaryIO
    path: Path
    pid: int
    lost: bool = False


_installed: _Installed | None = None


def asked_for_by_environment() -> bool:
    """Whether `faulthandler` was switched on from outside, so that it writes to standard error."""
    return bool(os.environ.get("PYTHONFAULTHANDLER")) or "faulthandler" in sys._xoptions or sys.flags.dev_mode


def is_the_applications_own() -> bool:
    """Whether the application has enabled `faulthandler` for itself: nobody can tell where it writes."""
    return faulthandler.is_enabled() and _installed is None and not asked_for_by_environment()


#: The stack went to our file and not to standard error, where somebody expects it.
echoed = asked_for_by_environment


def install(path: Path, wanted: bool | None) -> bool:
    """Send the stacks of this process's fatal signals to `path`. False where the application keeps its own.

    Raises OSError if the file cannot be made.
    """
    global _installed
    if wanted is False or (wanted is None and is_the_applications_own()):
        return False
    file = path.open("wb", buffering=0)
    faulthandler.enable(file=file, all_threads=True)
    if DUMP_SIGNAL is not None and signal.getsignal(DUMP_SIGNAL) == signal.SIG_DFL:
        faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True, chain=False)
    _installed = _Installed(file, path, os.getpid())
    if threading.getprofile() is None:
        threading.setprofile(_in_new_thread)
    return True


def uninstall() -> None:
    """At a clean end of the process: nothing fatal can be told any more."""
    global _installed
    if _installed is None or _installed.pid != os.getpid():
        return
    _stop_writing()
    with contextlib.suppress(OSError):
        _installed.path.unlink()
    _installed.file.close()
    _installed = None
    if threading.getprofile() is _in_new_thread:
        threading.setprofile(None)


def _stop_writing() -> None:
    faulthandler.disable()
    if DUMP_SIGNAL is not None:
        faulthandler.unregister(DUMP_SIGNAL)
    if asked_for_by_environment():
        with contextlib.suppress(Exception):  # no standard error: nobody to tell
            faulthandler.enable(file=sys.__stderr__ or 2)


def just_lost() -> bool:
    """True once, when the application has switched `faulthandler` off (or on for itself, as far as can be told)."""
    if _installed is None or _installed.lost or _installed.pid != os.getpid() or faulthandler.is_enabled():
        return False
    _installed.lost = True
    return True


def _after_fork_in_child() -> None:
    """A process that the application forks is not ours: its death must not be told as its parent's."""
    global _installed
    if _installed is not None and _installed.pid != os.getpid():
        _stop_writing()
        _installed = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# A handler needs stack to run on. faulthandler gives one to the thread that enables it; in any other thread a C stack
# that overflows kills without a word.


class _StackDescription(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


_SS_DISABLE = 2


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class _AlternateStack:
    """Of one thread; taken away again when the thread's locals go, in that thread."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_ALTERNATE_STACK)
        self._set(ctypes.addressof(self._memory), 0)

    def _set(self, address: int | None, flags: int) -> None:
        libc = _libc()
        if libc is not None:
            libc.sigaltstack(ctypes.byref(_StackDescription(address, flags, _ALTERNATE_STACK)), None)

    def __del__(self) -> None:
        self._set(None, _SS_DISABLE)


_covered = threading.local()


def cover_thread() -> None:
    """Let this thread tell of a stack overflow too. Cheap to call again."""
    if _installed is None or getattr(_covered, "stack", None) is not None:
        return
    if threading.current_thread() is not threading.main_thread():
        with contextlib.suppress(Exception):  # an unusual libc: that evidence is missing then, nothing else
            _covered.stack = _AlternateStack()


def _in_new_thread(frame: Any, event: str, argument: Any) -> None:
    """The first thing that a new thread of the application does (`threading.setprofile`)."""
    sys.setprofile(None)
    cover_thread()


# -- after its death --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FatalStack:
    """What a process wrote. `signal` is None for a dump on demand; `thread` is the one that the signal struck."""

    text: str
    frame: str | None
    signal: str | None
    thread: int | None


def read(path: Path | None) -> FatalStack | None:
    """The stack in a file, the thread that died first; None where there is none."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _READ_LIMIT))
            text = file.read(_READ_LIMIT).decode("utf-8", "replace")
    except OSError:
        return None
    return parse(text)


def parse(text: str) -> FatalStack | None:
    """Read what faulthandler wrote; the last fatal error if there are several."""
    headers = list(_HEADER.finditer(text))
    what = headers[-1]["what"] if headers else None
    if headers:
        text = text[headers[-1].start() :]
    threads = list(_THREAD.finditer(text))
    if not threads:
        return None
    ends = [each.start() for each in threads[1:]] + [len(text)]
    blocks = [
        (each["current"] == "Current thread", int(each["ident"], 16), text[each.start() : end].strip())
        for each, end in zip(threads, ends, strict=True)
    ]
    blocks = _of_the_last_dump(blocks)
    struck = next((each for each in blocks if each[0]), None)
    first = struck or blocks[-1]  # a thread that Python does not know: most likely the main thread waits for it
    head = [f"Fatal Python error: {what}"] if what else []
    whole = "\n\n".join([*head, first[2], *(each[2] for each in blocks if each is not first)])
    return FatalStack(
        whole[:_KEPT], application_frame(frames(first[2])),
        next((name for known, name in _NAMES.items() if what and what.startswith(known)), None),
        struck[1] if struck else None,
    )  # fmt: skip


def _of_the_last_dump(blocks: list[tuple[bool, int, str]]) -> list[tuple[bool, int, str]]:
    """A dump on demand has no header, but tells each thread once."""
    seen: set[int] = set()
    start = 0
    for at, (_, ident, _) in enumerate(blocks):
        if ident in seen:
            start, seen = at, set()
        seen.add(ident)
    return blocks[start:]
