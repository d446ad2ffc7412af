"""Processes of this host: who they are, and whether they are still there.

Whatever cannot be read is unknown, and unknown never convicts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from celery_batchtrack.vocabulary.records import HostIdentity

_PROC = Path("/proc")


def identity() -> HostIdentity:
    """The kernel boot and pid namespace of this process; None where the system does not tell."""
    boot_id = namespace = None
    with contextlib.suppress(OSError):
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return HostIdentity(socket.gethostname(), boot_id, namespace)


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time (clock ticks since boot) of a process; None if it is not there."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name may hold anything, blanks and brackets too
    return fields[0], int(fields[19])


def started(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; with its pid, its identity on this boot."""
    found = _stat(pid)
    return None if found is None else found[1]


def gone(pid: int, pid_started: int | None) -> bool | None:
    """Whether the process is no more (a zombie is no more). None: cannot be told."""
    found = _stat(pid)
    if found is not None:
        state, start = found
        if state in "ZX":
            return True
        return None if pid_started is None else start != pid_started
    try:
        os.kill(pid, 0)
    except OSError as error:
        return True if error.errno == errno.ESRCH else None
    return None


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as far as ``/proc/<pid>/status`` tells."""
    with contextlib.suppress(OSError, ValueError):
        for line in (_PROC / str(pid) / "status").read_text(errors="replace").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
