"""Random faults against chains, nested batches and children that are added: nothing waits for ever or counts twice."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter

import pytest

from celery_batchtrack import chord
from celery_batchtrack.behaviour import dispatch
from celery_batchtrack.vocabulary.records import Outgoing
from tests.acceptance.scene import Scene
from tests.acceptance.test_batch_life import LIFE, canvases
from tests.chaos.test_chaos import Monkey, let_loose
from tests.helpers import eventually

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


@pytest.fixture
def module() -> str:
    return LIFE


class CanvasMonkey(Monkey):
    def send_duplicates(self) -> None:
        """Only of rows that are messages at all."""
        tracker, row = self.scene.batchtrack.tracker, self.batch.row
        rows = [child.row for child in self.batch.children() if child.task not in dispatch.CANVAS]
        again = [Outgoing(each, row) for each in self.dice.sample(rows, min(10, len(rows)))]
        tracker.publisher.publish([dispatch.message_of(tracker, each) for each in again])


def test_no_link_and_no_nested_batch_vanishes(scene: Scene, seed: int) -> None:
    print(f"replay: pytest tests/chaos --chaos-seed={seed}")
    dice, tasks, store = random.Random(seed), scene.tasks, scene.batchtrack.store
    told = tasks.told.s(scene.place("told"))
    options = {"tolerance": "100%", "on_crash": "retry", "max_crashes": 50, "on_finish": told}
    made = chord(canvases(tasks, dice, 30, 2), app=scene.app, batch=options)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(scene.worker()) for _ in range(2)]
        batch = made(tasks.kept.s(scene.place("body"))).batch
        let_loose(CanvasMonkey(scene, batch, workers, dice), stack)
        batch.wait(100, callbacks=True)
        eventually(
            lambda: store.unsettled() == [] or None, 60, what="every nested batch and every callback to end"
        )
    assert scene.violations() == []
    progress = batch.progress()
    assert progress.completed + progress.failed + progress.crashed + progress.cancelled == progress.total
    called = Counter((row.kind, row.attempt) for row in batch._callback_rows())
    assert called == Counter([("on_success", 1), ("on_finish", 1)]), "each was started once"
    for nested in batch.nested():
        assert nested.row.ended and nested.row.parent_batch == batch.id
    for line in scene.lines("body"):  # a body that was killed at once wrote nothing
        assert len(json.loads(line)) == progress.completed
    assert len(scene.lines("body")) <= 1 and len(scene.lines("told")) <= 1
