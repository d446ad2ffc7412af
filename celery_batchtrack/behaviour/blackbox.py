"""The black box: one small memory-mapped file per slot that says which run is in it.

The kernel keeps the page when its process dies, so the worker's main process, and the next worker on
the host, can read what a dead process had in hand. Writing is a memory store: no I/O, no SQL.

A page is 4096 bytes: magic, a sequence number (odd while a write is under way, so that a torn write is
recognised), phase, batch id, position, run token. A slot is ``pid:start:thread:depth``.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import struct
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from celery_batchtrack.vocabulary.ids import ChildKey

from . import hosts

SIZE = 4096
_MAGIC = b"BTK1"
_SEQUENCE = struct.Struct("<Q")
_RUN = struct.Struct("<B7x16sq16s")
_SEQUENCE_AT, _RUN_AT = 8, 16


class Phase(IntEnum):
    """What the slot is doing with its run."""

    IDLE = 0
    CLAIMING = 1
    RUNNING = 2
    SETTLING = 3
    GAVE_UP = 4  # the claim was not answered in time; it may have committed all the same


@dataclass(frozen=True, slots=True)
class PageState:
    """What a page says. `key` and `token` are None when idle."""

    phase: Phase
    key: ChildKey | None
    token: uuid.UUID | None


_IDLE = PageState(Phase.IDLE, None, None)


class Page:
    """The writer's side of one slot's page. Without a file (no writable folder) it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._file: int | None = None
        self._sequence = 0
        #: Tokens of claims that got no answer: they may have committed, but nothing ran.
        self.given_up: set[uuid.UUID] = set()
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # Held until this process ends: whoever gets this lock knows that it did, across pid namespaces.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, SIZE)
        self._file, self._map = descriptor, mmap.mmap(descriptor, SIZE)
        self._map[: len(_MAGIC)] = _MAGIC

    def enter(self, key: ChildKey, token: uuid.UUID, phase: Phase = Phase.CLAIMING) -> None:
        """Name the run in this slot. Comes before the claim, so that no claimed run is without a page."""
        self._write(_RUN.pack(phase, key.batch_id.bytes, key.position, token.bytes))

    def phase(self, phase: Phase) -> None:
        if self._map is not None:
            self._write(bytes((phase,)))

    def give_up(self, token: uuid.UUID) -> None:
        """The claim was not answered in time."""
        self.phase(Phase.GAVE_UP)
        self.given_up.add(token)

    def clear(self) -> None:
        """The run is over and written."""
        self._write(bytes(_RUN.size))

    def _write(self, run: bytes) -> None:
        if self._map is None:
            return
        self._sequence += 2
        _SEQUENCE.pack_into(self._map, _SEQUENCE_AT, self._sequence - 1)
        self._map[_RUN_AT : _RUN_AT + len(run)] = run
        _SEQUENCE.pack_into(self._map, _SEQUENCE_AT, self._sequence)

    def close(self, *, unlink: bool = True) -> None:
        if self._map is not None and self._file is not None and self.path is not None:
            if unlink:
                self.path.unlink(missing_ok=True)
            self._map.close()
            os.close(self._file)
            self._map = self._file = None


def read(path: Path) -> PageState | None:
    """What a page says, or None if there is none, or it is torn (its writer died in mid-write)."""
    with contextlib.suppress(OSError):
        for _ in range(3):
            data, again = path.read_bytes(), path.read_bytes()  # a copy is no snapshot: two must agree
            if len(data) < _RUN_AT + _RUN.size or data[: len(_MAGIC)] != _MAGIC:
                return None
            if data == again and _SEQUENCE.unpack_from(data, _SEQUENCE_AT)[0] % 2 == 0:
                return _state(data)
    return None


def _state(data: bytes) -> PageState:
    phase, batch_id, position, token = _RUN.unpack_from(data, _RUN_AT)
    if phase == Phase.IDLE or phase not in Phase._value2member_map_:
        return _IDLE
    return PageState(Phase(phase), ChildKey(uuid.UUID(bytes=batch_id), position), uuid.UUID(bytes=token))


def slot_name(depth: int = 0) -> str:
    """The slot of the calling thread: ``pid:start:thread:depth``."""
    pid = os.getpid()
    return f"{pid}:{_own_start(pid)}:{threading.get_native_id()}:{depth}"


_start_of: tuple[int, int] | None = None


