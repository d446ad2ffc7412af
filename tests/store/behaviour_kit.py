"""A tracker over a real store, with a publisher that keeps what it is given."""

from __future__ import annotations

import json
import os
import signal
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from celery_batchtrack.behaviour import failpoints
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.behaviour.identity import WorkerIdentity
from celery_batchtrack.behaviour.run import Run, Runner
from celery_batchtrack.behaviour.tracker import Message, NotSent, Tracker
from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Ending, Refused
from celery_batchtrack.vocabulary.settings import Settings
from celery_batchtrack.vocabulary.states import Status

E = TypeVar("E")


@dataclass
class Outbox:
    """Stands for the broker."""

    sent: list[Message] = field(default_factory=list)
    refuse: dict[int, bool] = field(default_factory=dict)  # position → final
    down: bool = False
    lengths: dict[str | None, int | None] = field(default_factory=dict)
    default_length: int | None = 0
    asked: list[tuple[str | None, str]] = field(default_factory=list)
    terminated: list[str] = field(default_factory=list)
    paced: bool = True
    workers_there: bool = True
    handed_out: list[tuple[uuid.UUID, int, int, str | None, str]] = field(default_factory=list)

    def hand_out(self, batch_id: uuid.UUID, shares: int, rows: int, queue: str | None, task: str) -> bool:
        if self.workers_there:
            self.handed_out.append((batch_id, shares, rows, queue, task))
        return self.workers_there

    def publish(self, messages: Sequence[Message]) -> list[NotSent]:
        if self.down:
            return [NotSent(each, "connection refused", down=True) for each in messages]
        refused = [each for each in messages if each.row.position in self.refuse]
        self.sent += [each for each in messages if each not in refused]
        return [NotSent(each, "broker says no", self.refuse[each.row.position]) for each in refused]

    def queue_length(self, queue: str | None, task: str) -> int | None:
        self.asked.append((queue, task))
        return self.lengths.get(queue or task, self.default_length)

    def terminate(self, task_ids: Sequence[str]) -> None:
        self.terminated += task_ids

    def published(self) -> list[ChildKey]:
        return [each.row.key for each in self.sent]

    def kinds(self, batch_id: uuid.UUID) -> list[str]:
        """Kinds of the callbacks published for a batch."""
        return sorted(each.row.kind for each in self.sent if each.row.batch_id == batch_id and each.row.kind != "child")


class Json:
    def dumps(self, value: Any) -> str:
        return json.dumps(value)

    def loads(self, text: str) -> Any:
        return json.loads(text)


@dataclass
class Told(Tracker):
    """A tracker that keeps its events."""

    heard: list[events.Event] = field(default_factory=list)

    def of(self, kind: type[E]) -> list[E]:
        return [each for each in self.heard if isinstance(each, kind)]

    @property
    def outbox(self) -> Outbox:
        assert isinstance(self.publisher, Outbox)
        return self.publisher


def tracker_on(store: Store, **settings: Any) -> Told:
    values = {"retry_backoff": 0.0, **settings}
    told = Told(store, Settings.validated(values), Outbox(), Json())
    told.emit = told.heard.append
    return told


@dataclass
class Bench:
    """One worker boot that runs what the outbox holds, in this process."""

    tracker: Told
    runner: Runner
    ran: list[tuple[ChildKey, str]] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    @classmethod
    def of(cls, tracker: Told, folder: Path | None, name: str = "w1@here", **more: Any) -> Bench:
        """Registered, with a folder of black boxes below `folder`."""
        identity = WorkerIdentity(name, **more)
        boxes = Boxes(folder, identity.id)
        boxes.create()
        tracker.store.register(identity.as_new_worker(15.0, "0"))
        return cls(tracker, Runner(tracker, identity, boxes, pause=lambda seconds: None))

    @property
    def worker(self) -> WorkerIdentity:
        return self.runner.worker

    @property
    def boxes(self) -> Boxes:
        return self.runner.boxes

    def claim(self, message: Message, policy: dict[str, Any] | None = None) -> Run:
        run = self.runner.claim(message.ticket, message.row.task, policy)
        assert isinstance(run, Run), run
        return run

    def work(self) -> None:
        """Run every message there is, and those that this leads to. Refused ones are dropped."""
        while self.tracker.outbox.sent:
            message = self.tracker.outbox.sent.pop(0)
            run = self.runner.claim(message.ticket, message.row.task, None)
            if isinstance(run, Refused):
                self.refused.append(run)
                continue
            self.ran.append((message.row.key, message.row.kind))
            self.runner.settle(run, Ending(Status.COMPLETED, "1"))

    def kinds(self) -> list[str]:
        """Of the callbacks that ran."""
        return sorted(kind for _, kind in self.ran if kind != "child")


def killed(act: Callable[[], object], at: str | None = None) -> int:
    """Do it in a forked process that dies by SIGKILL: at the failpoint `at`, else when it is done. Its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            with failpoints.armed(at or "", lambda: os.kill(os.getpid(), signal.SIGKILL)):
                act()
                if at is None:
                    os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"it never reached {at}"
    return pid
