"""The gate that lets a suspect run alone, on Celery's own book of reserved requests; and the queues of suspects."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.worker import state

from celery_batchtrack.glue.isolation import Gate, IsolatedQueues

PATIENCE = 60.0


class Request:
    """As far as the gate looks at one."""

    def __init__(self, name: str, *, isolated: bool | None = None) -> None:
        self.id = self.name = name
        self.request_dict: dict[str, Any] = {} if isolated is None else {"batchtrack": {"isolated": isolated}}

    def __repr__(self) -> str:
        return self.name


class Worker:
    """Celery's way with a request: reserved, handed to the pool behind the gate, ready."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ran: list[str] = []
        self.gave_way: list[str] = []
        self.known: dict[str, Request] = {}
        self.sent_back: list[str] = []
        self.gate = Gate(PATIENCE, self._give_way, self._send_back, lambda: self.now)
        self._process: Callable[[Any], None] = self.gate.guarding(lambda request: self.ran.append(request.name))

    def _give_way(self, request: Request) -> None:
        self.gave_way.append(request.name)
        state.task_ready(request)

    def _send_back(self, request: Request) -> None:
        self.sent_back.append(request.name)
        state.task_ready(request)

    def gets(self, *names: str) -> None:
        """Messages arrive. Names that begin with an S are suspects, with a B other children of batches."""
        for name in names:
            request = self.known[name] = Request(name, isolated={"S": True, "B": False}.get(name[0]))
            state.task_reserved(request)
            self._process(request)

    def ends(self, *names: str) -> None:
        for name in names:
            state.task_ready(self.known.pop(name))

    def tick(self) -> None:
        self.gate.tick()

    def loses_its_connection(self) -> None:
        """Celery forgets what it has reserved; the broker will deliver it again."""
        state.reserved_requests.clear()
        state.active_requests.clear()


@pytest.fixture
def worker() -> Iterator[Worker]:
    assert not state.reserved_requests
    yield Worker()
    state.reserved_requests.clear()
    state.active_requests.clear()
    state.requests.clear()


def test_without_suspects_everything_goes_through_at_once(worker: Worker) -> None:
    worker.gets("a", "B1", "b")
    assert worker.ran == ["a", "B1", "b"]


def test_a_suspect_in_an_idle_worker_starts_at_once_and_the_others_wait_for_its_end(worker: Worker) -> None:
    worker.gets("S1", "a", "B1")
    assert worker.ran == ["S1"]
    for _ in range(3):
        worker.tick()
    assert worker.ran == ["S1"]
    worker.ends("S1")
    worker.tick()
    assert worker.ran == ["S1", "a", "B1"], "in the order of their coming"


def test_a_suspect_waits_for_the_others_and_later_ones_wait_behind_it(worker: Worker) -> None:
    worker.gets("a", "b", "S1", "c")
    assert worker.ran == ["a", "b"]
    worker.ends("a")
    worker.tick()
    assert worker.ran == ["a", "b"], "b still runs"
    worker.ends("b")
    worker.tick()
    assert worker.ran == ["a", "b", "S1"]
    worker.ends("S1")
    worker.tick()
    assert worker.ran[3:] == ["c"]


def test_suspects_run_one_after_the_other(worker: Worker) -> None:
    worker.gets("S1", "S2", "a", "S3")
    assert worker.ran == ["S1"]
    for done, running in (("S1", "S2"), ("S2", "S3")):
        worker.ends(done)
        worker.tick()
        assert worker.ran[-1] == running
        worker.tick()
    worker.ends("S3")
    worker.tick()
    assert worker.ran == ["S1", "S2", "S3", "a"]


def test_a_suspect_whose_end_no_tick_has_seen_yet_keeps_nobody(worker: Worker) -> None:
    worker.gets("S1")
    worker.ends("S1")
    worker.gets("a")
    assert worker.ran == ["S1", "a"]
    worker.gets("S2")
    assert worker.ran == ["S1", "a"]


