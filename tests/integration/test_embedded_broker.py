"""The embedded broker: real connections, real processes, real workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import psutil
import pytest
from celery import Celery
from kombu import Connection, Queue
from kombu.exceptions import ChannelError

from celery_batchtrack.glue.embedded import folder as broker_folder
from celery_batchtrack.glue.embedded.alias import register

ROOT = Path(__file__).resolve().parents[2]
register()

APP = """
import os, time
from pathlib import Path
from celery import Celery, bootsteps, signals
from celery_batchtrack.glue.embedded.alias import register

register()
HERE = Path(__file__).parent
app = Celery("app", broker=f"batchtrack+filesystem://{HERE}/broker")
app.conf.task_ignore_result = True

class Maintain(bootsteps.StartStopStep):
    requires = {"celery.worker.components:Pool"}
    def start(self, worker):
        if worker.hub is not None and hasattr(worker.pool, "_pool"):
            worker.hub.call_repeatedly(0.25, worker.pool.maintain_pool)
app.steps["worker"].add(Maintain)

def note(line):
    with open(HERE / "log", "a") as file:
        file.write(line + "\\n")

@signals.worker_ready.connect
def ready(**_):
    note("ready")

@signals.task_failure.connect
def failed(exception=None, **_):
    note(f"failed {type(exception).__name__} {time.time()}")

@app.task
def work(n):
    note(f"work {n}")

@app.task
def wait_for_file(n, name):
    note(f"begin {n}")
    while not (HERE / name).exists():
        time.sleep(0.01)
    note(f"end {n}")

@app.task(bind=True, acks_late=True)
def late(self, name):
    note(f"late {self.request.delivery_info['redelivered']}")
    while not (HERE / name).exists():
        time.sleep(0.01)
    note("late done")

@app.task
def die():
    note(f"dying {time.time()}")
    os.kill(os.getpid(), 9)
"""

CONSUMER = """
import os, sys, time
from celery_batchtrack.glue.embedded.alias import register
from kombu import Connection

register()
folder, count, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with Connection(f"batchtrack+filesystem://{folder}") as connection:
    queue = connection.SimpleQueue("work")
    for _ in range(count):
        try:
            message = queue.get(timeout=2)
        except queue.Empty:
            break
        print(message.payload["n"], flush=True)
        if mode == "ack":
            message.ack()
    if mode == "hold-with-child" and os.fork() == 0:
        time.sleep(60)
    if mode != "ack":
        print("holding", flush=True)
        time.sleep(60)
"""

PRODUCER = """
import sys
from celery_batchtrack.glue.embedded.alias import register
from kombu import Connection

register()
folder, start, count, size = sys.argv[1], *map(int, sys.argv[2:5])
with Connection(f"batchtrack+filesystem://{folder}") as connection:
    queue = connection.SimpleQueue("work")
    for n in range(start, start + count):
        queue.put({"n": n, "filler": "x" * size})
