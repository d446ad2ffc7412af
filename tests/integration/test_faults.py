"""Databases, brokers and creators that die in mid-batch: nothing is lost, and nothing runs twice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_batchtrack import Batch
from celery_batchtrack.glue.publish import BrokerPublisher
from tests.acceptance.scene import Scene, embedded
from tests.helpers import ROOT, GuardedProcess, eventually, unique
from tests.nodes import ProcessWorker
from tests.servers import PostgresServer, RedisServer, require

#: Lost messages are missed, and claims give up, within seconds.
IMPATIENT = {
    "batchtrack_redispatch_after": 1.0,
    "batchtrack_redispatch_wait": 4.0,
    "batchtrack_detect_every": 0.5,
    "batchtrack_claim_timeout": 0.5,
}


# -- the database --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """This module's own, to be killed."""
    with require(PostgresServer) as server:
        yield server


@pytest.fixture(scope="module")
def scene(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("faults")
    scene = Scene(folder, f"batchtrack+filesystem://{folder / 'broker'}", postgres.create_database(), **IMPATIENT)
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def worker(scene: Scene) -> Iterator[ProcessWorker]:
    with scene.worker() as worker:
        yield worker


@pytest.fixture(autouse=True)
def the_database_is_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "postgres" in request.fixturenames:
        request.getfixturevalue("postgres").start()


def meeting(scene: Scene, name: str) -> tuple[Batch, str]:
    """A batch of one child, which runs and waits at a place of its own."""
    place = unique(name)
    batch = scene.start(
        scene.tasks.meet.s(scene.place(place)), on_finish=scene.here.called_bare.si(scene.place(f"{place}.end"))
    )
    scene.wait_met(place)
    return batch, place


def spooled(scene: Scene) -> list[Path]:
    return list((scene.folder / "boxes").glob("*/spool/*.json"))


def assert_completed_once(scene: Scene, batch: Batch, place: str) -> None:
    batch.wait(40, callbacks=True)
    (child,) = batch.children()
    assert (child.status, child.attempt) == ("completed", 1)
    assert child.result == f"met {place}"
    assert batch.incidents() == []
    assert len(scene.lines(place)) == len(scene.lines(f"{place}.end")) == 1
    assert not spooled(scene)
    assert scene.violations() == []


def test_an_end_waits_for_a_database_that_is_away(
    scene: Scene, worker: ProcessWorker, postgres: PostgresServer
) -> None:
    batch, place = meeting(scene, "settle")
    postgres.kill()
    scene.go(place)
    eventually(lambda: spooled(scene), what="the outcome on disk")
    postgres.start()
    assert_completed_once(scene, batch, place)


def test_a_spooled_end_survives_its_process(scene: Scene, worker: ProcessWorker, postgres: PostgresServer) -> None:
    """The main process delivers it: a completed child must not become a crash."""
    batch, place = meeting(scene, "process")
    postgres.kill()
    scene.go(place)
    eventually(lambda: spooled(scene), what="the outcome on disk")
    pid = int(scene.lines(place)[0])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: f"pid:{pid} exited with 'signal 9 (SIGKILL)'" in worker.logs(), what="the death noticed")
    postgres.start()
    assert_completed_once(scene, batch, place)


def test_a_spooled_end_survives_its_whole_worker(scene: Scene, worker: ProcessWorker, postgres: PostgresServer) -> None:
    """The next worker on the host delivers it before it convicts anybody."""
    batch, place = meeting(scene, "worker")
    postgres.kill()
    scene.go(place)
    eventually(lambda: spooled(scene), what="the outcome on disk")
    worker.kill()
    postgres.start()
    worker.restart()
    assert_completed_once(scene, batch, place)


