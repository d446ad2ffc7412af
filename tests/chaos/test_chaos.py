"""Random faults against a small batch. Whatever happens: every child settles, callbacks start once, `verify` is clean.

A failing round prints its seed; `pytest tests/chaos --chaos-seed=SEED` plays the same faults again (their timing
is the machine's).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from celery_batchtrack import Batch
from celery_batchtrack.behaviour import dispatch
from celery_batchtrack.vocabulary.records import Outgoing
from celery_batchtrack.vocabulary.states import SETTLED
from tests.acceptance.scene import Scene
from tests.nodes import ProcessWorker

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(200)]

CHILDREN = 60
ACTIONS = 12


def children(scene: Scene, dice: random.Random) -> list[Any]:
    kinds = ["early", "late", "late_reject", "record", "retry", "autoretry"]
    ends = ["nap"] * 12 + ["ok"] * 4 + ["SIGSEGV", "SIGKILL", "exit 7", "ValueError", "MemoryError", "requeue"]
    made = []
    for at in range(CHILDREN):
        kind, how = dice.choice(kinds), dice.choice(ends)
        times = dice.choice([None, 1, 2]) if how in ("SIGSEGV", "SIGKILL", "ValueError") else 1
        task = getattr(scene.tasks, kind, None) or getattr(scene.here, kind)
        made.append(task.s([{"db": "chaos", "id": str(at)}], how, scene.place(str(at)), times))
    return made


class Monkey:
    """Does one harmful or confusing thing after the other. The dice decide which and when."""

    def __init__(self, scene: Scene, batch: Batch, workers: list[ProcessWorker], dice: random.Random) -> None:
        self.scene, self.batch, self.workers, self.dice = scene, batch, workers, dice
        self.stop = threading.Event()
        self.done: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.act()
        except BaseException as error:  # noqa: BLE001 (raised again by the test)
            self.error = error

    def act(self) -> None:
        deeds: list[Callable[[], None]] = [
            self.kill_pool_process, self.kill_pool_process, self.kill_pool_process, self.kill_main,
            self.kill_everything, self.shut_down_warm, self.shut_down_cold, self.freeze, self.send_duplicates,
            self.sweep,
        ]  # fmt: skip
        for _ in range(ACTIONS):
            if self.stop.wait(self.dice.uniform(0.05, 0.6)):
                return
            deed = self.dice.choice(deeds)
            self.done.append(deed.__name__)
            deed()

    def kill_pool_process(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            pool = psutil.Process(self.dice.choice(self.workers).pid).children()
            self.dice.choice(pool).send_signal(self.dice.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]))

    def kill_main(self) -> None:
        worker = self.dice.choice(self.workers)
        worker.kill()
        worker.restart()

    def kill_everything(self) -> None:
        worker = self.dice.choice(self.workers)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.restart()

    def shut_down_warm(self) -> None:
        worker = self.dice.choice(self.workers)
        worker.terminate()
        # Where a pool process was killed just before, billiard's others may wait 30 s for an answer (Celery 5.7).
        worker.wait(45)
        worker.restart()

    def shut_down_cold(self) -> None:
        worker = self.dice.choice(self.workers)
        worker.quit()
        worker.wait(30)
        worker.restart()

    def freeze(self) -> None:
        worker = self.dice.choice(self.workers)
        worker.send_signal(signal.SIGSTOP)
        self.stop.wait(1.0)
        worker.send_signal(signal.SIGCONT)

    def send_duplicates(self) -> None:
        """Messages that fit their row, and messages of a stage that is over."""
        tracker, row = self.scene.batchtrack.tracker, self.batch.row
        rows = [child.row for child in self.batch.children()]
        again = [Outgoing(each, row) for each in self.dice.sample(rows, 15)]
        tracker.publisher.publish([dispatch.message_of(tracker, each) for each in again])

    def sweep(self) -> None:
        self.scene.batchtrack.sweep()


def let_loose(monkey: Monkey, stack: contextlib.ExitStack) -> None:
    """Until it has done all its deeds; raises what went wrong with them."""
    thread = threading.Thread(target=monkey.run)
    thread.start()
    stack.callback(thread.join)
    stack.callback(monkey.stop.set)
    thread.join(100)
    print(f"it did: {', '.join(monkey.done)}")
    assert not thread.is_alive()
    if monkey.error is not None:
        raise monkey.error


def test_no_child_vanishes(scene: Scene, seed: int) -> None:
    print(f"replay: pytest tests/chaos --chaos-seed={seed}")
    dice = random.Random(seed)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(scene.worker()) for _ in range(2)]
        batch = scene.start(
            *children(scene, dice),
            on_success=scene.here.called_bare.si(scene.place("success")),
            on_finish=scene.here.called_bare.si(scene.place("finish")),
            on_first_failure=scene.here.called_bare.si(scene.place("first")),
            max_in_flight=dice.choice([None, 4, 10]),
        )
        let_loose(Monkey(scene, batch, workers, dice), stack)
        assert all(worker.alive for worker in workers)
        batch.wait(80, callbacks=True)

    assert_all_settled(scene, batch)
    assert_callbacks_once(scene, batch)
    assert scene.violations() == []


def assert_all_settled(scene: Scene, batch: Batch) -> None:
    progress = batch.progress()
    assert (progress.pending, progress.running, progress.total) == (0, 0, CHILDREN)
    incidents = batch.incidents()
    for child in batch.children():
        runs = len(scene.lines(str(child.position)))
        assert child.status in SETTLED
        assert runs <= child.attempt, f"#{child.position} ran {runs} times in {child.attempt} attempts"
        assert child.crashes <= 3
        if child.status == "completed":
            assert runs >= 1
        else:
            own = [each for each in incidents if each.position == child.position]
            assert any(each.outcome == child.status for each in own), f"#{child.position} without evidence"


def assert_callbacks_once(scene: Scene, batch: Batch) -> None:
    """A callback's own process may be killed: then it is crashed, and never starts again by itself."""
    rows = {row.kind: row for row in batch._callback_rows()}
    assert {"on_success", "on_finish"} <= set(rows)
    for kind, row in rows.items():
        assert row.attempt == 1, kind
        assert len(scene.lines(kind.removeprefix("on_").removesuffix("_failure"))) == int(row.status == "completed")
