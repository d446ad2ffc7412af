"""Publishing rows through Celery: to the broker, or inline where tasks are always eager.

Whoever publishes (a sweep, a sibling that just settled) is not who created: headers, ids and stamps
come from the row and its batch, never from the task that happens to run here.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from celery._state import pop_current_task, push_current_task
from celery.app.task import Context
from celery.exceptions import QueueNotFound
from kombu.exceptions import KombuError, OperationalError

from celery_batchtrack.behaviour.tracker import Message, NotSent
from celery_batchtrack.vocabulary.ids import HEADER

from . import codec, own_sending, signatures
from .capture import Captures, Carried, Publishing
from .narrate import logger
from .outbox import Outbox
from .tracked_task import current_run


@contextlib.contextmanager
def _nobodys_context() -> Iterator[None]:
    """Hide the running task: Celery would make it the parent, and pass on its priority."""
    nobody = SimpleNamespace(
        name="celery_batchtrack.publish",
        request=Context(called_directly=False, delivery_info={}),
        add_trail=lambda result: None,
    )
    push_current_task(nobody)
    try:
        yield
    finally:
        pop_current_task()


def call_of(
    message: Message, carried: Carried | None = None, *, rerouted: bool = True
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """(args, kwargs, options) of `send_task`: what is stored, and what the row and the batch say. Without `rerouted`
    it goes where its task is routed, whatever the row says."""
    row, batch = message.row, message.batch
    signature = signatures.parsed(row.signature)
    args, kwargs = list(signature.get("args") or ()), dict(signature.get("kwargs") or {})
    if not signature.get("immutable"):
        args = [*message.prefix, *args]
    options: dict[str, Any] = dict(signature.get("options") or {})
    captured = carried.headers if carried is not None else {}
    options["headers"] = {**captured, **(options.get("headers") or {}), HEADER: message.ticket.as_header()}
    options.update(
        task_id=row.task_id,
        root_id=options.get("root_id") or batch.root_id,
        parent_id=options.get("parent_id") or message.parent_id or batch.parent_task_id,
        retries=row.retries,
        add_to_parent=False,
    )
    if row.kind == "child":
        options["group_id"] = str(batch.id)
        if batch.options.get("results") != "backend":
            options["ignore_result"] = True
    if row.rerouted and rerouted:  # stronger than any route: the default exchange leads to the queue of that name
        options.update(queue=row.queue, exchange="", routing_key=row.queue)
    if row.not_before is not None:
        options["eta"] = row.not_before
    if row.expires_at is not None:
        options["expires"] = row.expires_at
    return args, kwargs, options


#: What will not be sent at the next try either: the message itself is wrong, or its task does not want it.
_HOPELESS = (own_sending.NotTaken, KombuError, TypeError, ValueError, LookupError)
#: The task by which workers send the children of a large batch: (batch id, rows).
DISPATCH_TASK = "celery_batchtrack.dispatch"


class BrokerPublisher:
    """Sends to the broker. A broker that is down is an answer, not an error."""

    paced = True

    def __init__(self, app: Any, captures: Captures | None = None) -> None:
        self.app = app
        self._captures = Captures(app) if captures is None else captures

    def publish(self, messages: Sequence[Message]) -> list[NotSent]:
        # What is left behind in context variables by who listens, after an error say, ends with this.
        return contextvars.copy_context().run(self._publish, messages)

    def _publish(self, messages: Sequence[Message]) -> list[NotSent]:
        failed: list[NotSent] = []
        left = deque(messages)
        down, tried = self._down(), False
        try:
            with (
                _nobodys_context(), Publishing(self._captures) as publishing,
                self.app.producer_or_acquire() as acquired,
            ):  # fmt: skip
                producer = Outbox(acquired)
                while left:
                    row, batch = left[0].row, left[0].batch
                    try:
                        producer.begin(publishing.enter(batch.headers, row.signature))
                        self._send(left[0], producer)
                    except down:
                        tried = producer.tried
                        raise
                    except _HOPELESS as error:
                        failed.append(NotSent(left[0], _say(error), final=True))
                    except Exception as error:  # noqa: BLE001 (a broker may refuse one message for any reason)
                        failed.append(NotSent(left[0], _say(error)))
                        with contextlib.suppress(Exception):  # AMQP closes a channel that it refused something on
                            producer.revive(producer.connection.channel())
                    left.popleft()
        except down as error:
            failed += [NotSent(each, _say(error), down=True, tried=tried and at == 0) for at, each in enumerate(left)]
        return failed

    def _down(self) -> tuple[type[Exception], ...]:
        """Errors that say that the broker, not the message, is the trouble."""
        return (OperationalError, OSError, *self.app.connection_for_write().connection_errors)

    def _send(self, message: Message, producer: Outbox) -> None:
        try:
            self._send_to(message, producer, rerouted=True)
        except QueueNotFound:
            if not message.row.rerouted:
                raise
            logger.warning(
                "action=queue_missing %s: there is no queue %s (task_create_missing_queues is off: declare it in "
                "task_queues); it is sent where its task is routed", message.row.key, message.row.queue,
            )  # fmt: skip
            self._send_to(message, producer, rerouted=False)

    def _send_to(self, message: Message, producer: Outbox, *, rerouted: bool) -> None:
        args, kwargs, options = call_of(message, producer.carried, rerouted=rerouted)
        producer.address(options)
        task = self.app._tasks.get(message.row.task)
        if task is not None:  # before 5.7, send_task knows nothing of the task's own queue, priority, limits …
            own = {name: value for name, value in task._get_exec_options().items() if value is not None}
            own.pop("expires", None)  # counted from the creation: it is in the row
            options = {"ignore_result": task.ignore_result, **own, **options}
        if own_sending.wanted(message, task):
            self._send_through(message, task, args, kwargs, {"expires": None, **options, "producer": producer})
            return
        self.app.send_task(message.row.task, args, kwargs, producer=producer, task_type=task, **options)

    def hand_out(self, batch_id: uuid.UUID, shares: int, rows: int, queue: str | None, task: str) -> bool:
        queue = queue or signatures.route(self.app, task, (), {}, {})
        where = {"queue": queue} if queue else {}
        try:
            with _nobodys_context(), self.app.producer_or_acquire() as producer:
                for _ in range(shares):
                    self.app.send_task(
                        DISPATCH_TASK, (str(batch_id), rows), producer=producer, ignore_result=True, **where
                    )
        except (*self._down(), *_HOPELESS) as error:
            logger.warning("action=not_handed_out batch %s: %s (it is sent from here)", batch_id, _say(error))
            return False
        return True

    def _send_through(self, message: Message, task: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        producer = options["producer"]
        # Before the task takes its lock: one that is given up at once would be missing at the next try.
        producer.connection.ensure_connection(max_retries=1, interval_start=0)
        try:
            own_sending.send(message, task, args, kwargs, options)
        except own_sending.NotTaken:
            raise
        except Exception as error:
            if isinstance(error, self._down()) and (producer.tried or not isinstance(error, own_sending.OF_FILES)):
                raise
            raise own_sending.NotTaken(f"{own_sending.whose(task)} raised {_say(error)}") from error

    def queue_length(self, queue: str | None, task: str) -> int | None:
        name = queue or signatures.route(self.app, task, (), {}, {})
        if not name:
            return None
        # No error may leave the block: kombu 5.7 puts a connection that one went through back into its pool, closed.
        with self.app.connection_or_acquire() as connection:
            try:
                with connection.channel() as channel:
                    return int(channel.queue_declare(queue=name, passive=True).message_count)
            except self._down():
                connection.collect()  # it connects anew when it is used next
                return None
            except tuple(connection.channel_errors):
                return 0  # no such queue: nothing is in it (Redis forgets an empty one)

    def terminate(self, task_ids: Sequence[str]) -> None:
        """Broadcast a revoke with terminate. The workers' own reconciliation finds what it misses."""
        with contextlib.suppress(Exception):  # no remote control, or no broker: see above
            self.app.control.revoke(list(task_ids), terminate=True)


