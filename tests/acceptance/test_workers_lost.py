"""What becomes of children when their worker's main process dies, stops, hangs, restarts or ends in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_batchtrack import Batch
from tests.acceptance.scene import Scene, beats, embedded
from tests.helpers import ROOT, eventually, unique
from tests.nodes import ProcessWorker
from tests.servers import PostgresServer, RabbitQueues, RedisServer, rabbitmq_url, require

#: A lease in seconds, for the tests in which it runs out.
SHORT = {"batchtrack_heartbeat": 0.2, "batchtrack_lease": 2.0, "batchtrack_detect_every": 0.5}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """On the embedded broker and SQLite."""
    scene = embedded(tmp_path)
    yield scene
    scene.close()


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Scene]:
    """The same, with leases of two seconds."""
    scene = embedded(tmp_path, **SHORT)
    yield scene
    scene.close()


@pytest.fixture(params=["embedded", "redis", "rabbitmq"])
def any_scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """On each broker; the servers' with PostgreSQL. What a dead worker held is sent again after two seconds."""
    conf = {"batchtrack_redispatch_after": 2.0}
    with contextlib.ExitStack() as stack:
        if request.param == "embedded":
            scene = embedded(tmp_path, **conf)
        else:
            postgres: PostgresServer = request.getfixturevalue("postgres_server")
            database = postgres.create_database()
            stack.callback(postgres.drop_database, database)
            if request.param == "redis":
                redis: RedisServer = request.getfixturevalue("redis_server")
                scene = Scene(tmp_path, redis.url, database, task_default_queue=unique("queue"), **conf)
            else:
                queues = RabbitQueues(require(rabbitmq_url))
                stack.callback(queues.clean_up)
                scene = Scene(tmp_path, queues.url, database, task_default_queue=queues.queue, **conf)
        yield scene
        scene.close()


def meet(scene: Scene, *names: str, kind: str = "meet") -> list[Any]:
    return [getattr(scene.tasks, kind).s(scene.place(name)) for name in names]


def details(batch: Batch) -> list[tuple[str, str | None, int]]:
    return [(child.status, child.cause, child.attempt) for child in batch.children()]


def wait_for_the_end_of(*pids: int) -> None:
    """A pool outlives its main process by a moment."""
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="end of the pool")


def wait_and_verify(scene: Scene, batch: Batch, timeout: float = 40.0) -> None:
    batch.wait(timeout, callbacks=True)
    assert scene.violations() == []


LOST = ("crashed", "worker_lost", 1)
DONE = ("completed", None, 1)


# -- the main process is killed -------------------------------------------------------------------------


def test_a_restart_settles_what_a_killed_worker_had_in_hand(any_scene: Scene) -> None:
    """Only what really ran is crashed; what acknowledges late, or was only prefetched, runs again."""
    scene = any_scene
    with scene.worker() as worker:
        batch = scene.start(
            *meet(scene, "lost"), *meet(scene, "late", kind="meet_late"),
            *(scene.here.add.s(at, 1) for at in range(6)),
            on_finish=scene.here.called.s(scene.place("finish")),
        )  # fmt: skip
        scene.wait_met("lost", "late")
        pids = {name: int(scene.lines(name)[0]) for name in ("lost", "late")}
        worker.kill()
        wait_for_the_end_of(*pids.values())
        scene.go("late")
        worker.restart()
        eventually(lambda: details(batch)[0] == LOST, 10, what="the lost child settled at the boot")
        wait_and_verify(scene, batch)

    assert details(batch) == [LOST, ("completed", None, 2), *[DONE] * 6]
    (incident,) = scene.incidents(batch, 0)
    assert (incident.detected_by, incident.verdict, incident.pid) == ("host", "observed", pids["lost"])
    assert incident.worker == f"{worker.name}@{incident.hostname}"
    assert [each.outcome for each in scene.incidents(batch, 1)] == ["retried"]
    assert len(scene.lines("late")) == 2
    assert len(scene.lines("finish")) == 1
    old, new = sorted(scene.workers(), key=lambda row: row.started_at)
    assert (old.lost_by, new.lost_by) == ("host", None)


