"""Reads of the tracking database off the IO loop: a few threads, and one answer for all who look at the same thing."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from celery_batchtrack import errors
from celery_batchtrack.store import reading_at_most

T = TypeVar("T")

#: Seconds that an answer is shown to others too.
KEEP = 2.0
#: Seconds after which a page says that the database does not answer.
PATIENCE = 3.0
#: Seconds that an action may take before its page says that it goes on by itself.
ACTION_PATIENCE = 30.0
_THREADS = 4
#: Reads that wait for a thread. More than that, and the database is too slow for those who look.
_WAITING = 64


class Silent(errors.DatabaseUnavailable):
    """The database has not answered in time."""


class Pool:
    """A few threads that work comes to in turn. Unlike those of `concurrent.futures`, one that hangs in a database does
    not keep Flower from ending."""

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def do(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """From the loop's thread alone."""
        future: Future[T] = Future()
        self._work.put((future, work))
        if len(self.threads) < self._most:
            self.threads.append(threading.Thread(target=self._run, name=self._name, daemon=True))
            self.threads[-1].start()
        return asyncio.wrap_future(future)

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            future, work = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 (whoever waits for it sees it)
                future.set_exception(error)

    def close(self) -> None:
        for _ in self.threads:
            self._work.put(None)


@dataclass
class _Answer:
    future: asyncio.Future[Any]
    keep: float
    done_at: float | None = None

    def over(self, now: float) -> bool:
        return self.done_at is not None and now - self.done_at >= self.keep


class Snapshots:
    """Answers by key. A read that hangs takes one of few threads, and whoever asks the same waits for the same."""

    def __init__(self, *, keep: float = KEEP, patience: float = PATIENCE) -> None:
        self.keep, self.patience = keep, patience
        self._answers: dict[Hashable, _Answer] = {}
        self.readers, self.actors = Pool(_THREADS, "batchtrack-read"), Pool(2, "batchtrack-act")

    async def get(
        self, key: Hashable, read: Callable[[], T], *, keep: float | None = None, patience: float | None = None
    ) -> T:
        """What `read` returns, or returned to somebody at most `keep` seconds ago. Raises what it raises, and Silent
        after `patience` seconds."""
        limit = self.patience if patience is None else patience
        answer = self._answers.get(key)
        if answer is None or answer.over(_now()):
            answer = self._start(key, _given_up_after(limit, read), self.keep if keep is None else keep)
        return await _in_time(answer.future, limit)

    def peek(self, key: Hashable) -> tuple[Any, float] | None:
        """What was answered last and how many seconds ago, without asking; None if it was an error, or nothing."""
        answer = self._answers.get(key)
        if answer is None or answer.done_at is None or answer.future.cancelled() or answer.future.exception():
            return None
        return answer.future.result(), _now() - answer.done_at

    def asked(self, key: Hashable) -> bool:
        """Whether an answer is under way."""
        answer = self._answers.get(key)
        return answer is not None and answer.done_at is None

    def _start(self, key: Hashable, read: Callable[[], T], keep: float) -> _Answer:
        now = _now()
        for old in [each for each, answer in self._answers.items() if answer.over(now)]:
            del self._answers[old]
        if sum(answer.done_at is None for answer in self._answers.values()) >= _WAITING:
            raise Silent(f"{_WAITING} reads of the tracking database wait already")
        answer = _Answer(self.readers.do(read), keep)
        self._answers[key] = answer

        def done(future: asyncio.Future[Any]) -> None:
            answer.done_at = _now()
            if not future.cancelled():
                future.exception()  # looked at: whoever waited for it may have gone

        answer.future.add_done_callback(done)
        return answer

    async def act(self, do: Callable[[], T]) -> T:
        """Something that changes the database, after which everything is read anew."""
        try:
            return await _in_time(self.actors.do(do), ACTION_PATIENCE)
        except Silent:
            raise Silent(f"not done after {ACTION_PATIENCE:g} s: it goes on by itself, look again later") from None
        finally:
            self.forget()

    def forget(self) -> None:
        """What is known is old; what is under way may have been read before."""
        self._answers.clear()

    def close(self) -> None:
        self.readers.close()
        self.actors.close()


def _given_up_after(seconds: float, read: Callable[[], T]) -> Callable[[], T]:
    """Nobody waits for it any longer: the database need not go on, and its thread is free for others."""

    def bounded() -> T:
        with reading_at_most(seconds):
            return read()

    return bounded


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _in_time(future: asyncio.Future[T], patience: float) -> T:
    try:
        return await asyncio.wait_for(asyncio.shield(future), patience)
    except TimeoutError:
        raise Silent(f"no answer within {patience:g} s") from None
