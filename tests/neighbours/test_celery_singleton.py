"""celery-singleton: a doubled task is the one that is queued already, which is no child of the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import eventually
from tests.neighbours.locks import Locked, locked
from tests.servers import RedisServer


@pytest.fixture(scope="module")
def scene(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    with locked(tmp_path_factory.mktemp("single"), redis_server.url) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_locks(redis_url: str) -> None:
    """Each test begins without."""


def test_a_child_takes_the_lock_and_gives_it_back(scene: Locked) -> None:
    batch = scene.start(scene.here.single_wait.s(scene.place("single")))
    scene.wait_met("single")
    assert len(scene.held()) == 1
    scene.go("single")
    assert batch.wait(20) == "completed"
    eventually(lambda: not scene.held(), what="the lock given back")


def test_what_is_queued_already_is_not_sent_and_says_so(scene: Locked) -> None:
    place = scene.place("twice")
    batch = scene.start(scene.here.single_wait.s(place), scene.here.single_wait.s(place))
    scene.wait_met("twice")
    scene.eventually_statuses(batch, "running", "failed")
    first = next(iter(batch.children())).task_id
    assert f"own apply_async of single.wait (Singleton) returned the id of another task, {first}" in scene.why(batch, 1)
    scene.go("twice")
    assert batch.wait(20) == "partial"
    assert len(scene.lines("twice")) == 1


def test_a_child_that_was_killed_runs_again_although_its_lock_is_held(scene: Locked) -> None:
    batch = scene.run(scene.here.single_die.s(scene.place("killed")))
    assert scene.statuses(batch) == ["completed"]
    assert len(scene.lines("killed")) == 2


def test_a_retry_that_its_own_lock_swallowed_is_sent_again(scene: Locked) -> None:
    """Outside a batch it would be lost: the task finds its own id in the lock, and takes that for its message."""
    batch = scene.run(scene.here.single_again.s(scene.place("again")))
    assert scene.statuses(batch) == ["completed"]
    assert len(scene.lines("again")) == 2