"""


def wait_until(condition: Callable[[], Any], seconds: float = 20.0, what: str = "") -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what or f"not within {seconds} s: {condition}"
        time.sleep(0.02)
    return value


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def process(*argv: str, cwd: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, *argv], cwd=cwd, env=environment(), text=True, start_new_session=True, **options
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if child.stdout:
            child.stdout.close()


def script(source: str, *args: object, cwd: Path) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return process("-c", source, *map(str, args), cwd=cwd, stdout=subprocess.PIPE)


def wait_for_line(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdout and line in (read.strip() for read in child.stdout), "ended before that line"


class Site:
    """A folder with an application, its broker, and what its workers noted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / "broker"
        (path / "app.py").write_text(APP)
        self.app = Celery("app", broker=f"batchtrack+filesystem://{self.folder}", set_as_current=False)
        self.app.conf.task_ignore_result = True

    def send(self, name: str, *args: Any) -> None:
        self.app.send_task(f"app.{name}", args)

    def log(self) -> list[str]:
        file = self.path / "log"
        return file.read_text().splitlines() if file.exists() else []

    def count(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.log())

    @contextlib.contextmanager
    def worker(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        before = self.count("ready")
        argv = ["-m", "celery", "-A", "app", "worker", "-l", "WARNING", "--without-mingle", *options]
        with process(*argv, cwd=self.path) as worker:
            wait_until(lambda: self.count("ready") > before or worker.poll() is not None)
            assert worker.poll() is None
            yield worker

    def connection(self) -> Connection:
        return Connection(f"batchtrack+filesystem://{self.folder}")

    def ready_messages(self, queue: str = "celery") -> int:
        return len(list((self.folder / "queues" / queue).glob("*.msg")))

    def owners(self) -> list[str]:
        return [path.name for path in (self.folder / "unacked").iterdir()]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.app.close()


def receive(queue: Any, count: int, timeout: float = 5.0) -> list[Any]:
    return [queue.get(timeout=timeout) for _ in range(count)]


def assert_empty(queue: Any) -> None:
    with pytest.raises(Empty):
        queue.get(timeout=0.2)


# -- messages


def test_large_messages_of_two_producers_all_arrive(site: Site) -> None:
    size = 200_000
    with (
        script(PRODUCER, site.folder, 0, 400, size, cwd=site.path),
        script(PRODUCER, site.folder, 400, 400, size, cwd=site.path),
        site.connection() as connection,
    ):
        queue, seen = connection.SimpleQueue("work"), []
        for _ in range(800):
            message = queue.get(timeout=20)
            assert len(message.payload["filler"]) == size
            seen.append(message.payload["n"])
            message.ack()
        assert sorted(seen) == list(range(800))
        assert [n for n in seen if n < 400] == list(range(400)), "not in order of publishing"
        assert_empty(queue)
    assert not list(site.folder.rglob("*.msg"))


@pytest.mark.parametrize("mode", ["hold", "hold-with-child"])
def test_messages_of_a_killed_consumer_are_delivered_once_more_and_marked(site: Site, mode: str) -> None:
    with site.connection() as connection:
        queue = connection.SimpleQueue("work")
        for n in range(5):
            queue.put({"n": n})
        with script(CONSUMER, site.folder, 3, mode, cwd=site.path) as consumer:
            wait_for_line(consumer, "holding")
            assert queue.qsize() == 2
            consumer.kill()
            consumer.wait()
            got = [(m.payload["n"], m.delivery_info["redelivered"]) for m in receive(queue, 5)]
        assert sorted(got) == [(0, True), (1, True), (2, True), (3, False), (4, False)]
        assert_empty(queue)


def test_messages_of_a_living_consumer_stay_with_it(site: Site) -> None:
    with site.connection() as connection:
        queue = connection.SimpleQueue("work")
        queue.put({"n": 0})
        with script(CONSUMER, site.folder, 1, "hold", cwd=site.path) as consumer:
            wait_for_line(consumer, "holding")
            folder = broker_folder.broker_folder(site.folder)
            for _ in range(3):
                folder.sweep()
            assert queue.qsize() == 0


def test_a_rejected_message_returns_to_its_place_marked_as_redelivered(site: Site) -> None:
    with site.connection() as connection:
        queue = connection.SimpleQueue("work")
        for n in range(3):
            queue.put({"n": n})
        first = queue.get(timeout=1)
        assert first.delivery_info["redelivered"] is False
        first.requeue()
        again = receive(queue, 3)
        assert [m.payload["n"] for m in again] == [0, 1, 2]
        assert [m.delivery_info["redelivered"] for m in again] == [True, False, False]
        again[1].reject()
        assert queue.qsize() == 0
        again[0].requeue()
    with site.connection() as connection:  # closing the first one gave back what it still held
        queue = connection.SimpleQueue("work")
        assert [m.payload["n"] for m in receive(queue, 2)] == [0, 2]
        assert_empty(queue)


def test_two_consumers_share_a_queue_without_duplicates(site: Site) -> None:
    with (
        script(PRODUCER, site.folder, 0, 2000, 10, cwd=site.path) as producer,
        script(CONSUMER, site.folder, 2000, "ack", cwd=site.path) as one,
        script(CONSUMER, site.folder, 2000, "ack", cwd=site.path) as two,
    ):
        first, second = (child.communicate()[0].split() for child in (one, two))
        assert producer.wait() == 0
    assert sorted(map(int, first + second)) == list(range(2000))
    assert first and second


def test_racing_sweepers_return_each_message_once(site: Site) -> None:
    with site.connection() as connection:
        queue = connection.SimpleQueue("work")
        for n in range(300):
            queue.put({"n": n})
        with script(CONSUMER, site.folder, 300, "hold", cwd=site.path) as dead:
            wait_for_line(dead, "holding")
            dead.kill()
            dead.wait()
        with (
            script(CONSUMER, site.folder, 300, "ack", cwd=site.path) as one,
            script(CONSUMER, site.folder, 300, "ack", cwd=site.path) as two,
        ):
            seen = one.communicate()[0].split() + two.communicate()[0].split()
        assert sorted(map(int, seen)) == list(range(300))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"body": "abc',
        b"[]",
        b'{"properties": {"delivery_info": {}, "body_encoding": "base64"}, "body": "a"}',
    ],
)
def test_a_file_that_is_no_message_is_set_aside(site: Site, content: bytes, caplog: Any) -> None:
    with site.connection() as connection:
        queue = connection.SimpleQueue("work")
        (site.folder / "queues" / "work" / "0-0.msg").write_bytes(content)
        queue.put({"n": 1})
        assert queue.get(timeout=1).payload == {"n": 1}
        assert [path.name for path in (site.folder / "broken").iterdir()] == ["work@0-0.msg"]
        assert "moved aside" in caplog.text


