"""Every way in which a child can end, on real brokers and databases, with real prefork workers.

All cases of a broker are children of one batch, run once; each test then looks at one child.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pytest_celery import CeleryTestSetup, CeleryTestWorker, CeleryWorkerCluster

from celery_batchtrack import Batch
from celery_batchtrack.glue.batch import Child
from celery_batchtrack.vocabulary.evidence import IncidentRow
from tests.acceptance.docker_nodes import DockerWorker
from tests.acceptance.scene import Scene, embedded
from tests.helpers import eventually, unique
from tests.nodes import ProcContainer, ProcessWorker
from tests.servers import PostgresServer, RabbitQueues, docker_engine, rabbitmq_url, require

Build = Callable[[Scene, str], Any]


@dataclass(frozen=True)
class Case:
    """A child, and what is to become of it."""

    build: Build
    status: str
    cause: str | None = None
    signal: str | None = None
    exit_code: int | None = None
    #: How often its function ran, how many claims it took, and what became of each unhappy attempt.
    runs: int = 1
    attempts: int | None = None
    incidents: tuple[str, ...] = field(default=())
    phase: str = "running"
    items: bool = True

    @property
    def claims(self) -> int:
        return self.runs if self.attempts is None else self.attempts

    @property
    def outcomes(self) -> tuple[str, ...]:
        return self.incidents or ((self.status,) if self.status != "completed" else ())


def docs(name: str) -> list[dict[str, str]]:
    return [{"db": "PMC", "id": f"{name}/{at}"} for at in range(2)]


def task(kind: str, how: str, *more: Any, **options: Any) -> Build:
    """A child of the task `kind` that ends as `how` says."""

    def build(scene: Scene, name: str) -> Any:
        found = getattr(scene.tasks, kind, None) or getattr(scene.here, kind)
        return found.s(docs(name), how, scene.place(name), *more).set(**options)

    return build


def ordered(how: str) -> Build:
    def build(scene: Scene, name: str) -> Any:
        return scene.here.pydantic.s({"docs": docs(name), "how": how, "place": scene.place(name)})

    return build


def retrying(countdown: float, times: int) -> Build:
    return lambda scene, name: scene.here.retrying.s(docs(name), countdown, scene.place(name), times)


def crashed(build: Build, signal: str | None = None, exit_code: int | None = None, **more: Any) -> Case:
    return Case(build, "crashed", more.pop("cause", "signal" if signal else "exit"), signal, exit_code, **more)


THRICE = ("retried", "retried", "crashed")

DEATHS = {
    "SIGSEGV": crashed(task("early", "SIGSEGV"), "SIGSEGV"),
    "SIGKILL": crashed(task("early", "SIGKILL"), "SIGKILL"),
    "SIGABRT": crashed(task("early", "SIGABRT"), "SIGABRT"),
    "SIGBUS": crashed(task("early", "SIGBUS"), "SIGBUS"),
    "os._exit(0)": crashed(task("early", "exit 0"), exit_code=0),
    "os._exit(7)": crashed(task("early", "exit 7"), exit_code=7),
    "hard time limit": crashed(task("limited", "busy"), cause="time_limit"),
    "hard time limit of a late ack": crashed(task("late_limited", "busy"), cause="time_limit"),
    "bound": crashed(task("bound", "SIGSEGV"), "SIGSEGV"),
    "own base": crashed(task("own_base", "SIGSEGV"), "SIGSEGV"),
    "class-based": crashed(task("class_based", "SIGSEGV"), "SIGSEGV"),
    "shared": crashed(task("shared", "SIGSEGV"), "SIGSEGV"),
    "pydantic": crashed(ordered("SIGSEGV"), "SIGSEGV"),
    "autoretry": crashed(task("autoretry", "SIGSEGV"), "SIGSEGV"),
    "ignored result": crashed(task("ignoring", "SIGSEGV"), "SIGSEGV"),
    "undecorated": crashed(
        lambda scene, name: scene.here.undecorated.s("SIGSEGV", scene.place(name)), "SIGSEGV", items=False
    ),
}

ACKS = {
    "early": crashed(task("early", "SIGKILL"), "SIGKILL"),
    "early, reject": crashed(task("early_reject", "SIGKILL"), "SIGKILL"),
    "late": crashed(task("late", "SIGKILL"), "SIGKILL"),
    "late, reject": crashed(task("late_reject", "SIGKILL"), "SIGKILL", runs=3, incidents=THRICE),
    "late, reject, once": Case(task("late_reject", "SIGKILL", 1), "completed", runs=2, incidents=("retried",)),
    "late, reject, exit": crashed(task("late_reject", "exit 7"), exit_code=7, runs=3, incidents=THRICE),
    "record": crashed(task("record", "SIGKILL"), "SIGKILL"),
    "retry": crashed(task("retry", "SIGSEGV"), "SIGSEGV", runs=3, incidents=THRICE),
    "retry, twice": Case(task("retry", "SIGSEGV", 2), "completed", runs=3, incidents=("retried", "retried")),
    "retry_on_worker_lost": crashed(task("retry_lost", "SIGKILL"), "SIGKILL", runs=3, incidents=THRICE),
    "retry of a time limit": crashed(
        task("limited_retry", "busy"), cause="time_limit", runs=2, incidents=("retried", "crashed")
    ),
}

BEFORE_CLAIM = {
    "decoding, record": crashed(
        task("record", "never", serializer="deadly"), "SIGSEGV", attempts=1, phase="before_claim"
    ),
    "decoding, early": crashed(
        task("early", "never", serializer="deadly"), "SIGSEGV", attempts=1, phase="before_claim"
    ),
    "decoding, retry": crashed(
        task("retry", "never", serializer="deadly"),
        "SIGSEGV", runs=3, attempts=3, phase="before_claim", incidents=THRICE,
    ),
    "decoding, late and reject": crashed(
        task("late_reject", "never", serializer="deadly"),
        "SIGSEGV", runs=3, attempts=3, phase="before_claim", incidents=THRICE,
    ),
    "decoding, retry_on_worker_lost": crashed(
        task("retry_lost", "never", serializer="deadly"),
        "SIGSEGV", runs=3, attempts=3, phase="before_claim", incidents=THRICE,
    ),
    "decoding, late and reject, twice": Case(
        task("late_reject", "ok", 2, serializer="deadly"),
        "completed", runs=4, attempts=3, phase="before_claim", incidents=("retried", "retried"), signal="SIGSEGV",
    ),
}  # fmt: skip

FAILURES = {
    "ValueError": Case(task("early", "ValueError"), "failed", "exception"),
    "MemoryError": Case(task("early", "MemoryError"), "failed", "exception"),
    "MemoryError of a late ack": Case(task("late", "MemoryError"), "failed", "exception"),
    "sys.exit": Case(task("early", "sys.exit"), "failed", "exception"),
    "KeyboardInterrupt": Case(task("early", "KeyboardInterrupt"), "failed", "exception"),
    "unpicklable": Case(task("early", "unpicklable"), "failed", "exception"),
    "unserialisable": Case(task("early", "unserialisable"), "failed", "unserialisable"),
    "soft time limit": Case(task("soft", "busy"), "failed", "soft_time_limit"),
    "Reject": Case(task("early", "Reject"), "failed", "rejected"),
    "Reject of a late ack": Case(task("late", "Reject"), "failed", "rejected"),
    "Ignore": Case(task("early", "Ignore"), "cancelled", "ignored"),
    "Ignore of a late ack": Case(task("late", "Ignore"), "cancelled", "ignored"),
    "retries exhausted": Case(retrying(0, 9), "failed", "exception", runs=2, incidents=("retried", "failed")),
    "autoretry exhausted": Case(
        task("autoretry", "ValueError"), "failed", "exception", runs=3, incidents=("retried", "retried", "failed")
    ),
}

NEVER_RUN = {
    "unknown name": Case(
        lambda scene, name: scene.app.signature("crashes.nobody_knows", args=(name,)),
        "failed", "not_registered", runs=0, items=False,
    ),
    "refused content": Case(task("early", "ok", serializer="pickle"), "failed", "content_refused", runs=0),
    "undecodable": Case(task("early", "ok", serializer="broken"), "failed", "content_refused", runs=0),
    "expired": Case(task("early", "ok", countdown=1.0, expires=0.4), "cancelled", "expired", runs=0),
}  # fmt: skip

HAPPY = {
    "ok": Case(task("early", "ok"), "completed"),
    "ok, late": Case(task("late_reject", "ok"), "completed"),
    "ok, bound": Case(task("bound", "ok"), "completed"),
    "ok, own base": Case(task("own_base", "ok"), "completed"),
    "ok, class-based": Case(task("class_based", "ok"), "completed"),
    "ok, shared": Case(task("shared", "ok"), "completed"),
    "ok, pydantic": Case(ordered("ok"), "completed"),
    "ok, ignored result": Case(task("ignoring", "ok"), "completed"),
    "requeue": Case(task("early", "requeue", 1), "completed", runs=2),
    "requeue of a late ack": Case(task("late", "requeue", 1), "completed", runs=2),
    "retry at once": Case(retrying(0, 1), "completed", runs=2, incidents=("retried",)),
    "retry after a second": Case(retrying(1, 1), "completed", runs=2, incidents=("retried",)),
    "autoretry, in the end": Case(
        task("autoretry", "ValueError", 2), "completed", runs=3, incidents=("retried", "retried")
    ),
}

CASES = {**DEATHS, **ACKS, **BEFORE_CLAIM, **FAILURES, **NEVER_RUN, **HAPPY}

assert len(CASES) == sum(map(len, (DEATHS, ACKS, BEFORE_CLAIM, FAILURES, NEVER_RUN, HAPPY))), "a name twice"


# -- the stage ----------------------------------------------------------------------------------------


STACKS = ["embedded", "redis", "rabbitmq", pytest.param("docker", marks=pytest.mark.docker)]


@pytest.fixture(scope="module", params=STACKS)
def stack(request: pytest.FixtureRequest) -> str:
    """Which broker. "docker" is Redis and PostgreSQL with the worker in a container."""
    if request.param == "docker":
        require(docker_engine)
    return str(request.param)


@pytest.fixture(scope="module")
def scene(stack: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The application on each broker, with a database of its own."""
    folder = tmp_path_factory.mktemp(stack)
    if stack == "embedded":
        scene = embedded(folder)
        yield scene
        scene.close()
        return
    postgres: PostgresServer = request.getfixturevalue("postgres_server")
    database = postgres.create_database()
    if stack == "rabbitmq":
        queues = RabbitQueues(require(rabbitmq_url))
        scene = Scene(folder, queues.url, database, task_default_queue=queues.queue)
    else:
        redis = request.getfixturevalue("redis_server")
        scene = Scene(folder, redis.url, database, task_default_queue=unique("queue"))
    yield scene
    scene.close()
    if stack == "rabbitmq":
        queues.clean_up()
    postgres.drop_database(database)


