"""Celery workers as plain processes: for our own tests, and as pytest-celery nodes without Docker."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.helpers import ROOT, GuardedProcess, eventually, unique

READY = "ready."


class ProcessWorker:
    """`celery -A app worker ...` in a process group of its own.

    >>> with ProcessWorker("tests.acceptance.apps.smoke", folder=tmp_path, env={...}) as worker:
    ...     worker.kill()
    ...     worker.restart()

    `args` go to `celery worker`, after the defaults and so stronger than they. `env` is added to this
    process's. The log is `<folder>/<name>.log`. Leaving the context ends every process of the group.
    """

    def __init__(
        self,
        app: str,
        *args: str,
        folder: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        name: str | None = None,
    ) -> None:
        self.name = name or unique("worker")
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", f"{self.name}@%h"]
        self._process = GuardedProcess(
            [*command, "--loglevel=INFO", "--concurrency=2", *args],
            log=folder / f"{self.name}.log",
            cwd=cwd,
            env=_environment(env or {}),
        )
        self._log_start = 0

    @property
    def pid(self) -> int:
        """Of the main process. A new one after `restart`."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.alive

    @property
    def exit_code(self) -> int | None:
        return self._process.exit_code

    @property
    def log_file(self) -> Path:
        return self._process.log

    def start(self) -> Self:
        """Does not wait: see `wait_ready`."""
        self._log_start = len(self.logs())
        self._process.spawn()
        return self

    def wait_ready(self, timeout: float = 30.0) -> Self:
        eventually(self._is_ready, timeout, what=f"worker {self.name} ready")
        return self

    def _is_ready(self) -> bool:
        fresh = self.logs()[self._log_start :]
        if not self.alive:
            ended = f"worker {self.name} ended at its start, exit code {self.exit_code}"
            raise AssertionError(f"{ended}:\n{fresh[-3000:]}")
        return READY in fresh

    def kill(self) -> None:
        """SIGKILL to the main process alone, as the kernel's out-of-memory killer does; waits for its end."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, Celery's warm shutdown. Does not wait: see `wait`."""
        self._process.send_signal(signal.SIGTERM)

    def quit(self) -> None:
        """SIGQUIT, Celery's cold shutdown. Does not wait: see `wait`."""
        self._process.send_signal(signal.SIGQUIT)

    def send_signal(self, number: int) -> None:
        """To the main process alone: SIGSTOP and SIGCONT for a worker that hangs."""
        self._process.send_signal(number)

    def wait(self, timeout: float = 15.0) -> int:
        """For the end of the main process; returns its exit code."""
        return self._process.wait(timeout)

    def restart(self, timeout: float = 30.0) -> Self:
        """End whatever is left of it, and wait until a new one with the same name is ready."""
        self.stop()
        return self.start().wait_ready(timeout)

    def stop(self) -> None:
        """SIGKILL to the whole group, pool processes and their children included. Safe to call twice."""
        self._process.end_group()

    def logs(self) -> str:
        """Since the first start."""
        return self._process.output()

    def __enter__(self) -> Self:
        try:
            return self.start().wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path), **extra}


class ProcContainer:
    """What pytest-celery asks of a container, done by a process worker; so its nodes need no Docker.

    As in Docker, the end of the main process ends everything else in the "container".
    """

    ready_prompt = READY

    def __init__(self, worker: ProcessWorker, queue: str = "celery") -> None:
        self.worker = worker
        self.name = worker.name
        self.id = worker.name
        self.status = "created"
        self._queue = queue

    def start(self) -> Self:
        self.worker.start()
        self.reload()
        return self

    def ready(self) -> bool:
        self.worker.wait_ready()
        return True

    def reload(self) -> None:
        self.status = "running" if self.worker.alive else "exited"

    def logs(self) -> str:
        return self.worker.logs()

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """As `docker kill`: SIGKILL is over at once, any other signal is only sent."""
        number = _signal_number(signal)
        if number == _signal_number("SIGKILL"):
            self.worker.stop()
        else:
            self.worker.send_signal(number)

    def restart(self, timeout: float = 30.0) -> None:
        """Ready when it returns: an old "ready." in the log could not tell."""
        self.worker.terminate()
        if self.worker.alive:
            self.worker.wait(timeout)
        self.worker.restart(timeout)
        self.reload()

    def teardown(self) -> None:
        self.worker.stop()
        self.reload()

    def worker_name(self) -> str:
        return self.name

    def worker_queue(self) -> str:
        return self._queue


def _signal_number(name: str | int) -> int:
    return signal.Signals[name] if isinstance(name, str) else name
