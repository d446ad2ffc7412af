"""The four detectors and the sweep, over a real SQLite database and real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack.behaviour import dispatch, hosts, recovery, spool
from celery_batchtrack.behaviour.blackbox import Page, Phase
from celery_batchtrack.behaviour.detector import Death, Reconciler, Sweeper, process_died
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.behaviour.identity import WorkerIdentity
from celery_batchtrack.behaviour.run import Runner
from celery_batchtrack.store import Store, schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, Ticket, new_token
from celery_batchtrack.vocabulary.records import Claimed, Ending, HostIdentity
from celery_batchtrack.vocabulary.states import Cause, Status, Verdict
from tests.store.behaviour_kit import Bench, Told, killed, tracker_on
from tests.store.kit import ELSEWHERE, RETRY, Scene, add_up, counts, some

CALLS = ("on_success", "on_failure", "on_finish")
DONE = Ending(Status.COMPLETED, '"done"')
AGAIN = RowPolicy("retry", True, True, True)


@pytest.fixture
def scene(sqlite_url: str) -> Iterator[Scene]:
    scene = Scene(Store(sqlite_url))
    assert scene.store.store_id
    yield scene
    scene.store.dispose()


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store)


@pytest.fixture
def bench(tracker: Told, scene: Scene, tmp_path: Path) -> Bench:
    """This process, as a worker's main process; `scene.worker_id` is its."""
    bench = Bench.of(tracker, tmp_path)
    scene.worker_id = bench.worker.id
    return bench


@pytest.fixture
def sweeper(tracker: Told, bench: Bench, tmp_path: Path) -> Sweeper:
    """A sweep that may convict: it is not the first."""
    sweeper = Sweeper(tracker, "test", tmp_path, bench.worker)
    sweeper.sweep()
    return sweeper


@contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A living process, for a slot's owner."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def slot_of(pid: int, start: int | None = None) -> str:
    return f"{pid}:{hosts.started(pid) if start is None else start}:{pid}:0"


def dead_slot() -> str:
    """The slot of a process that was there."""
    with process() as child:
        return slot_of(child.pid)


def page(bench: Bench, slot: str, claimed: Claimed | None = None, phase: Phase = Phase.RUNNING) -> Page:
    """What a pool process would have written."""
    written = bench.boxes.page(slot)
    if claimed is not None:
        written.enter(claimed.key, claimed.token, phase)
    return written


def first_of(tracker: Told) -> Ticket:
    return tracker.outbox.sent[0].ticket


# -- 1: a pool process died, its main process lives ------------------------------------------------


def _death(slot: str, **more: object) -> Death:
    pid, start, *_ = slot.split(":")
    return Death(int(pid), int(start), Cause.SIGNAL, signal="SIGSEGV", **more)  # type: ignore[arg-type]


def test_whatever_a_dead_process_had_in_hand_is_settled(scene: Scene, tracker: Told, bench: Bench) -> None:
    slot, other = dead_slot(), dead_slot().replace(":0", ":7")
    batch_id = scene.batch(3, tolerance=3)
    scene.run(batch_id, 0, slot=slot)
    scene.run(batch_id, 1, slot=slot[:-1] + "1")  # an eager child within it
    scene.run(batch_id, 2, slot=other)
    assert process_died(tracker, bench.worker, bench.boxes, _death(slot)) == 2
    assert scene.statuses(batch_id) == ["crashed", "crashed", "running"]
    (incident, _) = scene.incidents(batch_id)
    assert (incident.signal, incident.cause, incident.detected_by, incident.verdict) == (
        "SIGSEGV", "signal", "main", "observed",
    )  # fmt: skip
    assert incident.pid == int(slot.split(":")[0]) and incident.hostname == bench.worker.host.hostname
    assert [event.runs_again for event in tracker.of(events.ChildCrashed)] == [False, False]


def test_a_death_that_is_told_twice_is_judged_once(scene: Scene, tracker: Told, bench: Bench) -> None:
    """A hard time limit is: by Celery's own handler, and by the end of the process."""
    slot, batch_id = dead_slot(), scene.batch(1)
    dispatch.pump(tracker, batch_id)
    ticket = first_of(tracker)
    scene.run(batch_id, slot=slot, policy=RETRY)
    death = _death(slot, ticket=ticket, policy=AGAIN)
    assert process_died(tracker, bench.worker, bench.boxes, death) == 1
    assert process_died(tracker, bench.worker, bench.boxes, death) == 0
    row = scene.row(ticket.key)
    assert (row.status, row.crashes, row.attempt) == ("pending", 1, 1)


