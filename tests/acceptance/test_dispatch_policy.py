"""Windows, turns, rates, full queues and large batches, with real workers on Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_batchtrack import Batch
from tests.acceptance.scene import Scene
from tests.helpers import eventually
from tests.servers import BrokerWatch, resident

LIFE = "tests.acceptance.apps.life"


@pytest.fixture
def make(tmp_path: Path, redis_url: str, postgres_url: str) -> Iterator[Callable[..., Scene]]:
    """A scene with these settings."""
    made: list[Scene] = []

    def new(**conf: Any) -> Scene:
        made.append(Scene(tmp_path, redis_url, postgres_url, module=LIFE, **conf))
        return made[-1]

    yield new
    for scene in made:
        assert scene.violations() == []
        scene.close()


def test_the_broker_never_holds_more_than_the_window_while_a_large_batch_runs(
    make: Callable[..., Scene], redis_url: str
) -> None:
    scene, count = make(), 800
    with BrokerWatch(redis_url) as watch, scene.worker("--concurrency=4") as worker:
        worker.wait_ready()
        with Batch("large", app=scene.app, max_in_flight=40) as batch:
            batch.add_many(scene.tasks.value.s(at) for at in range(count))
        assert batch.wait(120) == "completed"
    assert watch.most_ready <= 40
    assert 30 < watch.most <= 40 + 4, "one for each process: its child is over, its message not yet acknowledged"
    assert (batch.progress().completed, list(batch.results())) == (count, list(range(count)))
    assert {child.attempt for child in batch.children()} == {1} == {child.dispatches for child in batch.children()}


def test_a_window_outlives_the_worker_that_fills_it_up(make: Callable[..., Scene]) -> None:
    scene = make(batchtrack_redispatch_after=1.0)
    place = scene.place("runs")
    with scene.worker("--concurrency=2") as first:
        first.wait_ready()
        batch = scene.start(*(scene.tasks.value.s(at, place) for at in range(400)), max_in_flight=10)
        eventually(lambda: len(scene.lines("runs")) > 100, 60, what="a hundred runs")
        first.kill()
    assert 0 < batch.progress().completed < 400
    with scene.worker("--concurrency=2") as second:
        second.wait_ready()
        batch.wait(90)
    progress = batch.progress()
    assert (progress.completed + progress.crashed, progress.crashed <= 2) == (400, True), "what ran died with it"


def test_the_small_batch_that_starts_behind_a_large_one_ends_early(make: Callable[..., Scene]) -> None:
    scene = make(batchtrack_max_in_flight=20)
    with scene.worker("--concurrency=2") as worker:
        worker.wait_ready()
        large = scene.start(*(scene.tasks.value.s(at) for at in range(500)), name="large")
        small = scene.start(*(scene.tasks.value.s(at) for at in range(30)), name="small")
        assert small.wait(60) == "completed"
        done = large.progress().completed
        assert large.wait(120) == "completed"
    assert done < 250, "it had its turn long before the other was over"
    assert large.row.finished_at is not None and small.row.finished_at is not None
    assert small.row.finished_at < large.row.finished_at


def test_no_more_children_run_than_max_running_says_and_the_queue_is_that_of_the_batch(
    make: Callable[..., Scene], redis_url: str
) -> None:
    scene = make()
    place = scene.place("held")
    with scene.worker("--concurrency=4", "-Q", "special") as worker:
        worker.wait_ready()
        batch = scene.start(*(scene.tasks.held.s(at, place) for at in range(6)), max_running=2, queue="special")
        eventually(lambda: len(scene.lines("held")) == 2, 30, what="two runs")
        watch = BrokerWatch(redis_url, "special")
        assert (watch.look(), batch.progress().running) == ((0, 0), 2), "two processes idle, and nothing is sent"
        scene.go("held")
        assert batch.wait(60) == "completed"
    assert {child.queue for child in batch.children()} == {"special"}


def test_a_rate_is_kept_whatever_ends_when(make: Callable[..., Scene]) -> None:
    scene = make()
    with scene.worker("--concurrency=4") as worker:
        worker.wait_ready()
        batch = scene.start(*(scene.tasks.value.s(at) for at in range(50)), rate="15/s")
        assert batch.wait(60) == "completed"
    sent = sorted(child.dispatched_at for child in batch.children())
    for earlier, later in zip(sent, sent[31:], strict=False):
        assert (later - earlier).total_seconds() > 0.99, "a burst of 15, and 15 more within a second"


def test_a_queue_is_not_flooded(make: Callable[..., Scene], redis_url: str) -> None:
    scene = make(batchtrack_max_queue_depth=20)
    with BrokerWatch(redis_url) as watch:
        with Batch("deep", app=scene.app) as batch:
            batch.add_many(scene.tasks.value.s(at) for at in range(500))
        assert watch.look() == (20, 0), "nobody consumes: it is full, and the parent has gone on"
        with scene.worker("--concurrency=2") as worker:
            worker.wait_ready()
            assert batch.wait(90) == "completed"
    assert watch.most_ready <= 4 * 20, "two pool processes, the main one and who waits may look at the same moment"


def test_a_large_batch_is_sent_by_the_workers(make: Callable[..., Scene], redis_url: str) -> None:
    scene = make(batchtrack_fan_out=100, batchtrack_dispatch_chunk=20)
    batch = scene.start(*(scene.tasks.value.s(at) for at in range(500)))
    watch = BrokerWatch(redis_url)
    assert watch.look() == (10, 0), "ten shares of fifty, and no child yet"
    with scene.worker("--concurrency=2") as worker:
        worker.wait_ready()
        assert batch.wait(60) == "completed"
    assert {child.dispatches for child in batch.children()} == {1}


def test_filling_a_batch_of_any_size_takes_the_same_memory(make: Callable[..., Scene]) -> None:
    """Rows are written in blocks, and only a window of them is sent."""
    scene = make()

    def grown(count: int) -> int:
        before = resident()
        with Batch("flat", app=scene.app, max_in_flight=5) as batch:
            batch.add_many(scene.tasks.value.s(at) for at in range(count))
        batch.cancel()
        return resident() - before

    grown(2000)  # what is imported and compiled once
    assert grown(20_000) < 12_000, "kB; all rows of so many would be 30,000"