@pytest.fixture(scope="module")
def node(stack: str, scene: Scene) -> Iterator[ProcContainer]:
    """One worker node for the whole module: a process here, a container on Docker."""
    worker: ProcessWorker = scene.worker()
    if stack == "docker":
        worker = DockerWorker(worker, scene.folder)
    container = ProcContainer(worker, queue=scene.conf.get("task_default_queue", "celery"))
    try:
        container.start().ready()
        yield container
    finally:
        container.teardown()


@pytest.fixture
def celery_worker_cluster(node: ProcContainer) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(CeleryTestWorker(node, app=None))


@pytest.fixture
def celery_worker_cluster_config(scene: Scene) -> dict[str, Any]:
    place = {"urls": [scene.broker], "host_urls": [scene.broker]}
    return {"celery_broker_cluster_config": place}


@dataclass
class Ended:
    """The batch of all cases, after its end."""

    scene: Scene
    batch: Batch
    main_pid: int
    children: dict[str, Child]
    incidents: dict[str, list[IncidentRow]]
    #: Where each case ran, by the time of the batch's end.
    pids: dict[str, list[int]]


@pytest.fixture(scope="module")
def ended(scene: Scene, node: ProcContainer) -> Ended:
    main_pid = node.worker.pid
    batch = scene.run(
        *(case.build(scene, name) for name, case in CASES.items()),
        on_success=scene.here.called.s(scene.place("on_success")),
        on_finish=scene.here.called.s(scene.place("on_finish")),
        on_failure=scene.here.called.s(scene.place("on_failure")),
        on_first_failure=scene.here.called.s(scene.place("on_first_failure")),
    )
    names = list(CASES)
    return Ended(
        scene, batch, main_pid,
        {names[child.position]: child for child in batch.children()},
        {name: scene.incidents(batch, at) for at, name in enumerate(names)},
        {name: [int(line) for line in scene.lines(name)] for name in names},
    )  # fmt: skip