def test_a_death_without_a_database_is_written_when_it_is_back(
    scene: Scene, worker: ProcessWorker, postgres: PostgresServer
) -> None:
    batch, place = meeting(scene, "death")
    pid = int(scene.lines(place)[0])
    postgres.kill()
    os.kill(pid, signal.SIGSEGV)
    eventually(lambda: f"pid:{pid} exited with 'signal 11 (SIGSEGV)'" in worker.logs(), what="the death noticed")
    postgres.start()
    batch.wait(40, callbacks=True)
    (child,) = batch.children()
    assert (child.status, child.cause) == ("crashed", "signal")
    (incident,) = batch.incidents()
    assert (incident.signal, incident.detected_by, incident.pid) == ("SIGSEGV", "main", pid)
    assert scene.violations() == []


def test_a_claim_that_cannot_reach_the_database_lets_its_message_go(
    scene: Scene, worker: ProcessWorker, postgres: PostgresServer
) -> None:
    """The row is pending all the while, and is sent again."""
    place = scene.place(unique("claim"))
    batch = scene.start(scene.tasks.early.s([], "ok", place).set(countdown=1.0))
    postgres.kill()
    eventually(lambda: f"action=claim_refused {batch.id}#0 attempt 0" in worker.logs(), 20, what="a dropped message")
    assert not Path(place).exists()
    postgres.start()
    batch.wait(40)
    (child,) = batch.children()
    assert (child.status, child.attempt, child.crashes) == ("completed", 1, 0)
    assert child.dispatches >= 2
    assert len(Path(place).read_text().splitlines()) == 1
    assert scene.violations() == []


def test_a_worker_starts_without_its_database_and_works_when_it_is_there(
    scene: Scene, worker: ProcessWorker, postgres: PostgresServer
) -> None:
    batch = scene.start(scene.here.add.s(1, 2).set(queue="starting"))
    postgres.kill()
    with scene.worker("--queues=starting") as late:
        eventually(lambda: "action=unregistered" in late.logs(), what="the missing database in the log")
        postgres.start()
        batch.wait(40)
    assert [child.status for child in batch.children()] == ["completed"]
    assert scene.violations() == []


# -- the broker ----------------------------------------------------------------------------------------------


def test_a_broker_that_lost_everything_is_filled_again(postgres_url: str, tmp_path: Path) -> None:
    """Redis without persistence: what was queued is gone. Each child still runs, and only once."""
    with require(RedisServer) as redis:
        scene = Scene(tmp_path, redis.url, postgres_url, **IMPATIENT, worker_prefetch_multiplier=1)
        with scene.worker("--concurrency=1") as worker:
            batch = scene.start(
                scene.tasks.meet.s(scene.place("first")),
                *(scene.tasks.early.s([], "ok", scene.place(f"child{at}")) for at in range(8)),
                on_finish=scene.here.called_bare.si(scene.place("finish")),
            )
            scene.wait_met("first")
            redis.kill()
            eventually(lambda: "onnection to broker lost" in worker.logs(), 20, what="the loss noticed")
            scene.go("first")
            redis.start()
            batch.wait(60, callbacks=True)
            assert [(child.status, child.attempt) for child in batch.children()] == [("completed", 1)] * 9
            assert [len(scene.lines(f"child{at}")) for at in range(8)] == [1] * 8
            assert len(scene.lines("finish")) == 1
            assert scene.violations() == []
        scene.close()


# -- the creator ---------------------------------------------------------------------------------------------

