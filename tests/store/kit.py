"""What the tests of store, races and behaviour share: a store with a registered worker, and short ways to act."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from celery_batchtrack.store import Store, schema
from celery_batchtrack.store.quarantine import count_kill
from celery_batchtrack.vocabulary.aftermath import Killer, Part, Rerun
from celery_batchtrack.vocabulary.evidence import Evidence, IncidentRow
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import (
    ChildRow,
    Claimed,
    Ending,
    HostIdentity,
    NewBatch,
    NewChild,
    NewWorker,
    Refused,
    Settled,
)
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict

HERE = HostIdentity("here", "boot-1", "pid:[1]")
ELSEWHERE = HostIdentity("elsewhere", "boot-2", "pid:[2]")
RETRY = {"on_crash": "retry", "max_crashes": 3, "process": True, "worker": True, "time_limit": True}

SEGFAULT = Evidence(
    Cause.SIGNAL, signal="SIGSEGV", message="died", hostname="here", worker="w1", pid=41, detected_by=Detector.MAIN
)
SILENCE = Evidence(Cause.WORKER_LOST, message="silent", detected_by=Detector.LEASE)
ERROR = Evidence(Cause.EXCEPTION, message="ValueError: no", traceback="Traceback …")
SET_ASIDE = Evidence(Cause.QUARANTINED, phase="before_claim", message="not sent: it killed 2 times")


def callbacks(*kinds: str) -> str:
    """What a batch declares: one callback of each kind, or several of a kind named more than once."""
    declared: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        entry = {"task": f"demo.{kind}", "task_id": str(uuid.uuid4()), "signature": "{}", "queue": None}
        declared.setdefault(kind, []).append(entry)
    return json.dumps(declared)


def some(count: int, *, items: int = 1, **more: Any) -> list[NewChild]:
    """Children with `items` identifiers each."""
    return [
        NewChild(
            "demo.task", str(uuid.uuid4()), '{"task": "demo.task"}',
            tuple(f"doc-{number}-{item}" for item in range(items)), items, **more,
        )
        for number in range(count)
    ]  # fmt: skip


def documents(*names: str, **more: Any) -> NewChild:
    """One child that works on these."""
    signature = {"task": "demo.task", "args": [list(names)], "kwargs": {}}
    return NewChild("demo.task", str(uuid.uuid4()), json.dumps(signature), names, len(names), **more)


def part(*names: str, status: Status = Status.PENDING, evidence: Evidence | None = None, **more: Any) -> Part:
    """What becomes of some of a split child's items."""
    signature = None if status is Status.COMPLETED else documents(*names).signature
    return Part(names, len(names), signature, str(uuid.uuid4()), status, evidence, **more)


def killer(item: str, after: int = 2, version: str = "1") -> Killer:
    return Killer(item, f"hash of {item}" if item.isprintable() else "a hash", version, after)


def killed(*names: str, evidence: Evidence = SEGFAULT) -> Part:
    return part(*names, status=Status.CRASHED, evidence=evidence)


def done(*names: str) -> Part:
    return part(*names, status=Status.COMPLETED)


