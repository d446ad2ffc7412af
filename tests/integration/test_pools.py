"""Pools other than prefork: children share their worker's process, and its death is all of theirs."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator

import pytest

from tests.acceptance.scene import Scene, embedded
from tests.nodes import ProcessWorker


@pytest.fixture(scope="module", params=["threads", "solo"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scene(pool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    scene = embedded(tmp_path_factory.mktemp(pool))
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def worker(pool: str, scene: Scene) -> Iterator[ProcessWorker]:
    with scene.worker("--pool", pool) as worker:
        yield worker


def test_children_complete_and_the_callback_gets_their_results(scene: Scene, worker: ProcessWorker) -> None:
    batch = scene.run(
        *(scene.here.add.s(at, 1) for at in range(10)), on_success=scene.here.called.s(scene.place("results"))
    )
    assert batch.status == "completed"
    assert scene.lines("results") == [str([at + 1 for at in range(10)])]
    assert scene.violations() == []


@pytest.mark.parametrize("how", ["sys.exit", "KeyboardInterrupt", "MemoryError", "ValueError"])
@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_child_that_raises_fails_alone(scene: Scene, worker: ProcessWorker, kind: str, how: str) -> None:
    """Unwrapped, `MemoryError` or `sys.exit` ends the worker, or blocks its prefetch for ever."""
    pid, task = worker.pid, getattr(scene.tasks, kind)
    batch = scene.run(task.s([{"db": "PMC", "id": how}], how), *(scene.here.add.s(at, 1) for at in range(4)))
    assert [child.status for child in batch.children()] == ["failed"] + ["completed"] * 4
    (incident,) = batch.incidents()
    assert (incident.cause, incident.items, incident.pid) == ("exception", [f"PMC:{how}"], pid)
    assert how.removeprefix("sys.").lower().removeprefix("exit") in (incident.message or "").lower()
    assert worker.alive
    assert scene.violations() == []


def test_a_retry_runs_again(scene: Scene, worker: ProcessWorker) -> None:
    batch = scene.run(scene.here.retrying.s([], 0, scene.place("retry")))
    assert [(child.status, child.attempt) for child in batch.children()] == [("completed", 2)]
    assert scene.violations() == []


def test_a_crash_takes_the_worker_and_its_restart_settles_the_child(scene: Scene, worker: ProcessWorker) -> None:
    batch = scene.start(
        scene.tasks.early.s([{"db": "PMC", "id": "killer"}], "SIGSEGV", scene.place("killer")),
        scene.here.add.s(1, 1).set(countdown=2),
        on_finish=scene.here.called.s(scene.place("finish")),
    )
    assert worker.wait() == -signal.SIGSEGV
    worker.restart()
    batch.wait(30, callbacks=True)
    killer, other = batch.children()
    assert (killer.status, killer.cause, killer.items) == ("crashed", "signal", ["PMC:killer"])
    assert other.status == "completed"
    (incident,) = batch.incidents()
    assert (incident.detected_by, incident.pid) == ("host", int(scene.lines("killer")[0]))
    assert (incident.signal, incident.item) == ("SIGSEGV", "PMC:killer"), "the stack that it left says so"
    assert incident.python_frame is not None and incident.python_frame.startswith("crashes.py")
    assert len(scene.lines("finish")) == 1
    assert scene.violations() == []


def refusal(worker: ProcessWorker) -> str:
    """What a worker that does not start says."""
    worker.start()
    try:
        assert worker.wait(20) != 0
    finally:
        worker.stop()
    return worker.logs()


def assert_refused(said: str) -> None:
    assert "celery-batchtrack does not support -P gevent yet" in said
    assert "Use -P prefork, threads or solo" in said
    assert "ready." not in said


def test_a_pool_of_greenlets_is_refused_with_a_reason(scene: Scene, pool: str) -> None:
    if pool == "solo":
        pytest.skip("once is enough")
    env = {"CELERY_CUSTOM_WORKER_POOL": "tests.acceptance.apps.gevent:TaskPool"}
    assert_refused(refusal(scene.worker("--pool=custom", env=env)))


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")
def test_gevent_is_refused_with_a_reason(scene: Scene, pool: str) -> None:
    assert_refused(refusal(scene.worker("--pool=gevent")))
