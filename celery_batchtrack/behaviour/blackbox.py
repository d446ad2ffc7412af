"""The black box: one small memory-mapped file per slot that says which run is in it, and which item it has in hand.

The kernel keeps the page when its process dies, so the worker's main process, and the next worker on
the host, can read what a dead process had in hand. Writing is a memory store: no I/O, no SQL.

A page is 4096 bytes in three sections, each behind a sequence number that is odd while a write is under way, so that
a torn write is recognised: the run (phase, batch, position, token, stall time-out, thread, memory), the item in hand
(index, how many were done, flags, identifier) and the last note; and a count of other progress. A slot is
``pid:start:thread:depth``.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from celery_batchtrack.vocabulary.ids import ChildKey

from . import hosts, memory

SIZE = 4096
_MAGIC = b"BTK2"
_SEQUENCE = struct.Struct("<Q")
_RUN = struct.Struct("<B7x16sq16sdQQ")
_ITEM = struct.Struct("<qqBxH")
_NOTE = struct.Struct("<H")
_SEQUENCE_AT, _RUN_AT = 8, 16
_ITEM_SEQUENCE_AT, _ITEM_AT = 128, 136
_IDENTIFIER_AT, IDENTIFIER_SIZE = _ITEM_AT + _ITEM.size, 1024
_NOTE_SEQUENCE_AT, _NOTE_AT = 1536, 1544
_TEXT_AT, NOTE_SIZE = _NOTE_AT + _NOTE.size, 512
_TOUCHES_AT = 2064
_RUN_SECTION = slice(_SEQUENCE_AT, _RUN_AT + _RUN.size)
_ITEM_SECTION = slice(_ITEM_SEQUENCE_AT, _IDENTIFIER_AT + IDENTIFIER_SIZE)
_NOTE_SECTION = slice(_NOTE_SEQUENCE_AT, _TEXT_AT + NOTE_SIZE)

#: Flags of an item: its index is one of the child's declared items; what was done before it is durable; the loop was
#: left with it in hand, by `break` or by an exception that was on its way up.
DECLARED, PROMISED, LEFT = 1, 2, 4
_NO_ITEM = -1


class Phase(IntEnum):
    """What the slot is doing with its run."""

    IDLE = 0
    CLAIMING = 1
    RUNNING = 2
    SETTLING = 3
    GAVE_UP = 4  # the claim was not answered in time; it may have committed all the same


@dataclass(frozen=True, slots=True)
class InHand:
    """What the run said of its items. `index` is None before the first item and after the last."""

    index: int | None
    done: int
    identifier: str | None
    declared: bool
    promised: bool
    left: bool = False


@dataclass(frozen=True, slots=True)
class PageState:
    """What a page says. `key` and `token` are None when idle; `item` and `note` where they are torn."""

    phase: Phase
    key: ChildKey | None
    token: uuid.UUID | None
    stall_timeout: float = 0.0  # seconds; 0: none
    thread: int = 0  # as Python names it (`threading.get_ident`)
    peak_memory: int = 0  # bytes, of the process at the claim
    item: InHand | None = None
    note: str | None = None
    #: Moves with every item and every note.
    progress: int = 0


_IDLE = PageState(Phase.IDLE, None, None)


class Page:
    """The writer's side of one slot's page. Without a file (no writable folder) it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._file: int | None = None
        self._sequence = self._item_sequence = self._note_sequence = self._touches = 0
        #: Counts the runs in this slot: what a former run left behind must not write into the next one's.
        self.generation = 0
        #: Tokens of claims that got no answer: they may have committed, but nothing ran.
        self.given_up: set[uuid.UUID] = set()
        self._left = False
        #: Why there is no file although there is a folder, until somebody was told.
        self.trouble: str | None = None
        if path is not None:
            self._open(path)
            _pages_of_this_process.add(self)

    def _open(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Held until this process ends: whoever gets this lock knows that it did, across pid namespaces.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)  # somebody else's, so it stays
            raise
        try:
            # Not a hole: a store into one that a full disk cannot fill would be SIGBUS.
            os.posix_fallocate(descriptor, 0, SIZE)
            self._map = mmap.mmap(descriptor, SIZE)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        self._file = descriptor
        self._map[:] = _MAGIC + bytes(SIZE - len(_MAGIC))  # whatever a former process of this name left

    @property
    def works(self) -> bool:
        return self._map is not None

    def enter(
        self, key: ChildKey, token: uuid.UUID, phase: Phase = Phase.CLAIMING, stall_timeout: float = 0.0
    ) -> None:
        """Name the run in this slot. Comes before the claim, so that no claimed run is without a page."""
        self.generation += 1
        self._left = False
        page = self._map
        if page is None:
            return
        run = _RUN.pack(
            phase, key.batch_id.bytes, key.position, token.bytes, stall_timeout, threading.get_ident(),
            memory.own_peak(),
        )  # fmt: skip
        self._sequence += 2
        _SEQUENCE.pack_into(page, _SEQUENCE_AT, self._sequence - 1)
        self.no_item(0, 0)  # the former run's are not this one's
        self.note("")
        page[_RUN_AT : _RUN_AT + len(run)] = run
        _SEQUENCE.pack_into(page, _SEQUENCE_AT, self._sequence)

    def phase(self, phase: Phase) -> None:
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

    # -- items and notes -------------------------------------------------------------------------

    def item_writer(self, flags: int) -> Callable[[int, bytes], None] | None:
        """What notes the item in hand: (index, identifier in UTF-8). None for a page without a file.

        The hottest code of the package: a few stores, nothing allocated that stays.
        """
        page = self._map
        if page is None:
            return None
        sequence, item = _SEQUENCE.pack_into, _ITEM.pack_into

        def write(index: int, identifier: bytes) -> None:
            self._item_sequence = number = self._item_sequence + 2
            length = len(identifier)
            # One byte, so one store. `pack_into` wipes before it writes, so it may not begin what it marks as torn.
            page[_ITEM_SEQUENCE_AT] = 1
            item(page, _ITEM_AT, index, index, flags, length)
            page[_IDENTIFIER_AT : _IDENTIFIER_AT + length] = identifier
            sequence(page, _ITEM_SEQUENCE_AT, number)

        return write

    def no_item(self, done: int, flags: int) -> None:
        """The loop over the items is over."""
        if self._map is None:
            return
        self._item_sequence += 2
        _SEQUENCE.pack_into(self._map, _ITEM_SEQUENCE_AT, self._item_sequence - 1)
        _ITEM.pack_into(self._map, _ITEM_AT, _NO_ITEM, done, flags, 0)
        _SEQUENCE.pack_into(self._map, _ITEM_SEQUENCE_AT, self._item_sequence)

    def item_left(self) -> None:
        """The loop was left with an item in hand: whether that still matters, what follows will tell."""
        self._flag_item(LEFT, True)

    def _flag_item(self, flag: int, on: bool) -> None:
        if self._map is None or not _whole(self._map, _ITEM_SEQUENCE_AT):
            return
        index, done, flags, length = _ITEM.unpack_from(self._map, _ITEM_AT)
        self._item_sequence += 2
        _SEQUENCE.pack_into(self._map, _ITEM_SEQUENCE_AT, self._item_sequence - 1)
        _ITEM.pack_into(self._map, _ITEM_AT, index, done, flags | flag if on else flags & ~flag, length)
        _SEQUENCE.pack_into(self._map, _ITEM_SEQUENCE_AT, self._item_sequence)

    def touch(self) -> None:
        """Progress without a new item or note."""
        if self._map is not None:
            self._touches += 1
            _SEQUENCE.pack_into(self._map, _TOUCHES_AT, self._touches)

    def note(self, text: str) -> None:
        """Keep a short note, its first 512 bytes."""
        page = self._map
        if page is None:
            return
        data = (text if len(text) <= NOTE_SIZE else text[:NOTE_SIZE]).encode("utf-8", "replace")[:NOTE_SIZE]
        self._note_sequence += 2
        _SEQUENCE.pack_into(page, _NOTE_SEQUENCE_AT, self._note_sequence - 1)
        _NOTE.pack_into(page, _NOTE_AT, len(data))
        page[_TEXT_AT : _TEXT_AT + len(data)] = data
        _SEQUENCE.pack_into(page, _NOTE_SEQUENCE_AT, self._note_sequence)

    def leave(self) -> None:
        """This process is being ended with the run in hand, which is how its loop was left: what the page says
        stays, for who judges."""
        self._flag_item(LEFT, False)
        self._left = True

    # -- this process's own view, and its end ------------------------------------------------------

    def state(self) -> PageState | None:
        """What it says now. A process must not `read` its own pages: closing the file would drop their locks."""
        page = self._map
        return None if page is None else _state(page[:])

    def close(self) -> None:
        """At a clean end of the process its page goes; one that was left stays. A thread that is still in a loop over
        its items keeps the memory, and writes in vain."""
        if self._map is not None and self._file is not None and self.path is not None:
            if not self._left:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._map = self._file = None

    def disown(self) -> None:
        """In a process that was forked from the page's own, perhaps in the middle of a loop over items."""
        self.generation += 1
        self._map = None


