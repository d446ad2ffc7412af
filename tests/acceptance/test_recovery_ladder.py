"""From "a process died" to "this item did it", with real workers that really die."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_batchtrack import Batch, CrashPolicy, errors
from celery_batchtrack.vocabulary.evidence import IncidentRow
from tests.acceptance.scene import Scene, beats
from tests.helpers import eventually, unique
from tests.servers import PostgresServer, RabbitQueues, RedisServer, rabbitmq_url, require

APP = "tests.acceptance.apps.recovery"


def docs(count: int, **does: str) -> list[dict[str, Any]]:
    """Items 0 … count - 1; ``_7="SIGSEGV"`` says what the item 7 does."""
    return [{"id": at, **({"does": does[f"_{at}"]} if f"_{at}" in does else {})} for at in range(count)]


def scene_on(kind: str, folder: Path, request: pytest.FixtureRequest, stack: contextlib.ExitStack) -> Scene:
    """The embedded broker with SQLite, or a server's with PostgreSQL."""
    conf: dict[str, Any] = {"batchtrack_redispatch_after": 2.0}
    if kind == "embedded":
        broker, database = f"batchtrack+filesystem://{folder / 'broker'}", f"sqlite:///{folder / 'batchtrack.db'}"
    else:
        postgres: PostgresServer = request.getfixturevalue("postgres_server")
        database = postgres.create_database()
        stack.callback(postgres.drop_database, database)
        if kind == "redis":
            redis: RedisServer = request.getfixturevalue("redis_server")
            broker, conf = redis.url, {"task_default_queue": unique("queue"), **conf}
        else:
            queues = RabbitQueues(require(rabbitmq_url))
            stack.callback(queues.clean_up)
            queue = queues.queue
            queues.also(f"{queue}.isolated")
            broker, conf = queues.url, {"task_default_queue": queue, **conf}
    scene = Scene(folder, broker, database, APP, **conf)
    stack.callback(scene.close)
    return scene


