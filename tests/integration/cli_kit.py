"""What the tests of the command line share: rows in every state, and ways to call it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_batchtrack import BatchTrack
from celery_batchtrack.store import Store, schema
from celery_batchtrack.surfaces.cli import batchtrack
from celery_batchtrack.vocabulary.aftermath import Part, Rerun
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import ChildRow, Ending, HostIdentity, NewBatch, NewChild, NewWorker
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict
from tests.helpers import ROOT

HOSTILE = "\x1b[31mred\x1b[0m \x1b]0;owned\x07 \x9b2J tab\tnew\nline \u202eesrever\u2066 \x00 end"
ESCAPES = ("\x1b", "\x9b", "\x07", "\x00", "\u202e", "\u2066")


# -- rows -----------------------------------------------------------------------------------------


@dataclass
class Seeds:
    """Rows in every state, made the way that workers make them."""

    store: Store

    def batch(
        self, name: str = "upload", children: int | Sequence[NewChild] = 2, *, id: uuid.UUID | None = None,
        callbacks: dict[str, list[Any]] | None = None, tolerance: int | str = "100%",
    ) -> uuid.UUID:  # fmt: skip
        callback = {"task": "shop.done", "task_id": str(uuid.uuid4()), "signature": "{}"}
        new = NewBatch(
            id=id or uuid7(), name=name, callbacks=json.dumps(callbacks or {"on_finish": [callback]}),
            options={"tolerance": tolerance}, parent_task="shop.start", parent_task_id="5c1e", shards=2,
        )  # fmt: skip
        rows = [parse(at) for at in range(children)] if isinstance(children, int) else children
        self.store.create(new, rows, seal=True)
        return new.id

    def worker(self, name: str = "w1@here", pid: int = 4242, host: HostIdentity | None = None) -> uuid.UUID:
        host = host or HostIdentity("elsewhere", "another-boot", "another-namespace")
        new = NewWorker(uuid.uuid4(), "worker", name, host, pid, 1, "prefork", 15.0, "0")
        self.store.register(new)
        return new.id

    def run(self, batch_id: uuid.UUID, position: int, worker: uuid.UUID) -> ChildRow:
        key = ChildKey(batch_id, position)
        row = self.child(key)
        self.store.claim(key, row.attempt, new_token(), worker, f"4242:1:{position}:0")
        return self.child(key)

    def child(self, key: ChildKey) -> ChildRow:
        row = self.store.child(key)
        assert row is not None
        return row

    def complete(self, row: ChildRow) -> None:
        assert row.run_token is not None
        assert self.store.settle(row.key, row.run_token, Ending(Status.COMPLETED, "1")).written

    def fail(self, row: ChildRow, message: str) -> None:
        assert row.run_token is not None
        evidence = Evidence(Cause.EXCEPTION, message=message, hostname="web-3", worker="w1@here", pid=771)
        self.store.settle(row.key, row.run_token, Ending(Status.FAILED, None, Cause.EXCEPTION, evidence))

    def crash(self, row: ChildRow, evidence: Evidence | None = None, *, again: float | None = None) -> None:
        evidence = evidence or death()
        verdict = Verdict.LEASE if evidence.detected_by is Detector.LEASE else Verdict.OBSERVED
        assert self.store.crash(row, evidence, verdict, None if again is None else Rerun(again)).written

    def split(self, row: ChildRow, evidence: Evidence | None = None) -> None:
        """Into the killer and the others, as `skip` does, or with evidence of its own into halves."""
        half = len(row.items) // 2 if evidence else 1
        first, rest = row.items[:half], row.items[half:]
        parts = [self._part(first, None if evidence else death(item=first[0], item_index=0)), self._part(rest, None)]
        assert self.store.split(row, parts, evidence).written

    def _part(self, items: Sequence[str], told: Evidence | None) -> Part:
        status = Status.CRASHED if told else Status.PENDING
        return Part(tuple(items), len(items), "{}", str(uuid.uuid4()), status, told)

    def ended(self, name: str = "upload") -> uuid.UUID:
        """One completed, one crashed child; the callback done."""
        worker = self.worker()
        batch_id = self.batch(name)
        self.complete(self.run(batch_id, 0, worker))
        self.crash(self.run(batch_id, 1, worker))
        assert self.store.finish(batch_id) is not None
        self.complete(self.run(batch_id, 2, worker))
        return batch_id


def parse(at: int) -> NewChild:
    return NewChild("shop.parse", str(uuid.uuid4()), "{}", (f"PMC:{at}", f"DOI:{at}"), 2, queue="celery")


def death(by: Detector = Detector.MAIN, **more: Any) -> Evidence:
    told: dict[str, Any] = {
        "cause": Cause.SIGNAL, "signal": "SIGSEGV", "message": "killed", "hostname": "web-3", "worker": "w1@here",
        "pid": 771, "detected_by": by,
    }  # fmt: skip
    return Evidence(**{**told, **more})


@contextlib.contextmanager
def locked(store: Store) -> Iterator[None]:
    """Somebody holds all tables (PostgreSQL), but not so long that who waits for them would wait for ever."""
    engine = sa.create_engine(store.url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = '30s'")
        names = ", ".join(each.name for each in schema.metadata.sorted_tables)
        connection.exec_driver_sql(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")
        yield
    engine.dispose()


# -- running it -----------------------------------------------------------------------------------


def make_app(url: str | None, **conf: Any) -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    if url is not None:
        app.conf.batchtrack_database_url = url
    app.conf.update(conf)
    BatchTrack(app)
    return app


def invoke(app: Any, *args: object, code: int = 0) -> Result:
    context = CLIContext(app=app, no_color=True, workdir=None)
    result = CliRunner().invoke(batchtrack, [str(each) for each in args], obj=context)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    if code not in (0, 1, 124):
        assert not result.stdout and result.stderr.strip(), "errors are for standard error alone"
    return result


Run = Callable[..., Any]


def error(app: Any, *args: object, code: int) -> str:
    """What an error says: one line, and the same with --json."""
    first = invoke(app, *args, code=code).stderr
    assert invoke(app, *args, "--json", code=code).stderr == first
    assert first.count("\n") == 1 or code == 2
    assert "Traceback" not in first
    return first


@dataclass
class Shell:
    """`python -m celery -A … batchtrack …` in a folder with an application."""

    folder: Path
    env: dict[str, str]
    app: str = "cli_shop"

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", self.app, "batchtrack", *args]

    def start(self, *args: str, **more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = self.command(*args)
        return subprocess.Popen(command, cwd=self.folder, env={**self.env, **more}, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, *args: str, code: int = 0, **more: str) -> tuple[str, str]:
        process = self.start(*args, **more)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        return out, err

    def json(self, *args: str, code: int = 0) -> Any:
        return json.loads(self(*args, "--json", code=code)[0])


SHOP = """
import os
from celery import Celery
from celery_batchtrack import BatchTrack

app = Celery("cli_shop", broker="memory://")
app.conf.batchtrack_database_url = os.environ["CLI_DATABASE_URL"]
BatchTrack(app)
"""


def shell_in(folder: Path, url: str, source: str = SHOP) -> Shell:
    (folder / "cli_shop.py").write_text(source)
    path = [str(ROOT), str(folder)]
    if not any(each.name == "batchtrack" for each in importlib.metadata.entry_points(group="celery.commands")):
        path.append(str(_installed_in(folder / "plugins")))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    return Shell(folder, {**env, "PYTHONPATH": os.pathsep.join(path), "CLI_DATABASE_URL": url})


def _installed_in(folder: Path) -> Path:
    """The package's entry point, for an interpreter in which it is not installed."""
    info = folder / "celery_batchtrack-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: celery-batchtrack\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[celery.commands]\nbatchtrack=celery_batchtrack.surfaces.cli:batchtrack\n")
    return folder


def app_of(seeds: Seeds) -> Celery:
    return make_app(seeds.store.url.render_as_string(hide_password=False))
