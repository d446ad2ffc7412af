"""The embedded broker's storage: a folder in which a message is one file.

A message is one file, and every change of its place is one ``rename``, so it is always in exactly one::

    queues/<queue>/<time>-<process>.msg             ready
    unacked/<owner>/<queue>/<time>-<process>.msg    received by a process that has not acknowledged it
    broken/<queue>@<name>                           not readable as a message; kept for a look
    exchanges/<exchange>.exchange                   bindings, a JSON list of [routing key, pattern, queue]

Delivery is at least once. An owner is one process, and holds a POSIX lock on ``unacked/<owner>/lock`` while
it lives. The kernel drops that lock with the process, however it dies, and pool children do not inherit it;
so whoever gets the lock knows that the owner is dead, and returns its messages to their queues. A message
that was delivered before has ``.r<count>`` in its name and ``redelivered`` in its delivery info.

Queues are first in, first out by the wall clock of the publishing processes; a returned message goes back
to its old place. Priorities are ignored.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import IO
from urllib.parse import quote

from celery.exceptions import ImproperlyConfigured
from kombu.transport import virtual
from kombu.utils.encoding import str_to_bytes
from kombu.utils.json import dumps, loads

logger = logging.getLogger("celery_batchtrack.broker")

#: Seconds between two checks for consumers that died.
SWEEP_INTERVAL = 1.0
#: Seconds after which a listing is taken anew even if the folder seems unchanged.
RELIST_INTERVAL = 1.0
#: A listing may cost at most 1/50 of the time until the next one, however long the queue is.
RELIST_COST_FACTOR = 50
#: Some file systems keep whole seconds only: an mtime younger than this may hide a later change.
SETTLE_NS = 2_100_000_000
#: Seconds after which the half-made files of a process that died count as litter.
LITTER_AGE = 3600.0

Binding = tuple[str, str, str]


class BrokerFolderError(ImproperlyConfigured):  # type: ignore[misc]
    """The broker's folder cannot be used; raised at once instead of being retried like a lost server."""


def _unusable(path: Path, error: OSError) -> BrokerFolderError:
    return BrokerFolderError(
        f"The embedded broker cannot use its folder {path}: {error.strerror or error}. Make it a folder that "
        f"this user may write to, or choose another one, by broker_url = "
        f"'batchtrack+filesystem:///absolute/path' or broker_transport_options = {{'folder': '/path'}}."
    )


def _key(queue: str) -> str:
    """A queue's or exchange's name as one harmless, reversible file name."""
    quoted = quote(queue, safe="@")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def redeliveries(name: str) -> int:
    """How often the message in this file was given back: 0 for ``x.msg``, 2 for ``x.r2.msg``."""
    parts = name.split(".")
    return int(parts[1][1:]) if len(parts) == 3 and parts[1][1:].isdigit() else 0


def _given_back(name: str) -> str:
    return f"{name.split('.')[0]}.r{redeliveries(name) + 1}.msg"


def _rename_into(source: Path, target: Path) -> bool:
    """Move a file, making the target's folder if need be. False: someone else has moved it."""
    for _ in range(3):
        try:
            source.rename(target)
            return True
        except FileNotFoundError:
            if not os.path.lexists(source):
                return False
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return False


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _messages(folder: Path) -> list[str]:
    return [name for name in _names(folder) if name.endswith(".msg")]


def _process_start() -> str:
    """Clock ticks from boot to this process's start, to tell apart two uses of one process id."""
    try:
        return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return str(time.time_ns())


