"""`watch`: what it shows, when it ends, and with which exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa
from celery import Celery
from rich.console import Console

from celery_batchtrack.store import schema
from celery_batchtrack.surfaces.watch_cli import _follow
from celery_batchtrack.surfaces.watch_screen import frame
from celery_batchtrack.surfaces.watching import Watch, stacked
from celery_batchtrack.vocabulary.ids import uuid7
from tests.integration.cli_kit import ESCAPES, HOSTILE, Run, Seeds, Shell, invoke, locked


def test_every_class_of_a_bar_has_a_cell_and_all_cells_are_given() -> None:
    assert stacked([999_998, 1, 1, 0, 0, 0], 12) == [10, 1, 1, 0, 0, 0]
    assert stacked([0, 0, 0], 10) == [0, 0, 0]
    assert stacked([1, 1, 1, 1, 1, 1], 12) == [2] * 6
    assert stacked([50, 0, 50], 14) == [7, 0, 7]
    for counts in ([1, 10**9, 3, 1, 1, 7], [2, 3, 5, 7, 11, 13], [1, 1, 1, 10_000, 1, 1]):
        given = stacked(counts, 12)
        assert sum(given) == 12 and all(given)


def test_watch_ends_when_batch_and_callbacks_are_over(seeds: Seeds, app: Celery) -> None:
    worker, batch_id = seeds.worker(), seeds.batch("invoices", children=2)
    seeds.complete(seeds.run(batch_id, 0, worker))
    late = invoke(app, "watch", "invoices", "--timeout", "0s", code=124)
    assert late.stdout == (
        f"batch={batch_id} name=invoices status=running percent=50 done=1 total=2 running=0 completed=1 failed=0 "
        f"crashed=0 cancelled=0 rate={late.stdout.split('rate=')[1]}"
    )
    assert late.stderr == "not over after 0.0s: 1 of 1\n"
    seeds.crash(seeds.run(batch_id, 1, worker))
    seeds.store.finish(batch_id)
    waits = invoke(app, "watch", str(batch_id)[:13], "--timeout", "0s", code=124).stdout
    assert "status=partial" in waits and "callbacks_open=1 callbacks_failed=0" in waits
    assert f'crash=SIGSEGV batch={batch_id} position=1 task=shop.parse item="PMC:1, DOI:1" host=web-3' in waits
    assert invoke(app, "watch", "--timeout", "0s", code=124).stdout == waits, "its callback is open"
    seeds.complete(seeds.run(batch_id, 2, worker))
    assert "callbacks_open=0" in invoke(app, "watch", "invoices", code=1).stdout
    invoke(app, "watch", "invoices", "--allow-partial")


def test_exit_codes_tell_a_good_end_from_a_bad_one(seeds: Seeds, app: Celery) -> None:
    worker, good, lost, cancelled = seeds.worker(), *(seeds.batch(name, children=1) for name in ("good", "lost", "no"))
    for batch_id in (good, lost):
        seeds.complete(seeds.run(batch_id, 0, worker))
        seeds.store.finish(batch_id)
    seeds.complete(seeds.run(good, 1, worker))
    seeds.crash(seeds.run(lost, 1, worker))
    seeds.store.cancel(cancelled)
    seeds.complete(seeds.run(cancelled, 1, worker))
    assert [json.loads(line)["id"] for line in invoke(app, "watch", good, "--json").stdout.splitlines()] == [str(good)]
    assert "callbacks_failed=1" in invoke(app, "watch", good, lost, code=1).stdout
    invoke(app, "watch", "no", "--allow-partial", code=1)
    assert invoke(app, "watch").stdout == "nothing runs\n"
    assert invoke(app, "watch", "--json").stdout == ""


def test_a_name_means_those_that_run_or_the_newest(seeds: Seeds, app: Celery) -> None:
    seeds.ended("nightly")
    newest = seeds.ended("nightly")
    watch = Watch(seeds.store, ["nightly"])
    watch.begin()
    watch.look()
    assert list(watch.batches) == [newest]
    running = [seeds.batch("nightly"), seeds.batch("nightly")]
    watch = Watch(seeds.store, ["nightly", str(running[0])])
    watch.begin()
    watch.look()
    assert list(watch.batches) == running
    for wanted in ("monthly", "\x1b[31m", str(uuid7())):
        said = invoke(app, "watch", wanted, code=66).stderr
        assert "none of that name" in said and not set(ESCAPES) & set(said)
    assert "at least 0.1 s" in invoke(app, "watch", "--every", "0s", code=2).stderr


def test_only_what_changed_is_told_and_batches_that_begin_meanwhile_join(seeds: Seeds, data: Run) -> None:
    worker, first = seeds.worker(), seeds.batch("first", children=1)
    watch = Watch(seeds.store)
    watch.begin()
    changed, _ = watch.look()
    assert [each.batch["name"] for each in changed] == ["first"]
    [listed] = data("list")
    assert set(changed[0].batch) == set(listed)
    assert watch.look() == ([], [])
    second = seeds.batch("second", children=1)
    seeds.crash(seeds.run(second, 0, worker))
    changed, crashes = watch.look()
    assert [each.batch["name"] for each in changed] == ["second"] and len(crashes) == 1
    assert watch.look() == ([], [])
    inner = seeds.batch("inner", children=1)
    with seeds.store.write() as connection:
        connection.execute(sa.update(schema.batch).where(schema.batch.c.id == inner).values(parent_batch=first))
    seeds.crash(seeds.run(inner, 0, worker))
    assert [str(each["batch_id"]) for each in watch.look()[1]] == [str(inner)], "nested in one that is watched"
    with seeds.store.write() as connection:
        connection.exec_driver_sql("DELETE FROM batchtrack_batch")
    assert [each.state for each in watch.look()[0]] == ["gone", "gone"] and watch.over
    assert not watch.ended_well(partial=True) and uuid.UUID(str(first)) in watch.batches


def shown(watch: Watch, width: int, encoding: str = "utf-8", trouble: str | None = None) -> str:
    console = Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding), force_terminal=True, width=width, height=12, no_color=True,
        color_system=None,
    )  # fmt: skip
    with console.capture() as capture:
        console.print(frame(console, watch, trouble))
    return capture.get()


def test_a_frame_shows_harmless_names_fits_its_terminal_and_has_the_newest_deaths(seeds: Seeds) -> None:
    worker = seeds.worker()
    names = ["[red]", HOSTILE.replace("\0", ""), "long " * 50, "[/]", "日本語"]
    ids = [seeds.batch(name, children=4) for name in names]
    seeds.complete(seeds.run(ids[0], 0, worker))
    seeds.crash(seeds.run(ids[0], 1, worker))
    seeds.run(ids[0], 2, worker)
    watch = Watch(seeds.store)
    watch.begin()
    watch.look()
    for columns in (80, 140):
        text = shown(watch, columns, trouble="no news for 3s, trying on: x[red]y")
        lines = text.splitlines()
        assert max(map(len, lines)) <= columns and not set(ESCAPES) & set(text)
        assert "[red]" in lines[1] and " 50% " in lines[1] and "2/4" in lines[1] and "running" in lines[1]
        assert "█" in lines[1] and "!" in lines[1] and "▒" in lines[1] and "░" in lines[1]
        assert "and 2 more" in text and "x[red]y" in lines[-1]
        assert "[red] #1  SIGSEGV  PMC:1, DOI:1  (web-3)" in text
    assert shown(watch, 140, "ascii").isascii()


# -- as a process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_ctrl_c_leaves_the_last_frame_and_130(seeds: Seeds, shell: Shell) -> None:
    seeds.batch("[red]" + HOSTILE.replace("\0", ""))
    ours, theirs = pty.openpty()
    env = {**shell.env, "TERM": "xterm", "COLUMNS": "140"}
    process = subprocess.Popen(shell.command("watch", "--every", "0.1s"), cwd=shell.folder, env=env, stdout=theirs)
    os.close(theirs)
    seen = b""
    try:
        while b"running" not in seen:
            seen += os.read(ours, 65_536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(ours, 65_536):
                seen += part
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    text = seen.decode()
    assert "\x1b[?25h" in text and "[red]red" in text and "tab new line" in text
    assert "owned" not in text and "\x1b[31mred" not in text and "\x1b[2J" not in text


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_terminal_without_rich_gets_lines(seeds: Seeds, shell: Shell) -> None:
    batch_id = seeds.batch()
    without = "import sys; sys.modules['rich'] = None; from celery.__main__ import main; main()"
    python, _, _, *arguments = shell.command("watch", "--timeout", "0s")
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [python, "-c", without, *arguments], cwd=shell.folder, env=shell.env, stdout=theirs, stderr=subprocess.PIPE,
        timeout=60, check=False,
    )  # fmt: skip
    os.close(theirs)
    said = os.read(ours, 65_536).decode()
    os.close(ours)
    assert said.startswith(f"batch={batch_id} name=upload status=running") and "\x1b" not in said
    assert (done.returncode, done.stderr) == (124, b"not over after 0.0s: 1 of 1\n")


class Locking:
    """A view that has all tables locked from the first look on."""

    def __init__(self, stack: contextlib.ExitStack, seeds: Seeds) -> None:
        self._stack, self._seeds = stack, seeds
        self.said: list[str] = []

    def show(self, *_: object) -> None:
        self._stack.enter_context(locked(self._seeds.store))

    def away(self, watch: Watch, error: Exception, seconds: float) -> None:
        self.said.append(str(error))

    def back(self, watch: Watch, seconds: float) -> None:
        raise AssertionError("it stays locked")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_time_runs_out_on_a_locked_database_too(seeds: Seeds, app: Celery) -> None:
    batch_id = seeds.batch(children=1)
    watch = Watch(seeds.store, [str(batch_id)])
    watch.begin()
    with contextlib.ExitStack() as stack:
        view = Locking(stack, seeds)
        assert not _follow(watch, view, 0.1, time.monotonic() + 1.0)
        assert len(view.said) == 1 and "no answer within 1 s: somebody holds a lock" in view.said[0]
        late = invoke(app, "watch", batch_id, "--timeout", "0s", code=124)
        assert "not over after 0.0s: the database is away: tracking database" in late.stderr
        assert "no answer within 1 s" in late.stderr and late.stdout == ""
    with unreachable(seeds.store.url.render_as_string(hide_password=False)):
        assert "the database is away" not in invoke(app, "watch", batch_id, "--timeout", "0s", code=69).stderr


@contextlib.contextmanager
def unreachable(url: str) -> Iterator[None]:
    """No connection to this database, neither old nor new ones."""
    base, _, name = url.replace("postgresql+psycopg://", "postgresql://").partition("?")[0].rpartition("/")
    with psycopg.connect(f"{base}/postgres", autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')  # type: ignore[arg-type, unused-ignore]
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        yield
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')  # type: ignore[arg-type, unused-ignore]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_database_that_is_away_for_a_while_is_told_and_waited_for(seeds: Seeds, shell: Shell) -> None:
    batch_id, worker = seeds.batch(children=1), seeds.worker()
    process = shell.start("watch", "--every", "0.1s", "--timeout", "60s", "--json")
    assert process.stdout is not None and process.stderr is not None
    try:
        assert json.loads(process.stdout.readline())["status"] == "running"
        url = seeds.store.url.render_as_string(hide_password=False)
        with unreachable(url):
            assert "the database is away, trying on: tracking database" in process.stderr.readline()
        assert "is back after" in process.stderr.readline()
        seeds.store.dispose()
        seeds.complete(seeds.run(batch_id, 0, worker))
        seeds.store.finish(batch_id)
        seeds.complete(seeds.run(batch_id, 1, worker))
        told = [json.loads(line) for line in process.stdout]
        assert told[-1]["status"] == "completed" and told[-1]["progress_percent"] == 100
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