def test_a_worker_that_is_never_free_does_not_stand_still_for_a_suspect(worker: Worker) -> None:
    worker.gets("long", "S1", "a", "B1")
    worker.now += PATIENCE
    worker.tick()
    assert worker.gave_way == [] and worker.ran == ["long"]
    worker.now += 1
    worker.tick()
    assert worker.gave_way == ["S1"] and worker.ran == ["long", "a", "B1"]
    worker.gets("c")
    assert worker.ran[-1] == "c", "the gate is open again"


def test_what_kept_a_suspect_waiting_is_not_waited_for_again(worker: Worker) -> None:
    """Suspects that come one after the other must not keep a worker shut beside one long task."""
    worker.gets("long", "S1")
    worker.now += PATIENCE + 1
    worker.tick()
    assert worker.gave_way == ["S1"]
    worker.gets("S2", "a")
    assert worker.gave_way == ["S1", "S2"] and worker.ran == ["long", "a"], "at once, and nobody is held"
    worker.ends("long", "a")
    worker.gets("S3")
    assert worker.ran[-1] == "S3"


def test_suspects_that_came_later_give_way_with_the_first(worker: Worker) -> None:
    worker.gets("long", "S1")
    worker.now += PATIENCE - 1
    worker.gets("S2", "a")
    worker.now += 2
    worker.tick()
    assert worker.gave_way == ["S1"]
    worker.now += PATIENCE
    worker.tick()
    assert worker.gave_way == ["S1", "S2"] and worker.ran == ["long", "a"]


def test_who_waits_for_long_behind_a_running_suspect_goes_elsewhere(worker: Worker) -> None:
    worker.gets("S1", "S2", "a")
    worker.now += PATIENCE * 10
    worker.tick()
    assert worker.gave_way == ["S2"] and worker.sent_back == ["a"] and worker.ran == ["S1"]
    worker.gets("S3", "b")
    assert worker.gave_way == ["S2", "S3"], "S1 still runs"
    worker.ends("S1")
    worker.tick()
    assert worker.ran == ["S1", "b"]


def test_after_a_lost_connection_nothing_that_was_held_is_started(worker: Worker) -> None:
    """Its message comes again: to run it twice would only cost a refused claim, but a full pool as well."""
    worker.gets("long", "S1", "a")
    worker.loses_its_connection()
    worker.tick()
    assert worker.ran == ["long"] and worker.gave_way == []
    worker.gets("S1", "a")
    assert worker.ran == ["long", "S1"]
    worker.ends("S1")
    worker.tick()
    assert worker.ran == ["long", "S1", "a"]


def test_a_running_suspect_that_celery_has_forgotten_keeps_nobody_waiting_for_ever(worker: Worker) -> None:
    worker.gets("S1", "a")
    worker.loses_its_connection()
    worker.gets("b")
    worker.tick()
    assert worker.ran == ["S1", "b"]


def test_a_held_request_that_was_revoked_meanwhile_is_not_waited_for(worker: Worker) -> None:
    worker.gets("a", "S1", "b")
    worker.ends("S1")
    worker.tick()
    assert worker.ran == ["a", "b"]


def test_the_gate_keeps_no_request_alive(worker: Worker) -> None:
    worker.gets("S1", "a")
    worker.ends("S1")
    worker.tick()
    worker.ends("a")
    gc.collect()
    assert [each for each in gc.get_objects() if type(each) is Request] == []


def test_a_request_that_cannot_be_started_keeps_none_behind_it(worker: Worker) -> None:
    """Celery would log it, in a timer."""

    def process(request: Any) -> None:
        if request.name == "broken":
            raise RuntimeError("the pool says no")
        worker.ran.append(request.name)

    worker._process = worker.gate.guarding(process)
    worker.gets("S1", "broken", "b")
    worker.ends("S1")
    with pytest.raises(RuntimeError):
        worker.tick()
    worker.tick()
    assert worker.ran == ["S1", "b"]


