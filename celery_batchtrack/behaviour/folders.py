"""Folders of black boxes: one per boot of a worker, with pages, stacks, spool, and the lock that says it lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from .blackbox import Page


def choose_folder(wanted: str | None) -> Path | None:
    """The first writable of: the setting, or else our own in /dev/shm, XDG_RUNTIME_DIR, the temp folder. None if none
    is."""
    own = f"batchtrack-{os.getuid()}"
    places = [Path(wanted)] if wanted else [
        Path("/dev/shm") / own,
        *([Path(os.environ["XDG_RUNTIME_DIR"]) / own] if os.environ.get("XDG_RUNTIME_DIR") else []),
        Path(tempfile.gettempdir()) / own,
    ]  # fmt: skip
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not wanted and place.lstat().st_uid != os.getuid():
                continue  # whoever made it could forge outcomes there
            with tempfile.NamedTemporaryFile(dir=place):
                return place
    return None


_PROCESS, _SLOT = re.compile(r"(\d+)-(\d+)"), re.compile(r"\d+-\d+-\d+-\d+")

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
        #: Why there is no folder although there was to be one.
        self.trouble: str | None = None
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
        except OSError as error:
            self.folder = None  # full or taken away meanwhile: tracking goes on without boxes
            self.trouble = f"{type(error).__name__}: {error}"

    def page(self, slot: str) -> Page:
        """This process's page for a slot, opened at its first use and kept."""
        if self._owner != os.getpid():  # forked: the parent's pages are not ours
            self._pages, self._owner = {}, os.getpid()
        page = self._pages.get(slot)
        if page is None:
            page = self._pages[slot] = self._opened(slot)
        return page

    def _opened(self, slot: str) -> Page:
        try:
            return Page(self.path(slot))
        except OSError as error:  # a full disk, a folder that was taken away
            page = Page(None)
            page.trouble = f"{type(error).__name__}: {error}"
            return page

    def path(self, slot: str) -> Path | None:
        return None if self.folder is None else self.folder / (slot.replace(":", "-") + ".box")

    def stack_path(self, pid: int, started: int | None) -> Path | None:
        """Where a process of this worker writes the Python stack of a fatal signal."""
        return None if self.folder is None else self.folder / f"{pid}-{started or 0}.stack"

    def stacks(self) -> Iterator[tuple[int, int | None, Path]]:
        """(pid, start time, path) of every stack file in the folder."""
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.glob("*.stack")):
                name = _PROCESS.fullmatch(path.stem)
                if name is not None:
                    yield int(name[1]), int(name[2]) or None, path

    def pages(self) -> Iterator[tuple[str, Path]]:
        """(slot, path) of every page in the folder, whichever process wrote it."""
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.glob("*.box")):
                if _SLOT.fullmatch(path.stem):
                    yield path.stem.replace("-", ":"), path

    def drop(self, slot: str) -> None:
        """Remove a dead process's page."""
        path = self.path(slot)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()

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
        with contextlib.suppress(ValueError, OSError):  # no worker's, or another user's
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