def test_five_thousand_queued_messages_are_listed_a_few_times_only(site: Site, monkeypatch: Any) -> None:
    listings = []
    real = broker_folder._messages
    monkeypatch.setattr(broker_folder, "_messages", lambda folder: listings.append(folder) or real(folder))
    with site.connection() as connection:
        queue = connection.SimpleQueue("work")
        for n in range(5000):
            queue.put({"n": n})
        start = time.monotonic()
        for n in range(5000):
            message = queue.get(timeout=1)
            assert message.payload["n"] == n
            message.ack()
        seconds = time.monotonic() - start
    assert len(listings) <= 3 + seconds / broker_folder.RELIST_INTERVAL


# -- queues, folders


def test_declare_tells_the_number_of_ready_messages(site: Site) -> None:
    with site.connection() as connection:
        channel = connection.channel()
        queue = connection.SimpleQueue("work")
        for n in range(3):
            queue.put({"n": n})
        message = queue.get(timeout=1)
        assert channel.queue_declare("work", passive=True).message_count == 2
        assert channel.queue_purge("work") == 2
        message.requeue()
        assert channel.queue_declare("work", passive=True).message_count == 1
        channel.queue_delete("work")
        with pytest.raises(ChannelError, match="NOT_FOUND"):
            channel.queue_declare("work", passive=True)
        assert not list((site.folder / "exchanges").glob("*.exchange"))


def test_queue_names_are_no_paths(site: Site) -> None:
    with site.connection() as connection:
        for name in ("../../evil", ".hidden", "a/b", "celery@host", "ünïcode"):
            queue = connection.SimpleQueue(name)
            queue.put({"n": name})
            assert queue.get(timeout=1).payload == {"n": name}
            queue.close()
    assert {path.name for path in site.path.iterdir()} == {"app.py", "broker"}


def test_where_the_folder_is(site: Site, monkeypatch: Any) -> None:
    monkeypatch.chdir(site.path)

    def folder(url: str, **options: str) -> Path:
        path: Path = Connection(url, transport_options=options).transport.folder.path
        return path

    assert folder("batchtrack+filesystem:///abs/Path") == Path("/abs/Path")
    assert folder("batchtrack+filesystem://rel/Path") == site.path / "rel" / "Path"
    assert folder("batchtrack+filesystem://") == site.path / "batchtrack-broker"
    assert folder("batchtrack+filesystem:///abs", folder="/other") == Path("/other")
    assert Connection("batchtrack+filesystem:///abs").clone().as_uri() == "batchtrack+filesystem:///abs"


def test_folders_are_private_and_an_unusable_one_is_a_clear_error(site: Site) -> None:
    with site.connection() as connection:
        connection.connect()
    assert {path.stat().st_mode & 0o777 for path in [site.folder, *site.folder.iterdir()]} == {0o700}
    (site.path / "file").write_text("")
    with (
        pytest.raises(broker_folder.BrokerFolderError, match=r"cannot use its folder .*file/below.*broker_url"),
        Connection(f"batchtrack+filesystem://{site.path}/file/below") as connection,
    ):
        connection.SimpleQueue("work").put({})


def test_a_folder_cleared_away_under_a_running_connection_is_made_again(site: Site) -> None:
    with site.connection() as connection:
        queue = connection.SimpleQueue("work")
        queue.put({"n": 0})
        queue.get(timeout=1).ack()
        site.folder.rename(site.path / "gone")
        connection.Producer().publish({"n": 1}, routing_key="work")
        message = queue.get(timeout=3)
        assert message.payload == {"n": 1}
        message.ack()


# -- workers


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_tasks_run_and_remote_control_answers(site: Site, pool: str) -> None:
    with site.worker("-P", pool, "-c", "2", "-n", "w@here"):
        for n in range(50):
            site.send("work", n)
        wait_until(lambda: site.count("work") == 50)
        assert site.app.control.inspect(timeout=5, limit=1).ping() == {"w@here": {"ok": "pong"}}
    assert sorted(site.log()[1:]) == sorted(f"work {n}" for n in range(50))
    assert not list((site.folder / "queues").glob("*reply*"))


