"""Runs that make no progress, in real processes: seen by another process, told where they stood, and ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from celery_batchtrack.behaviour import blackbox, detector, fatal, hosts
from celery_batchtrack.behaviour.blackbox import DECLARED, Phase, slot_name
from celery_batchtrack.behaviour.detector import Death
from celery_batchtrack.behaviour.stalls import StallWatch
from celery_batchtrack.glue.attendant import Attendant
from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey, new_token
from celery_batchtrack.vocabulary.records import Claimed
from celery_batchtrack.vocabulary.states import Cause
from tests.helpers import eventually
from tests.store.behaviour_kit import Bench, Told, tracker_on
from tests.store.kit import Scene

TIMEOUT = 30.0


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    url = f"sqlite:///{tmp_path / 'batchtrack.db'}"
    scene = Scene(Store(url, engine_options={"connect_args": {"timeout": 0.01}}))
    assert scene.store.store_id
    yield scene
    scene.store.dispose()


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store)


@pytest.fixture
def bench(tracker: Told, scene: Scene, tmp_path: Path) -> Bench:
    """This process, as a worker's main process."""
    bench = Bench.of(tracker, tmp_path / "boxes")
    scene.worker_id = bench.worker.id
    return bench


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(tracker: Told, bench: Bench, clock: Clock) -> StallWatch:
    """Looks rarely enough for these tests' steps in time not to be late."""
    return StallWatch(tracker, bench.worker, bench.boxes, interval=TIMEOUT, clock=clock)


# -- pool processes --------------------------------------------------------------------------------


def hold_the_gil(answers: int) -> None:
    """Native code that lets no Python run."""
    os.write(answers, b"ok")
    re.match("(a|a)*$", "a" * 100 + "b")


def sleep_on(answers: int) -> None:
    os.write(answers, b"ok")
    while True:
        time.sleep(600)


DEEDS: dict[str, Callable[[int], object]] = {"hold the GIL": hold_the_gil, "sleep": sleep_on}


