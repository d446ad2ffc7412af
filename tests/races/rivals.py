"""The helper of the race tests: hold one transaction open, start the other side, see it blocked, let go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import sqlalchemy as sa

from celery_batchtrack.store import Store
from tests.helpers import eventually

T = TypeVar("T")
PATIENCE = 30.0


class Held(Store):
    """A store whose first write transaction stops right before its commit, until `commit` is called."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.ready = threading.Event()
        self._go = threading.Event()

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        with super().write() as connection:
            yield connection
            self.ready.set()
            assert self._go.wait(PATIENCE), "never let go"

    @contextlib.contextmanager
    def single(self) -> Iterator[sa.Connection]:
        with self.write() as connection:
            yield connection

    def commit(self) -> None:
        self._go.set()


class Rivals:
    """Threads that act on the same database, each on a connection of its own."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.held: list[Held] = []
        self._pool = ThreadPoolExecutor(64)
        self._started: list[Future[Any]] = []

    def start(self, act: Callable[..., T], *args: Any) -> Future[T]:
        future = self._pool.submit(act, *args)
        self._started.append(future)
        return future

    def start_held(self, held: Held, act: Callable[..., T], *args: Any) -> Future[T]:
        """Start a write on a held store, and wait until it has done everything but commit."""
        future = self.start(act, *args)
        eventually(lambda: held.ready.is_set() or future.done(), PATIENCE, 0.002, "a held transaction")
        if not held.ready.is_set():
            future.result()
            raise AssertionError("it ended without a write")
        return future

    def wait_until_blocked(self, count: int = 1) -> None:
        """Until so many sessions of this database wait for a lock."""
        query = sa.text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

        def blocked() -> bool:
            with self.store.engine.connect() as connection:
                return bool(connection.execute(query).scalar_one() >= count)

        eventually(blocked, PATIENCE, 0.005, f"{count} sessions that wait for a lock")

    def start_blocked(self, act: Callable[..., T], *args: Any) -> Future[T]:
        """Start the other side, and wait until it waits for the held one."""
        before = self._blocked_now()
        future = self.start(act, *args)
        self.wait_until_blocked(before + 1)
        assert not future.done()
        return future

    def _blocked_now(self) -> int:
        query = sa.text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with self.store.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def at_once(self, *acts: Callable[[], T]) -> list[T]:
        """Start all of them at the same moment; what each gave, in order."""
        barrier = threading.Barrier(len(acts))

        def run(act: Callable[[], T]) -> T:
            barrier.wait(PATIENCE)
            return act()

        return [future.result(PATIENCE) for future in [self.start(run, act) for act in acts]]

    def join(self) -> None:
        for future in self._started:
            with contextlib.suppress(Exception):
                future.result(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for held in self.held:
            held.commit()
        self._pool.shutdown(wait=True)