def test_a_killed_worker_leaves_no_queue_that_grows(site: Site) -> None:
    with site.worker("-P", "solo", "-n", "dead@here") as worker:
        worker.kill()
        worker.wait()
    assert list((site.folder / "queues").glob("dead@here*"))
    with site.worker("-P", "solo", "-n", "w@here"):
        assert site.app.control.inspect(timeout=5, limit=1).ping() == {"w@here": {"ok": "pong"}}
        assert not list((site.folder / "queues").glob("dead@here*"))
        rows = json.loads((site.folder / "exchanges" / "celery.pidbox.exchange").read_text())
        assert [row[2] for row in rows] == ["w@here.celery.pidbox"]


def test_a_restarted_worker_of_the_same_name_keeps_its_control_queue(site: Site) -> None:
    for _ in range(2):
        with site.worker("-P", "solo", "-n", "w@here") as worker:
            assert site.app.control.inspect(timeout=5, limit=1).ping() == {"w@here": {"ok": "pong"}}
            worker.kill()
            worker.wait()


def test_a_warm_shutdown_gives_prefetched_messages_back_at_once(site: Site) -> None:
    with site.worker("-P", "prefork", "-c", "1") as worker:
        for n in range(4):
            site.send("wait_for_file", n, "go")
        wait_until(lambda: site.count("begin") == 1 and site.ready_messages() == 0)
        worker.terminate()
        (site.path / "go").touch()
        assert worker.wait(20) == 0
        ended = site.count("end")
        assert ended >= 1
        assert site.ready_messages() == 4 - ended
    with site.worker("-P", "prefork", "-c", "1"):
        wait_until(lambda: site.count("end") == 4)
        wait_until(lambda: site.ready_messages() == 0)


def test_a_late_acknowledged_task_of_a_killed_worker_runs_again(site: Site) -> None:
    with site.worker("-P", "prefork", "-c", "1") as worker:
        site.send("late", "go")
        wait_until(lambda: site.count("late False"))
        worker.kill()
        worker.wait()
    with site.worker("-P", "prefork", "-c", "1"):
        wait_until(lambda: site.count("late True"), 5)
        (site.path / "go").touch()
        wait_until(lambda: site.count("late done"))


def test_killing_an_idle_pool_process_does_not_stop_the_worker(site: Site) -> None:
    with site.worker("-P", "prefork", "-c", "2") as worker:
        for child in psutil.Process(worker.pid).children():
            child.kill()
            for n in range(4):
                site.send("work", n)
        wait_until(lambda: site.count("work") >= 8)


def test_a_crashing_pool_process_is_reported_quickly(site: Site) -> None:
    with site.worker("-P", "prefork", "-c", "2"):
        for crash in range(1, 5):
            site.send("die")
            wait_until(lambda crash=crash: site.count("failed WorkerLostError") == crash)
        died = [float(line.split()[-1]) for line in site.log() if line.startswith("dying")]
        seen = [float(line.split()[-1]) for line in site.log() if line.startswith("failed")]
        assert max(later - earlier for earlier, later in zip(died, seen, strict=True)) < 2.0


def test_many_queues_on_one_worker(site: Site) -> None:
    with site.worker("-P", "threads", "-c", "2", "-Q", "a,b"):
        for n in range(10):
            site.app.send_task("app.work", [n], queue="ab"[n % 2])
        wait_until(lambda: site.count("work") == 10)


def test_fanout_reaches_each_bound_queue(site: Site) -> None:
    with site.connection() as connection:
        from kombu import Consumer, Exchange

        news = Exchange("news", type="fanout")
        queues = [Queue(name, news) for name in ("one", "two")]
        got = []
        with Consumer(connection, queues, callbacks=[lambda body, m: (got.append(body), m.ack())]):
            connection.Producer().publish({"n": 1}, exchange=news, declare=[news])
            connection.drain_events(timeout=2)
            connection.drain_events(timeout=2)
    assert got == [{"n": 1}, {"n": 1}]


def test_an_idle_worker_costs_next_to_nothing(site: Site) -> None:
    with site.worker("-P", "prefork", "-c", "1") as worker:
        main = psutil.Process(worker.pid)
        main.cpu_percent()
        used = main.cpu_percent(interval=2.0)
    assert used < 10.0, "percent of one processor; about 1 on an unburdened machine"


def test_normal_exit_leaves_no_owner_behind(site: Site) -> None:
    with script(PRODUCER, site.folder, 0, 3, 1, cwd=site.path) as producer:
        assert producer.wait() == 0
    with script(CONSUMER, site.folder, 3, "ack", cwd=site.path) as consumer:
        assert consumer.communicate()[0].split() == ["0", "1", "2"]
    assert site.owners() == []
