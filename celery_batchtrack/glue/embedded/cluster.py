"""LocalCluster: workers and a detector that live exactly as long as a ``with`` block of this process."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TextIO

from celery_batchtrack.errors import ClusterError
from celery_batchtrack.glue.embedded import alias, cluster_child

logger = logging.getLogger("celery_batchtrack.cluster")

#: Seconds before the first restart of a process that died; doubled with each further one, up to the second.
RESTART_DELAY, RESTART_DELAY_MAX = 0.2, 10.0
#: A process that was ready for this many seconds has earned a quick restart again.
STABLE_AFTER = 60.0
#: Lines of a process's output that are kept for the error message.
TAIL_LINES = 60
#: Lines that say nothing to somebody who has just left the block; kept in a log file.
NOISE = ("", "worker: Warm shutdown (MainProcess)")

_cluster_numbers = itertools.count(1)


# -- what the parent tells its processes


def locate(app: Any) -> dict[str, Any]:
    """Where a fresh process finds ``app``: module, attribute, main script, modules with tasks.

    Errors: ClusterError if no imported module has the application as a module-level variable.
    """
    found = _holders(app)
    if not found:
        raise ClusterError(
            f"No module holds {app!r}, so that the processes of a LocalCluster cannot find it. Make it a "
            f"module-level variable, e.g. `app = Celery(...)` in a file (not in an interactive session)."
        )
    # The main script last: importing an ordinary module has no side conditions.
    module, attribute = min(found, key=lambda holder: (holder[0] == "__main__", holder[0] != app.main, holder))
    modules = {type(task).__module__ for task in app.tasks.values()} & set(sys.modules)
    modules = {name for name in modules if not _is_library(name)}
    needs_main = "__main__" in modules | {module}
    main_path, main_name = _main_script() if needs_main else (None, None)
    return {
        "module": module,
        "attribute": attribute,
        "main_path": main_path,
        "main_name": main_name,
        "task_modules": sorted(name for name in modules - {"__main__"} if _importable(sys.modules[name])),
    }


def _holders(app: Any) -> list[tuple[str, str]]:
    """(module, variable) pairs whose value is the application."""
    found = []
    for name, module in list(sys.modules.items()):
        if _is_library(name) or not (name == "__main__" or _importable(module)):
            continue
        if name == "__main__" and not getattr(module, "__file__", None):
            continue
        found += [(name, attribute) for attribute, value in list(vars(module).items()) if value is app]
    return found


def _is_library(name: str) -> bool:
    return name.partition(".")[0] in ("celery", "celery_batchtrack", "kombu", "__mp_main__")


def _importable(module: ModuleType | None) -> bool:
    return getattr(module, "__spec__", None) is not None and hasattr(module, "__dict__")


def _main_script() -> tuple[str, str | None]:
    """Path of the running main script, and its module name if it was started by ``python -m``."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.origin:
        return spec.origin, spec.name
    return str(Path(str(main.__file__)).absolute()), None


def runtime_settings(app: Any) -> dict[str, Any]:
    """The settings made on the application itself, as far as JSON can carry them."""
    app.conf.get("broker_url")  # the first look at any setting makes the changes complete
    settings = {}
    for name, value in dict(app.conf.changes).items():
        if name != "deprecated_settings" and _is_plain(value):
            settings[name] = value
    return settings


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def describe_exit(status: int | None) -> str:
    """``exit status 1``, ``signal 9 (SIGKILL)``."""
    if status is None:
        return "an unknown exit status"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


# -- one process

#: Write ends of the lifelines of this process's children.
_lifelines: set[int] = set()


def _write(text: str, target: TextIO) -> None:
    target.write(text)
    target.flush()


def _drop_lifelines() -> None:
    # A process forked from this one must not keep the children alive when this one dies.
    for fd in _lifelines:
        with contextlib.suppress(OSError):
            os.close(fd)
    _lifelines.clear()


os.register_at_fork(after_in_child=_drop_lifelines)