# -- the cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_end_has_its_status_and_cause(ended: Ended, name: str) -> None:
    case, child = CASES[name], ended.children[name]
    assert (child.status, child.cause) == (case.status, case.cause), ended.incidents[name]
    if case.phase == "before_claim":
        # Billiard may give a job to a second process, if the first died before it was known to have accepted it.
        assert len(ended.pids[name]) >= case.runs
    else:
        assert len(ended.pids[name]) == case.runs
    # A death of that kind is not the child's for certain, so it is no strike: a task that dies twice may count once.
    uncounted = case.claims - child.attempt if (case.phase, case.status) == ("before_claim", "completed") else 0
    assert uncounted in (0, 1)
    assert child.attempt == case.claims - uncounted
    assert tuple(each.outcome for each in ended.incidents[name]) == case.outcomes[uncounted:]
    assert child.items == ([f"PMC:{name}/0", f"PMC:{name}/1"] if case.items else [])
    assert child.item_count == (2 if case.items else 1)


@pytest.mark.parametrize("name", [*DEATHS, *ACKS, *BEFORE_CLAIM])
def test_every_death_leaves_its_evidence(ended: Ended, name: str) -> None:
    case, pids = CASES[name], ended.pids[name]
    for at, incident in enumerate(ended.incidents[name]):
        assert (incident.signal, incident.exit_code) == (case.signal or incident.signal, case.exit_code)
        assert incident.phase == case.phase
        assert incident.detected_by == "main"
        assert incident.verdict == "observed"
        assert incident.attempt == at + 1
        assert incident.hostname == socket.gethostname()
        assert incident.pid == pids[at] if case.phase == "running" else incident.pid in pids
        assert incident.items == ended.children[name].items
        assert incident.died_at <= incident.detected_at
        assert (incident.detected_at - incident.died_at).total_seconds() < 5


