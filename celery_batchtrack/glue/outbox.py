"""The producer that our messages go through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_batchtrack.vocabulary.ids import HEADER

from .capture import Carried


class Outbox:
    """A producer that keeps to what was captured, whatever receivers of signals or a patched `send_task` write: it is
    given to Celery in the place of kombu's."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.carried = Carried()
        self._firm: dict[str, Any] = {}
        #: Whether the present message came as far as to be handed over to the broker.
        self.tried = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def begin(self, carried: Carried) -> None:
        self.carried, self.tried, self._firm = carried, False, {}

    def address(self, options: Mapping[str, Any]) -> None:
        """The message is one with these options: what they say themselves is the user's own."""
        own = options["headers"]
        self._firm = {name: own[name] for name in (*self.carried.firm, HEADER)}

    def publish(self, body: Any, *args: Any, **options: Any) -> Any:
        self.tried = True
        headers = options.get("headers")
        if isinstance(headers, dict):  # changed in place: receivers of `after_task_publish` see the same
            headers.update(self._firm)
            if isinstance(headers.get("headers"), dict):  # where tracers repeat them, and then Celery reads them
                headers["headers"].update(self._firm)
        return self._producer.publish(body, *args, **options)
