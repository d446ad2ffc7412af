"""`doctor`: that its facts are gathered from real workers, databases and brokers, and none of them can hang it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from celery import Celery

from celery_batchtrack import Batch, BatchTrack, tracked
from celery_batchtrack.store import Store
from celery_batchtrack.surfaces.doctor import gathering
from tests.helpers import ROOT, eventually, free_port
from tests.integration.cli_kit import Run, Seeds, app_of, invoke, make_app
from tests.nodes import ProcessWorker
from tests.servers import PgBouncer, PostgresServer, require

SHOP = """
import os
from celery import Celery

app = Celery("shop", broker=os.environ["SHOP_BROKER"], batchtrack_heartbeat=0.5)
app.conf.batchtrack_blackbox_dir = os.environ.get("SHOP_BLACKBOX")
app.conf.batchtrack_database_url = os.environ.get("SHOP_DATABASE")
if "SHOP_DATABASE" in os.environ:
    from celery_batchtrack import BatchTrack
    BatchTrack(app)
"""


def found(app: Celery, *args: object, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    """What doctor says, by check."""
    said: dict[str, list[dict[str, Any]]] = {}
    patience = () if "--timeout" in args else ("--timeout", "3s")
    for each in json.loads(invoke(app, "doctor", *args, *patience, "--json", code=code).stdout):
        assert set(each) == {"check", "level", "message", "advice"}
        said.setdefault(each["check"], []).append(each)
    return said


def one(said: dict[str, list[dict[str, Any]]], check: str, level: str) -> str:
    [message] = [each["message"] for each in said[check] if each["level"] == level]
    return str(message)


def all_answered(app: Celery) -> dict[str, list[dict[str, Any]]] | None:
    """What doctor says, unless a worker was too busy with its start."""
    said = found(app, "--timeout", "5s", code=1)
    told = [each["message"] for each in (*said["workers"], *said.get("store", ()))]
    return said if sum("all answer" in each or "worker" in each for each in told) == 3 else None


@pytest.fixture
def shop(postgres_url: str, redis_url: str) -> Iterator[Celery]:
    app = make_app(postgres_url, broker_url=redis_url, batchtrack_heartbeat=0.5, task_acks_late=True)
    BatchTrack.of(app).migrate()

    @app.task(name="shop.ocr", shared=False, time_limit=7200, reject_on_worker_lost=True)
    @tracked
    def ocr() -> None:
        pass

    @app.task(name="shop.scan", shared=False, queue="scans", reject_on_worker_lost=True)
    def scan() -> None:
        pass

    yield app
    BatchTrack.of(app).reset()


def test_doctor_finds_what_is_wrong_with_workers_database_and_broker(
    shop: Celery, postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "doctor_shop.py").write_text(SHOP)
    Store(f"sqlite:///{tmp_path}/other.db").migrate()
    (tmp_path / "file").write_text("no folder")
    common = {"SHOP_BROKER": redis_url, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}

    def started(name: str, *args: str, **env: str) -> ProcessWorker:
        return ProcessWorker("doctor_shop", *args, folder=tmp_path, env={**common, **env}, cwd=tmp_path, name=name)

    ours = started("ours", "--time-limit=9000", SHOP_DATABASE=postgres_url)
    solo = started("solo", "-P", "solo", SHOP_DATABASE=postgres_url, SHOP_BLACKBOX=str(tmp_path / "file"))
    other = started("other", "-P", "threads", SHOP_DATABASE=f"sqlite:///{tmp_path}/other.db")
    bare = started("bare")
    workers = [ours, solo, other, bare]
    Batch.create("to nobody", [shop.tasks["shop.ocr"].s().set(queue="nobody") for _ in range(3)], app=shop)
    try:
        for each in workers:
            each.start()
        for each in workers:
            each.wait_ready()
        store = BatchTrack.of(shop).store
        eventually(lambda: len(store.live_workers()) == 2)
        said = eventually(lambda: all_answered(shop), 60, what="answers from all four")
    finally:
        for each in workers:
            each.stop()
    host = f"@{os.uname().nodename}"
    assert one(said, "database", "ok").startswith("PostgreSQL 1")
    assert one(said, "schema", "ok").endswith(f"= code {store.check_up({'completed': 1, 'other': 1}).wanted_revision}")
    assert "connections needed of " in one(said, "connections", "ok")
    assert "did not answer" not in str(said["connections"])
    assert "by " in one(said, "sweeps", "ok")
    assert one(said, "workers", "ok") == f"2 alive, and all answer: ours{host}, solo{host}"
    shared = [each["message"].split(": a crash takes the whole worker along")[0] for each in said["pool"]]
    assert shared == [f"-P solo on solo{host}", f"-P threads on other{host}"]
    assert "pooler" not in said
    wrong = sorted(each["message"] for each in said["store"])
    assert wrong[0] == f"worker bare{host} has no BatchTrack(app), or an old one: it runs children unseen"
    assert wrong[1].startswith(f"worker other{host} uses another batchtrack database (sqlite:///{tmp_path}/other.db")
    assert len(wrong) == 2
    assert one(said, "black box", "fail").startswith(f"worker solo{host} has no folder to write in")
    again = "its message comes again while it runs, and outside a batch it runs twice"
    limits = [each["message"] for each in said["visibility"]]
    assert limits[0] == f"redis visibility_timeout 3600 s < time_limit 9000 s of tasks on ours{host}: {again}"
    assert limits[1] == f"redis visibility_timeout 3600 s < time_limit 7200 s of shop.ocr: {again}"
    assert "without a cap: shop.scan." in one(said, "redelivery", "warn")
    assert one(said, "broker", "ok").startswith("redis at redis://")
    assert one(said, "detector", "ok").startswith("its queue is celery, the work's too")
    assert one(said, "clock", "ok")
    assert [each["message"] for each in said["queues"]] == [
        "3 children wait in nobody, which no worker that tells of its queues consumes",  # `bare` tells nothing
        "no worker consumes scans, where shop.scan would wait",
    ]


def test_doctor_says_of_a_database_what_is_in_it(seeds: Seeds, text: Run, app: Celery) -> None:
    seeds.ended("old")
    seeds.batch("open")
    app.conf.update(batchtrack_detect_every=5.0)
    with seeds.store.write() as connection:
        when = sa.text("UPDATE batchtrack_batch SET finished_at = '2020-01-02 00:00:00.000000' WHERE name = 'old'")
        connection.execute(when)
    said = found(app_of(seeds), code=1)
    assert one(said, "retention", "warn").startswith("1 batches are kept longer than batchtrack_retention says")
    assert one(said, "sweeps", "fail") == "nobody has ever swept, and 1 batches are open: crashes stay unseen"
    assert one(said, "workers", "warn").startswith("1 alive, but no answer from w1@here")
    BatchTrack.of(app).sweep()
    lines = text("doctor", "--timeout", "3s").splitlines()
    assert lines[0].startswith("ok    database       ") and " → " in lines[-1] and lines[-1].startswith("WARN  ")
    assert invoke(app, "doctor", "--timeout", "0s", code=2)


def test_nobody_who_does_not_answer_holds_doctor_up(postgres_url: str, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    app = make_app(f"postgresql://me:s3cret@{nowhere}/x", broker_url=f"redis://:s3cret@{nowhere}/0")
    said = found(app, "--timeout", "10s", code=1)
    assert one(said, "database", "fail").startswith("tracking database postgresql+psycopg://me:***@")
    assert one(said, "broker", "fail").startswith(f"redis://:**@{nowhere}/0 does not answer")
    assert "s3cret" not in str(said)

    app = make_app(postgres_url)
    BatchTrack.of(app).migrate()
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        connection.execute("LOCK TABLE batchtrack_worker IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        said = found(app, "--timeout", "0.5s", code=1)
        assert time.monotonic() - began < 30, "it would wait for the lock for ever"
    assert one(said, "database", "fail").startswith("the tracking database: no answer within 0.5 s")
    BatchTrack.of(app).reset()


def test_doctor_makes_no_tables_and_no_file_and_tells_of_wrong_settings(tmp_path: Path) -> None:
    app = make_app(f"sqlite:///{tmp_path}/x.db")
    assert one(found(app), "schema", "ok") == "no tables yet: they are made at first use"
    assert not (tmp_path / "x.db").exists()
    app.conf.batchtrack_auto_migrate = False
    BatchTrack.of(app).reset()
    assert one(found(app, code=1), "schema", "fail").startswith("the database has no batchtrack tables")
    wrong = make_app("sqlite://", batchtrack_laese=3)
    assert "did you mean 'batchtrack_lease'" in one(found(wrong, code=1), "configuration", "fail")
    assert "is not set" in one(found(make_app(None), code=1), "configuration", "fail")
    broken = make_app("sqlite://", imports=["no_such_module_of_the_shop"])
    assert "No module named 'no_such_module_of_the_shop'" in one(found(broken, code=1), "tasks", "fail")
    plain = Celery("plain", broker="memory://", set_as_current=False)
    invoke(plain, "doctor", code=78)


def test_a_task_without_the_wrapper_and_one_that_sends_itself_are_found(tmp_path: Path) -> None:
    app = make_app(f"sqlite:///{tmp_path}/x.db")
    app.task(name="shop.bare", shared=False)(lambda_free)
    app.finalize()
    task = app.tasks["shop.bare"]

    def wrapped() -> list[bool]:
        facts = gathering.facts(BatchTrack.of(app), 1.0)
        return [each.wrapped for each in facts.tasks if each.name == "shop.bare"]

    assert wrapped() == [True]
    task.__class__ = type(task).__mro__[2]
    assert wrapped() == [False]
    BatchTrack.of(app).track_tasks()
    task.apply_async = lambda *args, **kwargs: None
    assert "shop.bare overrides apply_async (set on the task itself)" in str(found(app)["apply_async"])


def lambda_free() -> None:
    """A task that nobody runs here."""


@pytest.mark.parametrize(("mode", "level"), [("transaction", "fail"), ("session", "warn")])
def test_a_pooler_and_its_mode_are_seen(
    mode: str, level: str, postgres_server: PostgresServer, postgres_url: str
) -> None:
    Store(postgres_url).migrate()
    with require(lambda: PgBouncer(postgres_server, mode)) as bouncer:
        app = make_app(bouncer.url_of(postgres_url))
        assert [each["level"] for each in found(app, code=level == "fail")["pooler"]] == [level]
        BatchTrack.of(app).reset()
        app = make_app(
            bouncer.url_of(postgres_url), batchtrack_engine_options={"connect_args": {"prepare_threshold": None}}
        )
        assert one(found(app), "pooler", "ok")
        BatchTrack.of(app).reset()