def test_headers_of_others_are_no_suspects(worker: Worker) -> None:
    for at, header in enumerate(({}, {"batchtrack": None}, {"batchtrack": {}}, {"batchtrack": {"isolated": "yes"}})):
        request = worker.known[f"odd{at}"] = Request(f"odd{at}")
        request.request_dict = header
        state.task_reserved(request)
        worker._process(request)
    assert worker.ran == ["odd0", "odd1", "odd2", "odd3"]


# -- the queues of suspects ------------------------------------------------------------------------


class Queue:
    def __init__(self, name: str) -> None:
        self.name = name


class Consumer:
    """Of a worker, as far as queues go."""

    def __init__(self, *names: str) -> None:
        self.task_consumer: Consumer | None = self
        self.queues = [Queue(name) for name in names]
        self.soon: list[Callable[[], object]] = []

    def consuming_from(self, name: str) -> bool:
        return any(queue.name == name for queue in self.queues)

    def add_task_queue(self, name: str) -> None:
        self.queues.append(Queue(name))

    def call_soon(self, act: Callable[..., object], *arguments: Any) -> None:
        self.soon.append(lambda: act(*arguments))

    def turn(self) -> list[str]:
        """Of its loop. The queues that it consumes from then."""
        while self.soon:
            self.soon.pop(0)()
        return [queue.name for queue in self.queues]


def test_a_worker_consumes_the_suspects_of_its_own_queues_as_soon_as_there_are_some() -> None:
    queues, consumer = IsolatedQueues(), Consumer("celery", "heavy")
    queues.attach(consumer)
    queues.adopt([])
    assert consumer.turn() == ["celery", "heavy"]
    queues.adopt(["heavy.isolated", "other.isolated", "celery", "x"])
    assert consumer.queues[-1].name == "heavy", "only its own loop touches its connection"
    assert consumer.turn() == ["celery", "heavy", "heavy.isolated"]
    queues.adopt(["heavy.isolated"])
    assert consumer.soon == []


def test_a_queue_that_was_asked_for_twice_is_added_once() -> None:
    queues, consumer = IsolatedQueues(), Consumer("celery")
    queues.attach(consumer)
    queues.adopt(["celery.isolated"])
    queues.adopt(["celery.isolated"])
    assert consumer.turn() == ["celery", "celery.isolated"]


def test_without_a_consumer_or_a_connection_nothing_is_adopted() -> None:
    queues, consumer = IsolatedQueues(), Consumer("celery")
    queues.adopt(["celery.isolated"])
    consumer.task_consumer = None
    queues.attach(consumer)
    queues.adopt(["celery.isolated"])
    assert consumer.soon == []


def test_a_connection_that_is_lost_between_the_question_and_the_answer_is_no_error() -> None:
    queues, consumer = IsolatedQueues(), Consumer("celery")
    queues.attach(consumer)
    queues.adopt(["celery.isolated"])
    consumer.task_consumer = None
    assert consumer.turn() == ["celery"]


def test_a_queue_that_the_broker_refuses_does_not_end_the_workers_loop(caplog: pytest.LogCaptureFixture) -> None:
    queues, consumer = IsolatedQueues(), Consumer("celery")
    queues.attach(consumer)

    def refuse(name: str) -> None:
        raise OSError("PRECONDITION_FAILED")

    consumer.add_task_queue = refuse  # type: ignore[method-assign]
    queues.adopt(["celery.isolated"])
    assert consumer.turn() == ["celery"]
    assert "action=isolated_queue celery.isolated cannot be consumed here" in caplog.text


def test_a_new_connection_adopts_anew() -> None:
    queues, former, present = IsolatedQueues(), Consumer("celery"), Consumer("celery")
    queues.attach(former)
    queues.adopt(["celery.isolated"])
    former.turn()
    queues.attach(present)
    queues.adopt(["celery.isolated"])
    assert present.turn() == ["celery", "celery.isolated"]
