"""What every test may use: polling with a deadline, free ports, child processes that never outlive pytest."""

from __future__ import annotations

import atexit
import os
import pwd
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent


class NeverHappened(AssertionError):
    """`eventually` reached its deadline."""


def eventually(
    predicate: Callable[[], T | None],
    timeout: float = 10.0,
    every: float = 0.02,
    what: str = "the expected condition",
) -> T:
    """Call `predicate` every `every` seconds until it is truthy, and return what it gave.

    The one place in the tests that sleeps. The predicate may raise to fail at once.
    Raises NeverHappened, naming `what`, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() >= deadline:
            raise NeverHappened(f"{what}: not within {timeout:g} s (last seen: {value!r})")
        time.sleep(every)
    return value


def quick_folder(room: int = 2 << 30) -> Path | None:
    """A folder in memory, if it has that much room and may hold programs: to make a database's files takes a tenth of
    the time that it takes on a disk. None: temporary files stay where they are."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK | os.X_OK):
        return None
    found = os.statvfs(memory)
    enough = found.f_bavail * found.f_frsize >= room
    return memory if enough and not found.f_flag & os.ST_NOEXEC else None


def unique(prefix: str = "batchtrack") -> str:
    """A name that no other test, run or machine uses: lower case, valid as a database or queue name."""
    return f"{prefix}_{uuid.uuid4().hex[:12]}"


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on.

    Below the range that Linux takes for outgoing connections: a client that reconnects in a loop to a killed
    server could otherwise be given the server's own port, connect to itself, and block the restart.
    """
    for port in random.sample(range(15_000, 32_000), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("100 random ports between 15000 and 32000 were all taken")


class Guardian:
    """Kills process groups and removes folders as soon as this interpreter is gone, even by SIGKILL.

    A side process that waits for the end of a pipe. PR_SET_PDEATHSIG would be shorter, but it fires when the
    *thread* that started the child ends (fault tests restart servers from threads), and it reaches the
    child alone, not its group.
    """

    _SCRIPT = """
import os, shutil, signal, sys
watched = set()
for line in sys.stdin:
    (watched.add if line[0] == "+" else watched.discard)(line[1:].rstrip("\\n"))
for kind, _, value in sorted((entry.partition(" ") for entry in watched), reverse=True):
    if kind == "group":
        try:
            os.killpg(int(value), signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        shutil.rmtree(value, ignore_errors=True)
"""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def watch(self, kind: str, value: int | Path) -> None:
        """Take over a "group" (process group id) or a "folder"."""
        self._tell(f"+{kind} {value}\n")

    def forget(self, kind: str, value: int | Path) -> None:
        self._tell(f"-{kind} {value}\n")

    def _tell(self, line: str) -> None:
        with self._lock:
            pipe = self._started().stdin
            assert pipe is not None
            pipe.write(line.encode())

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-I", "-S", "-c", self._SCRIPT]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C and a kill of pytest's process group must not reach it
            )
            atexit.register(self._process.communicate)
        return self._process


guardian = Guardian()


def running(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. A zombie does not: nobody may be there to reap it in a bare container."""
    return [one for one in processes if one.is_running() and _status(one) != psutil.STATUS_ZOMBIE]


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


def group_members(group: int) -> list[psutil.Process]:
    """The processes of a process group that still run."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == group
        except ProcessLookupError:
            return False

    return running([process for process in psutil.process_iter() if belongs(process)])


class GuardedProcess:
    """A child process with a process group of its own, whose output goes to a file (appended at a restart).

    `user` runs it as another system user, with that user's primary group only.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self.cwd = cwd
        self.env = env
        self.user = user
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the main process; kept after its death, until `end_group`."""
        if self._process is None:
            raise RuntimeError(f"not started: {self.command[0]}")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number if a signal killed it."""
        return self._process.poll() if self._process else None

    def spawn(self) -> None:
        if self.alive:
            raise RuntimeError(f"already running: {self.command[0]}")
        self.end_group()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env=self.env,
                start_new_session=True,
                **as_user(self.user),
            )
        guardian.watch("group", self._process.pid)

    def send_signal(self, number: int) -> None:
        """To the main process alone. Silent if it has ended already."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, timeout: float = 15.0) -> int:
        """Seconds to wait for the main process's end; returns its exit code."""
        assert self._process is not None
        eventually(lambda: not self.alive, timeout, what=f"end of process {self.pid} ({self.command[0]})")
        return self._process.returncode

    def end_group(self) -> None:
        """SIGKILL to whatever is left of the group, grandchildren included. Safe to call twice."""
        if self._process is None:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        eventually(lambda: not group_members(self.pid), what=f"end of process group {self.pid}")
        guardian.forget("group", self.pid)
        self._process = None

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def as_user(name: str | None) -> dict[str, Any]:
    """Popen's arguments to run as another user; none for the present one."""
    if name is None:
        return {}
    account = pwd.getpwnam(name)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