def test_a_process_that_died_before_its_claim_used_up_an_attempt(scene: Scene, tracker: Told, bench: Bench) -> None:
    """It died while it decoded the arguments: to ignore that would kill one process after another, for ever."""
    batch_id = scene.batch(1, calls=CALLS)
    dispatch.pump(tracker, batch_id)
    for crashes in (1, 2, 3):
        ticket = tracker.outbox.sent[-1].ticket
        death = _death(dead_slot(), ticket=ticket, policy=AGAIN)
        assert process_died(tracker, bench.worker, bench.boxes, death) == 1
        assert process_died(tracker, bench.worker, bench.boxes, death) == 0
        assert scene.row(ticket.key).crashes == crashes
    assert scene.statuses(batch_id) == ["crashed"] and scene.status(batch_id) == "failed"
    assert [(each.phase, each.attempt, each.outcome) for each in scene.incidents(batch_id)] == [
        ("before_claim", 1, "retried"), ("before_claim", 2, "retried"), ("before_claim", 3, "crashed"),
    ]  # fmt: skip
    assert [event.runs_again for event in tracker.of(events.ChildCrashed)] == [True, True, False]
    assert add_up(scene, batch_id)


def test_a_death_before_the_claim_is_final_where_the_task_never_runs_again(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    batch_id = scene.batch(1)
    dispatch.pump(tracker, batch_id)
    process_died(tracker, bench.worker, bench.boxes, _death(dead_slot(), ticket=first_of(tracker)))
    assert scene.statuses(batch_id) == ["crashed"]


def test_a_death_with_a_stale_message_in_hand_strikes_nobody(scene: Scene, tracker: Told, bench: Bench) -> None:
    batch_id = scene.batch(1)
    dispatch.pump(tracker, batch_id)
    ticket = first_of(tracker)
    scene.crash(scene.run(batch_id), again=0.0)
    assert process_died(tracker, bench.worker, bench.boxes, _death(dead_slot(), ticket=ticket)) == 0
    assert scene.row(ticket.key).crashes == 1


def test_an_end_that_the_dead_process_left_on_disk_is_its_end(scene: Scene, tracker: Told, bench: Bench) -> None:
    slot, batch_id = dead_slot(), scene.batch(1)
    claimed = scene.run(batch_id, slot=slot)
    assert bench.boxes.folder is not None
    spool.write(bench.boxes.folder, spool.Spooled(claimed.key, claimed.token, slot, DONE))
    assert process_died(tracker, bench.worker, bench.boxes, _death(slot)) == 0
    assert scene.statuses(batch_id) == ["completed"] and scene.incidents(batch_id) == []


def test_a_process_known_by_its_pid_alone_is_matched_by_it(scene: Scene, tracker: Told, bench: Bench) -> None:
    batch_id = scene.batch(2, tolerance=2)
    scene.run(batch_id, 0, slot="12:1:1:0")
    scene.run(batch_id, 1, slot="123:1:1:0")
    assert process_died(tracker, bench.worker, bench.boxes, Death(12, None, Cause.EXIT, exit_code=3)) == 1
    assert scene.statuses(batch_id) == ["crashed", "running"]


def test_the_third_death_settles_and_the_earlier_ones_are_kept(scene: Scene, tracker: Told, bench: Bench) -> None:
    batch_id = scene.batch(1)
    for _ in range(3):
        slot = dead_slot()
        scene.run(batch_id, slot=slot, policy=RETRY)
        process_died(tracker, bench.worker, bench.boxes, _death(slot))
    assert scene.row(ChildKey(batch_id, 0)).crashes == 3
    assert [each.outcome for each in scene.incidents(batch_id)] == ["retried", "retried", "crashed"]


def test_a_crashed_child_waits_longer_after_each_death(scene: Scene, tracker: Told, bench: Bench) -> None:
    tracker.settings = replace(tracker.settings, retry_backoff=100.0)
    batch_id = scene.batch(1)
    waits = []
    for _ in range(2):
        claimed = scene.run(batch_id, policy=RETRY)
        evidence = Evidence(Cause.SIGNAL)
        recovery.run_died(tracker, scene.row(claimed.key), evidence, Verdict.OBSERVED)
        not_before = scene.row(claimed.key).not_before
        assert not_before is not None
        waits.append((not_before - scene.store.current_time()).total_seconds())
    assert waits == pytest.approx([100, 200], abs=5)


# -- 3: rows against black boxes -------------------------------------------------------------------


@pytest.fixture
def reconciler(tracker: Told, bench: Bench) -> Reconciler:
    return Reconciler(tracker, bench.worker, bench.boxes)


def test_a_run_whose_process_is_gone_is_settled_on_the_second_beat(scene: Scene, reconciler: Reconciler) -> None:
    batch_id = scene.batch(1)
    scene.run(batch_id, slot=dead_slot())
    reconciler.beat()
    assert scene.statuses(batch_id) == ["running"]
    reconciler.beat()
    (incident,) = scene.incidents(batch_id)
    assert (incident.cause, incident.detected_by, incident.outcome) == ("exit", "reconcile", "crashed")


def test_a_run_whose_slot_went_on_to_another_is_a_lost_settle(
    scene: Scene, bench: Bench, reconciler: Reconciler
) -> None:
    with process() as child:
        slot, batch_id = slot_of(child.pid), scene.batch(2)
        claimed = scene.run(batch_id, slot=slot)
        page(bench, slot, replace(claimed, key=ChildKey(batch_id, 1), token=new_token()))
        reconciler.beat()
        reconciler.beat()
        (incident,) = scene.incidents(batch_id)
        assert (incident.cause, incident.position) == ("settle_lost", 0)


def test_a_run_whose_slot_is_idle_is_a_lost_settle(scene: Scene, bench: Bench, reconciler: Reconciler) -> None:
    with process() as child:
        slot, batch_id = slot_of(child.pid), scene.batch(1)
        scene.run(batch_id, slot=slot)
        page(bench, slot)
        reconciler.beat()
        reconciler.beat()
        assert [each.cause for each in scene.incidents(batch_id)] == ["settle_lost"]


def test_a_run_that_is_in_its_slots_page_is_left_alone_however_long(
    scene: Scene, bench: Bench, reconciler: Reconciler
) -> None:
    with process() as child:
        slot, batch_id = slot_of(child.pid), scene.batch(1)
        claimed = scene.run(batch_id, slot=slot)
        scene.set_child(claimed.key, started_at=later(-36_000.0))
        for phase in (Phase.CLAIMING, Phase.RUNNING, Phase.SETTLING):
            page(bench, slot, claimed, phase)
            for _ in range(3):
                reconciler.beat()
        assert scene.statuses(batch_id) == ["running"] and scene.incidents(batch_id) == []


def test_a_living_slot_without_a_page_is_abstained_from(scene: Scene, reconciler: Reconciler) -> None:
    with process() as child:
        batch_id = scene.batch(1)
        scene.run(batch_id, slot=slot_of(child.pid))
        for _ in range(3):
            reconciler.beat()
        assert scene.statuses(batch_id) == ["running"]


def test_a_torn_page_proves_nothing(scene: Scene, bench: Bench, reconciler: Reconciler) -> None:
    with process() as child:
        slot, batch_id = slot_of(child.pid), scene.batch(1)
        scene.run(batch_id, slot=slot)
        torn = page(bench, slot)
        assert torn.path is not None
        data = bytearray(torn.path.read_bytes())
        data[8] |= 1
        torn.path.write_bytes(data)
        for _ in range(3):
            reconciler.beat()
        assert scene.statuses(batch_id) == ["running"]


def test_a_run_seen_without_its_page_on_one_beat_only_is_forgotten(
    scene: Scene, bench: Bench, reconciler: Reconciler
) -> None:
    with process() as child:
        slot, batch_id = slot_of(child.pid), scene.batch(1)
        claimed = scene.run(batch_id, slot=slot)
        page(bench, slot)
        reconciler.beat()
        page(bench, slot, claimed)
        reconciler.beat()
        page(bench, slot).clear()
        reconciler.beat()
        assert scene.statuses(batch_id) == ["running"]


def test_a_claim_that_was_given_up_goes_back_without_a_strike(
    scene: Scene, tracker: Told, bench: Bench, reconciler: Reconciler
) -> None:
    with process() as child:
        slot, batch_id = slot_of(child.pid), scene.batch(1)
        claimed = scene.run(batch_id, slot=slot)
        page(bench, slot, claimed, Phase.GAVE_UP)
        reconciler.beat()
        reconciler.beat()
        row = scene.row(claimed.key)
        assert (row.status, row.crashes) == ("pending", 0) and scene.incidents(batch_id) == []
        assert tracker.outbox.published() == [claimed.key]


def test_other_workers_rows_are_none_of_its_business(scene: Scene, reconciler: Reconciler) -> None:
    batch_id = scene.batch(1)
    scene.run(batch_id, slot=dead_slot(), worker=scene.worker())
    reconciler.beat()
    reconciler.beat()
    assert scene.statuses(batch_id) == ["running"]


def test_one_verdict_that_cannot_be_written_holds_nobody_up(
    scene: Scene, tracker: Told, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = scene.batch(2)
    dead = scene.worker()
    for position in (0, 1):
        scene.run(batch_id, position, worker=dead)
    scene.store.stop(dead)
    verdict = recovery.run_died

    def fails_for_one(told: Any, row: Any, *more: Any) -> bool:
        if row.position == 0:
            raise ValueError("out of range")
        return verdict(told, row, *more)

    monkeypatch.setattr(recovery, "run_died", fails_for_one)
    sweeper.sweep()
    assert scene.statuses(batch_id) == ["running", "crashed"]
    assert [event.error for event in tracker.of(events.VerdictFailed)] == ["ValueError: out of range"]
    monkeypatch.undo()
    sweeper.sweep()
    assert scene.statuses(batch_id) == ["crashed", "crashed"]


def test_pages_of_dead_processes_go(scene: Scene, bench: Bench, reconciler: Reconciler) -> None:
    page(bench, dead_slot())
    reconciler.beat()
    assert len(list(bench.boxes.pages())) == 1, "its death may still wait to be judged"
    reconciler.beat()
    assert list(bench.boxes.pages()) == []


def test_a_process_that_is_gone_is_left_to_the_main_process_for_a_moment(
    scene: Scene, tracker: Told, bench: Bench
) -> None:
    """Which sees how it died; here only that it did is known."""
    moments = iter([100.0, 100.5, 101.9, 102.0])
    patient = Reconciler(tracker, bench.worker, bench.boxes, patience=2.0, clock=lambda: next(moments))
    batch_id = scene.batch(1)
    scene.run(batch_id, slot=dead_slot(), worker=bench.worker.id)
    for _ in range(3):
        patient.beat()
        assert scene.statuses(batch_id) == ["running"]
    patient.beat()
    assert scene.statuses(batch_id) == ["crashed"]


# -- 3, the reverse: zombies -----------------------------------------------------------------------


@contextmanager
def zombie(scene: Scene, bench: Bench) -> Iterator[tuple[subprocess.Popen[bytes], Claimed]]:
    """A living process in the middle of a run."""
    with process() as child:
        slot = slot_of(child.pid)
        claimed = scene.run(scene.batch(1, options={}), slot=slot, policy=RETRY)
        page(bench, slot, claimed)
        yield child, claimed


def _kills(reconciler: Reconciler) -> list[tuple[int, int]]:
    killed: list[tuple[int, int]] = []
    reconciler.kill = lambda pid, number: killed.append((pid, number))
    for _ in range(4):
        reconciler.beat()
    return killed


def test_a_run_whose_child_was_cancelled_is_terminated_and_then_killed(
    scene: Scene, tracker: Told, bench: Bench, reconciler: Reconciler
) -> None:
    with zombie(scene, bench) as (child, claimed):
        scene.store.cancel(claimed.key.batch_id)
        assert _kills(reconciler) == [
            (child.pid, signal.SIGTERM), (child.pid, signal.SIGKILL), (child.pid, signal.SIGKILL),
        ]  # fmt: skip
        assert tracker.of(events.ZombieTerminated)[0].pid == child.pid


def test_a_real_zombie_really_ends(scene: Scene, bench: Bench, reconciler: Reconciler) -> None:
    with zombie(scene, bench) as (child, claimed):
        scene.store.cancel(claimed.key.batch_id)
        reconciler.beat()
        assert child.poll() is None, "one look is not enough"
        reconciler.beat()
        assert child.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize(
    "fate", ["observed", "claimed anew", "gone", "lease in an ended batch", "lease and cancelled"]
)
def test_a_run_that_can_change_nothing_any_more_is_terminated(
    scene: Scene, bench: Bench, reconciler: Reconciler, fate: str
) -> None:
    with zombie(scene, bench) as (child, claimed):
        batch_id = claimed.key.batch_id
        if fate == "observed":
            scene.crash(claimed)
        elif fate == "claimed anew":
            scene.crash(claimed, Verdict.LEASE, again=0.0)
            scene.run(batch_id, worker=scene.worker())
        elif fate == "gone":
            scene.execute(sa.delete(schema.batch))
        elif fate == "lease in an ended batch":
            scene.crash(claimed, Verdict.LEASE)
            scene.store.finish(batch_id)
        else:
            scene.crash(claimed, Verdict.LEASE, again=0.0)
            scene.store.cancel(batch_id)
        assert _kills(reconciler)[:1] == [(child.pid, signal.SIGTERM)]


@pytest.mark.parametrize("fate", ["running", "lease", "lease, put back", "cancelled without termination"])
def test_a_run_that_lives_or_may_be_overturned_is_left_alone(
    scene: Scene, bench: Bench, reconciler: Reconciler, fate: str
) -> None:
    with zombie(scene, bench) as (_, claimed):
        if fate.startswith("lease"):
            scene.crash(claimed, Verdict.LEASE, again=0.0 if "back" in fate else None)
        elif fate.startswith("cancelled"):
            scene.store.cancel(claimed.key.batch_id, terminate=False)
        assert _kills(reconciler) == []


@pytest.mark.parametrize("phase", [Phase.CLAIMING, Phase.SETTLING])
def test_only_a_page_that_says_running_makes_a_zombie(
    scene: Scene, bench: Bench, reconciler: Reconciler, phase: Phase
) -> None:
    with zombie(scene, bench) as (_, claimed):
        scene.store.cancel(claimed.key.batch_id)
        page(bench, scene.row(claimed.key).slot or "", claimed, phase)
        assert _kills(reconciler) == []


def test_a_thread_of_the_main_process_is_never_killed(scene: Scene, bench: Bench, reconciler: Reconciler) -> None:
    slot = slot_of(os.getpid())
    claimed = scene.run(scene.batch(1), slot=slot)
    page(bench, slot, claimed)
    scene.store.cancel(claimed.key.batch_id)
    assert _kills(reconciler) == []


# -- 2: the same host ------------------------------------------------------------------------------


def _here(scene: Scene, pid: int, start: int | None, **more: object) -> uuid.UUID:
    """A worker of this very host."""
    return scene.worker(hosts.identity(), pid=pid, pid_started=start, **more)


def test_a_worker_of_this_host_that_is_gone_is_convicted_at_once(
    scene: Scene, tracker: Told, sweeper: Sweeper
) -> None:
    slot = dead_slot()
    pid, start = (int(part) for part in slot.split(":")[:2])
    lost, batch_id = _here(scene, pid, start), scene.batch(2, tolerance=2)
    scene.run(batch_id, 0, worker=lost, slot=dead_slot())
    scene.run(batch_id, 1, worker=lost, slot=slot)  # a threads or solo pool: the main process itself
    done = sweeper.sweep()
    assert (done.lost_workers, done.verdicts) == (1, 2)
    assert {(each.cause, each.detected_by, each.verdict) for each in scene.incidents(batch_id)} == {
        ("worker_lost", "host", "observed")
    }
    assert [event.worker_id for event in tracker.of(events.WorkerLost)] == [lost]
    assert sweeper.sweep().verdicts == 0, "a second sweep finds nothing to do"


def test_a_pid_that_came_again_is_another_process(scene: Scene, sweeper: Sweeper) -> None:
    with process() as child:
        start = hosts.started(child.pid) or 0
        lost, batch_id = _here(scene, child.pid, start - 1), scene.batch(1)
        scene.run(batch_id, worker=lost, slot=slot_of(child.pid, start - 1))
        sweeper.sweep()
        assert scene.statuses(batch_id) == ["crashed"]


@pytest.mark.parametrize("start_known", [True, False])
def test_a_worker_of_this_host_that_lives_is_left_alone(scene: Scene, sweeper: Sweeper, start_known: bool) -> None:
    with process() as child:
        start = hosts.started(child.pid) if start_known else None
        worker, batch_id = _here(scene, child.pid, start), scene.batch(1)
        scene.run(batch_id, worker=worker, slot=slot_of(child.pid))
        sweeper.sweep()
        assert scene.statuses(batch_id) == ["running"]
        assert worker in {each.id for each in scene.store.live_workers()}


def test_two_workers_under_one_name_do_not_vouch_for_each_other_nor_accuse(scene: Scene, sweeper: Sweeper) -> None:
    with process() as child:
        start = hosts.started(child.pid)
        one, batch_id = _here(scene, child.pid, start, name="same@here"), scene.batch(2, tolerance=2)
        dead = dead_slot()
        pid, begun = (int(part) for part in dead.split(":")[:2])
        other = _here(scene, pid, begun, name="same@here")
        scene.run(batch_id, 0, worker=one, slot=slot_of(child.pid))
        scene.run(batch_id, 1, worker=other, slot=dead)
        sweeper.sweep()
        assert scene.statuses(batch_id) == ["running", "crashed"]


def test_a_run_that_outlived_its_main_process_may_still_report(scene: Scene, sweeper: Sweeper) -> None:
    pid, start, *_ = dead_slot().split(":")
    lost, batch_id = _here(scene, int(pid), int(start)), scene.batch(1)
    with process() as child:
        claimed = scene.run(batch_id, worker=lost, slot=slot_of(child.pid))
        assert sweeper.sweep().lost_workers == 1
        assert scene.statuses(batch_id) == ["running"]
    sweeper.sweep()
    assert scene.row(claimed.key).status == "crashed"


@pytest.mark.parametrize("start", ["same", "another"])
def test_my_own_pid_under_another_boot_is_a_dead_worker(scene: Scene, sweeper: Sweeper, start: str) -> None:
    """Celery's SIGHUP restart keeps pid and start time; in a container the pid often comes again."""
    own = hosts.started(os.getpid()) or 0
    former = _here(scene, os.getpid(), own if start == "same" else own - 5)
    batch_id = scene.batch(1)
    scene.run(batch_id, worker=former, slot=dead_slot())
    assert sweeper.sweep().lost_workers == 1
    assert scene.statuses(batch_id) == ["crashed"]
    assert sweeper.own is not None and scene.store.running_of(sweeper.own.id) == []


def test_a_sweep_by_a_client_does_not_take_its_own_pid_for_a_dead_worker(
    scene: Scene, tracker: Told, tmp_path: Path
) -> None:
    worker = _here(scene, os.getpid(), hosts.started(os.getpid()))
    client = WorkerIdentity("client", "client", "client")
    Sweeper(tracker, "client", tmp_path, client).sweep()
    assert worker in {each.id for each in scene.store.live_workers()}


@pytest.mark.parametrize(
    "host",
    [
        ELSEWHERE, replace(hosts.identity(), boot_id="another"), replace(hosts.identity(), pid_namespace="another"),
        HostIdentity(hosts.identity().hostname, None, None),
    ],
)  # fmt: skip
def test_pids_of_another_host_boot_or_namespace_say_nothing(
    scene: Scene, sweeper: Sweeper, host: HostIdentity
) -> None:
    pid, start, *_ = dead_slot().split(":")
    worker, batch_id = scene.worker(host, pid=int(pid), pid_started=int(start)), scene.batch(1)
    scene.run(batch_id, worker=worker, slot=f"{pid}:{start}:1:0")
    sweeper.sweep()
    assert scene.statuses(batch_id) == ["running"]


def test_a_host_that_cannot_be_read_convicts_nobody(scene: Scene, sweeper: Sweeper) -> None:
    sweeper.host = HostIdentity("somewhere", None, None)
    worker = scene.worker(sweeper.host, pid=1, pid_started=1)
    sweeper.sweep()
    assert worker in {each.id for each in scene.store.live_workers()}


def test_a_container_that_ended_is_known_by_its_lock_in_the_shared_folder(
    scene: Scene, tracker: Told, sweeper: Sweeper, tmp_path: Path
) -> None:
    batch_id = scene.batch(1)
    dispatch.pump(tracker, batch_id)
    message = tracker.outbox.sent.pop()
    container = WorkerIdentity("w@container", host=ELSEWHERE)

    def live() -> None:
        boxes = Boxes(tmp_path, container.id)
        boxes.create()
        Bench(tracker, Runner(tracker, container, boxes)).claim(message)

    scene.store.register(container.as_new_worker(15.0, "0"))
    killed(live)
    sweeper.sweep()
    (incident,) = scene.incidents(batch_id)
    assert (incident.detected_by, incident.verdict) == ("host", "observed")


def test_the_spool_of_this_host_is_replayed_before_anybody_is_convicted(
    scene: Scene, sweeper: Sweeper, tmp_path: Path
) -> None:
    slot = dead_slot()
    lost, batch_id = _here(scene, *(int(part) for part in slot.split(":")[:2])), scene.batch(1, calls=CALLS)
    claimed = scene.run(batch_id, worker=lost, slot=slot)
    _left_on_disk(tmp_path, lost, claimed, slot)
    done = sweeper.sweep()
    assert (done.delivered, done.verdicts) == (1, 0)
    assert scene.status(batch_id) == "completed" and scene.incidents(batch_id) == []


def test_the_spool_of_a_worker_that_others_found_lost_overturns_their_verdict(
    scene: Scene, sweeper: Sweeper, tmp_path: Path
) -> None:
    slot = dead_slot()
    lost, batch_id = _here(scene, *(int(part) for part in slot.split(":")[:2])), scene.batch(2)
    claimed = scene.run(batch_id, worker=lost, slot=slot)
    scene.set_worker(lost, lost_at=later(0.0), lost_by="lease")
    scene.crash(claimed, Verdict.LEASE)
    _left_on_disk(tmp_path, lost, claimed, slot)
    assert sweeper.sweep().delivered == 1
    assert scene.statuses(batch_id) == ["completed", "pending"]


def test_the_spool_of_another_databases_worker_is_not_touched(scene: Scene, sweeper: Sweeper, tmp_path: Path) -> None:
    stranger = uuid.uuid4()
    path = _left_on_disk(tmp_path, stranger, scene.run(scene.batch(1)), "1:1:1:0")
    assert sweeper.sweep().delivered == 0
    assert path.exists()


def _left_on_disk(base: Path, worker_id: uuid.UUID, claimed: Claimed, slot: str) -> Path:
    folder = base / str(worker_id)
    (folder / "spool").mkdir(parents=True)
    return spool.write(folder, spool.Spooled(claimed.key, claimed.token, slot, DONE))


def test_a_worker_that_stopped_in_order_leaves_nothing_running(scene: Scene, sweeper: Sweeper) -> None:
    batch_id, stopped = scene.batch(1), scene.worker()
    scene.run(batch_id, worker=stopped)
    scene.store.stop(stopped)
    sweeper.sweep()
    (incident,) = scene.incidents(batch_id)
    assert (incident.cause, incident.detected_by) == ("settle_lost", "reconcile")


# -- 4: the lease ----------------------------------------------------------------------------------


def _silence(scene: Scene, worker_id: uuid.UUID, seconds: float, suspected: float | None = None) -> None:
    beat = next(each.beat for each in scene.store.workers(all=True) if each.id == worker_id)
    scene.set_worker(worker_id, beat_at=later(-seconds))
    if suspected is not None:
        scene.set_worker(worker_id, suspected_beat=beat, suspected_at=later(-suspected))


@pytest.fixture
def far(scene: Scene, bench: Bench) -> tuple[uuid.UUID, uuid.UUID, Claimed]:
    """A worker on another host, its batch, and what it runs."""
    worker, batch_id = scene.worker(ELSEWHERE), scene.batch(1, calls=CALLS)
    assert bench.worker.id != worker
    return worker, batch_id, scene.run(batch_id, worker=worker)


Far = tuple[uuid.UUID, uuid.UUID, Claimed]


def test_a_silent_worker_is_suspected_first_and_convicted_a_lease_later(
    scene: Scene, tracker: Told, far: Far, sweeper: Sweeper
) -> None:
    worker, batch_id, claimed = far
    _silence(scene, worker, 16)
    assert sweeper.sweep().lost_workers == 0
    assert scene.statuses(batch_id) == ["running"]
    _silence(scene, worker, 32, suspected=15)
    assert sweeper.sweep().verdicts == 1
    row, (incident,) = scene.row(claimed.key), scene.incidents(batch_id)
    assert (row.status, row.verdict, row.cause) == ("crashed", "lease", "worker_lost")
    assert (incident.detected_by, incident.verdict) == ("lease", "lease")
    assert [event.detected_by for event in tracker.of(events.WorkerLost)] == ["lease"]


def test_a_worker_is_never_convicted_from_the_age_of_its_pulse_alone(scene: Scene, far: Far, sweeper: Sweeper) -> None:
    worker, batch_id, _ = far
    _silence(scene, worker, 100_000)
    sweeper.sweep()
    assert scene.statuses(batch_id) == ["running"]


def test_one_beat_saves_a_suspect(scene: Scene, far: Far, sweeper: Sweeper) -> None:
    worker, batch_id, _ = far
    _silence(scene, worker, 32, suspected=15)
    scene.store.beat(worker)
    sweeper.sweep()
    assert scene.statuses(batch_id) == ["running"]


def test_after_an_outage_nobody_is_convicted_by_the_first_sweep(scene: Scene, far: Far, sweeper: Sweeper) -> None:
    """Every pulse is stale then, and a naive sweep would kill a healthy fleet."""
    worker, batch_id, _ = far
    _silence(scene, worker, 300, suspected=280)
    scene.execute(sa.update(schema.meta).values(swept_at=later(-300.0)))
    assert sweeper.sweep().lost_workers == 0
    assert sweeper.sweep().lost_workers == 0, "and its suspicion starts anew"
    assert scene.statuses(batch_id) == ["running"]


def test_after_a_restart_of_the_server_nobody_is_convicted_by_the_first_sweep(
    scene: Scene, far: Far, sweeper: Sweeper
) -> None:
    worker, batch_id, _ = far
    _silence(scene, worker, 300, suspected=280)
    scene.execute(sa.update(schema.meta).values(server_started_at=later(-1000.0)))  # before: another server
    sweeper.sweep()
    sweeper.sweep()
    assert scene.statuses(batch_id) == ["running"]


def test_the_first_sweep_ever_convicts_nobody_by_lease(scene: Scene, far: Far, tracker: Told, tmp_path: Path) -> None:
    worker, batch_id, _ = far
    _silence(scene, worker, 300, suspected=280)
    Sweeper(tracker, "first", tmp_path).sweep()
    assert scene.statuses(batch_id) == ["running"]


def test_a_worker_that_lives_on_this_host_is_never_convicted_by_its_lease(scene: Scene, sweeper: Sweeper) -> None:
    """Its pulse hangs: the process is there all the same."""
    with process() as child:
        worker, batch_id = _here(scene, child.pid, hosts.started(child.pid)), scene.batch(1)
        scene.run(batch_id, worker=worker, slot=slot_of(child.pid))
        _silence(scene, worker, 300, suspected=280)
        sweeper.sweep()
        assert scene.statuses(batch_id) == ["running"]


def test_the_sweeper_itself_is_never_its_own_suspect(scene: Scene, bench: Bench, sweeper: Sweeper) -> None:
    _silence(scene, bench.worker.id, 300, suspected=280)
    sweeper.sweep()
    assert bench.worker.id in {each.id for each in scene.store.live_workers()}


def test_a_run_that_was_claimed_after_its_worker_was_lost_is_found_too(
    scene: Scene, far: Far, sweeper: Sweeper
) -> None:
    """The question is about rows, every time."""
    worker, batch_id, _ = far
    _silence(scene, worker, 32, suspected=15)
    sweeper.sweep()
    late = scene.batch(1)
    scene.run(late, worker=worker)
    sweeper.sweep()
    assert scene.statuses(late) == ["crashed"] and batch_id != late


def test_a_late_end_overturns_the_verdict_of_a_lease(scene: Scene, far: Far, sweeper: Sweeper) -> None:
    worker, _, _ = far
    batch_id = scene.batch(2, calls=CALLS)
    claimed = scene.run(batch_id, worker=worker)
    _silence(scene, worker, 32, suspected=15)
    sweeper.sweep()
    assert counts(scene, batch_id) == {"crashed": 1, "pending": 1}
    assert scene.complete(claimed).overturned
    assert counts(scene, batch_id) == {"completed": 1, "pending": 1}
    assert scene.incidents(batch_id)[0].overturned_at is not None
    assert add_up(scene, batch_id)


def test_a_lease_verdict_runs_the_child_again_where_its_policy_says_so(
    scene: Scene, far: Far, sweeper: Sweeper
) -> None:
    worker, _, _ = far
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id, worker=worker, policy=RETRY)
    _silence(scene, worker, 32, suspected=15)
    sweeper.sweep()
    row = scene.row(claimed.key)
    assert (row.status, row.verdict, row.crashes) == ("pending", "lease", 1)
    assert row.dispatches == 1, "and it was published"


# -- what a sweep tends besides --------------------------------------------------------------------


def test_an_open_batch_of_a_client_that_died_is_cancelled(scene: Scene, tracker: Told, sweeper: Sweeper) -> None:
    slot = dead_slot()
    client = _here(scene, *(int(part) for part in slot.split(":")[:2]), kind="client", pool="client")
    batch_id = scene.batch(2, seal=False, opened_by=client, calls=CALLS)
    assert sweeper.sweep().abandoned == 1
    row = scene.store.batch(batch_id)
    assert row is not None and (row.status, row.reason) == ("cancelled", "abandoned")
    assert tracker.outbox.kinds(batch_id) == ["on_finish"]
    assert tracker.of(events.WorkerLost) == [], "a client that went is no lost worker"


def test_an_open_batch_of_a_silent_client_needs_the_lease_too(scene: Scene, sweeper: Sweeper) -> None:
    client = scene.worker(ELSEWHERE, kind="client", lease=60.0)
    batch_id = scene.batch(2, seal=False, opened_by=client)
    _silence(scene, client, 61)
    sweeper.sweep()
    assert scene.status(batch_id) == "open"
    _silence(scene, client, 130, suspected=61)
    sweeper.sweep()
    assert scene.status(batch_id) == "cancelled"


def test_a_sweep_withdraws_what_expired_ends_what_forgot_to_and_publishes_what_is_due(
    scene: Scene, tracker: Told, sweeper: Sweeper
) -> None:
    expired, forgotten = scene.batch(some(1, expires_in=-1.0)), scene.batch(1)
    due, lost = scene.batch(2), scene.batch(1)
    scene.complete(scene.run(forgotten))
    dispatch.pump(tracker, lost)
    scene.set_child(ChildKey(lost, 0), dispatched_at=later(-31.0))
    tracker.outbox.sent.clear()
    done = sweeper.sweep()
    assert (done.expired, done.finished, done.dispatched, done.redispatched) == (1, 1, 2, 1)
    assert [row.cause for row in scene.rows(expired)] == ["expired"]
    assert scene.status(expired) == "failed" and scene.status(forgotten) == "completed"
    assert set(tracker.outbox.published()) == {ChildKey(due, 0), ChildKey(due, 1), ChildKey(lost, 0)}
    assert set(done.as_dict().values()) == {0, 1, 2}


def test_a_sweep_with_nothing_to_do_does_nothing(scene: Scene, sweeper: Sweeper) -> None:
    done = sweeper.sweep()
    assert set(done.as_dict().values()) == {0}
    assert not sweeper.overdue()


def test_a_merely_queued_child_is_never_failed_however_long_it_waits(
    scene: Scene, tracker: Told, sweeper: Sweeper
) -> None:
    batch_id = scene.batch(1)
    dispatch.pump(tracker, batch_id)
    for dispatches in range(1, 40):
        scene.set_child(ChildKey(batch_id, 0), dispatched_at=later(-100_000.0), dispatches=dispatches)
        sweeper.sweep()
    row = scene.row(ChildKey(batch_id, 0))
    assert (row.status, row.attempt, row.crashes) == ("pending", 0, 0)
    assert {(each.cause, each.outcome) for each in scene.incidents(batch_id)} == {("lost_message", "redispatched")}

