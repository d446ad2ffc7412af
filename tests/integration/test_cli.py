"""The command line: as a real process under `celery`, and in this process where one would be overkill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from celery import Celery

from celery_batchtrack import Batch, BatchTrack, tracked
from celery_batchtrack.behaviour import hosts
from celery_batchtrack.store import schema
from celery_batchtrack.surfaces import pages, views
from celery_batchtrack.surfaces.cli import batchtrack
from celery_batchtrack.surfaces.render import Column, Screen, Table, bar, clean, cut, duration, width
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import NewBatch
from celery_batchtrack.vocabulary.states import Detector
from tests.helpers import ROOT, eventually, free_port
from tests.integration.cli_kit import (
    ESCAPES,
    HOSTILE,
    SHOP,
    Run,
    Seeds,
    Shell,
    app_of,
    error,
    invoke,
    locked,
    make_app,
    parse,
    shell_in,
)

COUNTS = ("total", "pending", "running", "completed", "failed", "crashed", "cancelled")


# -- list, show, children -------------------------------------------------------------------------


def test_an_empty_database_lists_nothing(text: Run, data: Run) -> None:
    for command, words in (("list", "no batches"), ("crashes", "no crashes"), ("workers", "no workers")):
        assert text(command) == words + "\n"
        assert data(command) == []
    assert data("verify") and not any(each["violations"] for each in data("verify"))
    assert not any(data("detect")[0].values())
    assert data("prune") == [{"batches": 0, "workers": 0}]


def test_list_counts_a_running_batch(seeds: Seeds, text: Run, data: Run) -> None:
    worker, batch_id = seeds.worker(), seeds.batch(children=4)
    seeds.complete(seeds.run(batch_id, 0, worker))
    seeds.crash(seeds.run(batch_id, 1, worker))
    seeds.run(batch_id, 2, worker)

    (found,) = data("list")
    assert [found[name] for name in COUNTS] == [4, 1, 1, 1, 0, 1, 0]
    wanted = {
        "id": str(batch_id), "name": "upload", "status": "running", "items_total": 8, "items_completed": 2,
        "items_crashed": 2, "progress_percent": 50, "finished_at": None, "round": 1, "parent_task": "shop.start",
        "parent_task_id": "5c1e", "reason": None,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert found["started_at"].endswith("Z") and found["created_at"] <= found["started_at"]
    assert found["rate"] > 0 and found["eta"] > 0

    header, line = text("list").splitlines()
    assert header.split() == [
        "ID", "NAME", "STATUS", "PROGRESS", "DONE/TOTAL", "FAIL", "CRASH", "RATE", "ETA", "AGE"
    ]  # fmt: skip
    assert line.startswith(str(batch_id)[:13]) and "███████░░░░░░░  50%" in line and " 2/4 " in line


def test_list_is_newest_first_and_filters(seeds: Seeds, text: Run, data: Run) -> None:
    done, running = seeds.ended("first"), seeds.batch("second")

    def ids(*args: object) -> list[str]:
        return [each["id"] for each in data("list", *args)]

    assert ids() == [str(running), str(done)]
    assert ids("--limit", 1) == [str(running)]
    assert ids("--name", "first") == ids("--status", "partial") == [str(done)]
    assert ids("--status", "partial", "--status", "running") == ids()
    assert ids("--name", "fir") == ids("--name", "\udcff") == []


def test_list_shows_ids_that_tell_batches_of_one_millisecond_apart(seeds: Seeds, text: Run) -> None:
    ids = [seeds.batch(id=uuid.UUID(f"019a3f7c-1111-7{at}00-8000-000000000000")) for at in range(3)]
    shown = [line.split()[0] for line in text("list").splitlines()[1:]]
    assert len(set(shown)) == len(ids)
    assert all(text("show", each).startswith("upload") for each in shown)


def test_show_has_callbacks_and_what_did_not_complete(seeds: Seeds, text: Run, data: Run) -> None:
    batch_id = seeds.ended()
    found = data("show", batch_id)
    assert (found["status"], found["progress_percent"], found["crashed"]) == ("partial", 100, 1)
    assert found["children"] == {
        "pending": 0, "running": 0, "completed": 1, "failed": 0, "crashed": 1, "cancelled": 0
    }  # fmt: skip
    (callback,) = found["callbacks"]
    names = ("kind", "ordinal", "position", "task", "status", "attempt")
    assert [callback[name] for name in names] == ["on_finish", 0, 2, "shop.done", "completed", 1]
    assert callback["task_id"] and callback["started_at"] <= callback["finished_at"]
    (incident,) = found["incidents"]
    assert incident["signal"] == "SIGSEGV" and found["incidents_complete"]

    page = text("show", batch_id)
    assert f"upload {batch_id}   partial   round 1   by shop.start (task 5c1e)" in page
    assert "4 = 2 completed + 2 crashed" in page
    assert "2 = 1 completed + 1 crashed, 0 open" in page
    assert "on_finish shop.done → completed in " in page and "(1 start)" in page
    assert "#1 PMC:1, DOI:1   SIGSEGV   web-3 pid 771   seen after " in page


def test_show_cuts_what_users_wrote_at_length_and_json_has_it_whole(seeds: Seeds, text: Run, data: Run) -> None:
    long = "x" * 100_000
    tags = ("x" * 100, *(f"tag{number}" for number in range(30)))
    new = NewBatch(
        id=uuid7(), name="long", callbacks="{}", options={}, description=long, tags=tags, metadata={"why": long}
    )  # fmt: skip
    seeds.store.create(new, [parse(0)], seal=True)
    page = text("show", new.id)
    assert max(map(len, page.splitlines())) < 1000
    assert f"about      {'x' * 199}…\n" in page
    assert f"labels     {'x' * 79}…, tag0, " in page and "tag18 (+12)\n" in page
    found = data("show", new.id)
    assert (found["description"], found["tags"]) == (long, list(tags))
    assert found["metadata"] == {"why": long}


def test_show_names_a_few_failures_and_counts_the_others(seeds: Seeds, text: Run) -> None:
    worker, batch_id = seeds.worker(), seeds.batch(children=13)
    for position in range(13):
        seeds.fail(seeds.run(batch_id, position, worker), "ValueError: no such span")
    page = text("show", batch_id)
    assert page.count("ValueError: no such span") == 10
    assert "… and 3 more" in page


def test_children_by_status(seeds: Seeds, text: Run, data: Run) -> None:
    batch_id = seeds.ended()
    (crashed,) = data("children", batch_id, "--status", "crashed")
    wanted = {
        "batch_id": str(batch_id), "position": 1, "kind": "child", "task": "shop.parse", "status": "crashed",
        "cause": "signal", "verdict": "observed", "attempt": 1, "crashes": 1, "retries": 0, "dispatches": 0,
        "items": ["PMC:1", "DOI:1"], "item_count": 2, "queue": "celery", "slot": "4242:1:1:0",
    }  # fmt: skip
    assert {name: crashed[name] for name in wanted} == wanted
    assert crashed["task_id"] and uuid.UUID(crashed["worker_id"]) and crashed["finished_at"].endswith("Z")
    assert not {"signature", "result", "run_token"} & set(crashed)

    assert [each["position"] for each in data("children", batch_id)] == [0, 1]
    assert [each["kind"] for each in data("children", batch_id, "--callbacks")] == ["on_finish"]
    assert data("children", batch_id, "--status", "failed") == []
    assert "PMC:1, DOI:1" in text("children", batch_id)
    assert text("children", batch_id, "--status", "failed") == "no such rows\n"
    invoke(None, "children", batch_id, "--status", "crushed", code=2)


def test_children_of_a_large_batch_are_listed_whole(seeds: Seeds, text: Run, data: Run) -> None:
    batch_id = seeds.batch(children=2300)
    assert [each["position"] for each in data("children", batch_id)] == list(range(2300))
    lines = text("children", batch_id).splitlines()
    assert len(lines) == 2301 and sum("STATUS" in line for line in lines) == 1


# -- workers -----------------------------------------------------------------------------


def test_workers_and_their_states(seeds: Seeds, text: Run, data: Run) -> None:
    ids = {state: seeds.worker(f"{state}@here") for state in ("alive", "suspected", "lost", "stopped")}
    seeds.store.suspect_now(ids["suspected"])
    seeds.store.lose(ids["lost"], Detector.LEASE)
    seeds.store.stop(ids["stopped"])

    found = {each["name"]: each for each in data("workers", "--all")}
    assert {name: each["state"] for name, each in found.items()} == {f"{state}@here": state for state in ids}
    assert found["lost@here"]["lost_by"] == "lease" and found["alive@here"]["id"] == str(ids["alive"])
    assert {each["state"] for each in data("workers")} == {"alive", "suspected"}
    assert "alive@here" in text("workers") and "lost@here" not in text("workers")


def test_a_worker_silent_for_longer_than_its_lease_is_suspected_without_a_sweep(seeds: Seeds) -> None:
    seeds.worker()
    (row,) = seeds.store.workers()
    late = row.beat_at + timedelta(seconds=row.lease + 1)
    assert views.worker_state(row, row.beat_at) == "alive"
    assert views.worker_state(row, late) == "suspected"


# -- verify, detect, prune, cancel ----------------------------------------------------------------


def test_verify_lists_every_check_and_exits_1_on_violations(seeds: Seeds, text: Run, data: Run) -> None:
    batch_id = seeds.batch()
    lines = text("verify").splitlines()
    assert len(lines) > 15 and all(line.split()[1] == "ok" for line in lines[1:])
    with seeds.store.write() as connection:
        connection.execute(sa.update(schema.tally).where(schema.tally.c.shard == 0).values(total=7))

    broken = {each["check"]: each for each in data("verify", code=1) if each["violations"]}
    assert broken["tally_equals_rows"]["violations"] == 1
    assert str(batch_id) in broken["tally_equals_rows"]["examples"][0]
    assert "1 violations" in text("verify", code=1)


def test_the_grace_of_verify_is_what_detection_may_take(seeds: Seeds, data: Run) -> None:
    worker, batch_id = seeds.worker(), seeds.batch()
    seeds.run(batch_id, 0, worker)
    seeds.store.lose(worker, Detector.LEASE)
    assert not any(each["violations"] for each in data("verify"))

    def violated() -> bool:
        found = invoke(app_of(seeds), "verify", "--grace", "0", "--json", code=1).stdout
        return any(each["violations"] for each in json.loads(found) if each["check"] == "running_on_a_living_worker")

    eventually(violated)


def test_detect_settles_what_a_dead_worker_left(seeds: Seeds, text: Run, data: Run) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    batch_id = seeds.batch()
    seeds.store.claim(
        ChildKey(batch_id, 0), 0, new_token(), seeds.worker(pid=dead.pid, host=hosts.identity()), f"{dead.pid}:1:1:0"
    )
    (done,) = data("detect")
    assert (done["lost_workers"], done["verdicts"]) == (1, 1)
    assert text("detect") == "nothing to do\n"
    assert data("crashes")[0]["detected_by"] == "host"


def test_detect_refuses_a_pause_that_would_keep_it_from_judging(app: Celery) -> None:
    assert "batchtrack_detect_every" in invoke(app, "detect", "--every", "60s", code=2).stderr


def test_prune_deletes_ended_batches_of_any_outcome(seeds: Seeds, text: Run, data: Run) -> None:
    seeds.ended("old")
    running = seeds.batch("running")
    assert text("prune", "--older-than", "7d") == "batches deleted: 0; workers that ended before: 0\n"
    eventually(lambda: data("prune", "--older-than", "0s")[0]["batches"])
    assert [each["id"] for each in data("list")] == [str(running)]


def test_prune_keeps_the_opener_of_a_batch_that_nobody_has_cancelled_yet(seeds: Seeds) -> None:
    opener = seeds.worker("client")
    seeds.store.create(NewBatch(uuid7(), "open", "{}", {}, opened_by=opener))
    seeds.store.stop(opener)
    other = seeds.worker("other")
    seeds.store.stop(other)
    eventually(lambda: seeds.store.prune_workers(0.0))
    assert [each.id for each in seeds.store.workers(all=True)] == [opener]
    assert len(seeds.store.abandoned()) == 1


@pytest.mark.parametrize("value", ["7 days", "-1d", "1e9", "nan", "999999w", ""])
def test_a_wrong_duration_is_a_usage_error(app: Celery, value: str) -> None:
    invoke(app, "prune", "--older-than", value, code=2)
    invoke(app, "crashes", "--since", value, code=2)


def test_cancel_ends_a_batch_once(seeds: Seeds, text: Run, data: Run) -> None:
    first, second = seeds.batch(), seeds.batch()
    (done,) = data("cancel", first)
    assert done == {"id": str(first), "name": "upload", "status": "cancelled", "cancelled": True}
    assert data("cancel", first)[0]["cancelled"] is False
    assert text("cancel", second) == f"cancelled upload {second}: 2 children, 0 had completed\n"
    assert text("cancel", second) == f"upload {second} had ended already: cancelled\n"
    assert data("show", second)["reason"] == "user"


# -- migrate, and databases that do not fit -------------------------------------------------------


def test_migrate_says_what_it_did_and_where(database_url: str) -> None:
    app = make_app(database_url, batchtrack_auto_migrate=False)
    assert "batchtrack migrate" in error(app, "list", code=78)
    assert invoke(app, "migrate").stdout.endswith(": tables created\n")
    store = BatchTrack.of(app).store
    assert json.loads(invoke(app, "migrate", "--json").stdout) == [
        {"database": store.shown_url, "before": "current", "changed": False}
    ]
    assert invoke(app, "migrate").stdout == f"{store.shown_url}: nothing to do, the schema is current\n"
    assert invoke(app, "list").stdout == "no batches\n"

    with store.write() as connection:
        connection.execute(sa.text("UPDATE batchtrack_alembic_version SET version_num = 'from the future'"))
    BatchTrack.of(app).reset()
    for command in ("list", "migrate"):
        assert "upgrade the package" in error(app, command, code=78)
    BatchTrack.of(app).reset()


def test_passwords_are_never_shown() -> None:
    url = f"postgresql://me:s3cret@127.0.0.1:{free_port()}/x?passfile=/s3cret"
    said = error(make_app(url), "migrate", code=69)
    assert "s3cret" not in said and "***" in said


def test_exit_69_where_the_database_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "noise.db").write_bytes(b"this is no database " * 500)
    for url in (
        f"postgresql://127.0.0.1:{free_port()}/x",
        f"sqlite:///{tmp_path}/missing/x.db",
        f"sqlite:///{tmp_path}/noise.db",
        f"sqlite:///{tmp_path}",
    ):
        for command in ("list", "migrate", "verify", "detect", "prune"):
            assert "tracking database" in error(make_app(url), command, code=69)


#: Commands that read, and for how long they wait for the database.
READING = {
    ("list",): 10, ("show", "ID"): 10, ("children", "ID"): 10, ("workers",): 10, ("running",): 10, ("stuck",): 10,
    ("crashes",): 10, ("stack", "ID", "1"): 10, ("repro", "ID", "1"): 10, ("quarantine", "list"): 10,
    ("verify",): 30, ("sql", "invariant", "--run"): 30,
}  # fmt: skip


def commands_in(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, each in group.commands.items():
        yield from commands_in(each, *path, name) if isinstance(each, click.Group) else [((*path, name), each)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_only_reads_gives_up_on_a_locked_database_with_69(
    seeds: Seeds, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = seeds.ended()
    found = dict(commands_in(batchtrack))
    limits = {path: each.reads_for for path, each in found.items() if each.reads_for is not None}
    assert limits == {path[: 1 + (path[0] == "quarantine")]: seconds for path, seconds in READING.items()}
    for each in limits:
        monkeypatch.setattr(found[each], "reads_for", 0.1)
    with locked(seeds.store):
        for words in READING:
            said = invoke(app, *(str(batch_id) if word == "ID" else word for word in words), code=69).stderr
            assert "no answer within 0.1 s: somebody holds a lock" in said, words
    invoke(app, "show", batch_id)


def test_a_read_only_database_is_read_and_answers_writes_with_69(seeds: Seeds) -> None:
    batch_id = seeds.ended()
    url = seeds.store.url
    if seeds.store.sqlite:
        url = url.set(database=f"file:{url.database}").update_query_dict({"mode": "ro", "uri": "true"})
    else:
        url = url.update_query_dict({"options": "-c default_transaction_read_only=on"})
    app = make_app(url.render_as_string(hide_password=False))
    assert str(batch_id) in invoke(app, "list", "--json").stdout
    invoke(app, "verify")
    for command in (("detect",), ("prune", "--older-than", "0s"), ("cancel", str(seeds.batch()))):
        assert "read-only" in error(app, *command, code=69)
    BatchTrack.of(app).reset()


def test_exit_78_for_wrong_settings(tmp_path: Path) -> None:
    assert "batchtrack_database_url is not set" in error(make_app(None), "list", code=78)
    assert "did you mean 'batchtrack_lease'" in error(make_app("sqlite://", batchtrack_laese=3), "list", code=78)
    assert "must be PostgreSQL or SQLite" in error(make_app("mysql://x/y"), "migrate", code=78)
    plain = Celery("plain", set_as_current=False)
    said = error(plain, "list", code=78)
    assert "has no BatchTrack" in said and "celery -A <app>" in said


# -- ids ------------------------------------------------------------------------------------------


def test_an_id_may_be_shortened_while_it_is_unique(seeds: Seeds, data: Run) -> None:
    app = app_of(seeds)
    first = seeds.batch(id=uuid.UUID("019a3f7c-1111-7000-8000-000000000001"))
    seeds.batch(id=uuid.UUID("019a3f7c-1111-7000-8000-000000000002"))
    seeds.batch(id=uuid.UUID("02000000-1111-7000-8000-000000000002"))
    for prefix in (
        "019a3f7c-1111-7000-8000-000000000001", "019A3F7C-1111-7000-8000-000000000001", first.hex,
        "02", "0200", "02000000-", "0200000011", "02000000-1111-7000-8000-00000000000",
    ):  # fmt: skip
        assert data("show", prefix)["id"].startswith(prefix[:2])
    for prefix in ("0", "019a3f7c", "019a3f7c-1111-7000-8000-00000000000"):
        assert "several batches" in error(app, "show", prefix, code=66)
    unknown = ("7", "ffffffff", str(uuid7()), "%", "_", "'", "\udcff", "x" * 500, "\x1b[31m", "0" * 33)
    for prefix in unknown:
        for command in ("show", "children", "cancel"):
            assert not set(ESCAPES) & set(error(app, command, prefix, code=66))
    assert "no batch" in error(app, "crashes", "--batch", "7", code=66)
    invoke(app, "show", code=2)


# -- what users named -----------------------------------------------------------------------------


def test_hostile_names_reach_a_terminal_as_plain_text_and_json_unchanged(app: Celery) -> None:
    app.conf.task_always_eager = True

    @app.task(name="shop.fails", shared=False)  # type: ignore[untyped-decorator, unused-ignore]
    @tracked(items="docs")
    def fails(docs: list[str]) -> None:
        raise ValueError(HOSTILE + "\ud800")

    names = [HOSTILE.replace("\0", ""), "long " * 51, "日本語" * 20]
    batches = [Batch.create(name, [fails.s([HOSTILE, "\ud800"])], app=app) for name in names]
    ids = [str(batch.id) for batch in batches]
    for command in (["list"], *(["show", id] for id in ids), *(["children", id] for id in ids)):
        lines = invoke(app, *command).stdout
        assert not [char for char in lines if char in ESCAPES or (char != "\n" and not char.isprintable())]
        raw = invoke(app, *command, "--json").stdout
        assert raw.isascii() and not set(ESCAPES) & set(raw)
    assert "red tab new line esrever end" in " ".join(invoke(app, "list").stdout.split())
    assert "owned" not in invoke(app, "list").stdout

    found = {each["id"]: each["name"] for each in json.loads(invoke(app, "list", "--json").stdout)}
    assert [found[id] for id in ids] == names
    child = json.loads(invoke(app, "children", ids[0], "--json").stdout)[0]
    assert child["items"][0] == HOSTILE.replace("\0", "\\0")


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;unterminated", ""),
        ("\x1bP1$r\x1b\\x\x1b(0y\x1b", "xy"),
        ("\x9b31mc1\x9d0;t\x9cz", "c1z"),
        ("a\r\nb\tc\x7f\x08\u200b\u2028d", "a b c d"),
        ("\u202egnp.exe", "gnp.exe"),
        ("é 日本 👩 e\u0301", "é 日本 👩 e\u0301"),
        (None, "None"),
    ],
)
def test_cleaning(raw: object, plain: str) -> None:
    assert clean(raw) == plain


def test_tables_are_aligned_and_fit_the_terminal() -> None:
    rows = [("日本語の名前です", 1, "x" * 40), ("plain", 1000, "y"), ("e\u0301" * 12, 2, "")]
    columns = [Column("NAME", elastic=True), Column("N", right=True), Column("TEXT", elastic=True)]
    lines = list(Table(Screen("utf-8", 40, False), columns).lines(rows))
    assert all(width(line) <= 40 for line in lines)
    assert "…" in lines[1] and "1000" in lines[2]
    wide = list(Table(Screen("utf-8", None, False), columns).lines(rows))
    assert "x" * 40 in wide[1]
    ends = [width(wide[at][: wide[at].index(text) + len(text)]) for at, text in ((0, " N"), (1, " 1"), (2, "1000"))]
    assert len(set(ends)) == 1
    assert list(Table(Screen("utf-8", 40, False), columns).lines([])) == []
    assert cut("日本語", 4) == "日…" and cut("abcd", 4) == "abcd"


def test_an_encoding_without_blocks_gets_ascii_and_a_terminal_colours() -> None:
    batch = {
        "id": str(uuid7()), "name": "naïve 日本", "status": "running", "total": 10, "pending": 4, "running": 1,
        "failed": 1, "crashed": 0, "progress_percent": 50, "rate": 3.0, "eta": 40.0, "finished_at": None,
        "paused_at": None,
        "created_at": datetime.fromisoformat("2026-01-01T00:00:00+00:00"),
    }  # fmt: skip
    now = datetime.fromisoformat("2026-01-01T00:03:00+00:00")
    ascii_line = list(pages.batch_list(Screen("ascii", None, False), [batch], now))[1]
    assert ascii_line.isascii() and "#######.......  50%" in ascii_line and "3m" in ascii_line
    latin = list(pages.batch_list(Screen("latin-1", None, False), [batch], now))[1]
    latin.encode("latin-1")
    coloured = list(pages.batch_list(Screen("utf-8", None, True), [batch], now))[1]
    assert "\x1b[34mrunning" in coloured and "\x1b[31m" in coloured
    assert not Screen.of(StringIO(), no_color=False).colour
    assert [bar(percent, 4) for percent in (0, 99, 100)] == ["░░░░", "███░", "████"]
    assert [duration(value) for value in (0.04, 53, 180, 7300, 500_000)] == ["0.0s", "53s", "3m", "2h", "6d"]


# -- as a process ---------------------------------------------------------------------------------


def test_every_command_as_a_process(seeds: Seeds, shell: Shell) -> None:
    batch_id = str(seeds.ended())
    for args in (
        ["list"], ["show", batch_id[:18]], ["children", batch_id], ["crashes", "--since", "24h"], ["workers", "--all"],
        ["verify"], ["detect"], ["migrate"], ["prune", "--older-than", "7d"], ["cancel", batch_id],
    ):  # fmt: skip
        found = shell.json(*args)
        assert isinstance(found, dict if args[0] == "show" else list) and found
    out, err = shell("list")
    assert batch_id[:13] in out and "\x1b" not in out and not err
    _, err = shell("show", "7", code=66)
    assert err.startswith("Error: no batch '7'")


def test_a_process_exits_with_69_without_its_database_and_78_without_its_app(tmp_path: Path) -> None:
    shell = shell_in(tmp_path, f"postgresql://127.0.0.1:{free_port()}/x")
    out, err = shell("list", "--json", code=69)
    assert not out and err.startswith("Error: tracking database") and err.count("\n") == 1
    (tmp_path / "bare.py").write_text("from celery import Celery\napp = Celery('bare')\n")
    shell.app = "bare"
    out, err = shell("list", "--json", code=78)
    assert not out and "call BatchTrack(app)" in err


def test_output_follows_the_encoding_and_the_width_it_is_given(seeds: Seeds, shell: Shell) -> None:
    seeds.ended("n" * 200)
    assert shell("list", PYTHONIOENCODING="ascii")[0].isascii()
    lines = shell("list", COLUMNS="100", PYTHONIOENCODING="utf-8")[0].splitlines()
    assert max(map(len, lines)) <= 100 and "…" in lines[1]


def test_what_detect_logs_is_on_standard_error_without_escape_sequences(seeds: Seeds, shell: Shell) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    worker = seeds.worker(f"w\x1b[31m@{'x' * 20}", pid=dead.pid, host=hosts.identity())
    seeds.store.claim(ChildKey(seeds.batch(), 0), 0, new_token(), worker, f"{dead.pid}:1:1:0")
    out, err = shell("detect", "--json")
    assert json.loads(out)[0]["verdicts"] == 1
    assert "action=child_crashed" in err and "PMC:0" in err and "\x1b" not in err


def test_detect_goes_on_until_it_is_told_to_stop(shell: Shell) -> None:
    process = shell.start("detect", "--every", "0.1s", "--json")
    assert process.stdout is not None and process.stderr is not None
    try:
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert all(line["verdicts"] == 0 for line in lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_reader_that_leaves_early_is_no_error_to_talk_about(seeds: Seeds, shell: Shell) -> None:
    batch_id = seeds.batch(children=3000)
    process = shell.start("children", str(batch_id), "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(30)
    assert not process.stderr.read()
    process.stderr.close()


def test_an_application_with_preload_options_has_the_commands_too(tmp_path: Path) -> None:
    source = SHOP + (
        "\nfrom click import Option\nfrom celery import signals\n"
        "app.user_options['preload'].add(Option(['--tenant']))\n"
        "@signals.user_preload_options.connect(weak=False)\n"
        "def told(options, **_): os.write(2, str(options).encode())\n"
    )
    shell = shell_in(tmp_path, f"sqlite:///{tmp_path / 'x.db'}", source)
    process = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "cli_shop", "batchtrack", "--tenant", "a", "list", "--json"],
        cwd=tmp_path, env=shell.env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0 and json.loads(process.stdout) == []
    assert "{'tenant': 'a'}" in process.stderr


def test_the_command_line_is_light_to_import() -> None:
    script = (
        "import sys, celery.bin.celery\n"
        "import celery_batchtrack.surfaces.cli\n"
        "heavy = {'sqlalchemy', 'alembic', 'rich', 'psycopg', 'celery_batchtrack.glue'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)


def test_the_package_hands_out_its_names_at_first_use() -> None:
    script = (
        "import celery_batchtrack as package\n"
        "assert set(package.__all__) <= set(dir(package))\n"
        "from celery_batchtrack import *\n"
        "from celery_batchtrack.glue.batch import Batch as Home\n"
        "assert Batch is Home is package.Batch and callable(chord) and errors.BatchTrackError and signals.batch_ended\n"
        "assert not hasattr(package, 'no_such_name')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)