class _Process:
    """One child process with its lifeline, its output and its word that it is ready."""

    def __init__(self, orders: dict[str, Any], logfile: str | None) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.status: int | None = None
        self.ready_at: float | None = None
        self._lock = threading.Lock()
        self._reaped = False
        lifeline, self._lifeline = os.pipe()
        self._status_pipe, status = os.pipe()
        _lifelines.add(self._lifeline)
        orders = {**orders, "lifeline": lifeline, "status": status, "parent": os.getpid()}
        try:
            self._popen = self._start(orders, (lifeline, status))
        except BaseException:
            self._drop_lifeline()
            os.close(self._status_pipe)
            raise
        finally:
            os.close(lifeline)
            os.close(status)
        self.pid = self._popen.pid
        self._tell(orders)
        self._pump = threading.Thread(target=self._pump_output, args=(logfile,), daemon=True, name="batchtrack-output")
        self._pump.start()

    def _start(self, orders: dict[str, Any], pass_fds: Sequence[int]) -> subprocess.Popen[bytes]:
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        # -P: the folder of the child's file is no place to import from. The last two words are for `ps`.
        argv = [sys.executable, *flags, "-P", cluster_child.__file__, orders["role"], orders["module"]]
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    def _tell(self, orders: dict[str, Any]) -> None:
        assert self._popen.stdin
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(json.dumps(orders).encode())
            self._popen.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()

    def _pump_output(self, logfile: str | None) -> None:
        """Pass the output on to this process's standard error or the log file; keep the end of it."""
        assert self._popen.stdout
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self._popen.stdout)
            log = stack.enter_context(Path(logfile).open("a", errors="replace")) if logfile else None
            for line in output:
                text = line.decode(errors="replace")
                self.tail.append(text)
                if log or text.strip() not in NOISE:
                    with contextlib.suppress(OSError, ValueError):
                        _write(text, log or sys.stderr)

    def wait_until_ready(self) -> bool:
        """Blocks; False if the process ends before it is ready."""
        poll = select.poll()
        poll.register(self._status_pipe, select.POLLIN)
        # The end of the pipe alone would not do: something the process started may hold it open.
        while not poll.poll(500) and not self._has_ended():
            pass
        os.set_blocking(self._status_pipe, False)
        with contextlib.suppress(BlockingIOError):
            if os.read(self._status_pipe, len(cluster_child.READY)):
                self.ready_at = time.monotonic()
        os.close(self._status_pipe)
        return self.ready_at is not None

    def _has_ended(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        except ChildProcessError:
            return True

    def wait(self) -> int | None:
        """Blocks until the process has ended, and takes the rest of its group with it."""
        with contextlib.suppress(ChildProcessError):
            # Not reaped yet, so that its group's number cannot be anyone else's.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.kill_group()
        with self._lock:
            self.status = self._popen.wait()
            self._reaped = True
        self._drop_lifeline()
        self._pump.join(timeout=5)
        return self.status

    def send_signal(self, number: signal.Signals) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            if not self._reaped:
                os.kill(self.pid, number)

    def kill_group(self) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if not self._reaped:
                os.killpg(self.pid, signal.SIGKILL)

    def _drop_lifeline(self) -> None:
        if self._lifeline in _lifelines:
            _lifelines.discard(self._lifeline)
            os.close(self._lifeline)


class _Keeper:
    """Keeps one role running: starts its process, and starts it again when it dies by itself."""

    def __init__(self, role: str, orders: dict[str, Any], logfile: str | None, restart: bool) -> None:
        self.role = role
        self._orders = {**orders, "role": role}
        self._logfile = logfile
        self._restart = restart
        self._changed = threading.Condition()
        self._stopping = False
        self._deaths = 0
        self._was_ready = False
        self._failure: _Process | None = None
        self.process = self._new_process()
        self._thread = threading.Thread(target=self._keep, daemon=True, name=f"batchtrack-{role}")
        self._thread.start()

    def _new_process(self) -> _Process:
        return _Process(self._orders, self._logfile)

    def _keep(self) -> None:
        delay = RESTART_DELAY
        while True:
            process = self.process
            if process.wait_until_ready():
                self._note(was_ready=True)
            process.wait()
            if process.ready_at and time.monotonic() - process.ready_at >= STABLE_AFTER:
                delay = RESTART_DELAY
            self._note(death=process)
            while not self._restarts(process, delay):
                if self._stopping or self._failure:
                    return
            delay = min(2 * delay, RESTART_DELAY_MAX)

    def _note(self, was_ready: bool = False, death: _Process | None = None) -> None:
        with self._changed:
            self._was_ready = self._was_ready or was_ready
            if death is not None:
                self._deaths += 1
                # One that never worked is a mistake to report; one that did is worth another try.
                if not self._was_ready or not self._restart:
                    self._failure = death
            self._changed.notify_all()

    def _restarts(self, process: _Process, delay: float) -> bool:
        with self._changed:
            if self._stopping:
                return False
            how = describe_exit(process.status)
            if self._failure is not None:
                logger.warning("%s process %d ended: %s", self.role, process.pid, how)
                return False
            logger.warning("%s process %d died: %s; restart in %.1f s", self.role, process.pid, how, delay)
            if self._changed.wait_for(lambda: self._stopping, timeout=delay):
                return False
            try:
                self.process = self._new_process()
            except OSError as error:
                logger.error("%s process could not be started: %s", self.role, error)
                return False
            return True

    def wait_ready(self, deadline: float) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_ready() or self._failure or self._stopping, deadline - time.monotonic()
            )
            if self._failure:
                how = describe_exit(self._failure.status)
                raise ClusterError(f"The {self.role} process ended with {how}.{self._output(self._failure)}")
            if not self._is_ready():
                raise ClusterError(f"The {self.role} process is not ready in time.{self._output(self.process)}")

    def _is_ready(self) -> bool:
        return self.process.ready_at is not None and self.process.status is None

    def _output(self, process: _Process) -> str:
        return " Its last output:\n" + "".join(process.tail) if process.tail else " It wrote nothing."

    def kill(self) -> None:
        """SIGKILL the main process; returns when it is dead and noticed."""
        with self._changed:
            deaths = self._deaths
            self.process.send_signal(signal.SIGKILL)
            self._changed.wait_for(lambda: self._deaths > deaths, timeout=10)

    def begin_stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self.process.send_signal(signal.SIGTERM)

    def end_stop(self, deadline: float) -> None:
        """Wait for the end of the process; kill its group at the deadline or if this is interrupted."""
        try:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            self._stopping = True
            self.process.kill_group()
            self._thread.join()


