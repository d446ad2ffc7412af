"""celery-once: what is queued already is not queued again, and no lock of a child's own keeps the child back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from tests.helpers import eventually
from tests.neighbours.locks import Locked, locked
from tests.servers import RedisServer


@pytest.fixture(scope="module")
def scene(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    with locked(tmp_path_factory.mktemp("once"), redis_server.url) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_locks(redis_url: str) -> None:
    """Each test begins without."""


def test_a_child_takes_the_lock_and_gives_it_back(scene: Locked) -> None:
    place = scene.place("once")
    batch = scene.start(scene.here.once_wait.s(place))
    scene.wait_met("once")
    assert len(scene.held()) == 1
    scene.go("once")
    assert batch.wait(20) == "completed"
    eventually(lambda: not scene.held(), what="the lock given back")


def test_what_is_queued_already_is_not_sent_and_says_so(scene: Locked) -> None:
    place = scene.place("twice")
    here = scene.here
    batch = scene.start(
        here.once_wait.s(place), here.once_wait.s(place), here.pass_on.s(place) | here.once_wait.s()
    )  # fmt: skip
    scene.wait_met("twice")
    scene.eventually_statuses(batch, "running", "failed", "failed")
    assert "own apply_async of once.wait (QueueOnce) raised AlreadyQueued" in scene.why(batch, 1)
    assert "AlreadyQueued" in scene.why(batch, 2), "a chain's link, too"
    scene.batchtrack.sweep()
    assert scene.statuses(batch) == ["running", "failed", "failed"]
    scene.go("twice")
    assert batch.wait(20) == "partial"
    assert scene.lines("twice") == scene.lines("twice")[:1], "it ran once"
    eventually(lambda: not scene.held(), what="the lock given back")
    assert batch.retry() == 2
    assert batch.wait(20) == "completed", "another round asks again"


def test_what_is_refused_without_an_error_is_not_sent_either(scene: Locked) -> None:
    key = "qo_once.graceful_place-there"
    with redis.Redis.from_url(scene.locks) as client:
        client.set(key, "somebody else's", ex=60)
    batch = scene.run(scene.here.graceful.s("there"))
    assert scene.statuses(batch) == ["failed"]
    assert "returned no task's id: it did not send it" in scene.why(batch, 0)
    assert scene.held() == [key]


def test_a_child_that_was_killed_runs_again_although_its_lock_is_held(scene: Locked) -> None:
    batch = scene.run(scene.here.once_die.s(scene.place("killed")))
    assert scene.statuses(batch) == ["completed"]
    assert len(scene.lines("killed")) == 2


def test_a_lost_message_is_sent_again_although_its_lock_is_held(scene: Locked) -> None:
    lost = scene.here.once_run.s(scene.place("lost")).set(queue="nobody")
    batch = scene.start(lost)
    assert len(scene.held()) == 1
    with scene.app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_purge("nobody")
    eventually(lambda: next(iter(batch.children())).dispatches >= 2, 20, what="another message")
    with scene.worker("--queues=nobody", "--pool=solo"):
        assert batch.wait(20) == "completed"


def test_a_broker_that_is_down_costs_no_lock(scene: Locked) -> None:
    """The lock is taken when the child is really sent; until then nothing keeps it back."""
    offline = Locked(scene.folder, scene.locks, "redis://127.0.0.1:1/0", broker_connection_timeout=1)
    batch = offline.start(offline.here.once_wait.s(scene.place("down")))
    scene.wait_met("down")
    assert next(iter(batch.children())).dispatches == 1, "what was not tried does not count"
    assert len(scene.held()) == 1
    scene.go("down")
    assert batch.wait(20) == "completed"
    eventually(lambda: not scene.held(), what="the lock given back")
    offline.close()
