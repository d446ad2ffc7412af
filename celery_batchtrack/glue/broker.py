"""The embedded broker: a kombu transport on a folder, ``batchtrack+filesystem://``.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from time import monotonic
from typing import IO, Any
from urllib.parse import quote

from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str, str_to_bytes
from kombu.utils.json import dumps, loads

logger = logging.getLogger("celery_batchtrack.broker")

#: Used by a bare ``batchtrack+filesystem://``, relative to the working directory.
DEFAULT_FOLDER = "batchtrack-broker"
#: Seconds between two looks of an idle consumer (transport option ``polling_interval``).
POLLING_INTERVAL = 0.05
#: Seconds between two checks for consumers that died.
SWEEP_INTERVAL = 1.0
#: Seconds after which a listing is taken anew even if the folder seems unchanged.
RELIST_INTERVAL = 1.0
#: A listing may cost at most 1/50 of the time until the next one, however long the queue is.
RELIST_COST_FACTOR = 50
#: Some file systems keep whole seconds only: an mtime younger than this may hide a later change.
SETTLE_NS = 2_100_000_000
#: Seconds of uninterrupted delivery after which the event loop gets its turn.
BURST = 0.1
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


def _redeliveries(name: str) -> int:
    """How often the message in this file was given back: 0 for ``x.msg``, 2 for ``x.r2.msg``."""
    parts = name.split(".")
    return int(parts[1][1:]) if len(parts) == 3 and parts[1][1:].isdigit() else 0


def _given_back(name: str) -> str:
    return f"{name.split('.')[0]}.r{_redeliveries(name) + 1}.msg"


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


class QoS(virtual.QoS):  # type: ignore[misc]
    """Prefetch as in kombu; acknowledging and rejecting take effect on disk at once, from any thread."""

    def ack(self, delivery_tag: str) -> None:
        self._settle(delivery_tag, self.channel.folder.discard)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        folder = self.channel.folder
        self._settle(delivery_tag, folder.requeue if requeue else folder.discard)

    def _settle(self, tag: str, move: Callable[[str], None]) -> None:
        was_full = not self.can_consume()
        move(tag)
        super().ack(tag)
        transport = self.channel.connection
        if was_full and transport is not None:
            transport.wake()


class Channel(virtual.Channel):  # type: ignore[misc]
    """A kombu channel whose queues and exchanges are those of a BrokerFolder."""

    QoS = QoS
    supports_fanout = True

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self.folder: BrokerFolder = connection.folder
        self._no_ack: set[str] = set()

    # -- messages

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        exchange = message["properties"]["delivery_info"].get("exchange") or ""
        try:
            self.folder.put(queue, str_to_bytes(dumps(message)), exchange)
        except OSError as error:
            raise ChannelError(f"Cannot add a message to queue {queue!r} in {self.folder.path}: {error}") from error

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any) -> None:
        for _, _, queue in self.folder.table(exchange):
            self._put(queue, message)

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        self.folder.sweep_when_due()
        while (tag := self.folder.claim(queue)) is not None:
            message = self._read(tag)
            if message is not None:
                if queue in self._no_ack:
                    self.folder.discard(tag)
                return message
        raise Empty

    def _read(self, tag: str) -> dict[str, Any] | None:
        try:
            message: dict[str, Any] = loads(bytes_to_str(self.folder.read(tag)))
            properties = message["properties"]
            properties["delivery_tag"] = tag
            properties["delivery_info"]["redelivered"] = _redeliveries(tag.split("/")[1]) > 0
            self.Message(message, channel=self)  # decodes the body, which a broken file may not survive
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            self.folder.set_aside(tag, error)
            return None
        return message

    def _restore(self, message: Any) -> None:
        self.folder.requeue(message.delivery_tag)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        message = super().basic_get(queue, no_ack=no_ack, **kwargs)
        if message is not None and no_ack:
            self.folder.discard(message.delivery_tag)
        return message

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> None:
        self.folder.sweep()
        self.folder.begin_consumer(queue)
        if no_ack:
            self._no_ack.add(queue)
        super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        if queue is not None:
            self._no_ack.discard(queue)
            self.folder.end_consumer(queue)

    # -- queues and exchanges

    def queue_declare(self, queue: str | None = None, passive: bool = False, **kwargs: Any) -> Any:
        if not passive:
            return super().queue_declare(queue, **kwargs)
        if not self.folder.has_queue(queue or ""):
            raise ChannelError(f"NOT_FOUND - no queue {queue!r}", (50, 10), "Channel.queue_declare", "404")
        return virtual.base.queue_declare_ok_t(queue, self._size(queue or ""), 0)

    def _new_queue(self, queue: str, auto_delete: bool = False, exclusive: bool = False, **_: Any) -> None:
        self.folder.declare(queue, transient=auto_delete, exclusive=exclusive)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return self.folder.has_queue(queue)

    def _size(self, queue: str) -> int:
        return self.folder.size(queue)

    def _purge(self, queue: str) -> int:
        return self.folder.purge(queue)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any) -> None:
        if (if_empty and self._size(queue)) or (if_unused and self.folder.consumers[queue]):
            return
        self.folder.delete_queue(queue)

    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        # Always asks the disk: what this process remembers, another one may have deleted.
        exchange = exchange or "amq.direct"
        self.folder.bind(exchange, self._binding(queue, exchange, routing_key, arguments))

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", arguments: Any = None, **_: Any
    ) -> None:
        exchange = exchange or "amq.direct"
        self.folder.unbind(exchange, self._binding(queue, exchange, routing_key, arguments))

    def _binding(self, queue: str, exchange: str, routing_key: str, arguments: Any) -> Binding:
        key, pattern, name = self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments)
        return (key or "", pattern or "", name or "")

    def get_table(self, exchange: str) -> list[Binding]:
        return self.folder.table(exchange)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        self.folder.delete_exchange(exchange)
        self.state.exchanges.pop(exchange, None)


class Transport(virtual.Transport):  # type: ignore[misc]
    """The kombu transport ``batchtrack``. Options: ``folder``, ``polling_interval`` (seconds)."""

    Channel = Channel
    default_port = 0
    driver_type = "filesystem"
    driver_name = "batchtrack"
    polling_interval = POLLING_INTERVAL
    # Asynchronous, although it polls: Celery then uses the pool that sees a dead child at once.
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self.folder = broker_folder(folder_path(client.hostname, client.transport_options))
        self.state = self.folder.state
        self._timer: Any = None
        self._bell: _Bell | None = None

    def driver_version(self) -> str:
        return "1"

    def establish_connection(self) -> Any:
        self.folder.prepare()
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._bell is not None:
            self._bell.close()
        self._timer = self._bell = None
        super().close_connection(connection)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self._bell = _Bell(loop, self._poll)
        self._timer = loop.call_repeatedly(self.polling_interval, self._poll)

    def wake(self) -> None:
        """Look for messages in the loop's next turn instead of after the polling interval."""
        if self._bell is not None:
            self._bell.ring()

    def _poll(self) -> None:
        deadline = monotonic() + BURST
        try:
            while monotonic() < deadline:
                self.cycle.get(self._deliver, timeout=0)
        except Empty:
            return
        self.wake()