def _own_start(pid: int) -> int:
    global _start_of
    if _start_of is None or _start_of[0] != pid:
        _start_of = (pid, hosts.started(pid) or 0)
    return _start_of[1]


def slot_process(slot: str) -> tuple[int, int | None]:
    """(pid, start time) of a slot's process."""
    pid, start, *_ = slot.split(":")
    return int(pid), int(start) or None


def choose_folder(wanted: str | None) -> Path | None:
    """The first writable of: the setting, /dev/shm, XDG_RUNTIME_DIR, the temp folder. None if none is."""
    own = f"batchtrack-{os.getuid()}"
    places = [Path(wanted)] if wanted else [
        Path("/dev/shm") / own,
        *([Path(os.environ["XDG_RUNTIME_DIR"]) / own] if os.environ.get("XDG_RUNTIME_DIR") else []),
        Path(tempfile.gettempdir()) / own,
    ]  # fmt: skip
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place):
                return place
    return None


#: Workers whose main process is this very process: asking for their locks would drop them.
_own_workers: set[uuid.UUID] = set()


def _is_own(worker_id: uuid.UUID) -> bool:
    return worker_id in _own_workers


class Boxes:
    """The folder of one worker boot: its pages, its spool, and the lock that says its main process lives."""

    def __init__(self, base: Path | None, worker_id: uuid.UUID) -> None:
        self.base = base
        self.worker_id = worker_id
        self.folder = None if base is None else base / str(worker_id)
        self._alive: int | None = None
        self._pages: dict[str, Page] = {}
        self._owner = os.getpid()

    def create(self) -> None:
        """Make the folder and hold its lock; called once, by the main process."""
        if self.folder is None:
            return
        try:
            (self.folder / "spool").mkdir(mode=0o700, parents=True, exist_ok=True)
            self._alive = os.open(self.folder / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _own_workers.add(self.worker_id)
        except OSError:
            self.folder = None  # full or taken away meanwhile: tracking goes on without boxes

    def page(self, slot: str) -> Page:
        """This process's page for a slot, opened at its first use and kept."""
        if self._owner != os.getpid():  # forked: the parent's pages are not ours
            self._pages, self._owner = {}, os.getpid()
        page = self._pages.get(slot)
        if page is None:
            page = self._pages[slot] = self._opened(slot)
        return page

    def _opened(self, slot: str) -> Page:
        path = self.path(slot)
        if path is not None:
            with contextlib.suppress(OSError):
                return Page(path)
        return Page(None)

    def path(self, slot: str) -> Path | None:
        return None if self.folder is None else self.folder / (slot.replace(":", "-") + ".box")

    def pages(self) -> Iterator[tuple[str, Path]]:
        """(slot, path) of every page in the folder, whichever process wrote it."""
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.glob("*.box")):
                yield path.stem.replace("-", ":"), path

    def drop(self, slot: str) -> None:
        """Remove a dead process's page."""
        path = self.path(slot)
        if path is not None:
            path.unlink(missing_ok=True)

    def close_own_pages(self) -> None:
        """At a clean end of this process."""
        if self._owner == os.getpid():
            for page in self._pages.values():
                page.close()
            self._pages.clear()

    def remove(self) -> None:
        """At a clean end of the worker; keeps the folder if outcomes are still spooled in it."""
        if self.folder is None:
            return
        if not any((self.folder / "spool").glob("*.json")):
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._alive is not None:
            os.close(self._alive)
            self._alive = None


def with_spool(base: Path | None) -> set[uuid.UUID]:
    """Worker boots below `base` whose folder holds undelivered outcomes."""
    found: set[uuid.UUID] = set()
    for path in () if base is None else base.glob("*/spool/*.json"):
        with contextlib.suppress(ValueError):
            found.add(uuid.UUID(path.parent.parent.name))
    return found


def of_dead_workers(base: Path) -> list[Boxes]:
    """Folders whose main process is gone, by its lock. Another database's workers may be among them."""
    found = []
    for folder in base.iterdir() if base.is_dir() else ():
        with contextlib.suppress(ValueError):
            boxes = Boxes(base, uuid.UUID(folder.name))
            if (folder / "alive").exists() and not _is_own(boxes.worker_id) and held(folder / "alive") is False:
                found.append(boxes)
    return found


def held(path: Path) -> bool | None:
    """Whether a living process holds the lock on this file. None: no file, or it cannot be told.

    Never ask about a file of this very process: closing it would drop the process's own lock.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    else:
        return False
    finally:
        os.close(descriptor)
