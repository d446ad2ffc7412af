"""What the documentation's queries and commands find: four batches of a shop, on either database.

``letters`` ended three days ago. ``articles`` runs now, and its first document is one that has killed before.
``thumbnails`` was paused by hand; ``imports`` was never sealed, and who was filling it is gone. Times and durations are
forged afterwards, so that each query has one answer.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.behaviour.identity import WorkerIdentity
from celery_batchtrack.store import Store, schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.durations import bucket
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import Ending, HostIdentity, NewBatch, NewChild, NewWorker
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict

STACK = """Fatal Python error: Segmentation fault

Current thread 0x00007fb8a4462b80 (most recent call first):
  File "/srv/shop/annotate.py", line 88 in annotate_one
  File "/srv/shop/annotate.py", line 12 in annotate"""
FRAME = "annotate.py:88 in annotate_one"
TRACEBACK = """Traceback (most recent call last):
  File "/srv/shop/annotate.py", line 40, in parse
ValueError: no title"""
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0


def _segfault(item: str, at: int, worker: uuid.UUID) -> Evidence:
    return Evidence(
        Cause.SIGNAL, signal="SIGSEGV", message="killed by SIGSEGV", item=item, item_index=at, stack=STACK,
        python_frame=FRAME, hostname="web-1", worker="w1@web-1", worker_id=worker, pid=771, note="tokenise",
        detected_by=Detector.MAIN,
    )  # fmt: skip


def _out_of_memory(item: str, worker: uuid.UUID) -> Evidence:
    return Evidence(
        Cause.OOM, signal="SIGKILL", message="killed for its memory", item=item, item_index=0, hostname="web-2",
        worker="w2@web-2", worker_id=worker, pid=90, peak_memory=4_100_000_000, detected_by=Detector.MAIN,
    )  # fmt: skip


def _error(worker: uuid.UUID) -> Evidence:
    return Evidence(
        Cause.EXCEPTION, message="ValueError: no title", exception="ValueError", traceback=TRACEBACK,
        python_frame="annotate.py:40 in parse", hostname="web-1", worker="w1@web-1", worker_id=worker, pid=772,
    )  # fmt: skip


def _children(task: str, *documents: Sequence[str]) -> list[NewChild]:
    signature = json.dumps({"task": task, "args": [], "kwargs": {}})
    return [NewChild(task, str(uuid.uuid4()), signature, tuple(each), len(each)) for each in documents]


@dataclass
class DocsScene:
    """`articles` is the batch that ``:id`` and ``ID`` stand for."""

    store: Store
    hour: datetime = field(init=False)
    web_1: uuid.UUID = field(init=False)
    web_2: uuid.UUID = field(init=False)
    articles: uuid.UUID = field(init=False)

    def __post_init__(self) -> None:
        self.store.migrate()
        self.hour = self.store.current_time().replace(minute=0, second=0, microsecond=0)
        self.web_1, self.web_2 = self._worker("w1@web-1"), self._worker("w2@web-2")
        self._letters()
        self._articles()
        self._thumbnails()
        self._imports()
        self._set(schema.worker, {"id": self.web_2}, lost_at=later(-9 * MINUTE), lost_by="host")

    def _letters(self) -> None:
        batch_id = self._batch("letters", _children("shop.annotate", ["PMC:13900", "PMC:13901"], ["PMC:14"]), 1)
        self._die(batch_id, 0, _segfault("PMC:13900", 0, self.web_1), 4.0)
        self._end(batch_id, 1, Ending(Status.COMPLETED, "1"), 2.0)
        self.store.finish(batch_id)
        self._move(batch_id, 3 * DAY, self.hour - timedelta(days=3))

    def _articles(self) -> None:
        documents = (
            ["PMC:13900", "PMC:13902"], ["PMC:20001", "PMC:20002"], ["PMC:31"], ["PMC:40", "PMC:41"], ["PMC:50"],
            ["PMC:60"], ["PMC:70"],
        )  # fmt: skip
        self.articles = batch_id = self._batch("articles", _children("shop.annotate", *documents), 3)
        self._die(batch_id, 0, _segfault("PMC:13900", 0, self.web_1), 6.0)
        self._die(batch_id, 1, _out_of_memory("PMC:20001", self.web_2), 30.0)
        failed = Ending(Status.FAILED, None, Cause.EXCEPTION, _error(self.web_1))
        self._end(batch_id, 2, failed, 1.0)
        self._end(batch_id, 3, Ending(Status.COMPLETED, "2"), 95.0)
        self._end(batch_id, 4, Ending(Status.COMPLETED, "1"), 3.0)
        self._run(batch_id, 5)
        self._move(batch_id, 30 * MINUTE, self.hour)
        self._set(schema.incident, {"batch_id": batch_id, "position": 1}, detected_at=later(-9 * MINUTE))
        self._set(schema.child, {"batch_id": batch_id, "position": 5}, started_at=later(-40.0))

    def _thumbnails(self) -> None:
        batch_id = self._batch("thumbnails", _children("shop.resize", ["cover.png"], ["back.png"]), 0)
        self._end(batch_id, 0, Ending(Status.COMPLETED, "1"), 1.0)
        self.store.pause(batch_id, "by hand")
        self._move(batch_id, 20 * MINUTE, self.hour)
        self._set(schema.batch, {"id": batch_id}, paused_at=later(-10 * MINUTE))

    def _imports(self) -> None:
        client = self._worker("import.py", kind="client")
        batch_id = self._batch("imports", _children("shop.load", ["jan.csv"]), 0, seal=False, opened_by=client)
        self._move(batch_id, 5 * MINUTE, self.hour)
        self._set(schema.worker, {"id": client}, lost_at=later(-4 * MINUTE), lost_by="host")

    # -- acting

    def _worker(self, name: str, kind: str = "worker") -> uuid.UUID:
        host = HostIdentity(name.partition("@")[2] or "cron-1", "boot", "pid:[1]")
        new = NewWorker(uuid.uuid4(), kind, name, host, 70, 7, "prefork", 3600.0, "0")
        self.store.register(new)
        return new.id

    def _batch(
        self, name: str, children: Sequence[NewChild], tolerance: int, *, seal: bool = True, **more: Any
    ) -> uuid.UUID:  # fmt: skip
        batch_id = uuid7()
        options = {"tolerance": tolerance, "callback_arg": "results", "results": "store"}
        self.store.create(NewBatch(batch_id, name, "{}", options, tags=["nightly"], **more), children, seal=seal)
        return batch_id

    def _run(self, batch_id: uuid.UUID, position: int) -> Any:
        key = ChildKey(batch_id, position)
        self.store.claim(key, 0, new_token(), self.web_1, f"{771 + position}:1:1:0")
        return self.store.child(key)

    def _die(self, batch_id: uuid.UUID, position: int, evidence: Evidence, seconds: float) -> None:
        assert self.store.crash(self._run(batch_id, position), evidence, Verdict.OBSERVED, None).written
        self._took(batch_id, position, seconds)

    def _end(self, batch_id: uuid.UUID, position: int, ending: Ending, seconds: float) -> None:
        row = self._run(batch_id, position)
        assert self.store.settle(row.key, row.run_token, ending).written
        self._took(batch_id, position, seconds)

    # -- forging

    def _set(self, table: sa.Table, where: dict[str, Any], **values: Any) -> None:
        with self.store.write() as connection:
            wanted = [table.c[name] == value for name, value in where.items()]
            connection.execute(sa.update(table).where(*wanted).values(**values))

    def _took(self, batch_id: uuid.UUID, position: int, seconds: float) -> None:
        ended = {"finished_at": later(0.0), "started_at": later(-seconds)}
        self._set(schema.child, {"batch_id": batch_id, "position": position}, **ended)
        self._set(
            schema.outcome, {"batch_id": batch_id, "shard": position % 16, "detail": ""},
            seconds=seconds, seconds_max=seconds, bucket=bucket(seconds),
        )  # fmt: skip

    def _move(self, batch_id: uuid.UUID, ago: float, hour: datetime) -> None:
        """All of it happened so long ago, and ended in this hour."""
        at = later(-ago)
        self._set(schema.batch, {"id": batch_id}, created_at=at, started_at=at)
        with self.store.write() as connection:
            ended = sa.update(schema.batch).where(schema.batch.c.id == batch_id)
            connection.execute(ended.where(schema.batch.c.finished_at.is_not(None)).values(finished_at=at))
        self._set(schema.incident, {"batch_id": batch_id}, detected_at=at, died_at=later(-ago - 0.2))
        self._set(schema.outcome, {"batch_id": batch_id}, time=hour)


def store_with_a_crash(url: str) -> tuple[Store, uuid.UUID]:
    """One batch of two children with two items each, the first of which died of SIGSEGV."""
    store = Store(url)
    store.migrate()
    batch_id = uuid7()
    worker = WorkerIdentity("docs@host")
    store.register(worker.as_new_worker(60.0, "0"))
    children = [
        NewChild(
            task="docs.parse", task_id=f"task-{at}", signature="{}", items=(f"PMC:{at}0", f"PMC:{at}1"), item_count=2
        )
        for at in range(2)
    ]
    options = {"tolerance": 1, "callback_arg": "results", "results": "store"}
    store.create(NewBatch(batch_id, "docs", "{}", options), children, seal=True)
    token, key = new_token(), ChildKey(batch_id, 0)
    store.claim(key, 0, token, worker.id, "1:1:1:0")
    row = store.child(key)
    assert row is not None
    evidence = Evidence(Cause.SIGNAL, signal="SIGSEGV", item="PMC:01", item_index=1, detected_by=Detector.MAIN)
    store.crash(row, evidence, Verdict.OBSERVED, None)
    return store, batch_id
