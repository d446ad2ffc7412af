"""What every behaviour needs, in one place: the store, the settings, a way to publish and to tell."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.ids import Ticket
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, FirstFailure, NewBatch, NewChild, Step
from celery_batchtrack.vocabulary.settings import Settings


@dataclass(frozen=True, slots=True)
class Message:
    """A row to be published. `prefix` are arguments put before the signature's own (never to immutable ones).

    `parent_id`: the task that it comes from, where that is not the one that started the batch.
    """

    row: ChildRow
    batch: BatchRow
    ticket: Ticket
    prefix: tuple[Any, ...] = ()
    parent_id: str | None = None


@dataclass(frozen=True, slots=True)
class NotSent:
    """A message that was not published.

    `final`: trying again is pointless. `down`: the broker cannot be reached, so neither were those behind it.
    `tried`: the message came as far as the broker.
    """

    message: Message
    error: str
    final: bool = False
    down: bool = False
    tried: bool = True

    @property
    def given_back(self) -> ChildRow:
        """Its row as it waits for the next publish: what was not tried does not count."""
        row = self.message.row
        return row if self.tried else replace(row, dispatches=row.dispatches - 1)


class Publisher(Protocol):
    """Sends messages to the broker; the only thing behaviour knows of it."""

    @property
    def paced(self) -> bool:
        """Whether windows and rates make sense: not where children run at once, in this process."""

    def hand_out(self, batch_id: uuid.UUID, shares: int, rows: int, queue: str | None, task: str) -> bool:
        """Ask workers of a queue to send a batch's children, each share so many rows. False: nobody was asked."""

    def publish(self, messages: Sequence[Message]) -> list[NotSent]:
        """Send in order; answers those that were not sent. Never raises for a broker that is down."""

    def queue_length(self, queue: str | None, task: str) -> int | None:
        """Messages ready in a queue, or None where that cannot be known."""

    def terminate(self, task_ids: Sequence[str]) -> None:
        """Ask all workers to terminate these tasks' processes. Best effort."""


class Codec(Protocol):
    """JSON of arguments and results (datetime, Decimal and UUID survive)."""

    def dumps(self, value: Any) -> str: ...

    def loads(self, text: str) -> Any: ...


class Canvas(Protocol):
    """What a child's stored steps mean to Celery."""

    def expand(self, row: ChildRow, batch: BatchRow, prefix: tuple[Any, ...]) -> tuple[NewBatch, list[NewChild]]:
        """The batch that a group or chord among a child's steps is. `prefix`: arguments put before its own."""

    def next_step(self, row: ChildRow, batch: BatchRow, result: Any) -> Step | None:
        """What follows the child's present step, with its result bound; None after the last."""


class Backend(Protocol):
    """Celery's result backend, for those who wait there for a body that will never run."""

    def tell(self, batch: BatchRow, why: FirstFailure | None) -> None:
        """Store what became of the body, and why. May raise anything."""

    def died(self, row: ChildRow, why: FirstFailure) -> None:
        """Call the errbacks (`link_error`) of a child that crashed, as the run itself would have. May raise
        anything."""


class NoCanvas:
    """Where nothing is known of Celery: children have one step."""

    def expand(self, row: ChildRow, batch: BatchRow, prefix: tuple[Any, ...]) -> tuple[NewBatch, list[NewChild]]:
        raise LookupError(f"{row.key}: {row.task} is no single task")

    def next_step(self, row: ChildRow, batch: BatchRow, result: Any) -> Step | None:
        return None


def _policy_on_the_row(row: ChildRow, batch: BatchRow) -> RowPolicy | None:
    return RowPolicy.from_option(row.policy) if row.policy else None


def _nobody(event: events.Event) -> None:
    return None


@dataclass
class Tracker:
    """The parts of one application's tracking, handed to every behaviour."""

    store: Store
    settings: Settings
    publisher: Publisher
    codec: Codec
    emit: Callable[[events.Event], None] = field(default=_nobody)
    #: The policy of a row, also of one that was never claimed; None where this process does not know its task.
    policy_of: Callable[[ChildRow, BatchRow], RowPolicy | None] = field(default=_policy_on_the_row)
    #: Of what runs here (Python, Celery, this package, the application), for evidence.
    versions: Mapping[str, str] = field(default_factory=dict)
    canvas: Canvas = field(default_factory=NoCanvas)
    backend: Backend | None = None

    @property
    def store_id(self) -> uuid.UUID:
        return self.store.store_id


def declared_callback(batch: BatchRow, row: ChildRow) -> dict[str, Any]:
    """What the batch declared for a callback's row."""
    declared: dict[str, list[dict[str, Any]]] = json.loads(batch.callbacks)
    return declared[row.kind][row.ordinal]