CREATOR = """
import os, sys, time
from pathlib import Path
from celery_batchtrack import Batch
from celery_batchtrack.behaviour import failpoints, finish
from celery_batchtrack.glue.publish import BrokerPublisher
from tests.acceptance.apps.crashes import app, tasks

def die():
    os.kill(os.getpid(), 9)

how, folder = sys.argv[1:]
if how == "publishing":
    send, sent = BrokerPublisher._send, []
    def dying(self, *args):
        sent.append(1)
        if len(sent) > 7:
            die()
        send(self, *args)
    BrokerPublisher._send = dying
elif how == "sealed":
    finish.started = lambda *args, **options: die()
elif how != "inside":
    failpoints._armed[how] = die
with Batch("created", app=app, tolerance="100%") as batch:
    Path(folder, "batch").write_text(str(batch.id))
    batch.add_many(tasks.early.s([], "ok", f"{folder}/child{at}") for at in range(30))
    if how == "inside":
        Path(folder, "filled").touch()
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """With a worker that nobody kills."""
    scene = embedded(
        tmp_path_factory.mktemp("creators"), **IMPATIENT, batchtrack_insert_chunk=10, batchtrack_dispatch_chunk=10
    )
    with scene.worker():
        yield scene
    scene.close()


def creator(scene: Scene, how: str, folder: Path) -> GuardedProcess:
    env = {**os.environ, **scene.environment(), "PYTHONPATH": str(ROOT)}
    process = GuardedProcess([sys.executable, "-c", CREATOR, how, str(folder)], log=folder / "log", cwd=ROOT, env=env)
    process.spawn()
    return process


def created(scene: Scene, folder: Path) -> Batch:
    return Batch.get((folder / "batch").read_text(), app=scene.app)


def runs(folder: Path) -> list[int]:
    return [len(path.read_text().splitlines()) for path in folder.glob("child*")]


def test_a_creator_killed_inside_its_block_leaves_no_child_that_ran(quiet: Scene, tmp_path: Path) -> None:
    process = creator(quiet, "inside", tmp_path)
    eventually(lambda: (tmp_path / "filled").exists() or process.exit_code is not None, 20, what="children added")
    batch = created(quiet, tmp_path)
    assert batch.status == "open"
    process.end_group()
    assert batch.wait(20) == "cancelled"
    assert batch.row.reason == "abandoned"
    assert {child.status for child in batch.children()} == {"cancelled"}
    assert runs(tmp_path) == []
    assert quiet.violations() == []


@pytest.mark.parametrize("how", ["publishing", "dispatch.stamped", "sealed"])
def test_a_creator_killed_while_it_publishes_has_started_its_batch(quiet: Scene, tmp_path: Path, how: str) -> None:
    """Sealed is sealed: others send what it did not, and each child runs once."""
    process = creator(quiet, how, tmp_path)
    assert process.wait(20) == -signal.SIGKILL, process.output()
    batch = created(quiet, tmp_path)
    assert batch.wait(40) == "completed"
    assert runs(tmp_path) == [1] * 30
    assert [child.attempt for child in batch.children()] == [1] * 30
    assert quiet.violations() == []


# -- a worker on another database ------------------------------------------------------------------------------


def test_a_worker_on_another_database_gives_messages_back_and_says_so(quiet: Scene, tmp_path: Path) -> None:
    other: dict[str, Any] = {"batchtrack_database_url": f"sqlite:///{tmp_path / 'other.db'}"}
    with quiet.worker("--queues=contested", **other) as wrong:
        batch = quiet.start(quiet.here.add.s(1, 2).set(queue="contested"))
        eventually(lambda: f"action=wrong_store {batch.id}#0" in wrong.logs(), 20, what="the complaint")
        assert [(child.status, child.attempt) for child in batch.children()] == [("pending", 0)]
        wrong.terminate()
        wrong.wait()
    with quiet.worker("--queues=contested"):
        batch.wait(40)
    assert [(child.status, child.attempt) for child in batch.children()] == [("completed", 1)]
    assert {each.cause for each in batch.incidents()} <= {"lost_message"}, "held back, and told as such; no death"
    assert quiet.violations() == []


def test_the_length_of_a_queue_is_told_after_one_that_is_not_there_and_after_an_outage() -> None:
    with require(RedisServer) as redis:
        app = Celery("lengths", broker=redis.url, set_as_current=False, broker_transport_options={"socket_timeout": 5})
        publisher = BrokerPublisher(app)
        assert [publisher.queue_length(name, "") for name in ("none", "nor this", "none")] == [0, 0, 0]
        with app.producer_or_acquire() as producer:
            app.send_task("shop.x", producer=producer, queue="waits")
        assert publisher.queue_length("waits", "") == 1
        redis.kill()
        assert [publisher.queue_length("waits", "") for _ in range(2)] == [None, None]
        redis.start()
        assert publisher.queue_length("waits", "") == 0