class _Listing:
    """One queue's ready messages, listed seldom and handed out often; may name files that are gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: list[str] = []  # last is next
        self._mtime_ns = -1
        self._settled = False
        self._listed_at = self._relist_at = float("-inf")

    def pop(self) -> str | None:
        now = monotonic()
        if now >= self._relist_at or (not self._names and self._may_have_changed()):
            self._list(now)
        try:
            return self._names.pop()
        except IndexError:
            return None

    def put_back(self, name: str) -> None:
        if not self._names or name < self._names[-1]:
            self._names.append(name)
        else:
            self._relist_at = min(self._relist_at, self._listed_at + RELIST_INTERVAL)

    def _may_have_changed(self) -> bool:
        return not self._settled or self._stat() != self._mtime_ns

    def _stat(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return -1

    def _list(self, now: float) -> None:
        # The time stamp is read first: a change during the listing then shows up as another one.
        self._mtime_ns = self._stat()
        self._settled = time.time_ns() - self._mtime_ns > SETTLE_NS
        self._names = sorted(_messages(self._path), reverse=True)
        self._listed_at = monotonic()
        cost = self._listed_at - now
        self._relist_at = self._listed_at + max(RELIST_INTERVAL, RELIST_COST_FACTOR * cost)


class _Owner:
    """This process as a holder of unacknowledged messages: a folder, and the lock that proves life."""

    def __init__(self, unacked: Path) -> None:
        host = _key(socket.gethostname())[:100]
        self.name = f"{host}-{os.getpid()}-{_process_start()}-{secrets.token_hex(4)}"
        self.path = unacked / self.name
        # Locked before it gets its name: nobody can meet it unlocked and take it for dead.
        unborn = unacked / f".new-{self.name}"
        unborn.mkdir(mode=0o700)
        # Never closed, and never opened a second time in this process: either would drop the lock.
        self._lock = os.open(unborn / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unborn.rename(self.path)


class BrokerFolder:
    """All that one process does in one broker folder. Methods may be called from any thread.

    ``tag`` names a received message: ``<queue's key>/<file name>``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = virtual.BrokerState()
        self.transient: set[str] = set()
        self.consumers: Counter[str] = Counter()
        self._pid = os.getpid()
        self._process = f"{self._pid}.{secrets.token_hex(4)}".replace(".", "-")
        self._last_ns = 0
        self._lock = threading.RLock()
        self._sweeping = threading.Lock()
        self._sweep_at = float("-inf")
        self._prepared = False
        self._owner: _Owner | None = None
        self._listings: dict[str, _Listing] = {}
        self._tables: dict[str, tuple[tuple[int, int], list[Binding]]] = {}

    # -- the folder itself

    def prepare(self) -> None:
        """Create the folders (mode 0700) and try to write. Errors: BrokerFolderError."""
        if self._prepared:
            return
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("queues", "unacked", "exchanges", "tmp", "broken"):
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
            self._temporary().unlink()
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._clear_litter()
        self._prepared = True

    def _clear_litter(self) -> None:
        for name in _names(self.path / "tmp"):
            path = self.path / "tmp" / name
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LITTER_AGE:
                    path.unlink()

    def _temporary(self, content: bytes = b"") -> Path:
        """A new file below the folder, so that it can be renamed to any place in it."""
        path = self.path / "tmp" / f"{self._next_ns()}-{self._process}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(file, "wb") as stream:
                stream.write(content)
        except OSError:  # a full disk
            path.unlink(missing_ok=True)
            raise
        return path

    def _next_ns(self) -> int:
        """The wall clock in nanoseconds, strictly growing in this process."""
        with self._lock:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            return self._last_ns

    @contextlib.contextmanager
    def _control(self) -> Iterator[None]:
        """Exclusive right to change bindings, and to begin or end queues that die with a process."""
        # An own open file each time: flock then excludes other threads as well as other processes.
        with self._control_file() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Said aloud, because a child forked meanwhile shares the open file and so the lock.
                fcntl.flock(file, fcntl.LOCK_UN)

    def _control_file(self) -> IO[bytes]:
        path = self.path / "exchanges" / "lock"
        try:
            return path.open("ab")
        except FileNotFoundError:
            self._prepare_again()
            return path.open("ab")

    def _prepare_again(self) -> None:
        """After the folder was cleared away under a running process."""
        self._prepared = False
        self.prepare()

    # -- messages

    def put(self, queue: str, content: bytes, exchange: str = "") -> None:
        """Append a message; it appears whole or not at all. Errors: OSError, and nothing was added."""
        try:
            temporary = self._temporary(content)
        except FileNotFoundError:
            self._prepare_again()
            temporary = self._temporary(content)
        target = self.path / "queues" / _key(queue) / f"{self._next_ns():020d}-{self._process}.msg"
        try:
            temporary.rename(target)
        except FileNotFoundError:
            if exchange and all(bound != queue for _, _, bound in self.table(exchange)):
                temporary.unlink(missing_ok=True)  # was routed to a queue that has been deleted since
            else:
                _rename_into(temporary, target)

    def claim(self, queue: str) -> str | None:
        """Receive the next message; returns its tag, or None if the queue is empty."""
        key = _key(queue)
        listing = self._listing(key)
        while (name := listing.pop()) is not None:
            if self._take(key, name):
                return f"{key}/{name}"
        return None

    def _take(self, key: str, name: str) -> bool:
        source = self.path / "queues" / key / name
        for _ in range(3):
            target = self._claims() / key / name
            try:
                source.rename(target)
                return True
            except FileNotFoundError:
                if not os.path.lexists(source):
                    return False
                self._make_room(target.parent)
        return False

    def _make_room(self, path: Path) -> None:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except FileNotFoundError:  # the owner's folder was cleared away, and its lock with it
            with self._lock:
                self._owner = None
            self._prepare_again()

    def _claims(self) -> Path:
        """This process's folder below ``unacked``."""
        with self._lock:
            if self._owner is None:
                try:
                    self.prepare()
                    self._owner = _Owner(self.path / "unacked")
                except OSError as error:
                    raise _unusable(self.path, error) from error
                atexit.register(self._leave)
                _own_names.add(self._owner.name)
            return self._owner.path

    def _claimed(self, tag: str) -> Path | None:
        """Where a received message is; None in a forked child, to which it does not belong."""
        if self._owner is None or self._pid != os.getpid():
            return None
        return self._owner.path / tag

    def read(self, tag: str) -> bytes:
        return (self._claims() / tag).read_bytes()

    def discard(self, tag: str) -> None:
        """Remove a received message for good."""
        if path := self._claimed(tag):
            path.unlink(missing_ok=True)

    def requeue(self, tag: str) -> None:
        """Give a received message back, to its old place in the queue."""
        key, name = tag.split("/")
        path, again = self._claimed(tag), _given_back(name)
        if path and _rename_into(path, self.path / "queues" / key / again):
            self._listing(key).put_back(again)

    def set_aside(self, tag: str, error: Exception) -> None:
        """Move a received file that is no message out of the way."""
        target = self.path / "broken" / tag.replace("/", "@")
        if path := self._claimed(tag):
            _rename_into(path, target)
        logger.error("Not a message, moved aside to %s: %r", target, error)

    def _listing(self, key: str) -> _Listing:
        with self._lock:
            if key not in self._listings:
                self._listings[key] = _Listing(self.path / "queues" / key)
            return self._listings[key]

    # -- queues

    def has_queue(self, queue: str) -> bool:
        return (self.path / "queues" / _key(queue)).is_dir()

    def size(self, queue: str) -> int:
        """Number of messages that are ready."""
        return len(_messages(self.path / "queues" / _key(queue)))

    def purge(self, queue: str) -> int:
        """Remove the messages that are ready; returns how many."""
        folder, count = self.path / "queues" / _key(queue), 0
        for name in _messages(folder):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
                count += 1
        return count

    def declare(self, queue: str, transient: bool = False, exclusive: bool = False) -> None:
        """Create a queue. ``transient``: it ends with its last consumer; ``exclusive``: with this process."""
        if not transient and not exclusive:
            (self.path / "queues" / _key(queue)).mkdir(mode=0o700, parents=True, exist_ok=True)
            return
        with self._control():
            self.transient.add(queue)
            self._hold(queue, ends=exclusive)
            (self.path / "queues" / _key(queue)).mkdir(mode=0o700, exist_ok=True)

    def begin_consumer(self, queue: str) -> None:
        with self._lock:
            self.consumers[queue] += 1
        if queue in self.transient:
            with self._control():
                self._hold(queue, ends=True)

    def end_consumer(self, queue: str) -> None:
        """The counterpart of begin_consumer; a transient queue nobody else holds is deleted."""
        with self._lock:
            self.consumers[queue] -= 1
            last = self.consumers[queue] <= 0
            if last:
                del self.consumers[queue]
        if last and queue in self.transient and self._owner is not None and self._pid == os.getpid():
            self.transient.discard(queue)
            self._let_go(_key(queue), self._owner.path)

    def delete_queue(self, queue: str) -> None:
        with self._control():
            self._delete_queue(_key(queue))

    def _hold(self, queue: str, ends: bool) -> None:
        """Note on disk that this process uses a transient queue; ``ends``: that it ends with us."""
        marker = self._claims() / ".queues" / _key(queue)
        marker.parent.mkdir(mode=0o700, exist_ok=True)
        with marker.open("ab") as file:
            if ends:
                file.write(b"ends")

    def _let_go(self, key: str, owner: Path) -> None:
        """Remove an owner's hold on a transient queue, and the queue if it was the last."""
        with self._control():
            marker = owner / ".queues" / key
            try:
                ends = marker.stat().st_size > 0
                marker.unlink()
            except FileNotFoundError:
                return
            unacked = self.path / "unacked"
            if ends and not any((unacked / other / ".queues" / key).exists() for other in _names(unacked)):
                self._delete_queue(key)

    def _delete_queue(self, key: str) -> None:
        for file in (self.path / "exchanges").glob("*.exchange"):
            rows = self._read_table(file)
            kept = [row for row in rows if _key(row[2]) != key]
            if kept != rows:
                self._write_table(file, kept)
        folder = self.path / "queues" / key
        for _ in range(10):  # a producer may have been between choosing the queue and writing to it
            for name in _names(folder):
                with contextlib.suppress(FileNotFoundError):
                    (folder / name).unlink()
            try:
                folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                continue

    # -- bindings

    def _table_file(self, exchange: str) -> Path:
        return self.path / "exchanges" / f"{_key(exchange)}.exchange"

    def table(self, exchange: str) -> list[Binding]:
        """An exchange's bindings, read again only if the file has changed."""
        file = self._table_file(exchange)
        try:
            stat = file.stat()
        except FileNotFoundError:
            return []
        stamp = (stat.st_ino, stat.st_mtime_ns)
        known = self._tables.get(exchange)
        if known is None or known[0] != stamp:
            known = self._tables[exchange] = (stamp, self._read_table(file))
        return known[1]

    def _read_table(self, file: Path) -> list[Binding]:
        try:
            return [(row[0], row[1], row[2]) for row in loads(file.read_text())]
        except FileNotFoundError:
            return []
        except (ValueError, IndexError, TypeError) as error:
            logger.error("Exchange file %s is not readable and counts as empty: %r", file, error)
            return []

    def _write_table(self, file: Path, rows: list[Binding]) -> None:
        if rows:
            self._temporary(str_to_bytes(dumps(rows))).rename(file)
        else:
            file.unlink(missing_ok=True)

    def bind(self, exchange: str, binding: Binding) -> None:
        if binding in self.table(exchange):
            return
        with self._control():
            file = self._table_file(exchange)
            rows = self._read_table(file)
            if binding not in rows:
                self._write_table(file, [*rows, binding])

    def unbind(self, exchange: str, binding: Binding) -> None:
        with self._control():
            file = self._table_file(exchange)
            self._write_table(file, [row for row in self._read_table(file) if row != binding])

    def delete_exchange(self, exchange: str) -> None:
        with self._control():
            self._table_file(exchange).unlink(missing_ok=True)

    # -- the dead

    def sweep_when_due(self) -> None:
        if monotonic() >= self._sweep_at:
            self.sweep()

    def sweep(self) -> None:
        """Return what dead processes had received to the queues; end the queues that ended with them."""
        if not self._sweeping.acquire(blocking=False):
            return
        try:
            self._sweep_at = monotonic() + SWEEP_INTERVAL
            for name in _names(self.path / "unacked"):
                if name not in _own_names and not self._unborn(name):
                    self._bury_if_dead(self.path / "unacked" / name)
        finally:
            self._sweeping.release()

    def _unborn(self, name: str) -> bool:
        if not name.startswith(".new-"):
            return False
        try:
            return time.time() - (self.path / "unacked" / name).stat().st_mtime < LITTER_AGE
        except FileNotFoundError:
            return True

    def _bury_if_dead(self, owner: Path) -> None:
        try:
            lock = os.open(owner / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # just removed by another process, or no owner's folder at all
            return
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            count = self._bury(owner)
        except OSError:  # locked, so alive; or not returnable now: the next sweep tries again
            return
        finally:
            os.close(lock)
        if count:
            logger.warning("Returned %d message(s) of the dead consumer %s.", count, owner.name)

    def _bury(self, owner: Path) -> int:
        """Empty and remove an owner's folder; returns the number of messages given back."""
        count = 0
        for key in _names(owner):
            if key == "lock" or key.startswith("."):
                continue
            for name in _messages(owner / key):
                count += _rename_into(owner / key / name, self.path / "queues" / key / _given_back(name))
            with contextlib.suppress(OSError):
                (owner / key).rmdir()
        for key in _names(owner / ".queues"):
            self._let_go(key, owner)
        with contextlib.suppress(OSError):
            if (owner / ".queues").exists():
                (owner / ".queues").rmdir()
            (owner / "lock").unlink(missing_ok=True)
            owner.rmdir()
        return count

    def _leave(self) -> None:
        """Orderly end of this process: nobody needs to wait for the next sweep."""
        if self._owner is not None and self._pid == os.getpid():
            with contextlib.suppress(OSError):
                self._bury(self._owner.path)


#: Owners that are this process: opening and closing their lock files would drop the locks.
_own_names: set[str] = set()
_folders: dict[Path, BrokerFolder] = {}
_folders_lock = threading.Lock()


def broker_folder(path: Path) -> BrokerFolder:
    """This process's one BrokerFolder for a path: a second owner would take the first for dead."""
    with _folders_lock:
        path = Path(os.path.realpath(path))
        if path not in _folders:
            _folders[path] = BrokerFolder(path)
        return _folders[path]


def _after_fork_in_child() -> None:
    global _own_names, _folders, _folders_lock
    # The old ones stay referenced by inherited channels, which may look but not touch (see _claimed).
    _own_names, _folders, _folders_lock = set(), {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
