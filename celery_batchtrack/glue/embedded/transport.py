"""The embedded broker: a kombu transport on a folder, ``batchtrack+filesystem://``.

Delivery is at least once, and survives a killed consumer; see `folder` for how.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from time import monotonic
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str, str_to_bytes
from kombu.utils.json import dumps, loads

from celery_batchtrack.glue.embedded.folder import Binding, BrokerFolder, broker_folder, redeliveries

logger = logging.getLogger("celery_batchtrack.broker")

#: Used by a bare ``batchtrack+filesystem://``, relative to the working directory.
DEFAULT_FOLDER = "batchtrack-broker"
#: Seconds between two looks of an idle consumer (transport option ``polling_interval``).
POLLING_INTERVAL = 0.05
#: Seconds of uninterrupted delivery after which the event loop gets its turn.
BURST = 0.1


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
            properties["delivery_info"]["redelivered"] = redeliveries(tag.split("/")[1]) > 0
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
