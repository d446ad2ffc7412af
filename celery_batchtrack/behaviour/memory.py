"""Memory: how much a process took, and whether it was the kernel that killed it for it.

Sources: `getrusage(2)` and ``VmHWM`` of ``/proc/<pid>/status`` for the peak; ``/dev/kmsg``, where it may be read, names
the process that the kernel killed; else ``oom_kill`` of the cgroup's ``memory.events`` (v2) or ``memory.oom_control``
(v1) counts such kills.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path

_PROC = Path("/proc")
_KMSG = Path("/dev/kmsg")
_CGROUPS = Path("/sys/fs/cgroup")
#: The inode of the first pid namespace: there the kernel's pids are ours (``PROC_PID_INIT_INO``).
_FIRST_NAMESPACE = "pid:[4026531836]"
_UNIT = 1 if sys.platform == "darwin" else 1024
_KILLED = re.compile(r"[Kk]illed process (?P<pid>\d+)\b")
_RESIDENT = re.compile(r"\b(?:anon|file|shmem)-rss:(\d+)kB")
_COUNTER = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def own_peak() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def peak_of(pid: int) -> int | None:
    """Peak resident memory of a living process, in bytes; None where that cannot be read."""
    with contextlib.suppress(OSError):
        found = _HIGH_WATER.search((_PROC / str(pid) / "status").read_text(errors="replace"))
        return int(found[1]) * 1024 if found else None
    return None


@dataclass(frozen=True, slots=True)
class Kill:
    """By the kernel, for memory. `memory`: resident bytes at its death, where the kernel told."""

    why: str
    memory: int | None = None


@dataclass
class Peaks:
    """Of pool processes, sampled while they live, since a dead one cannot be asked."""

    _seen: dict[int, int] = field(default_factory=dict)
    _reaped: int = field(default_factory=lambda: _largest_reaped())

    def sample(self, pids: set[int]) -> None:
        for pid in pids:
            peak = peak_of(pid)
            if peak is not None:
                self._seen[pid] = peak
        for pid in set(self._seen) - pids:
            del self._seen[pid]

    def of_the_dead(self, pid: int, killed: Kill | None = None) -> int | None:
        """The most that is known of it, however often it is asked.

        What was killed for memory is also known by the kernel's log, or else taken for the largest process that was
        reaped since: of any other death that would be a guess.
        """
        known = [self._seen[pid]] if pid in self._seen else []
        if killed is not None:
            known.append(killed.memory or self._newly_largest())
        if any(known):
            self._seen[pid] = max(known)
        return self._seen.get(pid)

    def _newly_largest(self) -> int:
        largest, before = _largest_reaped(), self._reaped
        self._reaped = largest
        return largest if largest > before else 0


def _largest_reaped() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT


def _cgroup_files(pid: int | str) -> set[Path]:
    """Files with the counters of the cgroup that a process is in."""
    found: set[Path] = set()
    with contextlib.suppress(OSError, ValueError):
        for line in (_PROC / str(pid) / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            inside = path.lstrip("/")
            if number == "0":
                places = [_CGROUPS / inside / "memory.events", _CGROUPS / "unified" / inside / "memory.events"]
            elif "memory" in controllers.split(","):
                # In a container the path is the host's, and its own cgroup is mounted as the root.
                places = [each / "memory.oom_control" for each in (_CGROUPS / "memory" / inside, _CGROUPS / "memory")]
            else:
                continue
            found.update([each for each in places if each.is_file()][:1])
    return found


def _count(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        found = _COUNTER.search(path.read_text())
        return int(found[1]) if found else None
    return None


class KernelKills:
    """Tells an out-of-memory kill from a SIGKILL by somebody. Watches from when it is made."""

    def __init__(self) -> None:
        self._log = self._open_log()
        self._named: dict[int, int] = {}  # pid: resident bytes
        self._named_before: set[int] = set()
        self._counters: dict[Path, int] = {}
        self._at_last_look: dict[Path, int] = {}
        self._files_of: dict[int, set[Path]] = {}
        self.look()

    def _open_log(self) -> int | None:
        """The kernel's log, from now on. Only where its pids are ours."""
        with contextlib.suppress(OSError):
            if str((_PROC / "self/ns/pid").readlink()) != _FIRST_NAMESPACE:
                return None
            log = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.lseek(log, 0, os.SEEK_END)
                os.read(log, 0)  # refused here if anywhere
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EAGAIN):
                    os.close(log)
                    return None
            return log
        return None

    def look(self, pids: set[int] | None = None, *, forget: bool = False) -> None:
        """Learn the counters of the cgroups that this process and the given ones are in, while they live.

        With `forget`, kills that a counter already had at the last look were others' (a subprocess of the
        application): nobody has asked for them.
        """
        # As first seen: of a process that has died meanwhile, version 1 says that it is in the root.
        self._files_of = {pid: self._files_of.get(pid) or _cgroup_files(pid) for pid in pids or ()}
        for path in _cgroup_files("self").union(*self._files_of.values()):
            self._counters.setdefault(path, _count(path) or 0)
        if forget:
            if self._log is not None:
                self._read_log()
            for pid in self._named_before:  # nobody has asked since the last look: somebody else's process
                self._named.pop(pid, None)
            self._named_before = set(self._named)
            for path in self._counters:
                self._counters[path] = max(self._counters[path], self._at_last_look.get(path, 0))
            self._at_last_look = {path: _count(path) or 0 for path in self._counters}

    def was(self, pid: int) -> Kill | None:
        """Why it is certain, or all but certain, that the kernel killed this process for memory; None otherwise."""
        if self._log is not None:
            if self._read_log() and pid in self._named:
                self._take_one(pid)
                return Kill("the kernel's log says that it was killed for memory", self._named.pop(pid) or None)
            if self._log is not None:
                return None  # the log is whole and does not name it
        path = self._take_one(pid)
        return None if path is None else Kill(f"oom_kill of {path} went up")

    def _take_one(self, pid: int) -> Path | None:
        """One kill that the counters of its cgroup have and nobody was told of yet."""
        for path in sorted(self._files_of.get(pid) or self._counters):
            present = _count(path)
            if present is not None and present > self._counters[path]:
                self._counters[path] += 1
                self._take_above(path)
                return path
        return None

    def _take_above(self, path: Path) -> None:
        """``memory.events`` counts what is below it too."""
        for each, before in self._counters.items():
            if each.name == "memory.events" and each.parent in path.parent.parents:
                self._counters[each] = max(before, min(before + 1, _count(each) or 0))

    def _read_log(self) -> bool:
        """Take in what the kernel has said since. False once lines were lost: then the counters tell."""
        assert self._log is not None
        while True:
            try:
                line = os.read(self._log, 8192).decode(errors="replace")
            except BlockingIOError:
                return True
            except OSError:  # overwritten before it was read, or taken away
                os.close(self._log)
                self._log = None
                return False
            killed = _KILLED.search(line)
            if killed is not None:
                self._named[int(killed["pid"])] = sum(int(size) * 1024 for size in _RESIDENT.findall(line))

    def close(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None
