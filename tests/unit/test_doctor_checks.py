"""Every check of `doctor`: from facts that are in order, one fact is broken at a time."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from celery_batchtrack.surfaces.doctor import checks_application, checks_database, checks_running
from celery_batchtrack.surfaces.doctor.facts import BrokerFacts, Facts, Reply, TaskFacts
from celery_batchtrack.surfaces.doctor_cli import findings
from celery_batchtrack.vocabulary.checkup import Connections, DatabaseFacts, Tables
from celery_batchtrack.vocabulary.records import WorkerRow
from celery_batchtrack.vocabulary.settings import Settings

NOW = datetime(2026, 1, 1, tzinfo=UTC)
STORE = "51aa0000-0000-0000-0000-000000000000"
HERE = {"lease": 15.0, "detect_every": 15.0, "enabled": True}


def worker(name: str = "w1@web-1", **more: Any) -> WorkerRow:
    values: dict[str, Any] = {
        "id": uuid.uuid5(uuid.NAMESPACE_DNS, name), "kind": "worker", "name": name, "hostname": "web-1",
        "boot_id": "boot-1", "pid_namespace": None, "pid": 1, "pid_started": 1, "pool": "prefork", "lease": 15.0,
        "version": "1.0", "beat": 1, "beat_at": NOW, "suspected_beat": None, "suspected_at": None, "started_at": NOW,
        "stopped_at": None, "lost_at": None, "lost_by": None,
    }  # fmt: skip
    return WorkerRow(**{**values, **more})


def reply(name: str = "w1@web-1", **told: Any) -> Reply:
    values = {
        "installed": True, "takes_part": True, "version": "1.0", "store_id": STORE, "database": "postgresql://db/shop",
        "settings": dict(HERE), "untracked": [], "worker_id": str(uuid.uuid5(uuid.NAMESPACE_DNS, name)),
        "hostname": "web-1", "boot_id": "boot-1", "pool": "prefork", "processes": 8, "blackbox": "/dev/shm/x",
        "queues": ["celery"],
    }  # fmt: skip
    return Reply(name, {**values, **told})


TABLES = Tables(STORE, [worker(), worker("c@x", kind="client", pool="client")], "w1@web-1", 4.0, 2, 0, None, 0.0)
DATABASE = DatabaseFacts(
    "PostgreSQL 15.18", "postgresql://db/shop", "CURRENT", "fits", "0005", "0005", False, False, 0.0,
    Connections(97, 5, None, True), TABLES,
)  # fmt: skip
SQLITE = replace(DATABASE, product="SQLite 3", sqlite=True, connections=None)
GOOD = Facts(
    settings=Settings(), database=DATABASE, broker=BrokerFacts("redis", "redis://b/0", None, 3600.0, {"celery": 3}),
    tasks=[TaskFacts("shop.ocr", acks_late=True, tracked=True, time_limit=600.0, retry_delay=180.0, queue="celery")],
    detector_queue="celery", replies=[reply()], store_id=STORE, version="1.0", own_settings=HERE, hostname="web-1",
    blackbox="/dev/shm/x",
)  # fmt: skip


def tables(**more: Any) -> Facts:
    return replace(GOOD, database=replace(DATABASE, tables=replace(TABLES, **more)))


def database(**more: Any) -> Facts:
    return replace(GOOD, database=replace(DATABASE, **more))


def connections(*values: Any) -> Facts:
    return database(connections=Connections(*values))


def broker(**more: Any) -> Facts:
    assert GOOD.broker is not None
    return replace(GOOD, broker=replace(GOOD.broker, **more))


def task(**more: Any) -> Facts:
    return replace(GOOD, tasks=[replace(GOOD.tasks[0], **more)])


def replies(**told: Any) -> Facts:
    return replace(GOOD, replies=[reply(**told)])


def told(facts: Facts, level: str) -> list[str]:
    return [f"{each.check}: {each.message} → {each.advice}" for each in findings(facts) if each.level == level]


def test_what_is_in_order_is_said_once_per_check_and_nothing_warns() -> None:
    assert not told(GOOD, "warn") and not told(GOOD, "fail")
    said = told(GOOD, "ok")
    assert "schema: 0005 = code 0005 → " in said and len(said) == len({each.split(":")[0] for each in said})
    assert "connections: 12 connections needed of 92 (5 more are others') → " in said
    assert not told(Facts(), "fail")


BROKEN: list[tuple[str, Facts, str, str]] = [
    ("fail", replace(GOOD, settings=None, configuration_error="batchtrack_laese is not a setting: did you mean 'x'?"),
     "configuration", "did you mean"),
    ("warn", replace(GOOD, ignored_settings={"BATCHTRACK_LEASE": "CELERY_BATCHTRACK_LEASE"}), "configuration",
     "write it as CELERY_BATCHTRACK_LEASE"),
    ("warn", replace(GOOD, settings=Settings(enabled=False), own_settings={**HERE}), "configuration", "untracked"),
    ("fail", replace(GOOD, tasks_error="ImportError: no shop"), "tasks", "cannot be imported: ImportError"),
    ("fail", task(wrapped=False), "tasks", "not wrapped, so that their children run unseen: shop.ocr"),
    ("fail", replies(untracked=["shop.ocr", "a", "b", "c", "d"]), "tasks", "shop.ocr, a, b and 2 more"),
    ("warn", task(own_apply_async="QueueOnce"), "apply_async", "overrides apply_async (QueueOnce): sent one by one"),
    ("warn", task(reject_on_worker_lost=True, tracked=False), "redelivery", "without a cap: shop.ocr"),
    ("fail", broker(error="Connection refused"), "broker", "redis://b/0 does not answer: Connection refused"),
    ("warn", broker(queues={"celery": None}), "broker", "does not tell how long its queues are (celery)"),
    ("fail", task(time_limit=7200.0), "visibility",
     "redis visibility_timeout 3600 s < time_limit 7200 s of shop.ocr: its message comes again"),
    ("fail", replies(time_limit=7200), "visibility", "< time_limit 7200 s of tasks on w1@web-1"),
    ("fail", tables(longest_wait=86_400.0), "visibility", "< countdown 24h of a child that waits now"),
    ("fail", task(retry_delay=7200.0), "visibility", "of shop.ocr (default_retry_delay)"),
    ("warn", replace(task(time_limit=7200.0), broker=BrokerFacts("amqp")), "visibility", "consumer_timeout"),
    ("warn", broker(queues={"celery": 50_000}), "detector", "behind 50000 others"),
    ("fail", replace(GOOD, database=None, database_error="tracking database x: refused (check that it runs)"),
     "database", "refused"),
    ("fail", database(schema="OLDER", schema_says="is older", revision="0004", tables=None), "schema",
     "(schema 0004, code 0005) → run `celery -A <app> batchtrack migrate`"),
    ("fail", database(schema="NEWER", schema_says="is newer", tables=None), "schema", "upgrade the package"),
    ("fail", database(schema="EMPTY", schema_says="has no tables", revision=None, tables=None), "schema", "none"),
    ("fail", connections(11, 0, None, True), "connections", "12 connections needed of 11"),
    ("warn", connections(100, 87, None, True), "connections", "12 connections needed of 13"),
    ("fail", connections(97, 0, "transaction", True), "pooler", "'prepare_threshold': None"),
    ("warn", connections(97, 0, "pooler", True), "pooler", "if it is in transaction mode"),
    ("fail", replace(GOOD, database=replace(SQLITE, tables=replace(TABLES, workers=[
        worker(), worker("c@web-2", kind="client", hostname="web-2", boot_id="boot-2")]))), "database", "web-1, web-2"),
    ("fail", replace(GOOD, database=SQLITE, replies=[reply(), reply("w2@web-2", hostname="web-2", boot_id="boot-2")]),
     "database", "use PostgreSQL"),
    ("warn", tables(kept_too_long=12, oldest_seconds=40 * 86_400.0), "retention",
     "12 batches are kept longer than batchtrack_retention says; the oldest ended 40d ago"),
    ("fail", tables(swept_seconds=300.0), "sweeps", "nobody has swept for 5m (the last was w1@web-1), and 2 batches"),
    ("warn", tables(swept_seconds=None, open_batches=0), "sweeps", "nobody has ever swept"),
    ("warn", replace(GOOD, beat_disabled=True), "beat", "is disabled in django-celery-beat"),
    ("fail", tables(workers=[]), "workers", "none is registered"),
    ("warn", tables(workers=[], open_batches=0), "workers", "start one: celery -A <app> worker"),
    ("warn", replace(GOOD, replies=[]), "workers", "1 alive, but no answer from w1@web-1"),
    ("warn", tables(workers=[worker(pool="solo")]), "pool", "-P solo on w1@web-1: a crash takes the whole worker"),
    ("warn", tables(workers=[worker(pool="thread")]), "pool", "-P threads on w1@web-1"),
    ("warn", replies(pool="thread"), "pool", "use -P prefork"),
    ("fail", replies(store_id="9b1c0000-0000-0000-0000-000000000000"), "store",
     "worker w1@web-1 uses another batchtrack database (postgresql://db/shop, store 9b1c0000 ≠ 51aa0000)"),
    ("fail", replies(installed=False), "store", "has no BatchTrack(app)"),
    ("fail", replace(GOOD, replies=[reply(), Reply("old@web-1", error="KeyError('batchtrack')")]), "store", "old@web"),
    ("fail", replies(trouble="batchtrack_database_url is not set"), "store", "w1@web-1: batchtrack_database_url"),
    ("fail", replies(takes_part=False), "store", "does not take part"),
    ("fail", replies(store_id=None), "store", "has not reached its tracking database (postgresql://db/shop)"),
    ("warn", task(queue="ocr"), "queues", "no worker consumes ocr, where shop.ocr would wait"),
    ("fail", tables(sent={"celery": 9, "celery.isolated": 1, "nobody": 3}), "queues",
     "3 children wait in nobody, which no worker consumes → start one for it: celery -A <app> worker -Q nobody"),
    ("fail", replace(task(queue="ocr"), database=replace(DATABASE, tables=replace(TABLES, sent={"ocr": 1}))), "queues",
     "1 child waits in ocr, which no worker consumes"),
    ("fail", tables(sent={"ocr.isolated": 2}), "queues", "celery -A <app> worker -Q ocr"),
    ("warn", replace(GOOD, detector_queue="ops"), "queues", "no worker consumes ops, where the detector's messages go"),
    ("warn", replies(version="0.9"), "version", "runs celery-batchtrack 0.9, here is 1.0"),
    ("warn", replies(settings={**HERE, "lease": 30.0}), "settings",
     "batchtrack_lease is 30.0 on worker w1@web-1, and 15.0 here"),
    ("fail", replies(blackbox=None, blackbox_trouble="OSError: full"), "black box", "(OSError: full)"),
    ("warn", replace(GOOD, blackbox=None), "black box", "no folder to write in on this host (/dev/shm, XDG"),
    ("fail", database(ahead=-40.0), "clock", "this host (web-1) is 40s behind the database's clock"),
    ("warn", replace(GOOD, replies=[replace(reply(), ahead=3.0)]), "clock",
     "worker w1@web-1 is 3.0s ahead of the database's clock: countdowns come too early"),
]  # fmt: skip


@pytest.mark.parametrize(("level", "facts", "check", "says"), BROKEN, ids=lambda value: str(value)[:30])
def test_every_check_finds_what_it_is_there_for_and_nothing_else(
    level: str, facts: Facts, check: str, says: str
) -> None:
    found = told(facts, level)
    assert any(each.startswith(f"{check}: ") and says in each for each in found), found
    others = [each for each in findings(facts) if each.level != "ok" and each.check != check]
    assert not others


def test_every_check_is_broken_by_some_facts() -> None:
    def finds(check: Callable[[Facts], Any], facts: Facts) -> bool:
        return any(each.level != "ok" for each in check(facts))

    for check in (*checks_application.CHECKS, *checks_database.CHECKS, *checks_running.CHECKS):
        assert any(finds(check, facts) for _, facts, _, _ in BROKEN), check.__name__


def test_what_cannot_be_known_is_not_guessed() -> None:
    said = told(connections(97, 0, "pooler", False), "ok")
    assert any("cannot be seen from here" in each for each in said)
    alone = replace(GOOD, replies=[], broker=BrokerFacts("sqs", remote_control=False))
    assert any("not asked, for there is no remote control" in each for each in told(alone, "ok"))
    down = replace(broker(error="refused"), replies=None)
    assert any("not asked, for the broker does not answer" in each for each in told(down, "ok"))
    fresh = replace(GOOD, database=replace(SQLITE, schema="EMPTY", revision=None, tables=None, makes_tables=True))
    assert "schema: no tables yet: they are made at first use → " in told(fresh, "ok")
    few = tables(workers=[worker(), worker("w2@web-1")], sent={"nobody": 3})
    assert any("nobody, which no worker that tells of its queues consumes" in each for each in told(few, "warn"))
    assert not any("nobody" in each for each in told(replace(few, replies=[]), "warn"))
    assert any("of 1 workers that did not answer one process is counted" in each for each in told(few, "ok"))


def test_settings_are_spelt_as_the_application_writes_them() -> None:
    django = replace(task(time_limit=7200.0, reject_on_worker_lost=True, tracked=False), namespace="CELERY_")
    assert "CELERY_BROKER_TRANSPORT_OPTIONS" in told(django, "fail")[0]
    assert "CELERY_TASK_REJECT_ON_WORKER_LOST" in told(django, "warn")[0]
    pooled = replace(connections(97, 0, "transaction", True), namespace="CELERY_")
    assert "CELERY_BATCHTRACK_ENGINE_OPTIONS" in told(pooled, "fail")[0]