def test_without_a_restart_a_waiting_client_notices(scene: Scene) -> None:
    with scene.worker() as worker:
        batch = scene.start(*meet(scene, "lost"), on_finish=scene.here.called_bare.si(scene.place("finish")))
        scene.wait_met("lost")
        worker.kill()
        assert batch.wait(20) == "partial"
        assert details(batch) == [LOST]
        assert scene.incidents(batch, 0)[0].detected_by == "host"
        worker.restart()
        wait_and_verify(scene, batch)
    assert len(scene.lines("finish")) == 1


def test_another_live_worker_notices_and_its_own_children_go_on(scene: Scene) -> None:
    """Two live workers under one node name: the death of one is not the other's."""
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(scene.worker("--queues", f"celery,{name}", name="twin")) for name in ("one", "two")
        )
        batch = scene.start(*(child.set(queue=name) for name in ("one", "two") for child in meet(scene, name)))
        scene.wait_met("one", "two")
        first.kill()
        eventually(lambda: details(batch)[0] == LOST, 20, what="the verdict, without any client")
        beats(scene, 3, lambda row: row.pid == second.pid)
        assert details(batch)[1] == ("running", None, 1)
        scene.go("two")
        wait_and_verify(scene, batch)
        assert details(batch) == [LOST, DONE]
        assert [(each.position, each.detected_by) for each in batch.incidents()] == [(0, "host")]


def test_a_worker_killed_with_its_whole_pool_at_once(scene: Scene) -> None:
    with scene.worker() as worker:
        batch = scene.start(*meet(scene, "a", "b"), *meet(scene, "c", kind="meet_retry"))
        scene.wait_met("a", "b")
        os.killpg(worker.pid, signal.SIGKILL)
        scene.go("c")
        worker.restart()
        wait_and_verify(scene, batch)
    assert details(batch)[:2] == [LOST, LOST]
    assert details(batch)[2][0] == "completed"