@pytest.mark.parametrize("name", ["SIGSEGV", "hard time limit", "decoding, retry"])
def test_a_death_is_seen_within_seconds(ended: Ended, name: str) -> None:
    child, last = ended.children[name], ended.incidents[name][-1]
    assert child.finished_at >= last.died_at
    assert (child.finished_at - last.died_at).total_seconds() < 3


def test_the_batch_ends_partial_and_adds_up(ended: Ended) -> None:
    progress = ended.batch.progress()
    wanted = [case.status for case in CASES.values()]
    assert progress.status == "partial"
    for status in ("completed", "failed", "crashed", "cancelled"):
        assert getattr(progress, status) == wanted.count(status)
    assert (progress.total, progress.pending, progress.running, progress.percent) == (len(CASES), 0, 0, 100)


def test_the_callbacks_start_exactly_once(ended: Ended) -> None:
    assert ended.scene.starts(ended.batch) == {"on_success": 1, "on_finish": 1, "on_first_failure": 1}
    for name in ("on_success", "on_finish", "on_first_failure"):
        assert len(ended.scene.lines(name)) == 1
    assert not ended.scene.lines("on_failure")


def test_completed_children_have_their_results_in_order(ended: Ended) -> None:
    good = [name for name, case in CASES.items() if case.status == "completed"]
    assert list(ended.batch.results()) == ["ok" if name.startswith("ok") else "survived" for name in good]


