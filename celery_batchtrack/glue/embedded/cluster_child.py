"""What a process of a LocalCluster runs: find the parent's application, then be a worker or a detector.

Started by path (not by ``-m``), with its orders as JSON on standard input, so that settings (passwords
among them) never show in a process list. Until the orders have set ``sys.path``, it uses the standard
library only.

The parent holds the only write end of the *lifeline*, a pipe. When the parent is gone, however it went, the
pipe breaks, and this process's whole group is killed: by a native thread, and on Linux by the kernel itself,
which needs no thread that gets to run (a task in C code may hold the interpreter lock for minutes).
"""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import importlib
import importlib.util
import json
import os
import select
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any

#: Set to the process id in a cluster's processes: they must not open a cluster while loading the main script.
CHILD_MARK = "BATCHTRACK_CLUSTER_PROCESS"
READY = b"ready\n"

# Taken before gevent may replace them: the lifeline's thread has to be a real one.
_start_thread = _thread.start_new_thread
_poll = select.poll

Orders = dict[str, Any]


def main() -> int:
    """Runs one role to its end; returns the exit status."""
    orders: Orders = json.load(sys.stdin)
    _no_standard_input()
    os.set_inheritable(orders["lifeline"], False)
    os.set_inheritable(orders["status"], False)
    if orders["role"] == "detector":
        # Before the first thread, since each inherits it: the signal is waited for (see _stop_on_sigterm).
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _guard_lifeline(orders["lifeline"], orders["parent"])
    _keep_from_children(orders["status"])
    _take_over_environment(orders)
    app = load_app(orders)
    sys.argv = [f"celery-batchtrack-{orders['role']}"]
    if orders["role"] == "worker":
        return _run_worker(app, orders)
    return _run_detector(app, orders)


def _no_standard_input() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


# -- the lifeline


def _guard_lifeline(lifeline: int, parent: int) -> None:
    group = os.getpid()
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -group)
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    _start_thread(_die_with_parent, (lifeline, parent, group))


def _die_with_parent(lifeline: int, parent: int, group: int) -> None:
    poll = _poll()
    poll.register(lifeline, select.POLLIN | select.POLLHUP)
    # The parent's id is looked at too, once a second: a process that it forked may hold the pipe open.
    while os.getppid() == parent and not poll.poll(1000):
        pass
    os.killpg(group, signal.SIGKILL)


def _keep_from_children(status: int) -> None:
    """Pool processes must not hold the status pipe open, or the parent would not see it end."""

    def close() -> None:
        with contextlib.suppress(OSError):
            os.close(status)

    os.register_at_fork(after_in_child=close)


# -- the application


def _take_over_environment(orders: Orders) -> None:
    os.environ[CHILD_MARK] = str(os.getpid())
    os.chdir(orders["cwd"])
    sys.path[:] = orders["sys_path"]
    sys.argv = orders["argv"]
    if orders["pool"] in ("gevent", "eventlet"):
        from celery import maybe_patch_concurrency

        maybe_patch_concurrency(["celery", "-P", orders["pool"]])
    if orders["main_path"]:
        # Read by Celery when imported: tasks of the main script keep the names they have in the parent.
        os.environ["MP_MAIN_FILE"] = orders["main_path"]
        import celery.utils.imports  # noqa: F401

        del os.environ["MP_MAIN_FILE"]  # not meant for the processes that tasks start


def load_app(orders: Orders) -> Any:
    """The parent's application, with the parent's settings and all modules that define tasks."""
    from celery_batchtrack.glue.embedded import alias

    alias.register()
    if orders["main_path"]:
        _load_main(orders["main_path"], orders["main_name"])
    module = importlib.import_module(orders["module"])
    for name in orders["task_modules"]:
        importlib.import_module(name)
    app = getattr(module, orders["attribute"])
    app.conf.update(orders["settings"])
    return app


def _load_main(path: str, name: str | None) -> None:
    """Run the parent's main script as ``__mp_main__``, as multiprocessing does: its main block is skipped."""
    module = types.ModuleType("__mp_main__")
    module.__file__ = path
    spec = importlib.util.find_spec(name) if name else None
    if spec is not None:
        module.__spec__ = spec
        module.__package__ = spec.parent
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), module.__dict__)


# -- the roles


def _run_worker(app: Any, orders: Orders) -> int:
    from celery import signals
    from celery.bin.celery import celery

    def on_ready(**_: Any) -> None:
        # A worker answers a hang-up by running its command line again, which here is not one.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _report_ready(orders["status"])

    signals.worker_ready.connect(on_ready, weak=False)
    celery.params[0].default = app
    return int(celery.main(args=orders["worker_args"], prog_name="celery", standalone_mode=False) or 0)


def _run_detector(app: Any, orders: Orders) -> int:
    stop = threading.Event()
    threading.Thread(target=_stop_on_sigterm, args=(stop,), daemon=True).start()
    from celery_batchtrack.glue.extension import BatchTrack

    app.log.setup(loglevel=orders["loglevel"])
    tracker = BatchTrack.of(app)
    _report_ready(orders["status"])
    tracker.detect_forever(stop)
    return 0


def _stop_on_sigterm(stop: threading.Event) -> None:
    # In a thread, not in a handler: setting an Event in a handler can deadlock with a wait on it.
    signal.sigwait({signal.SIGTERM})
    stop.set()


def _report_ready(status: int) -> None:
    with contextlib.suppress(OSError):  # a worker is ready again after each reconnection
        os.write(status, READY)


if __name__ == "__main__":
    sys.exit(main())