# -- the cluster


class LocalCluster:
    """One Celery worker and one detector, as processes that end with the block.

    ``processes``: pool processes of the worker. ``queues``: names, or None for the application's own.
    ``logfile``: gets the output of the processes, which otherwise goes to standard error. ``restart``: start
    a process that died by itself again, after 0.2 s at first and 10 s at most. ``node``: the worker's node
    name. ``extra_args``: further arguments of ``celery worker``. ``stop_timeout``: seconds that running tasks
    get at the end of the block before everything is killed.

    The processes import the module that holds the application, or run the main script under another name
    (as multiprocessing does), so a script needs ``if __name__ == "__main__":`` around the block. Settings
    made on the application before the block are passed on.

    Nothing outlives this process, even if it is killed. (A process that a task starts in a session of its
    own does.) Ctrl-C reaches this process alone. Errors: ClusterError.
    """

    def __init__(
        self,
        app: Any,
        processes: int = 4,
        pool: str = "prefork",
        queues: str | Iterable[str] | None = None,
        loglevel: str = "WARNING",
        logfile: str | os.PathLike[str] | None = None,
        restart: bool = True,
        detector: bool = True,
        node: str | None = None,
        extra_args: Sequence[str] = (),
        stop_timeout: float = 10.0,
        start_timeout: float = 30.0,
    ) -> None:
        self._app = app._get_current_object() if hasattr(app, "_get_current_object") else app
        self._processes = processes
        self._pool = pool
        self._queues = [queues] if isinstance(queues, str) else list(queues or ())
        self._loglevel = loglevel
        self._logfile = str(Path(logfile).absolute()) if logfile is not None else None
        self._restart = restart
        self._detector = detector
        self.node = node or f"cluster-{os.getpid()}-{next(_cluster_numbers)}@{socket.gethostname()}"
        self._extra_args = list(extra_args)
        self._stop_timeout = stop_timeout
        self._start_timeout = start_timeout
        self._keepers: dict[str, _Keeper] = {}

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes and wait until they are ready. Errors: ClusterError, and nothing is left."""
        if os.environ.get(cluster_child.CHILD_MARK) == str(os.getpid()):
            raise ClusterError(
                "A process of a LocalCluster came upon a LocalCluster while loading the main script. Put the "
                'block under `if __name__ == "__main__":`.'
            )
        if self._keepers:
            raise ClusterError("This LocalCluster is running already.")
        alias.register()
        if self._logfile:
            Path(self._logfile).open("a").close()  # an unwritable one is an error here, not in a thread
        orders = self._orders()
        try:
            for role in ("worker", "detector") if self._detector else ("worker",):
                self._keepers[role] = _Keeper(role, orders, self._logfile, self._restart)
            self.wait_ready(self._start_timeout)
        except BaseException:
            self.stop(timeout=0)
            raise

    def stop(self, timeout: float | None = None) -> None:
        """SIGTERM: running tasks finish; after ``timeout`` seconds (default ``stop_timeout``) SIGKILL."""
        deadline = time.monotonic() + (self._stop_timeout if timeout is None else timeout)
        keepers = list(self._keepers.values())
        self._keepers = {}
        with contextlib.ExitStack() as stack:  # each one is ended even if ending another is interrupted
            for keeper in keepers:
                stack.callback(keeper.end_stop, deadline)
            for keeper in keepers:
                keeper.begin_stop()

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until the processes work. Errors: ClusterError if one cannot start, or after ``timeout`` s."""
        deadline = time.monotonic() + timeout
        for keeper in self._keepers.values():
            keeper.wait_ready(deadline)

    @property
    def worker_pid(self) -> int:
        """Process id of the worker's main process; changes with a restart."""
        return self._worker().process.pid

    def kill_worker(self) -> None:
        """SIGKILL the worker's main process and wait until that is noticed. For tests."""
        self._worker().kill()

    def _worker(self) -> _Keeper:
        if "worker" not in self._keepers:
            raise ClusterError("This LocalCluster is not running.")
        return self._keepers["worker"]

    def _orders(self) -> dict[str, Any]:
        return {
            **locate(self._app),
            "settings": runtime_settings(self._app),
            "sys_path": [path or str(Path.cwd()) for path in sys.path],
            "cwd": str(Path.cwd()),
            "argv": sys.argv,
            "pool": self._pool,
            "loglevel": self._loglevel,
            "worker_args": self._worker_args(),
        }

    def _worker_args(self) -> list[str]:
        args = ["--quiet", "worker", "--pool", self._pool, "--concurrency", str(self._processes)]
        args += ["--loglevel", self._loglevel, "--hostname", self.node]
        # There is nobody to ask: without these two the worker is ready a second earlier.
        args += ["--without-mingle", "--without-gossip"]
        if self._queues:
            args += ["--queues", ",".join(self._queues)]
        return args + self._extra_args