_pages_of_this_process: weakref.WeakSet[Page] = weakref.WeakSet()


def _disown_all() -> None:
    for page in list(_pages_of_this_process):
        page.disown()
    _pages_of_this_process.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


# -- reading --------------------------------------------------------------------------------------


def read(path: Path) -> PageState | None:
    """What a page says, or None if there is none, or its run is torn (its writer died in mid-write)."""
    found = None
    with contextlib.suppress(OSError):
        for _ in range(3):
            data, again = path.read_bytes(), path.read_bytes()  # a copy is no snapshot: two must agree
            if len(data) < SIZE or data[: len(_MAGIC)] != _MAGIC:
                return None
            if len(again) < SIZE or data[_RUN_SECTION] != again[_RUN_SECTION]:
                continue
            found = _state(data, again)
            if data == again:
                break
    return found


def _number(data: bytes | mmap.mmap, at: int) -> int:
    return int(_SEQUENCE.unpack_from(data, at)[0])


def _whole(data: bytes | mmap.mmap, at: int) -> bool:
    return _number(data, at) % 2 == 0


def _state(data: bytes, again: bytes | None = None) -> PageState | None:
    """`again`: a second copy. Item and note are told only where both have the same of them."""
    if not _whole(data, _SEQUENCE_AT):
        return None
    again = data if again is None else again
    phase, batch_id, position, token, stall_timeout, thread, peak = _RUN.unpack_from(data, _RUN_AT)
    if phase == Phase.IDLE or phase not in Phase._value2member_map_:
        return _IDLE
    item = _item(data) if data[_ITEM_SECTION] == again[_ITEM_SECTION] else None
    note = _note(data) if data[_NOTE_SECTION] == again[_NOTE_SECTION] else None
    progress = sum(_number(again, at) for at in (_ITEM_SEQUENCE_AT, _NOTE_SEQUENCE_AT, _TOUCHES_AT))
    return PageState(
        Phase(phase), ChildKey(uuid.UUID(bytes=batch_id), position), uuid.UUID(bytes=token), stall_timeout, thread,
        peak, item, note, progress,
    )  # fmt: skip


def _item(data: bytes) -> InHand | None:
    if not _whole(data, _ITEM_SEQUENCE_AT):
        return None
    index, done, flags, length = _ITEM.unpack_from(data, _ITEM_AT)
    identifier = data[_IDENTIFIER_AT : _IDENTIFIER_AT + min(length, IDENTIFIER_SIZE)].decode("utf-8", "replace")
    declared, promised, left = (bool(flags & flag) for flag in (DECLARED, PROMISED, LEFT))
    return InHand(None if index == _NO_ITEM else index, done, identifier or None, declared, promised, left)


def _note(data: bytes) -> str | None:
    if not _whole(data, _NOTE_SEQUENCE_AT):
        return None
    (length,) = _NOTE.unpack_from(data, _NOTE_AT)
    return data[_TEXT_AT : _TEXT_AT + min(length, NOTE_SIZE)].decode("utf-8", "ignore") or None


# -- slots ----------------------------------------------------------------------------------------


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
