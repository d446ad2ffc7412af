"""Runs that make no progress: seen in their black boxes by the main process, so that native code that holds the GIL
is seen too. Only for tasks that set a `stall_timeout`."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.states import Cause

from . import blackbox, fatal, hosts
from .blackbox import PageState, Phase, slot_process
from .detector import Death
from .folders import Boxes
from .identity import WorkerIdentity
from .tracker import Tracker

#: How long a process may take to write its stack, and to end.
_STACK_PATIENCE, _END_PATIENCE = 0.5, 5.0


@dataclass(slots=True)
class _Seen:
    token: uuid.UUID
    progress: int
    since: float
    told: bool = False


@dataclass
class StallWatch:
    """Reads the pages of one worker's slots. `look` is to be called at least every `interval` seconds."""

    tracker: Tracker
    worker: WorkerIdentity
    boxes: Boxes
    interval: float = 1.0
    clock: Callable[[], float] = time.monotonic
    kill: Callable[[int, int], None] = os.kill
    pause: Callable[[float], None] = time.sleep
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def look(self, *, anew: bool = False) -> list[Death]:
        """End the processes of runs that stand still. Their deaths are to be judged by the caller. `anew` restarts all
        clocks: this process stood still too."""
        moment = self.clock()
        pages = dict(self._running())
        self._seen = {slot: each for slot, each in self._seen.items() if slot in pages}
        deaths = []
        for slot, page in pages.items():
            stalled = self._stands_still(slot, page, moment, anew=anew)
            if stalled is not None:
                deaths += self._end(slot, page, stalled)
        return deaths

    def _running(self) -> list[tuple[str, PageState]]:
        found = [(slot, blackbox.read(path)) for slot, path in self.boxes.pages()]
        return [
            (slot, page) for slot, page in found
            if page is not None and page.phase is Phase.RUNNING and page.stall_timeout > 0
        ]  # fmt: skip

    def _stands_still(self, slot: str, page: PageState, moment: float, *, anew: bool) -> _Seen | None:
        assert page.token is not None
        seen = self._seen.get(slot)
        if anew or seen is None or (seen.token, seen.progress) != (page.token, page.progress):
            self._seen[slot] = _Seen(page.token, page.progress, moment)
            return None
        return seen if moment - seen.since >= page.stall_timeout else None

    def _end(self, slot: str, page: PageState, seen: _Seen) -> list[Death]:
        pid, started = slot_process(slot)
        of_pool = pid != self.worker.pid
        if seen.told or page.key is None or (of_pool and hosts.gone(pid, started) is not False):
            return []
        seen.told = True
        if not of_pool:  # a thread cannot be ended, and the others of its worker have done nothing
            self.tracker.emit(events.Stalled(page.key, pid, page.stall_timeout, killed=False))
            return []
        self._dump(pid, started)
        if not self._is_still(slot, page):  # it went on meanwhile, perhaps to the next child
            del self._seen[slot]
            return []
        self.tracker.emit(events.Stalled(page.key, pid, page.stall_timeout, killed=True))
        with contextlib.suppress(ProcessLookupError):
            self.kill(pid, signal.SIGKILL)
        self._wait(lambda: hosts.gone(pid, started) is True, _END_PATIENCE)
        message = f"no progress for {page.stall_timeout:g} s: its process was killed"
        return [Death(pid, started, Cause.STALLED, message=message)]

    def _is_still(self, slot: str, page: PageState) -> bool:
        path = self.boxes.path(slot)
        present = None if path is None else blackbox.read(path)
        return present is not None and (present.token, present.progress, present.phase) == (
            page.token, page.progress, Phase.RUNNING,
        )  # fmt: skip

    def _dump(self, pid: int, started: int | None) -> None:
        """Let it write where it stands, if it listens: without that, the signal would end it."""
        path = self.boxes.stack_path(pid, started)
        if fatal.DUMP_SIGNAL is None or path is None or not path.exists() or not hosts.catches(pid, fatal.DUMP_SIGNAL):
            return
        with contextlib.suppress(OSError):  # it ended meanwhile, its file with it
            before = path.stat().st_size
            sizes = [before]

            def is_whole() -> bool:
                sizes.append(path.stat().st_size)
                return sizes[-1] == sizes[-2] > before

            self.kill(pid, fatal.DUMP_SIGNAL)
            self._wait(is_whole, _STACK_PATIENCE)

    def _wait(self, until: Callable[[], bool], patience: float) -> None:
        for _ in range(int(patience / 0.02)):
            if until():
                return
            self.pause(0.02)
