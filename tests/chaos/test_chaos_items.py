"""Random faults against children whose items are handed on: no item is lost or doubled, and no poison passes.

A pool process that is killed from outside looks as if its item had done it: so innocents may be crashed here, but they
are told, and counted once.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from typing import Any

import pytest

from celery_batchtrack import Batch
from tests.acceptance.scene import Scene
from tests.chaos.test_chaos import Monkey, let_loose

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(200)]

APP = "tests.acceptance.apps.recovery"
CHILDREN, ITEMS = 18, 8
POLICIES = ("skip", "bisect", "resume", "isolated_skip", "retry", "record")
DEEDS = ("SIGSEGV", "SIGKILL", "exit")


@pytest.fixture
def module() -> str:
    return APP


def header(scene: Scene, dice: random.Random) -> tuple[list[Any], set[str]]:
    """The children, and the items that kill whoever touches them."""
    made, poisons = [], set()
    for at in range(CHILDREN):
        docs: list[dict[str, Any]] = [{"id": f"{at}.{number}", "does": "nap"} for number in range(ITEMS)]
        for doc in dice.sample(docs, dice.choice([0, 0, 1, 2])):
            doc["does"] = dice.choice(DEEDS)
            poisons.add(doc["id"])
        made.append(getattr(scene.tasks, dice.choice(POLICIES)).s(docs, scene.place(f"child{at}")))
    return made, poisons


def test_no_item_vanishes(scene: Scene, seed: int) -> None:
    print(f"replay: pytest tests/chaos --chaos-seed={seed}")
    dice = random.Random(seed)
    children, poisons = header(scene, dice)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(scene.worker()) for _ in range(2)]
        batch = scene.start(*children, on_success=scene.here.flat.s(scene.place("body")))
        let_loose(Monkey(scene, batch, workers, dice), stack)
        batch.wait(80, callbacks=True)

    rows = [child.row for child in batch.children()]
    leaves = Counter(item for row in rows if row.status != "split" for item in row.items)
    assert leaves == Counter(f"{at}.{number}" for at in range(CHILDREN) for number in range(ITEMS))
    assert scene.violations() == []
    assert_told(scene, batch, poisons)
    (body,) = [row for row in batch._callback_rows() if row.kind == "on_success"]
    assert body.attempt == 1


def assert_told(scene: Scene, batch: Batch, poisons: set[str]) -> None:
    incidents = batch.incidents()
    for child in batch.children():
        if child.status == "completed":
            assert not poisons & set(child.items), f"#{child.position} completed with a poison"
            done = set(scene.lines(f"child{child.position if child.origin is None else child.origin}"))
            assert set(child.items) <= done, f"#{child.position}: completed, but never done"
        elif child.status == "crashed":
            assert any(each.position == child.position for each in incidents)