class _Bell:
    """Makes the event loop call a function at once, from any thread.

    A pipe, because what kombu's ``call_soon`` is given while the loop runs its callbacks waits for the next
    event or timer.
    """

    def __init__(self, loop: Any, function: Callable[[], None]) -> None:
        self._loop, self._function = loop, function
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._lock = threading.Lock()
        self._rung = False
        loop.add_reader(self._reader, self._answer)

    def ring(self) -> None:
        with self._lock:
            if not self._rung and self._writer >= 0:
                self._rung = True
                os.write(self._writer, b"!")

    def _answer(self) -> None:
        with self._lock:
            if self._writer < 0:
                return
            self._rung = False
            with contextlib.suppress(BlockingIOError):
                os.read(self._reader, 64)
        self._function()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the loop may be closed already, and says so in many ways
            self._loop.remove_reader(self._reader)
        with self._lock:
            os.close(self._reader)
            os.close(self._writer)
            self._writer = -1


def folder_path(hostname: str | None, options: dict[str, Any]) -> Path:
    """The broker's folder. ``hostname`` is what kombu keeps of the URL: ``filesystem://<path>``.

    The path is taken as it stands, without any unquoting; a relative one starts at the working directory.
    """
    from_url = (hostname or "").partition("://")[2]
    return Path(options.get("folder") or from_url or DEFAULT_FOLDER).expanduser().absolute()
