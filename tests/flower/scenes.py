"""Rich data for the pages: batches in every state, made by the store's own writes, then moved back in time."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.store import Store, schema
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import NewChild
from celery_batchtrack.vocabulary.states import Cause, Detector
from tests.store.kit import HERE, Scene

STACK = '''Fatal Python error: Segmentation fault

Current thread 0x00007f3a2c1ff740 (most recent call first):
  File "/srv/shop/invoices/render.py", line 88 in embed_font
  File "/srv/shop/invoices/render.py", line 141 in render_page
  File "/srv/shop/invoices/tasks.py", line 37 in render_invoice
  File "/usr/lib/python3.11/site-packages/celery/app/trace.py", line 453 in trace_task
'''
TRACEBACK = '''Traceback (most recent call last):
  File "/srv/shop/invoices/tasks.py", line 41, in render_invoice
    total = sum(line["amount"] for line in invoice["lines"])
  File "/srv/shop/invoices/tasks.py", line 41, in <genexpr>
    total = sum(line["amount"] for line in invoice["lines"])
KeyError: 'amount'
'''
SEGFAULT = Evidence(
    Cause.SIGNAL, signal="SIGSEGV", message="Worker exited prematurely: signal 11 (SIGSEGV)", stack=STACK,
    python_frame="render.py:88 in embed_font", hostname="web-3", worker="invoices@web-3", pid=771,
    detected_by=Detector.MAIN, note="page 3 of 12, font Inter-Bold", peak_memory=412_000_000, item_index=0,
    items_done=0, versions={"app": "2026.11.3", "celery": "5.7.0", "python": "3.11.7"},
)  # fmt: skip
KEY_ERROR = Evidence(
    Cause.EXCEPTION, message="KeyError: 'amount'", exception="KeyError", traceback=TRACEBACK,
    python_frame="tasks.py:41 in <genexpr>", hostname="web-1", worker="invoices@web-1", pid=402,
)  # fmt: skip
OOM = Evidence(
    Cause.OOM, signal="SIGKILL", message="killed by the kernel: out of memory", hostname="web-2",
    worker="images@web-2", pid=912, detected_by=Detector.MAIN, peak_memory=3_900_000_000,
    python_frame="resize.py:17 in decode",
)  # fmt: skip

HOSTILE = (
    "<b>bold</b><script>alert(1)</script> \x1b[31mred\x1b[0m \u202eesrever\nline \x07 {{ 1 + 1 }} {% raw x %} '\"&"
)
FORMULA = "=HYPERLINK(\"http://evil\",\"x\")"


@dataclass
class Rich:
    """Ids of what there is."""

    scene: Scene
    invoices: uuid.UUID  # runs, with crashes and failures
    images: uuid.UUID  # ended `failed`
    reindex: uuid.UUID  # completed
    paused: uuid.UUID
    parent: uuid.UUID
    hostile: uuid.UUID
    crashed: int  # position in `invoices`
    failed: int


def child(task: str, *items: str, at: int = 0) -> NewChild:
    return NewChild(task, str(uuid.uuid4()), f'{{"task": "{task}"}}', items, max(1, len(items)), queue="celery")


def build(store: Store, seed: int = 7, *, hostile: bool = True) -> Rich:
    """Without what is `hostile`, also for pictures."""
    scene, random_ = Scene(store), random.Random(seed)
    scene.worker(replace(HERE, hostname="web-3"), id=scene.worker_id, name="invoices@web-3", pid=771, version="0.1.0")
    scene.worker(replace(HERE, hostname="web-1"), name="invoices@web-1", pid=402, version="0.1.0")
    invoices, crashed, failed = _invoices(scene, random_)
    _images(scene, random_, timedelta(days=2))
    return Rich(
        scene, invoices, _images(scene, random_, timedelta(hours=2)), _reindex(scene, random_), _paused(scene),
        _nested(scene), _hostile(scene) if hostile else invoices, crashed, failed,
    )  # fmt: skip


def alive(scene: Scene) -> None:
    """As if its workers had beaten just now, and a sweep been made."""
    now = scene.store.current_time()
    scene.execute(sa.update(schema.worker).values(beat_at=now, started_at=now - timedelta(hours=31)))
    scene.execute(sa.update(schema.meta).values(swept_at=now, swept_by="invoices@web-1"))


def _invoices(scene: Scene, random_: random.Random) -> tuple[uuid.UUID, int, int]:
    batch = scene.batch(
        [child("shop.invoices.render_invoice", f"INV-{20_000 + at}") for at in range(240)], tags=["nightly", "billing"],
        metadata={"tenant": "acme", "month": "2026-11"}, parent_task="shop.billing.start", parent_task_id="5c1e",
        description="November invoices, rendered and archived", calls=("on_success", "on_finish"),
        options={"tolerance": "5%", "max_in_flight": 100},
    )  # fmt: skip
    scene.set_batch(batch, name="invoices")
    run_by, crashes, failures = scene.worker_id, [31, 118, 119], [12, 77, 140, 141, 160]
    for at in range(180):
        run = scene.run(batch, at)
        if at in crashes:
            scene.crash(run, evidence=replace(SEGFAULT, item=f"INV-{20_000 + at}", worker_id=run_by))
        elif at in failures:
            scene.fail(run, KEY_ERROR)
        else:
            scene.complete(run)
    for at in range(180, 186):
        scene.run(batch, at)
    spread(scene, batch, random_, minutes=9)
    return batch, crashes[0], failures[0]


def _images(scene: Scene, random_: random.Random, ago: timedelta) -> uuid.UUID:
    batch = scene.batch([child("shop.images.thumbnail", f"IMG-{at:05}.tif") for at in range(60)], tags=["import"])
    scene.set_batch(batch, name="thumbnails")
    for at in range(60):
        run = scene.run(batch, at)
        if at in (7, 44):
            scene.crash(run, evidence=replace(OOM, item=f"IMG-{at:05}.tif"))
            item, key = f"IMG-{at:05}.tif", ChildKey(batch, at)
            scene.kill(item, version="", task="shop.images.thumbnail", evidence=OOM, key=key)
        else:
            scene.complete(run)
    assert scene.store.finish(batch) is not None
    spread(scene, batch, random_, minutes=30, until=ago)
    return batch


def _reindex(scene: Scene, random_: random.Random) -> uuid.UUID:
    batch = scene.batch([child("shop.search.index", f"product:{at}", f"product:{at + 1}") for at in range(0, 160, 2)])
    scene.set_batch(batch, name="reindex")
    for at in range(80):
        scene.complete(scene.run(batch, at))
    assert scene.store.finish(batch) is not None
    spread(scene, batch, random_, minutes=4, until=timedelta(days=1, hours=3))
    return batch


def _paused(scene: Scene) -> uuid.UUID:
    batch = scene.batch([child("shop.mail.send", f"customer-{at}") for at in range(40)])
    scene.set_batch(batch, name="newsletter")
    for at in range(9):
        scene.complete(scene.run(batch, at))
    scene.store.pause(batch, "by hand")
    return batch


def _nested(scene: Scene) -> uuid.UUID:
    outer = scene.batch([child("shop.importer.part", f"part-{at}") for at in range(3)])
    scene.set_batch(outer, name="import")
    rows = [child("shop.importer.row", f"row-{at}") for at in range(8)]
    inner = scene.batch(rows, parent_batch=outer, parent_position=1)
    scene.set_batch(inner, name="import part 1")
    scene.complete(scene.run(outer, 0))
    for at in range(5):
        scene.complete(scene.run(inner, at))
    return outer


def _hostile(scene: Scene) -> uuid.UUID:
    batch = scene.batch(
        [child("shop.<b>evil</b>", HOSTILE.replace("\0", ""), "x" * 100_000), child("shop.evil", FORMULA)],
        tags=["<i>tag</i>", "=1+1"], metadata={"<u>key</u>": "<script>alert(2)</script>"}, description="y" * 100_000,
    )  # fmt: skip
    scene.set_batch(batch, name=HOSTILE[:200])
    evil = replace(
        SEGFAULT, message=HOSTILE + "z" * 30_000, stack=HOSTILE + "\n" + STACK, item=HOSTILE, note=HOSTILE,
        worker=FORMULA, hostname="<b>host</b>", python_frame="<script>x</script>:1 in <module>",
    )  # fmt: skip
    scene.crash(scene.run(batch, 0), evidence=evil)
    scene.fail(scene.run(batch, 1), replace(KEY_ERROR, exception="<img src=x onerror=alert(3)>", worker=FORMULA))
    return batch


def spread(
    scene: Scene, batch_id: uuid.UUID, random_: random.Random, *, minutes: float, until: timedelta = timedelta()
) -> None:
    """As if the children had run one after the other in the minutes before now (less `until`)."""
    now = scene.store.current_time() - until
    rows = [row for row in scene.rows(batch_id) if row.started_at is not None]
    step = minutes * 60 / max(1, len(rows))
    start = now - timedelta(minutes=minutes)
    for at, row in enumerate(rows):
        took = random_.lognormvariate(0.4, 0.7)
        began = start + timedelta(seconds=at * step * random_.uniform(0.9, 1.0))
        ended = None if row.finished_at is None else min(began + timedelta(seconds=took), now)
        scene.set_child(row.key, started_at=began, finished_at=ended)
        _move_incidents(scene, row.key, ended)
    ended_at = scene.store.batch(batch_id).finished_at  # type: ignore[union-attr]
    scene.set_batch(
        batch_id, created_at=start - timedelta(seconds=8), sealed_at=start - timedelta(seconds=2), started_at=start,
        **({"finished_at": now} if ended_at is not None else {}),
    )  # fmt: skip


def _move_incidents(scene: Scene, key: ChildKey, when: Any) -> None:
    if when is None:
        return
    table = schema.incident
    scene.execute(
        sa.update(table).where(table.c.batch_id == key.batch_id, table.c.position == key.position)
        .values(died_at=when, detected_at=when + timedelta(milliseconds=140))
    )  # fmt: skip