def _say(error: BaseException) -> str:
    return str(error) if isinstance(error, own_sending.NotTaken) else f"{type(error).__name__}: {error}"


def _stamps(options: dict[str, Any]) -> tuple[str, ...]:
    """Names of the options by which a signature is stamped."""
    return ("stamped_headers", *(options.get("stamped_headers") or ()))


class EagerPublisher:
    """Runs children inline, as `task_always_eager` asks for.

    What a child's end makes due waits until that child is over, so that a chain of a thousand links does not nest a
    thousand calls; what a task starts while it runs, it may wait for, so that runs at once.
    """

    paced = False

    def __init__(self, app: Any, captures: Captures | None = None) -> None:
        self.app = app
        self._captures = Captures(app) if captures is None else captures
        self._local = threading.local()

    def publish(self, messages: Sequence[Message]) -> list[NotSent]:
        waiting: list[deque[Message]] = self._local.__dict__.setdefault("waiting", [])
        current = current_run()
        if waiting and (current is None or current.ended):
            waiting[-1].extend(messages)
            return []
        mine = deque(messages)
        waiting.append(mine)
        failed = []
        try:
            while mine:
                unsent = self._run(mine.popleft())
                if unsent is not None:
                    failed.append(unsent)
        finally:
            waiting.pop()
        return failed

    def _run(self, message: Message) -> NotSent | None:
        with Publishing(self._captures) as publishing:
            carried = publishing.enter(message.batch.headers, message.row.signature)
            return self._run_here(message, carried)

    def _run_here(self, message: Message, carried: Carried) -> NotSent | None:
        task = self.app.tasks.get(message.row.task)
        if task is None:
            return NotSent(message, f"NotRegistered: {message.row.task!r}", final=True)
        wanted = ("headers", "task_id", "retries", "link", "link_error", "ignore_result", "queue", "priority")
        try:
            args, kwargs, options = call_of(message, carried)
            args, kwargs = codec.loads(codec.dumps([args, kwargs]))  # what a broker would do to them
        except (TypeError, ValueError, LookupError) as error:
            return NotSent(message, _say(error), final=True)
        kept = {key: options[key] for key in (*wanted, *_stamps(options)) if key in options}
        with _nobodys_context():
            if own_sending.wanted(message, task):
                return own_sending.run(message, task, args, kwargs, {**kept, "throw": False})
            task.apply(args, kwargs, throw=False, **kept)
        return None

    def hand_out(self, batch_id: uuid.UUID, shares: int, rows: int, queue: str | None, task: str) -> bool:
        return False

    def queue_length(self, queue: str | None, task: str) -> int | None:
        return 0

    def terminate(self, task_ids: Sequence[str]) -> None:
        return None


class AppPublisher:
    """Chooses at each call, since `task_always_eager` may change."""

    def __init__(self, app: Any, captures: Captures | None = None) -> None:
        self._broker, self._eager, self._app = BrokerPublisher(app, captures), EagerPublisher(app, captures), app

    def _now(self) -> BrokerPublisher | EagerPublisher:
        return self._eager if self._app.conf.task_always_eager else self._broker

    def publish(self, messages: Sequence[Message]) -> list[NotSent]:
        return self._now().publish(messages)

    @property
    def paced(self) -> bool:
        return self._now().paced

    def hand_out(self, batch_id: uuid.UUID, shares: int, rows: int, queue: str | None, task: str) -> bool:
        return self._now().hand_out(batch_id, shares, rows, queue, task)

    def queue_length(self, queue: str | None, task: str) -> int | None:
        return self._now().queue_length(queue, task)

    def terminate(self, task_ids: Sequence[str]) -> None:
        self._now().terminate(task_ids)
