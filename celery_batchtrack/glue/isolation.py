"""Suspects run alone: a gate in the worker's main process, and the queues in which they wait.

A child whose worker died together with others is a suspect. Its next attempt waits in a queue of its own, and in
whichever worker takes it, the gate lets it through only when nothing else runs there, and nothing else while it runs.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from celery.worker import state

from celery_batchtrack.vocabulary.crash_policy import ISOLATED, base_queue
from celery_batchtrack.vocabulary.ids import HEADER

logger = logging.getLogger("celery_batchtrack")

_Start = Callable[[], object]


class _Waiting(NamedTuple):
    request: Any
    start: _Start
    since: float


class Gate:
    """Holds tasks back while a suspect waits for its turn, or has it. All calls come from the main process's loop
    (or its timer's thread, where it has none)."""

    def __init__(
        self, patience: float, give_way: Callable[[Any], None], send_back: Callable[[Any], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._patience, self._give_way, self._send_back, self._clock = patience, give_way, send_back, clock
        self._lock = threading.RLock()
        self._suspects: collections.deque[_Waiting] = collections.deque()
        self._held: collections.deque[_Waiting] = collections.deque()
        self._alone: weakref.ref[Any] | None = None
        #: What kept the last suspect waiting for too long. Until it ends, no other needs to try.
        self._long: weakref.WeakSet[Any] = weakref.WeakSet()

    def guarding(self, process: Callable[[Any], object]) -> Callable[[Any], None]:
        """What hands a request to the pool, behind the gate. (Celery's own Request class overrides whatever a mixin
        says of its start, so the gate stands before it.)"""

        def process_in_turn(request: Any) -> None:
            suspect = _is_suspect(request)
            if suspect and self._is_hopeless():
                self._give_way(request)
            elif self.lets_through(request, isolated=suspect):
                process(request)
            else:
                self.hold(request, lambda: process(request))

        return process_in_turn

    def lets_through(self, request: Any, *, isolated: bool) -> bool:
        """Whether a request may start now. If not, it is to be held."""
        if not isolated and self._alone is None and not self._suspects:
            return True
        with self._lock:
            if not isolated:
                return not self._closed()
            if self._closed() or self._others(request):
                return False
            self._alone = weakref.ref(request)
            return True

    def hold(self, request: Any, start: _Start) -> None:
        """Keep a request until the gate is open for it. Its message is not acknowledged meanwhile."""
        with self._lock:
            waiting = self._suspects if _is_suspect(request) else self._held
            waiting.append(_Waiting(request, start, self._clock()))

    def tick(self) -> None:
        """Start what may start. Called several times a second."""
        if self._alone is None and not self._suspects and not self._held:
            return
        with self._lock:
            self._forget_the_gone()
            if self._alone is not None and not self._is_active(self._alone()):
                self._alone = None
            self._hurry()
            if self._alone is None and self._suspects and not self._others(self._suspects[0].request):
                suspect = self._suspects.popleft()
                self._alone = weakref.ref(suspect.request)
                suspect.start()
            while self._held and not self._closed():
                self._held.popleft().start()

    def _closed(self) -> bool:
        return bool(self._suspects) or (self._alone is not None and self._is_active(self._alone()))

    def _is_active(self, request: Any) -> bool:
        return request is not None and request in state.reserved_requests

    def _others(self, request: Any) -> list[Any]:
        """What else was handed to the pool and is not over."""
        waiting = {id(each.request) for each in (*self._suspects, *self._held)} | {id(request)}
        while True:
            try:
                return [each for each in state.reserved_requests if id(each) not in waiting]
            except RuntimeError:  # another thread's request just ended
                continue

    def _is_hopeless(self) -> bool:
        return any(self._is_active(each) for each in list(self._long))

    def _forget_the_gone(self) -> None:
        """After a lost connection Celery forgets what it has reserved: the broker delivers it again."""
        self._suspects = collections.deque(each for each in self._suspects if self._is_active(each.request))
        self._held = collections.deque(each for each in self._held if self._is_active(each.request))

    def _hurry(self) -> None:
        """A worker that is never free must not stand still for a suspect: it gives way, and is sent again later. Nor
        must others wait for a suspect that runs for long: they go back to the broker, for another worker."""
        late = self._clock() - self._patience
        while self._suspects and self._suspects[0].since < late:
            suspect = self._suspects.popleft()
            self._long = weakref.WeakSet(self._others(suspect.request))
            self._give_way(suspect.request)
        while self._alone is not None and self._held and self._held[0].since < late:
            self._send_back(self._held.popleft().request)


def send_back(request: Any) -> None:
    """Give a message that was never begun back to the broker."""
    request.reject(requeue=True)
    state.task_ready(request)


def _is_suspect(request: Any) -> bool:
    header = request.request_dict.get(HEADER)
    return header is not None and header.get("isolated") is True


class IsolatedQueues:
    """Consumes a suspects' queue as soon as something waits in it, in every worker of the queue it belongs to."""

    def __init__(self) -> None:
        self._consumer: Any = None

    def attach(self, consumer: Any) -> None:
        """The worker's consumer; a new one after each lost connection of some transports."""
        self._consumer = consumer

    def adopt(self, waiting: Iterable[str]) -> None:
        """`waiting`: queues with suspects. From any thread: the consumer's own does it."""
        consumer = self._consumer
        if consumer is None or getattr(consumer, "task_consumer", None) is None:
            return
        consumed = {queue.name for queue in consumer.task_consumer.queues}
        for queue in waiting:
            if queue.endswith(ISOLATED) and queue not in consumed and base_queue(queue) in consumed:
                logger.warning("action=isolated_queue suspects wait in %s: this worker consumes it from now on", queue)
                consumer.call_soon(_consume, consumer, queue)


def _consume(consumer: Any, queue: str) -> None:
    """In the worker's loop, which an error here would end; it sees for itself that a connection is lost."""
    try:
        if consumer.task_consumer is not None and not consumer.task_consumer.consuming_from(queue):
            consumer.add_task_queue(queue)
    except Exception:
        logger.exception("action=isolated_queue %s cannot be consumed here: another worker has to", queue)


__all__ = ["Gate", "IsolatedQueues", "send_back"]