def test_the_worker_outlives_all_of_it(ended: Ended, node: ProcContainer) -> None:
    assert node.worker.alive
    assert node.worker.pid == ended.main_pid
    assert ended.scene.run(ended.scene.here.add.s(1, 2)).status == "completed"


def test_nothing_was_settled_twice_or_late(ended: Ended) -> None:
    assert not [each for each in ended.batch.incidents() if each.outcome == "late_write"]
    assert ended.scene.violations() == []


def test_a_late_redelivery_is_refused(ended: Ended, celery_setup: CeleryTestSetup) -> None:
    """What the broker itself delivers again carries the attempt of a run that is over."""
    at = list(CASES).index("requeue of a late ack")
    celery_setup.worker.assert_log_exists(f"action=claim_refused {ended.batch.id}#{at} attempt 0", timeout=10)


def test_the_log_says_what_died_of_what(ended: Ended, celery_setup: CeleryTestSetup) -> None:
    at = list(CASES).index("SIGBUS")
    celery_setup.worker.assert_log_exists(f"action=child_crashed {ended.batch.id}#{at} crashes.early died of SIGBUS")


# -- revoked, in its time ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def revoked(scene: Scene, ended: Ended) -> dict[str, Any]:
    """A batch with a child revoked before its start, one terminated in mid-run, and one left alone."""
    before, running = unique("task"), unique("task")
    batch = scene.start(
        scene.tasks.early.s(docs("before"), "ok", scene.place("before")).set(task_id=before, countdown=1.5),
        scene.tasks.meet.s(scene.place("terminated")).set(task_id=running),
        scene.tasks.meet.s(scene.place("left alone")),
        on_finish=scene.here.called.s(scene.place("revoked finish")),
    )
    scene.app.control.revoke(before)
    scene.wait_met("terminated", "left alone")
    scene.app.control.revoke(running, terminate=True)
    scene.go("left alone")
    batch.wait(30, callbacks=True)
    return {"batch": batch, "children": list(batch.children()), "pid": int(scene.lines("terminated")[0])}


def test_a_child_revoked_before_its_start_is_cancelled(scene: Scene, revoked: dict[str, Any]) -> None:
    child = revoked["children"][0]
    assert (child.status, child.cause, child.attempt) == ("cancelled", "revoked", 0)
    assert not scene.lines("before")


def test_a_child_revoked_with_terminate_is_cancelled_and_its_process_ends(
    scene: Scene, revoked: dict[str, Any]
) -> None:
    child = revoked["children"][1]
    assert (child.status, child.cause, child.attempt) == ("cancelled", "terminated", 1)
    eventually(lambda: not _runs(revoked["pid"]), what="end of the terminated process")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_revoking_is_no_crash_and_the_batch_ends(scene: Scene, revoked: dict[str, Any]) -> None:
    assert revoked["children"][2].status == "completed"
    assert revoked["batch"].progress().crashed == 0
    assert len(scene.lines("revoked finish")) == 1
    assert scene.violations() == []


def test_a_cancelled_batch_terminates_its_running_children(scene: Scene, ended: Ended) -> None:
    batch = scene.start(
        scene.tasks.meet.s(scene.place("cancelled")), on_finish=scene.here.called.s(scene.place("cancelled finish"))
    )
    scene.wait_met("cancelled")
    assert batch.cancel()
    batch.wait(30, callbacks=True)
    (child,) = batch.children()
    assert (child.status, child.cause) == ("cancelled", "cancelled")
    pid = int(scene.lines("cancelled")[0])
    eventually(lambda: not _runs(pid), what="end of the cancelled child's process")
    assert len(scene.lines("cancelled finish")) == 1
    assert batch.progress().crashed == 0
    assert scene.violations() == []


def test_a_message_that_kills_its_process_does_not_come_back(ended: Ended) -> None:
    """Its broker would deliver it for ever: no run gets far enough to refuse it."""
    for name in BEFORE_CLAIM:
        assert len(ended.scene.lines(name)) == len(ended.pids[name]), name