@dataclass
class Scene:
    """A store, and workers that it knows."""

    store: Store
    worker_id: uuid.UUID = field(default_factory=uuid.uuid4)
    _slots: int = 0

    def worker(self, host: HostIdentity = ELSEWHERE, **more: Any) -> uuid.UUID:
        """Register one more worker."""
        values: dict[str, Any] = {
            "id": uuid.uuid4(), "kind": "worker", "name": "w@there", "host": host, "pid": 77, "pid_started": 7,
            "pool": "prefork", "lease": 15.0, "version": "0",
        }  # fmt: skip
        values.update(more)
        self.store.register(NewWorker(**values))
        return uuid.UUID(str(values["id"]))

    def batch(
        self, children: int | Sequence[NewChild] = 3, *, seal: bool = True, calls: Sequence[str] = (),
        tolerance: int | str = 0, **more: Any,
    ) -> uuid.UUID:  # fmt: skip
        batch_id = uuid7()
        new = NewBatch(
            batch_id, "upload", callbacks(*calls), {"tolerance": tolerance, **more.pop("options", {})}, **more
        )
        self.store.create(new, some(children) if isinstance(children, int) else children, seal=seal)
        return batch_id

    def slot(self) -> str:
        """A slot that nothing else in this test uses."""
        self._slots += 1
        return f"{1000 + self._slots}:1:1:0"

    def claim(
        self, key: ChildKey, *, attempt: int | None = None, token: uuid.UUID | None = None, slot: str | None = None,
        worker: uuid.UUID | None = None, policy: Mapping[str, Any] | None = None,
    ) -> Claimed | Refused:  # fmt: skip
        return self.store.claim(
            key, self.row(key).attempt if attempt is None else attempt, token or new_token(),
            worker or self.worker_id, slot or self.slot(), policy,
        )  # fmt: skip

    def run(self, batch_id: uuid.UUID, position: int = 0, **how: Any) -> Claimed:
        """Claim a child that must be claimable."""
        claimed = self.claim(ChildKey(batch_id, position), **how)
        assert isinstance(claimed, Claimed), claimed
        return claimed

    def complete(self, claimed: Claimed, result: str = '"done"') -> Settled:
        return self.store.settle(claimed.key, claimed.token, Ending(Status.COMPLETED, result))

    def fail(self, claimed: Claimed, evidence: Evidence | None = ERROR) -> Settled:
        return self.store.settle(
            claimed.key, claimed.token, Ending(Status.FAILED, None, Cause.EXCEPTION, evidence)
        )

    def crash(
        self, claimed: Claimed, verdict: Verdict = Verdict.OBSERVED, again: float | None = None,
        evidence: Evidence | None = None,
    ) -> Settled:  # fmt: skip
        evidence = evidence or (SEGFAULT if verdict is Verdict.OBSERVED else SILENCE)
        rerun = None if again is None else Rerun(again)
        return self.store.crash(self.row(claimed.key), evidence, verdict, rerun)

    def split(self, claimed: Claimed, *parts: Part, evidence: Evidence | None = None, **more: Any) -> Settled:
        """A run died, and its items are handed on. `evidence` is its own, where no part has it."""
        return self.store.split(self.row(claimed.key), parts, evidence, **more)

    def kill(
        self, item: str, *, after: int = 2, version: str = "1", task: str = "demo.task",
        evidence: Evidence = SEGFAULT, key: ChildKey | None = None,
    ) -> bool:  # fmt: skip
        """Count one death of an item. Whether that put it into quarantine."""
        with self.store.write() as connection:
            return count_kill(connection, task, killer(item, after, version), key or ChildKey(uuid7(), 0), evidence)

    def row(self, key: ChildKey) -> ChildRow:
        row = self.store.child(key)
        assert row is not None
        return row

    def at(self, batch_id: uuid.UUID, position: int) -> ChildRow:
        return self.row(ChildKey(batch_id, position))

    def rows(self, batch_id: uuid.UUID) -> list[ChildRow]:
        return list(self.store.children(batch_id))

    def statuses(self, batch_id: uuid.UUID) -> list[str]:
        return [row.status for row in self.rows(batch_id)]

    def called(self, batch_id: uuid.UUID) -> list[str]:
        """Kinds of the callback rows there are."""
        return sorted(row.kind for row in self.store.callback_rows(batch_id))

    def incidents(self, batch_id: uuid.UUID) -> list[IncidentRow]:
        return self.store.incidents(batch_id)

    def status(self, batch_id: uuid.UUID) -> str:
        row = self.store.batch(batch_id)
        assert row is not None
        return row.status

    def execute(self, statement: sa.Executable) -> None:
        """Forge what no write of the store would do."""
        with self.store.write() as connection:
            connection.execute(statement)

    def set_worker(self, worker_id: uuid.UUID, **values: Any) -> None:
        self.execute(sa.update(schema.worker).where(schema.worker.c.id == worker_id).values(**values))

    def set_batch(self, batch_id: uuid.UUID, **values: Any) -> None:
        self.execute(sa.update(schema.batch).where(schema.batch.c.id == batch_id).values(**values))

    def set_child(self, key: ChildKey, **values: Any) -> None:
        table = schema.child
        self.execute(
            sa.update(table)
            .where(table.c.batch_id == key.batch_id, table.c.position == key.position)
            .values(**values)
        )

    def violations(self, grace: float = 60.0) -> dict[str, int]:
        """The checks that find something."""
        return {each.check: each.violations for each in self.store.verify(grace) if each.violations}


def counts(scene: Scene, batch_id: uuid.UUID) -> dict[str, int]:
    """The counts by state that are not zero; checks that they add up."""
    progress = scene.store.progress(batch_id)
    names = ("pending", "running", "completed", "failed", "crashed", "cancelled")
    found = {name: getattr(progress, name) for name in names}
    assert sum(found.values()) == progress.total, found
    assert all(value >= 0 for value in found.values()), found
    return {name: value for name, value in found.items() if value}


def items_by_status(scene: Scene, batch_id: uuid.UUID) -> dict[str, list[str]]:
    """Identifiers of all items, by the state of the child that has them now; checks that the tally agrees."""
    found: dict[str, list[str]] = {}
    for row in scene.rows(batch_id):
        if row.status != Status.SPLIT:
            found.setdefault(row.status, []).extend(row.items)
    progress = scene.store.progress(batch_id)
    assert progress.items_total == sum(map(len, found.values()))
    for status in ("completed", "failed", "crashed", "cancelled"):
        assert getattr(progress, f"items_{status}") == len(found.get(status, ())), status
    return {status: sorted(names) for status, names in found.items()}


def every_item(scene: Scene, batch_id: uuid.UUID) -> list[str]:
    """Identifiers of all items, each as often as there is a child that has it now."""
    return sorted(name for names in items_by_status(scene, batch_id).values() for name in names)


def add_up(scene: Scene, batch_id: uuid.UUID) -> bool:
    """The counts add up, and are what the rows say."""
    counts(scene, batch_id)
    return scene.violations() == {}


@contextmanager
def statements(engine: sa.Engine, parameters: list[Any] | None = None) -> Iterator[list[str]]:
    """Every statement that this engine sends meanwhile, BEGIN included where it is sent as one."""
    sent: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, values: Any, *more: Any) -> None:
        sent.append(statement)
        if parameters is not None:
            parameters.append(values)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


def refused(answer: Claimed | Refused) -> Refused:
    assert isinstance(answer, Refused), answer
    return answer


def dispatch_all(scene: Scene, batch_id: uuid.UUID | None = None) -> list[int]:
    """Take everything that is due, as a dispatcher does; the positions taken."""
    return [each.child.position for each in scene.store.take_undispatched(batch_id, 1000)]


Make = Callable[..., Scene]