@pytest.fixture(scope="module", params=["embedded", "redis"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A scene with a worker of two processes that outlives its children's deaths."""
    with contextlib.ExitStack() as stack:
        scene = scene_on(request.param, tmp_path_factory.mktemp("stage"), request, stack)
        stack.enter_context(scene.worker())
        yield scene
        assert scene.violations() == []


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """A scene of the test's own; it starts and kills its workers itself."""
    with contextlib.ExitStack() as stack:
        scene = scene_on(getattr(request, "param", "embedded"), tmp_path, request, stack)
        yield scene
        assert scene.violations() == []


def on_every_broker(test: Any) -> Any:
    return pytest.mark.parametrize("scene", ["embedded", "redis", "rabbitmq"], indirect=True)(test)


def place(scene: Scene) -> str:
    return scene.place(unique("place"))


def deaths(batch: Batch) -> list[IncidentRow]:
    """Of its runs; what was never sent did not die."""
    return [each for each in batch.incidents() if each.detected_by]


def crashed(batch: Batch) -> list[list[str]]:
    return sorted(child.items for child in batch.children(status="crashed"))


def body(scene: Scene, batch: Batch, where: str) -> list[Any]:
    """What the body got, the one time it was started."""
    batch.wait(60, callbacks=True)
    (line,) = scene.lines(Path(where).name)
    found: list[Any] = json.loads(line)
    return found


# -- the ladder -------------------------------------------------------------------------------------

SURVIVORS = [at for at in range(20) if at not in (7, 13)]


def test_skip_costs_one_death_for_each_killer_and_runs_all_others_again(stage: Scene) -> None:
    where, header = place(stage), place(stage)
    batch = stage.start(
        stage.tasks.skip.s(docs(20, _7="SIGSEGV", _13="SIGKILL"), header), stage.tasks.skip.s(docs(3), place(stage)),
        on_success=stage.here.flat.s(where),
    )  # fmt: skip
    assert body(stage, batch, where) == [SURVIVORS, [0, 1, 2]], "one result for each header position"
    assert crashed(batch) == [["13"], ["7"]]
    first, second = deaths(batch)
    assert (first.item, first.item_index, first.items_done, first.note) == ("7", 7, 7, "before 7")
    assert (first.cause, first.signal, first.phase, first.outcome) == ("signal", "SIGSEGV", "running", "crashed")
    assert first.python_frame is not None and first.python_frame.endswith("in segfault_in_c")
    assert first.stack is not None and " in handle\n" in first.stack
    assert (second.item, second.signal, second.python_frame) == ("13", "SIGKILL", None)
    assert batch.progress().items_completed == 21


def test_bisect_ends_with_the_killers_alone_and_within_its_bound(stage: Scene) -> None:
    where = place(stage)
    batch = stage.start(
        stage.tasks.bisect.s(docs(20, _7="SIGSEGV", _13="exit"), place(stage)),
        stage.tasks.bisect.s(docs(3), place(stage)), on_success=stage.here.flat.s(where),
    )  # fmt: skip
    assert body(stage, batch, where) == [SURVIVORS, [0, 1, 2]]
    assert crashed(batch) == [["13"], ["7"]]
    assert len(deaths(batch)) <= 2 * (math.ceil(math.log2(20)) + 1)
    assert {each.outcome for each in deaths(batch)} == {"split", "crashed"}
    assert batch.progress().total == sum(child.status != "split" for child in batch.children())


def test_resume_runs_only_what_comes_after(stage: Scene) -> None:
    header = place(stage)
    batch = stage.start(stage.tasks.resume.s(docs(20, _7="SIGSEGV", _13="SIGABRT"), header))
    assert batch.wait(60) == "partial"
    assert crashed(batch) == [["13"], ["7"]]
    assert stage.lines(Path(header).name) == [str(at) for at in SURVIVORS], "each of them once"
    assert batch.progress().items_completed == 18


def test_items_that_the_task_has_sorted_are_not_mistaken_for_each_other(stage: Scene) -> None:
    """Without names nobody can tell which one was in hand: so it is looked for."""
    batch = stage.start(stage.here.sorting.s(docs(6, _4="SIGSEGV"), place(stage)))
    batch.wait(60)
    (child,) = batch.children(status="crashed")
    assert child.args[0] == [{"id": 4, "does": "SIGSEGV"}]
    assert batch.progress().items_completed == 5


def test_items_that_a_retry_has_changed_keep_their_names(stage: Scene) -> None:
    batch = stage.start(stage.here.narrowing.s(docs(4, _1="SIGSEGV"), place(stage)))
    batch.wait(60)
    (child,) = batch.children(status="crashed")
    assert (child.items, child.args[0]) == (["1"], [{"id": 1, "does": "SIGSEGV"}])
    assert batch.progress().items_completed == 3


def test_a_batch_may_have_a_policy_of_its_own(stage: Scene) -> None:
    batch = stage.start(stage.tasks.skip.s(docs(4, _2="SIGSEGV"), place(stage)), on_crash="record")
    assert batch.wait(60) == "partial"
    assert crashed(batch) == [["0", "1", "2", "3"]]
    (incident,) = deaths(batch)
    assert (incident.item, incident.item_index) == ("2", 2), "the item in hand is known all the same"
    batch = stage.start(
        stage.tasks.record.s(docs(4, _2="SIGSEGV"), place(stage)), on_crash=CrashPolicy("bisect"), results="none"
    )
    batch.wait(60)
    assert crashed(batch) == [["2"]]
    with pytest.raises(errors.InvalidOption, match="merge="):
        stage.start(stage.tasks.record.s(docs(4), place(stage)), on_crash="bisect")


def test_a_hard_time_limit_is_bisected_since_it_convicts_no_item(stage: Scene) -> None:
    batch = stage.start(stage.tasks.limited.s(docs(4, _3="sleep"), place(stage)))
    batch.wait(60)
    assert crashed(batch) == [["3"]]
    assert {each.cause for each in deaths(batch)} == {"time_limit"}


def test_a_run_that_makes_no_progress_is_ended_and_its_stack_says_where(stage: Scene) -> None:
    batch = stage.start(
        stage.tasks.stalling.s(docs(5, _3="hang"), place(stage)),
        stage.tasks.stalling.s(docs(5, _2="sleep"), place(stage)),
    )
    assert batch.wait(60) == "partial"
    assert crashed(batch) == [["2"], ["3"]]
    found = {each.item: each for each in deaths(batch)}
    assert {each.cause for each in found.values()} == {"stalled"}
    assert " in hang_with_the_gil" in (found["3"].python_frame or ""), "native code that holds the GIL is seen too"
    assert " in handle\n" in (found["2"].stack or "")


def test_one_root_cause_has_one_fingerprint_in_every_batch(stage: Scene) -> None:
    batches = [
        stage.start(stage.tasks.skip.s(docs(6, **{f"_{at}": "SIGSEGV"}), place(stage)), name=f"batch {at}")
        for at in (2, 4)
    ]
    for batch in batches:
        batch.wait(60)
    prints = {each.fingerprint for batch in batches for each in deaths(batch)}
    assert len(prints) == 1
    (fingerprint,) = prints
    group = next(each for each in stage.batchtrack.store.crash_groups("fingerprint") if each.key == fingerprint)
    assert group.batches >= 2 and group.signal == "SIGSEGV"


def test_an_item_that_killed_twice_is_not_sent_again_until_it_is_released(stage: Scene) -> None:
    killer = unique("item")

    def upload() -> Batch:
        items = [{"id": "good"}, {"id": killer, "does": "SIGSEGV"}, {"id": "fine"}]
        batch = stage.start(stage.tasks.quarantining.s(items, place(stage)))
        batch.wait(60)
        assert crashed(batch) == [[killer]] and batch.progress().items_completed == 2
        return batch

    assert [len(deaths(upload())) for _ in range(4)] == [1, 1, 0, 0]
    batch = stage.start(stage.tasks.quarantining.s([{"id": killer, "does": "SIGSEGV"}], place(stage)))
    batch.wait(60)
    (child,) = batch.children()
    assert (child.status, child.cause, child.attempt) == ("crashed", "quarantined", 0)
    (released,) = stage.batchtrack.store.release_from_quarantine(items=[killer])
    assert released.deaths == 0
    assert len(deaths(upload())) == 1, "it is sent again, and counted from the beginning"


def test_too_many_deaths_pause_the_batch_until_it_is_resumed(stage: Scene) -> None:
    # Many: how many die before the third death is written is up to the machine, and three must be left to die.
    bad = [stage.tasks.record.s(docs(1, _0="exit"), place(stage)) for _ in range(60)]
    batch = stage.start(*bad, max_crash_rate="50%")
    row = eventually(lambda: _paused(stage, batch), 30, what="the breaker")
    assert row.pause_reason.startswith("breaker: ") and "runs died within 300 s" in row.pause_reason
    eventually(lambda: batch.progress().running == 0, what="the end of what ran")
    left = batch.progress().pending
    assert left > 0
    beats(stage, 2)
    assert batch.progress().pending == left, "nothing starts any more"
    assert batch.resume() and not batch.resume()
    eventually(lambda: _paused(stage, batch), 30, what="the breaker again")
    assert batch.cancel()
    assert sum(batch.progress().as_dict()[name] for name in ("crashed", "cancelled")) == 60


def _paused(scene: Scene, batch: Batch) -> Any:
    row = scene.batchtrack.store.batch(batch.id)
    assert row is None or row.status == "running", f"it ended: {row}"
    return row if row is not None and row.paused_at is not None else None


# -- whole workers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("everybody", [False, True], ids=["main process", "its pool too"])
def test_the_items_in_hand_are_known_after_the_main_process_was_killed(scene: Scene, everybody: bool) -> None:
    with scene.worker() as worker:
        places = [scene.place("first"), scene.place("second")]
        batch = scene.start(
            *(
                scene.tasks.record.s([{"id": f"a{at}"}, {"id": f"b{at}", "does": "wait"}, {"id": f"c{at}"}], each)
                for at, each in enumerate(places)
            )
        )
        scene.wait_met("first.met-b0", "second.met-b1")
        if everybody:
            worker.stop()
        else:
            worker.kill()
        worker.restart()
        assert batch.wait(30) == "partial"
    found = sorted((each.item, each.item_index, each.items_done, each.note) for each in deaths(batch))
    assert found == [("b0", 1, 1, "before b0"), ("b1", 1, 1, "before b1")]
    assert {(each.cause, each.detected_by, each.verdict) for each in deaths(batch)} == {
        ("worker_lost", "host", "observed")
    }


@on_every_broker
def test_of_four_children_of_a_killed_worker_three_are_cleared_and_one_is_convicted(scene: Scene) -> None:
    names = [f"child{at}" for at in range(4)]
    deeds = [{}, {}, {"does": "kill the worker"}, {}]
    with scene.worker("--concurrency=4") as worker:
        batch = scene.start(
            *(
                scene.tasks.isolated.s([{"id": f"x{at}", "does": "wait"}, {"id": f"y{at}", **deed}], scene.place(name))
                for at, (name, deed) in enumerate(zip(names, deeds, strict=True))
            )
        )
        scene.wait_met(*(f"{name}.met-x{at}" for at, name in enumerate(names)))
        scene.go("child2")
        eventually(lambda: not worker.alive, 30, what="the end of the worker")
        scene.go(*names)
        worker.restart()
        eventually(lambda: not worker.alive, 60, what="the end of the second worker")
        worker.restart()
        assert batch.wait(60) == "partial"
    assert scene.statuses(batch) == ["completed", "completed", "crashed", "completed"]
    culprit = [each for each in deaths(batch) if each.position == 2]
    assert [each.outcome for each in culprit] == ["retried", "crashed"]
    assert [child.crashes for child in batch.children()] == [0, 0, 1, 0], "who only shared the worker has no strike"
    assert culprit[1].queue is not None and culprit[1].queue.endswith(".isolated")


def test_a_suspect_runs_alone_and_others_wait_for_it(scene: Scene) -> None:
    """Two children die with their worker; with two processes free, their next attempts do not overlap."""
    with scene.worker("--concurrency=4") as worker:
        batch = scene.start(
            *(scene.tasks.isolated.s([{"id": f"x{at}", "does": "wait"}], scene.place(f"s{at}")) for at in range(2))
        )
        scene.wait_met("s0.met-x0", "s1.met-x1")
        worker.stop()
        worker.restart()
        met = eventually(
            lambda: [at for at in range(2) if len(scene.lines(f"s{at}.met-x{at}")) > 1], 30, what="a suspect"
        )
        plain = scene.start(scene.tasks.record.s(docs(1), scene.place("plain")))
        for _ in range(3):  # sweeps and beats pass; nobody overtakes
            before = scene.workers()[0].beat
            eventually(lambda before=before: scene.workers()[0].beat > before, what="a beat")
            assert len(met) == 1
            assert [at for at in range(2) if len(scene.lines(f"s{at}.met-x{at}")) > 1] == met
            assert plain.progress().completed == 0
        scene.go(f"s{met[0]}", f"s{1 - met[0]}")
        assert batch.wait(30) == "completed"
        assert plain.wait(30) == "completed"


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_without_pool_processes_the_stack_tells_which_child_did_it(scene: Scene, pool: str) -> None:
    with scene.worker(f"--pool={pool}", "--concurrency=2") as worker:
        items = [{"id": "a", "does": "wait"}, {"id": "boom", "does": "SIGSEGV"}, {"id": "c"}]
        children = [scene.tasks.skip.s(items, scene.place("did"))]
        if pool == "threads":
            children.append(scene.tasks.isolated_skip.s([{"id": "x", "does": "wait"}, {"id": "y"}], scene.place("saw")))
        batch = scene.start(*children)
        scene.wait_met("did.met-a", *(["saw.met-x"] if pool == "threads" else []))
        scene.go("did")
        eventually(lambda: not worker.alive, 30, what="the end of the worker")
        scene.go("saw")
        worker.restart()
        batch.wait(60)
    assert crashed(batch) == [["boom"]]
    guilty = next(each for each in deaths(batch) if each.item == "boom")
    assert (guilty.cause, guilty.signal, guilty.detected_by) == ("signal", "SIGSEGV", "host")
    assert (guilty.python_frame or "").endswith("in segfault_in_c")
    assert [each.cause for each in deaths(batch) if each.item == "x"] == ["worker_lost"] * (pool == "threads")
    assert batch.progress().items_completed == len(children) * 2


# -- memory -----------------------------------------------------------------------------------------


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 150 MB; skipped where the machine lends none (in a container, say)."""
    group = _limited_cgroup(150 * 1024 * 1024)
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text().strip(), what="an empty cgroup")
    group.rmdir()


def _limited_cgroup(size: int) -> Path | None:
    for base, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max"), ("unified", "memory.max")):
        group = Path("/sys/fs/cgroup", base, unique("batchtrack"))
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                (group / limit).write_text(str(size))
                return group
            group.rmdir()
    return None


def test_what_the_kernel_killed_for_memory_is_told_apart_from_what_somebody_killed(
    scene: Scene, small_cgroup: Path
) -> None:
    with scene.worker() as worker:
        batch = scene.start(
            scene.tasks.skip.s([{"id": "a"}, {"id": "fat", "does": f"allocate in {small_cgroup}"}], scene.place("fat")),
            scene.tasks.skip.s([{"id": "b"}, {"id": "shot", "does": "SIGKILL"}], scene.place("shot")),
        )
        batch.wait(60)
        found = {each.item: each for each in deaths(batch)}
        assert (found["fat"].cause, found["fat"].signal) == ("oom", "SIGKILL"), worker.logs()[-2000:]
        assert (found["shot"].cause, found["shot"].signal) == ("signal", "SIGKILL")
        assert (found["fat"].peak_memory or 0) > 100 * 1024 * 1024
        assert crashed(batch) == [["fat"], ["shot"]]


def test_what_died_of_memory_goes_on_in_the_queue_of_bigger_machines(scene: Scene, small_cgroup: Path) -> None:
    with scene.worker():
        batch = scene.start(
            scene.tasks.bigger.s([{"id": "fat", "does": f"allocate in {small_cgroup}"}], scene.place("fat"))
        )
        eventually(lambda: [child.queue for child in batch.children()] == ["bigmem"], 30, what="the other queue")
        assert scene.statuses(batch) == ["pending"]
    with scene.worker("--queues=bigmem"):
        assert batch.wait(60) == "partial"
    assert [(each.outcome, each.cause, each.queue) for each in deaths(batch)] == [
        ("retried", "oom", "celery"), ("crashed", "oom", "bigmem"),
    ]  # fmt: skip


# -- what the application does ----------------------------------------------------------------------


def test_an_application_that_switches_faulthandler_off_is_told_and_its_children_are_tracked(scene: Scene) -> None:
    with scene.worker("--concurrency=1") as worker:
        batch = scene.start(scene.tasks.skip.s([{"id": "off", "does": "disable"}, {"id": "on"}], scene.place("one")))
        assert batch.wait(30) == "completed"
        batch = scene.start(scene.tasks.skip.s(docs(3, _1="SIGSEGV"), scene.place("two")))
        assert batch.wait(30) == "partial"
        eventually(lambda: worker.logs().count("action=no_stacks") == 1, what="one warning")
    (incident,) = deaths(batch)
    assert (incident.item, incident.signal, incident.stack) == ("1", "SIGSEGV", None)


def test_undecorated_tasks_may_walk_too(stage: Scene) -> None:
    batch = stage.start(stage.here.undecorated.s(docs(4, _2="SIGSEGV"), place(stage)))
    batch.wait(30)
    (incident,) = deaths(batch)
    assert (incident.item_index, incident.items_done, incident.signal) == (2, 2, "SIGSEGV")


def _pids(scene: Scene, name: str) -> list[int]:
    return [int(line) for line in scene.lines(f"{name}.runs")]


def test_a_clean_end_leaves_no_boxes_and_no_stacks(scene: Scene) -> None:
    with scene.worker() as worker:
        batch = scene.start(scene.tasks.skip.s(docs(6, _2="SIGSEGV"), scene.place("clean")))
        batch.wait(30)
        folder = scene.folder / "boxes"
        assert list(folder.glob("*/*.box")) and list(folder.glob("*/*.stack"))
        worker.terminate()
        worker.wait()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == []
    assert len(set(_pids(scene, "clean"))) == 2


def test_a_suspect_that_is_killed_by_hand_is_no_culprit_of_a_signal_from_outside(stage: Scene) -> None:
    where = place(stage)
    batch = stage.start(stage.tasks.skip.s([{"id": "a"}, {"id": "b", "does": "wait"}, {"id": "c"}], where))
    name = Path(where).name
    stage.wait_met(f"{name}.met-b")
    os.kill(_pids(stage, name)[-1], signal.SIGTERM)
    eventually(lambda: len(stage.lines(f"{name}.met-b")) == 2, 30, what="another attempt")
    stage.go(name)
    assert batch.wait(30) == "completed"
    (incident,) = deaths(batch)
    assert (incident.outcome, incident.item) == ("retried", "b")
