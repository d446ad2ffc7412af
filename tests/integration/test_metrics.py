"""Metrics: what is told, that it never goes down, and that no scrape waits for a database."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from celery_batchtrack import BatchTrack, errors
from celery_batchtrack.behaviour import recovery, retention, rounds
from celery_batchtrack.store import Store
from celery_batchtrack.surfaces import figures, metrics
from celery_batchtrack.surfaces.cli import batchtrack
from celery_batchtrack.vocabulary.states import Verdict
from tests.acceptance.scene import embedded
from tests.helpers import eventually, free_port
from tests.integration.cli_kit import Seeds, Shell, death, invoke, make_app

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    return {
        (each.name.removeprefix(figures.PREFIX), tuple(sorted(each.labels.items()))): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }


def told(app: Celery, *, invariants: bool = False) -> Samples:
    """As a scrape right after a refresh sees it."""
    snapshots = metrics.snapshots_of(BatchTrack.of(app), invariants=invariants)
    for each in snapshots:
        each.refresh()
        assert each.error is None
    return samples(metrics.text(snapshots))


def value(found: Samples, metric: str, /, **labels: str) -> float:
    return found[metric, tuple(sorted(labels.items()))]


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


# -- what is told ----------------------------------------------------------------------------------


def test_every_state_is_told_and_totals_survive_another_round_and_pruning(app: Celery, seeds: Seeds) -> None:
    extension = BatchTrack.of(app)
    old = seeds.ended()
    worker, live = seeds.worker("w2@here"), seeds.batch("live", 4)
    seeds.complete(seeds.run(live, 0, worker))
    seeds.fail(seeds.run(live, 1, worker), "no")
    row = seeds.run(live, 2, worker)
    assert recovery.run_died(extension.tracker, row, death(signal="SIGKILL"), Verdict.OBSERVED)
    seeds.run(live, 3, worker)

    found = told(app, invariants=True)
    assert {name.partition("_bucket")[0] for name, _ in found} >= {each.name for each in figures.ALL} - {
        "child_duration_seconds"
    }
    assert value(found, "up") == 1
    of_live = {"pending": 0, "running": 1, "completed": 1, "failed": 1, "crashed": 1, "cancelled": 0}
    assert {state: value(found, "children", state=state) for state in of_live} == of_live
    ends = {"completed": 2, "failed": 1, "crashed": 2, "cancelled": 0}
    parse = {"name": "shop.parse"}
    assert {each: value(found, "children_finished_total", **parse, state=each) for each in ends} == ends
    assert {each: value(found, "items_finished_total", **parse, state=each) for each in ends} == {
        each: 2 * count for each, count in ends.items()
    }
    deaths = {"SIGSEGV": 1, "SIGKILL": 1, "SIGABRT": 0, "oom": 0}
    assert {each: value(found, "crashes_total", **parse, signal=each) for each in deaths} == deaths
    assert value(found, "child_duration_seconds_count", **parse, state="crashed") == 2
    assert value(found, "child_duration_seconds_bucket", **parse, state="completed", le="+Inf") == 2
    assert value(found, "batches", status="running") == value(found, "batches", status="partial") == 1
    assert value(found, "workers", state="alive") == 2
    assert value(found, "workers", state="lost") == value(found, "stuck_batches", reason="no_progress") == 0
    assert value(found, "detector_last_sweep_age_seconds") == float("inf"), "nobody ever swept"
    assert value(found, "oldest_open_batch_age_seconds") > 0
    of_violations = {labels: count for (name, labels), count in found.items() if name == "invariant_violations"}
    assert set(of_violations.values()) == {0.0}
    assert {dict(labels)["kind"] for labels in of_violations} == {"structural", "liveness"}

    totals = {key: count for key, count in found.items() if key[0].endswith(("_total", "_bucket", "_count", "_sum"))}
    assert rounds.retry(extension.tracker, old) == 1
    with extension.store.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM batchtrack_batch"))  # by an owner's row, say
    retention.prune(extension.tracker, {"completed": 0.0, "other": 0.0})
    after = told(app)
    assert value(after, "batches", status="running") == 0
    assert {key: after.get(key) for key in totals} == pytest.approx(totals), "no counter goes down"
    extension.sweep()
    assert value(told(app), "detector_last_sweep_age_seconds") < 60


# -- a database that is away, locked, slow ---------------------------------------------------------


def test_a_database_that_does_not_answer_is_told_at_once_and_so_is_its_return(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "celery_batchtrack")
    store: Store = BatchTrack.of(app).store
    go_on, broken = threading.Event(), threading.Event()
    go_on.set()

    def read() -> list[figures.Family]:
        go_on.wait(20)
        if broken.is_set():
            raise errors.DatabaseUnavailable("no connection to the database")
        return figures.read(store)

    snapshot = metrics.Snapshot(read, every=0.01, timeout=0.2)
    assert samples(metrics.text([snapshot])) == {}, "nothing is known yet"
    snapshot.start()

    def up() -> float | None:
        return samples(metrics.text([snapshot])).get(("up", ()))

    eventually(lambda: up() == 1)
    go_on.clear()
    eventually(lambda: up() == 0, what="a refresh that hangs to be told")
    assert {name for name, _ in samples(metrics.text([snapshot]))} == {"up", "snapshot_timestamp_seconds"}
    go_on.set()
    eventually(lambda: up() == 1)
    broken.set()
    eventually(lambda: up() == 0)
    broken.clear()
    eventually(lambda: up() == 1)
    snapshot.stop()
    eventually(lambda: up() == 0, what="what nobody refreshes any more to be told")
    lines = [each.message for each in caplog.records if "action=metrics_" in each.message]
    assert [line.split()[0] for line in lines] == ["action=metrics_away", "action=metrics_back"], "each once"


def test_a_slow_read_puts_off_the_next_for_a_minute_at_most_and_a_failed_one_for_nothing() -> None:
    def fail() -> list[figures.Family]:
        raise errors.DatabaseUnavailable("no")

    well, failed = metrics.Snapshot(list, every=10.0), metrics.Snapshot(fail, every=10.0)
    for each in (well, failed):
        each.refresh()
    assert [well.idle_after(took) for took in (0.1, 5.0, 15.0, 600.0)] == [10.0, 20.0, 60.0, 60.0]
    assert [failed.idle_after(took) for took in (0.1, 600.0)] == [10.0, 10.0]
    assert metrics.Snapshot(list, every=300.0).idle_after(600.0) == 300.0
    assert well.up and failed.up is False


def test_a_locked_table_keeps_no_scrape_waiting(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(postgres_url)
    extension = BatchTrack.of(app)
    extension.migrate()
    registry = CollectorRegistry()
    made = metrics.register(extension, registry, every=0.05, timeout=0.3)
    assert metrics.register(extension, registry) is made, "a second time it is the same"
    with pytest.raises(errors.ImproperlyConfigured, match="another app"):
        metrics.register(BatchTrack.of(make_app(postgres_url)), registry)

    def up() -> float | None:
        return registry.get_sample_value("celery_batchtrack_up")

    eventually(lambda: up() == 1)
    other = sa.create_engine(extension.store.url)
    with other.begin() as connection:
        connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '30s'"))  # rather than to hang
        connection.execute(sa.text("LOCK TABLE batchtrack_batch IN ACCESS EXCLUSIVE MODE"))
        eventually(lambda: up() == 0)
        given_up = eventually(lambda: made.snapshots[0].error, what="the server to give the read up")
        assert "no answer within 0.3 s: somebody holds a lock" in str(given_up)
        monkeypatch.setattr(metrics, "TIMEOUT", 0.3)
        context = CLIContext(app=app, no_color=True, workdir=None)
        once = CliRunner().invoke(batchtrack, ["metrics", "--once"], obj=context)
        assert (once.exit_code, samples(once.stdout)) == (69, {("up", ()): 0.0})
        assert "no answer within 0.3 s" in once.stderr
    eventually(lambda: up() == 1)
    metrics.unregister(registry)
    metrics.unregister(registry)
    assert up() is None
    other.dispose()
    extension.reset()


def test_without_prometheus_client_it_says_what_to_install(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prometheus_client", "prometheus_client.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(errors.ImproperlyConfigured, match=r"celery-batchtrack\[metrics\]"):
        metrics.register(BatchTrack.of(app))


# -- in a worker -----------------------------------------------------------------------------------


def test_a_worker_serves_them_and_a_taken_port_ends_no_worker(tmp_path: Path) -> None:
    port = free_port()
    scene = embedded(tmp_path, batchtrack_metrics_address="127.0.0.1")
    with scene.worker("--concurrency=1", batchtrack_metrics_port=port) as first:
        found = eventually(lambda: up_at(port), what="metrics of the worker")
        assert value(found, "workers", state="alive") == 1
        with scene.worker("--concurrency=1", batchtrack_metrics_port=port) as second:
            eventually(lambda: "action=metrics_unserved" in second.logs(), 20, what="a line about the taken port")
            for worker in (second, first):
                worker.terminate()
                assert worker.wait() == 0
    scene.close()


def up_at(port: int) -> Samples | None:
    """What is told there, once the database was read."""
    with contextlib.suppress(OSError):
        found = samples(get(port))
        return found if found.get(("up", ())) == 1 else None
    return None


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_them_once(app: Celery, seeds: Seeds) -> None:
    seeds.ended()
    text = invoke(app, "metrics", "--once").stdout
    assert value(samples(text), "crashes_total", name="shop.parse", signal="SIGSEGV") == 1
    assert "invariant_violations" in text
    assert "invariant_violations" not in invoke(app, "metrics", "--once", "--no-invariants").stdout
    found = json.loads(invoke(app, "metrics", "--once", "--json").stdout)
    (up,) = [each for each in found if each["metric"] == "celery_batchtrack_up"]
    assert up == {"metric": "celery_batchtrack_up", "labels": {}, "value": 1}
    assert "--once" in invoke(app, "metrics", "--json", code=2).stderr
    assert "more than 0" in invoke(app, "metrics", "--every", "0", code=2).stderr


@pytest.fixture
def sqlite_shell(tmp_path: Path, sqlite_url: str) -> Iterator[Callable[[str], Shell]]:
    from tests.integration.cli_kit import shell_in

    yield lambda url: shell_in(tmp_path, url)


def test_the_command_serves_them_until_it_is_told_to_stop(sqlite_shell: Any, sqlite_url: str) -> None:
    store = Store(sqlite_url)
    store.migrate()
    store.dispose()
    shell = sqlite_shell(sqlite_url)
    process = shell.start("metrics", "--port", "0", "--address", "127.0.0.1")
    line = process.stdout.readline()
    port = int(line.rpartition(":")[2].partition("/")[0])
    eventually(lambda: up_at(port), what="the first refresh")
    _, err = shell("metrics", "--port", str(port), "--address", "127.0.0.1", code=69)
    assert f"cannot listen on 127.0.0.1:{port}" in err and "Traceback" not in err
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, process.stderr.read()
    process.communicate()


def test_the_command_tells_that_the_database_is_away(sqlite_shell: Any) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        shell = sqlite_shell(f"postgresql+psycopg://u@127.0.0.1:{nobody.getsockname()[1]}/x")
        out, err = shell("metrics", "--once", code=69)
        assert samples(out) == {("up", ()): 0.0}
        assert "Traceback" not in err
        process = shell.start("metrics", "--port", "0", "--address", "127.0.0.1")
        port = int(process.stdout.readline().rpartition(":")[2].partition("/")[0])
        eventually(lambda: samples(get(port)) == {("up", ()): 0.0}, what="up 0")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.communicate()