class Subject:
    """A forked pool process in the middle of a run, that does what it is told, step by step."""

    def __init__(
        self, bench: Bench, claimed: Claimed | None = None, *, timeout: float = TIMEOUT, stacks: bool = True
    ) -> None:
        self.key, self.token = (claimed.key, claimed.token) if claimed else (ChildKey(uuid.uuid4(), 0), new_token())
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._live(bench, orders, answers, timeout, stacks)
            finally:
                os._exit(1)
        os.close(orders)
        os.close(answers)
        self.slot = os.read(self._answers, 200).decode()

    def _live(self, bench: Bench, orders: int, answers: int, timeout: float, stacks: bool) -> None:
        if stacks:
            path = bench.boxes.stack_path(os.getpid(), hosts.started(os.getpid()))
            assert path is not None and fatal.install(path, True)
        page = bench.boxes.page(slot_name())
        page.enter(self.key, self.token, Phase.RUNNING, timeout)
        write = page.item_writer(DECLARED)
        assert write is not None
        os.write(answers, slot_name().encode())
        index = 0
        while True:
            order = os.read(orders, 200).decode()
            if order in DEEDS:
                DEEDS[order](answers)
            elif order == "item":
                write(index, f"doc-0-{index}".encode())
                index += 1
            elif order == "next run":
                page.enter(self.key, new_token(), Phase.RUNNING, timeout)
            elif order == "end":
                fatal.uninstall()
                page.close()
                os.write(answers, b"ok")
                os._exit(0)
            elif order == "note":
                page.note("the same")
            elif order == "nested":
                page.touch()
            elif order == "over":
                page.no_item(index, DECLARED)
            elif order == "settle":
                page.phase(Phase.SETTLING)
            elif order == "idle":
                page.clear()
            os.write(answers, b"ok")

    def does(self, order: str) -> None:
        os.write(self._orders, order.encode())
        assert os.read(self._answers, 2) == b"ok"

    @property
    def alive(self) -> bool:
        return hosts.gone(self.pid, None) is not True

    def finish(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        for each in (self._orders, self._answers):
            os.close(each)


@pytest.fixture
def subjects(bench: Bench) -> Iterator[Callable[..., Subject]]:
    made: list[Subject] = []

    def make(claimed: Claimed | None = None, **how: object) -> Subject:
        made.append(Subject(bench, claimed, **how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.finish()


@pytest.mark.parametrize(("deed", "function"), [("hold the GIL", "hold_the_gil"), ("sleep", "sleep_on")])
def test_a_run_that_stands_still_is_killed_and_told_with_its_item_and_where_it_stood(
    scene: Scene, tracker: Told, bench: Bench, watch: StallWatch, clock: Clock, subjects: Callable[..., Subject],
    deed: str, function: str,
) -> None:  # fmt: skip
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id, slot="1:1:1:0")
    subject = subjects(claimed)
    scene.set_child(claimed.key, slot=subject.slot)
    subject.does("item")
    subject.does(deed)
    assert watch.look() == []
    clock.now += TIMEOUT - 1
    assert watch.look() == [] and subject.alive
    clock.now += 1
    (death,) = watch.look()
    assert not subject.alive
    assert replace(death, noticed=0.0) == Death(
        subject.pid, hosts_start(subject.slot), Cause.STALLED, noticed=0.0,
        message="no progress for 30 s: its process was killed",
    )  # fmt: skip
    assert [(event.pid, event.seconds, event.killed) for event in tracker.of(events.Stalled)] == [
        (subject.pid, TIMEOUT, True)
    ]
    assert detector.process_died(tracker, bench.worker, bench.boxes, death) == 1
    (incident,) = scene.incidents(batch_id)
    assert (incident.cause, incident.item, incident.outcome, incident.detected_by) == (
        "stalled", "doc-0-0", "crashed", "main",
    )  # fmt: skip
    assert incident.python_frame is not None and incident.python_frame.endswith(f"in {function}")
    assert watch.look() == [], "once"


def hosts_start(slot: str) -> int | None:
    return blackbox.slot_process(slot)[1]


@pytest.mark.parametrize("step", ["item", "note", "nested", "over"])
def test_any_progress_keeps_it_alive(
    watch: StallWatch, clock: Clock, subjects: Callable[..., Subject], step: str
) -> None:
    subject = subjects()
    for _ in range(5):
        assert watch.look() == []
        clock.now += TIMEOUT - 1
        assert watch.look() == []
        subject.does(step)
        clock.now += 2
    assert watch.look() == [] and subject.alive
    clock.now += TIMEOUT
    assert len(watch.look()) == 1


def test_a_run_may_stand_still_for_as_long_as_it_likes_where_nobody_asked(
    watch: StallWatch, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    subject = subjects(timeout=0.0)
    for _ in range(5):
        assert watch.look() == []
        clock.now += TIMEOUT
    assert subject.alive


@pytest.mark.parametrize("step", ["settle", "idle"])
def test_a_run_that_has_come_to_its_end_is_not_watched(
    watch: StallWatch, clock: Clock, subjects: Callable[..., Subject], step: str
) -> None:
    """It may wait for the database then."""
    subject = subjects()
    watch.look()
    subject.does(step)
    for _ in range(3):
        clock.now += TIMEOUT
        assert watch.look() == []
    assert subject.alive


def test_the_next_run_in_its_slot_starts_a_clock_of_its_own(
    watch: StallWatch, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    subject = subjects()
    watch.look()
    clock.now += TIMEOUT - 1
    subject.does("next run")
    clock.now += 1
    assert watch.look() == [] and subject.alive


def test_one_that_stands_still_does_not_end_the_others(
    watch: StallWatch, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    still, busy, patient = subjects(), subjects(), subjects(timeout=TIMEOUT * 3)
    watch.look()
    clock.now += TIMEOUT
    busy.does("item")
    assert [death.pid for death in watch.look()] == [still.pid]
    assert busy.alive and patient.alive and not still.alive


def test_a_look_that_comes_late_blames_nobody(
    tracker: Told, bench: Bench, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    """This very process stood still too: stopped, or on a machine that was suspended."""
    watch = StallWatch(tracker, bench.worker, bench.boxes, interval=1.0, clock=clock)
    subject = subjects(timeout=5.0)
    watch.look()
    clock.now += 100
    assert watch.look(anew=True) == [] and subject.alive, "the clocks start anew"
    for _ in range(4):
        clock.now += 1
        assert watch.look() == []
    clock.now += 1
    assert len(watch.look()) == 1


def test_a_process_that_goes_on_while_its_stack_is_asked_for_lives(
    tracker: Told, bench: Bench, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    subject = subjects()
    sent: list[int] = []

    def kill(pid: int, number: int) -> None:
        sent.append(number)
        os.kill(pid, number)
        subject.does("item")

    watch = StallWatch(tracker, bench.worker, bench.boxes, interval=TIMEOUT, clock=clock, kill=kill)
    watch.look()
    clock.now += TIMEOUT
    assert watch.look() == [] and subject.alive
    assert sent == [fatal.DUMP_SIGNAL] and tracker.of(events.Stalled) == []


def test_a_process_without_a_stack_file_is_not_ended_by_the_question(
    watch: StallWatch, tracker: Told, bench: Bench, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    """The signal that asks for a stack would kill who does not listen, and be told as the cause."""
    subject = subjects(stacks=False)
    sent: list[int] = []

    def kill(pid: int, number: int) -> None:
        sent.append(number)
        os.kill(pid, number)

    watch.kill = kill
    watch.look()
    clock.now += TIMEOUT
    assert len(watch.look()) == 1 and sent == [signal.SIGKILL] and not subject.alive


def test_a_process_that_switched_its_stacks_off_is_not_asked(
    watch: StallWatch, bench: Bench, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    subject = subjects(stacks=False)
    path = bench.boxes.stack_path(subject.pid, hosts_start(subject.slot))
    assert path is not None
    path.write_bytes(b"")
    sent: list[int] = []
    watch.kill = lambda pid, number: (sent.append(number), os.kill(pid, number))[1]
    watch.look()
    clock.now += TIMEOUT
    assert len(watch.look()) == 1 and sent == [signal.SIGKILL]


def test_a_process_that_ends_in_order_meanwhile_is_no_stall(
    watch: StallWatch, tracker: Told, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    subject = subjects()
    sent: list[int] = []

    def kill(pid: int, number: int) -> None:
        sent.append(number)
        subject.does("end")
        os.waitpid(pid, 0)
        os.kill(pid, number)

    watch.kill = kill
    watch.look()
    clock.now += TIMEOUT
    assert watch.look() == []
    assert sent == [fatal.DUMP_SIGNAL] and tracker.of(events.Stalled) == []


def test_what_is_dead_already_is_none_of_its_business(
    watch: StallWatch, tracker: Told, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    subject = subjects()
    watch.look()
    os.kill(subject.pid, signal.SIGKILL)
    os.waitpid(subject.pid, 0)
    clock.now += TIMEOUT
    assert watch.look() == [] and tracker.of(events.Stalled) == []


def test_only_the_last_of_several_stacks_is_told(
    watch: StallWatch, tracker: Told, bench: Bench, clock: Clock, subjects: Callable[..., Subject]
) -> None:
    """Somebody had asked for one before, by hand."""
    subject = subjects()
    path = bench.boxes.stack_path(subject.pid, hosts_start(subject.slot))
    assert path is not None and fatal.DUMP_SIGNAL is not None
    os.kill(subject.pid, fatal.DUMP_SIGNAL)
    eventually(lambda: path.stat().st_size, what="the first stack")
    subject.does("sleep")
    watch.look()
    clock.now += TIMEOUT
    assert len(watch.look()) == 1
    stack = fatal.read(path)
    assert stack is not None and stack.frame is not None and stack.frame.endswith("in sleep_on")


# -- threads ---------------------------------------------------------------------------------------


def test_a_thread_of_this_process_is_told_once_and_never_killed(
    watch: StallWatch, tracker: Told, bench: Bench, clock: Clock
) -> None:
    """A pool of threads: the others of its worker have done nothing."""
    page = bench.boxes.page(slot_name())
    page.enter(ChildKey(uuid.uuid4(), 0), new_token(), Phase.RUNNING, TIMEOUT)
    sent: list[int] = []
    watch.kill = lambda pid, number: sent.append(number)
    for _ in range(4):
        assert watch.look() == []
        clock.now += TIMEOUT
    assert [(event.pid, event.killed) for event in tracker.of(events.Stalled)] == [(os.getpid(), False)]
    page.note("it goes on")
    for _ in range(3):
        assert watch.look() == []
        clock.now += TIMEOUT
    assert len(tracker.of(events.Stalled)) == 2, "and stands still anew"
    assert sent == []


# -- the attendant ---------------------------------------------------------------------------------


@contextlib.contextmanager
def away(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody holds the database's write lock; `rollback` lets it go."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


def test_a_stall_stays_one_though_the_database_is_away_and_the_pool_tells_of_a_mere_sigkill(
    scene: Scene, tracker: Told, bench: Bench, clock: Clock, subjects: Callable[..., Subject], tmp_path: Path
) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id, slot="1:1:1:0")
    subject = subjects(claimed)
    scene.set_child(claimed.key, slot=subject.slot)
    attendant = Attendant(tracker, bench.worker, bench.boxes)
    attendant.stalls = StallWatch(tracker, bench.worker, bench.boxes, interval=TIMEOUT, clock=clock)
    attendant._look_at_runs()
    clock.now += TIMEOUT
    with away(tmp_path / "batchtrack.db") as other:
        attendant._look_at_runs()
        assert not subject.alive and scene.statuses(batch_id) == ["running"]
        attendant.died(Death(subject.pid, None, Cause.SIGNAL, signal="SIGKILL"))
        attendant._take(0.0)
        other.rollback()
        attendant._take(0.0)
    assert [(each.cause, each.signal) for each in scene.incidents(batch_id)] == [("stalled", None)]
    attendant._kernel.close()