def test_any_number_of_sweeps_at_once_give_one_verdict(scene: Scene) -> None:
    """Two beats, no beat, ten sweepers: every verdict is guarded."""
    with scene.worker() as worker:
        batch = scene.start(*meet(scene, "a", "b"), on_first_failure=scene.here.called.s(scene.place("first")))
        scene.wait_met("a", "b")
        pids = [int(scene.lines(name)[0]) for name in ("a", "b")]
        worker.kill()
        wait_for_the_end_of(*pids)  # while they live, no sweep convicts what they run
        barrier = threading.Barrier(10)

        def sweep() -> None:
            barrier.wait()
            scene.batchtrack.sweep()

        threads = [threading.Thread(target=sweep) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert details(batch) == [LOST, LOST]
        assert len(batch.incidents()) == 2
        assert batch.progress().crashed == 2
        worker.restart()
        wait_and_verify(scene, batch)
    assert len(scene.lines("first")) == 1


def test_two_beats_change_nothing(scene: Scene) -> None:
    beat = [sys.executable, "-m", "celery", "-A", "tests.acceptance.apps.crashes", "beat", "--max-interval=1"]
    env = {**os.environ, **scene.environment(), "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        for name in ("one", "two"):
            command = [*beat, f"--schedule={scene.folder / name}", "--pidfile="]
            process = subprocess.Popen(
                command, env=env, cwd=scene.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        first = stack.enter_context(scene.worker())
        batch = scene.start(*meet(scene, "a", "b"), on_finish=scene.here.called.s(scene.place("finish")))
        scene.wait_met("a", "b")
        second = stack.enter_context(scene.worker())
        detecting = "celery_batchtrack.detect_crashes"
        eventually(lambda: f"Task {detecting}" in second.logs(), 20, what="a sweep sent by beat")
        assert [status for status, _, _ in details(batch)] == ["running", "running"]
        first.kill()
        wait_and_verify(scene, batch)
    assert details(batch) == [LOST, LOST]
    assert len(batch.incidents()) == 2
    assert len(scene.lines("finish")) == 1


# -- a worker that nobody here can look at ------------------------------------------------------------------


def elsewhere(scene: Scene, *args: str) -> ProcessWorker:
    """A worker that seems to be on another host, with black boxes of its own."""
    name = unique("host")
    return scene.worker(*args, env={"BATCHTRACK_TEST_HOSTNAME": name}, batchtrack_blackbox_dir=str(scene.folder / name))


def test_a_dead_worker_of_another_host_is_known_by_its_lease(short: Scene) -> None:
    scene = short
    with elsewhere(scene) as worker:
        batch = scene.start(*meet(scene, "lost"))
        scene.wait_met("lost")
        beats(scene, 2)
        worker.kill()
        assert batch.wait(30) == "partial"
    assert details(batch) == [LOST]
    (incident,) = scene.incidents(batch, 0)
    assert (incident.detected_by, incident.verdict) == ("lease", "lease")
    assert incident.hostname.startswith("host_")
    (row,) = scene.workers()
    assert row.lost_by == "lease"
    assert scene.violations() == []


def test_a_hanging_worker_that_resumes_overturns_its_verdict(short: Scene) -> None:
    """The lease convicts; the child's own report, by the same token, is stronger while the batch runs."""
    scene = short
    with elsewhere(scene) as worker:
        waiting = meet(scene, "not yet")[0].set(queue="later")
        batch = scene.start(
            *meet(scene, "hung", "other"), waiting, on_first_failure=scene.here.called.s(scene.place("first"))
        )
        scene.wait_met("hung", "other")
        os.killpg(worker.pid, signal.SIGSTOP)
        suspected = iter(batch.iter_progress())
        eventually(lambda: next(suspected).crashed == 2, 30, what="the lease verdict")
        assert [each.verdict for each in batch.incidents()] == ["lease", "lease"]
        assert not scene.lines("first"), "a mere suspicion calls nobody"

        scene.go("hung", "other", "not yet")
        os.killpg(worker.pid, signal.SIGCONT)
        eventually(lambda: details(batch)[:2] == [DONE, DONE], 20, what="overturned")
        scene.app.control.add_consumer("later", reply=False)
        wait_and_verify(scene, batch)
    assert batch.status == "completed"
    assert list(batch.results()) == ["met hung", "met other", "met not yet"]
    assert all(each.overturned_at is not None for each in batch.incidents())
    assert not scene.lines("first")


def test_a_long_silent_child_is_no_crash(short: Scene) -> None:
    """Busy for several leases, on this host and on another: the pulse is not the pool's."""
    scene = short
    with scene.worker(), elsewhere(scene, "--queues=away"):
        places = {name: scene.place(name) for name in ("w", "x", "y", "z")}
        batch = scene.start(
            scene.here.compute.s(places["w"]),
            scene.here.compute.s(places["x"]).set(queue="away"),
            scene.tasks.meet.s(places["y"]),
            scene.tasks.meet.s(places["z"]).set(queue="away"),
        )
        scene.wait_met("w", "x", "y", "z")
        lease = int(SHORT["batchtrack_lease"] / SHORT["batchtrack_heartbeat"])
        watching = threading.Event()
        sweeper = threading.Thread(target=scene.batchtrack.detect_forever, args=(watching,))
        sweeper.start()
        beats(scene, 2 * lease + 2)
        watching.set()
        sweeper.join()
        assert [status for status, _, _ in details(batch)] == ["running"] * 4
        scene.go("w", "x", "y", "z")
        wait_and_verify(scene, batch)
    assert details(batch) == [DONE] * 4
    assert batch.incidents() == []


# -- a pool process dies, and its request is not told ------------------------------------------------------------


def test_a_death_that_no_request_hears_of_is_seen_all_the_same(scene: Scene) -> None:
    """Billiard gives the job to another process where it had not read that it was accepted."""
    ways = ["SIGSEGV", "SIGKILL", "exit 7", "exit 0"]
    with scene.worker(env={"BATCHTRACK_TEST_DEAF": "1"}, batchtrack_heartbeat=10):
        batch = scene.run(*(scene.tasks.early.s([], how, scene.place(how)) for how in ways), timeout=9)
    assert [(child.status, child.attempt) for child in batch.children()] == [("crashed", 1)] * 4
    seen = {incident.position: incident for incident in batch.incidents()}
    assert [(seen[at].cause, seen[at].signal, seen[at].exit_code) for at in range(4)] == [
        ("signal", "SIGSEGV", None), ("signal", "SIGKILL", None), ("exit", None, 7), ("exit", None, 0),
    ]  # fmt: skip
    assert {incident.detected_by for incident in seen.values()} == {"main"}
    assert [seen[at].pid for at in range(4)] == [int(scene.lines(how)[0]) for how in ways]
    assert scene.violations() == []


# -- ends in order --------------------------------------------------------------------------------------------


def test_a_warm_shutdown_is_no_crash(short: Scene) -> None:
    """A deploy over a child that lasts longer than the lease; what was prefetched runs on the next worker."""
    scene = short
    with scene.worker("--concurrency=1") as worker:
        batch = scene.start(*meet(scene, "long"), *(scene.here.add.s(at, 1) for at in range(3)))
        scene.wait_met("long")
        worker.terminate()
        eventually(lambda: "Warm shutdown" in worker.logs(), what="the shutdown")
        before = scene.workers()[0].beat
        lease = int(SHORT["batchtrack_lease"] / SHORT["batchtrack_heartbeat"])
        eventually(lambda: scene.workers()[0].beat > before + lease, 20, what="a pulse during the shutdown")
        scene.batchtrack.sweep()
        assert details(batch)[0] == ("running", None, 1)
        scene.go("long")
        assert worker.wait(20) == 0
        assert scene.workers()[0].stopped_at is not None
        assert not list((scene.folder / "boxes").iterdir()), "a worker that ended in order leaves nothing behind"
        assert details(batch)[0] == DONE
        worker.restart()
        wait_and_verify(scene, batch)
    assert details(batch) == [DONE] * 4
    assert batch.incidents() == []


def test_recycled_pool_processes_are_no_crash(scene: Scene) -> None:
    with scene.worker("--max-tasks-per-child=1"):
        batch = scene.run(*(scene.tasks.early.s([], "ok", scene.place("runs")) for _ in range(8)))
    assert details(batch) == [DONE] * 8
    assert batch.incidents() == []
    assert len(set(scene.lines("runs"))) == 8, "each in a process of its own"
    assert scene.violations() == []


def test_a_cold_shutdown_crashes_what_ran_or_runs_it_again_by_policy(any_scene: Scene) -> None:
    scene = any_scene
    with scene.worker("--concurrency=3") as worker:
        batch = scene.start(
            *meet(scene, "early"), *meet(scene, "late", kind="meet_late"), *meet(scene, "retry", kind="meet_retry"),
            *(scene.here.add.s(at, 1) for at in range(3)),
        )  # fmt: skip
        scene.wait_met("early", "late", "retry")
        worker.quit()
        worker.wait(30)
        scene.go("late", "retry")
        assert details(batch)[0] == LOST
        assert scene.incidents(batch, 0)[0].detected_by == "main"
        worker.restart()
        wait_and_verify(scene, batch)
    again = ("completed", None, 2)
    assert details(batch) == [LOST, again, again, *[DONE] * 3]
    assert [len(scene.lines(name)) for name in ("early", "late", "retry")] == [1, 2, 2]


def test_a_restart_by_hang_up_is_no_crash(scene: Scene) -> None:
    """SIGHUP runs the worker anew in the same process: same pid, same start time."""
    worker = scene.worker()
    # By `python -m celery` it cannot: it runs its own file again, which then is in no package.
    worker._process.command[1:3] = [str(Path(sys.executable).with_name("celery"))]
    with worker:
        batch = scene.start(*meet(scene, "during"))
        scene.wait_met("during")
        worker.send_signal(signal.SIGHUP)
        eventually(lambda: "Restarting celery worker" in worker.logs(), what="the restart")
        scene.go("during")
        wait_and_verify(scene, batch)
        assert details(batch) == [DONE]
        eventually(lambda: len(scene.workers()) == 2, 20, what="the second boot")
        assert {row.pid for row in scene.workers()} == {worker.pid}
        batch = scene.run(scene.here.add.s(1, 1))
        assert details(batch) == [DONE]
        assert scene.violations() == []
