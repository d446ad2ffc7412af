"""`batchtrack repro`: the death happens again outside Celery, from the row alone."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_batchtrack import Batch, BatchTrack
from celery_batchtrack.behaviour import recovery
from celery_batchtrack.glue import codec
from celery_batchtrack.surfaces import repro
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token
from celery_batchtrack.vocabulary.records import Ending, NewChild
from celery_batchtrack.vocabulary.states import Cause, Status, Verdict
from tests.integration.cli_kit import ESCAPES, HOSTILE, Seeds, death, error, invoke, shell_in

SOURCE = """
import ctypes, faulthandler, os, signal
from datetime import datetime
from celery import Celery
from pydantic import BaseModel
from celery_batchtrack import BatchTrack, current_batch, each_item, note, tracked

faulthandler.disable()
app = Celery("cli_shop", broker=os.environ.get("CLI_BROKER_URL", "memory://"), set_as_current=False)
app.conf.batchtrack_database_url = os.environ["CLI_DATABASE_URL"]
BatchTrack(app)


def annotate_one(doc):
    note(doc["id"])
    if doc.get("does") == "SIGSEGV":
        ctypes.string_at(0)
    if doc.get("does") == "exit":
        os._exit(7)
    if doc.get("does") == "quit":
        os.kill(os.getpid(), signal.SIGQUIT)
    if doc.get("does") == "raise":
        raise ValueError("no span")


@app.task(shared=False)
@tracked(items="docs", item_id="id", on_crash="record")
def annotate(docs, lang="en"):
    assert current_batch() is None
    for doc in each_item(docs):
        annotate_one(doc)
    return lang, len(docs)


@app.task(shared=False)
@tracked(items="docs", item_id="id", on_crash="skip", merge="concat")
def skipping(docs):
    for doc in each_item(docs):
        annotate_one(doc)


@app.task(bind=True, shared=False, autoretry_for=(ValueError,), max_retries=3)
@tracked(items="docs", item_id="id")
def bound(self, docs, *, when):
    assert isinstance(when, datetime) and self.name.endswith("bound")
    annotate(docs)


class Classy(app.Task):
    name = "cli_shop.Classy"

    @tracked(items="docs", item_id="id")
    def run(self, docs):
        annotate(docs)


app.register_task(Classy())


class Options(BaseModel):
    lang: str


@app.task(pydantic=True, shared=False)
@tracked(items="docs", item_id="id")
def modelled(docs: list, options: Options):
    return annotate(docs, options.lang)


@app.task(shared=False)
@tracked(items=lambda docs: [doc["id"] for doc in docs["all"]])
def nested(docs):
    annotate(docs["all"])


@app.task(shared=False)
def plain(text):
    print("got", text)


@app.task(shared=False)
def merged(results, more):
    assert (results, more) == ([["en", 1]], "x"), (results, more)
    ctypes.string_at(0)
"""


def docs(*does: str | None) -> list[dict[str, Any]]:
    return [{"id": f"PMC:{at}", "does": each} for at, each in enumerate(does)]


@pytest.fixture
def app(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """The application of `SOURCE`, imported, with a folder for what is written."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "cli_shop.py").write_text(SOURCE)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("CLI_DATABASE_URL", sqlite_url)
    monkeypatch.syspath_prepend(tmp_path / "shop")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delitem(sys.modules, "cli_shop", raising=False)
    found: Celery = importlib.import_module("cli_shop").app
    yield found
    BatchTrack.of(found).reset()
    monkeypatch.delitem(sys.modules, "cli_shop", raising=False)


def child(task: str, items: list[dict[str, Any]], **kwargs: Any) -> NewChild:
    call = codec.dumps({"args": [items], "kwargs": kwargs})
    names = tuple(each["id"] for each in items)
    return NewChild(f"cli_shop.{task}", str(uuid.uuid4()), call, names, len(items), queue="celery")


def died(seeds: Seeds, new: NewChild, told: Evidence | None = None, **more: Any) -> uuid.UUID:
    """A batch of this child alone, which died; by default with its second item in hand."""
    batch_id = seeds.batch(children=[new])
    known = {"item": "PMC:1", "item_index": 1} if len(new.items) > 1 else {"item": new.items[0]}
    seeds.crash(seeds.run(batch_id, 0, seeds.worker()), told or death(**{**known, **more}))
    return batch_id


def made(app: Celery, batch_id: uuid.UUID, *args: object, position: int = 0) -> dict[str, Any]:
    (found,) = json.loads(invoke(app, "repro", batch_id, position, "--json", *args).stdout)
    assert isinstance(found, dict)
    return found


def arguments(found: dict[str, Any]) -> Any:
    return json.loads(Path(found["arguments"]).read_text())


def run(found: dict[str, Any], cwd: Path = Path("/"), **env: str) -> subprocess.CompletedProcess[str]:
    """The script as somebody runs it: from anywhere, without what this test has put on the import path."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONFAULTHANDLER")}
    return subprocess.run(
        found["command"], cwd=cwd, env={**clean, **env}, shell=True, executable="/bin/sh", capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


# -- the death ------------------------------------------------------------------------------------


def test_a_segfault_happens_again_outside_celery_from_the_row_alone(app: Celery, seeds: Seeds, tmp_path: Path) -> None:
    batch_id = died(seeds, child("annotate", docs(None, "SIGSEGV", None), lang="de"))
    page = invoke(app, "repro", batch_id, 0).stdout
    folder = tmp_path / "here" / f"repro-{str(batch_id)[:13]}-0"
    assert "only item PMC:1, which was in hand: number 2 of 3" in page
    assert json.loads((folder / "arguments.json").read_text()) == {
        "args": [[{"id": "PMC:1", "does": "SIGSEGV"}]], "kwargs": {"lang": "de"}
    }  # fmt: skip

    # Neither the database nor the broker can be reached: nothing but the folder is left of the batch.
    lost = {"CLI_DATABASE_URL": "postgresql://127.0.0.1:9/x", "CLI_BROKER_URL": "amqp://127.0.0.1:9//"}
    (command,) = (line.split("  ")[-1].strip() for line in page.splitlines() if line.startswith("run "))
    assert command == f"{sys.executable} {folder.name}/repro.py"
    done = run({"command": f"exec {sys.executable} {folder}/repro.py"}, **lost)
    assert done.returncode == -signal.SIGSEGV
    assert "cli_shop.annotate in process" in done.stdout and "'PMC:1'" in done.stdout
    assert "attempt 1: SIGSEGV on web-3" in done.stdout
    assert "Fatal Python error: Segmentation fault" in done.stderr and "in annotate_one" in done.stderr
    assert run({"command": f"{sys.executable} {folder}/repro.py"}, **lost).returncode == 128 + signal.SIGSEGV


def test_run_says_how_it_ended_and_whether_that_is_how_the_child_died(app: Celery, seeds: Seeds) -> None:
    same = died(seeds, child("annotate", docs(None, "SIGSEGV")))
    assert invoke(app, "repro", same, 0, "--run").stdout.endswith("\nit died of SIGSEGV, as it did in the batch\n")
    other = died(seeds, child("annotate", docs(None, "exit")))
    assert "it ended with exit code 7; in the batch: SIGSEGV\n" in invoke(app, "repro", other, 0, "--run").stdout
    healthy = died(seeds, child("annotate", docs(None, None)), cause=Cause.WORKER_LOST, signal=None)
    assert "it did not die; in the batch: worker lost\n" in invoke(app, "repro", healthy, 0, "--run").stdout


def test_run_with_json_keeps_standard_output_for_json(app: Celery, seeds: Seeds, capfd: Any) -> None:
    found = made(app, died(seeds, child("annotate", docs(None, "SIGSEGV"))), "--run")
    assert (found["returncode"], found["ended"]) == (-11, "died of SIGSEGV")
    assert (found["item"], found["item_index"], found["task"]) == ("PMC:1", 1, "cli_shop.annotate")
    assert Path(found["script"]).is_absolute() and Path(found["folder"]).name == f"repro-{found['batch_id'][:13]}-0"
    out, err = capfd.readouterr()
    assert not out and "in process" in err


@pytest.mark.parametrize("task", ["bound", "Classy", "modelled"])
def test_bound_class_based_and_pydantic_tasks_get_what_a_worker_gives_them(
    app: Celery, seeds: Seeds, task: str
) -> None:
    more = {"bound": {"when": datetime(2026, 1, 1, tzinfo=UTC)}, "modelled": {"options": {"lang": "de"}}}
    found = made(app, died(seeds, child(task, docs(None, "SIGSEGV", None), **more.get(task, {}))))
    assert arguments(found)["args"] == [docs(None, "SIGSEGV")[1:]]
    done = run(found)
    assert done.returncode == 139, done.stderr
    assert "in annotate_one" in done.stderr, "also where the application switches faulthandler off"


def test_other_ends_than_a_signal_are_the_script_s_own_too(app: Celery, seeds: Seeds) -> None:
    failing = run(made(app, died(seeds, child("annotate", docs("raise")))))
    assert failing.returncode == 1 and "ValueError: no span" in failing.stderr
    retrying = run(made(app, died(seeds, child("Classy", docs("exit")))))
    assert retrying.returncode == 7
    well = run(made(app, died(seeds, child("annotate", docs(None)))))
    assert well.returncode == 0 and "it did not die, and returned ('en', 1)" in well.stdout
    quit_ = run(made(app, died(seeds, child("annotate", docs("quit")))))
    assert quit_.returncode == 128 + signal.SIGQUIT and "in annotate_one" in quit_.stderr


def test_arguments_may_be_reduced_by_hand(app: Celery, seeds: Seeds) -> None:
    found = made(app, died(seeds, child("annotate", docs(None, "SIGSEGV"))))
    Path(found["arguments"]).write_text(json.dumps({"args": [[{"id": "other"}]], "kwargs": {}}))
    assert run(found).returncode == 0
    assert run(found, PYTHONIOENCODING="ascii", CLI_DATABASE_URL="sqlite://").returncode == 0


# -- which arguments ------------------------------------------------------------------------------


def test_the_row_s_own_policy_says_where_the_items_are(app: Celery, seeds: Seeds) -> None:
    batch_id = seeds.batch(children=[child("plain", docs(None, "SIGSEGV"))])
    key = ChildKey(batch_id, 0)
    policy = {"on_crash": "skip", "max_crashes": 3, "items": ["args", 0]}
    seeds.store.claim(key, 0, new_token(), seeds.worker(), "1:1:1:0", policy)
    seeds.crash(seeds.child(key), death(item="PMC:1", item_index=1))
    assert arguments(made(app, batch_id))["args"] == [docs(None, "SIGSEGV")[1:]]


def test_all_items_if_wanted_or_if_the_one_in_hand_is_not_known(app: Celery, seeds: Seeds) -> None:
    new = child("annotate", docs(None, "SIGSEGV"))
    wanted = made(app, died(seeds, new), "--all-items")
    assert wanted["what"] == "all 2 items" and len(arguments(wanted)["args"][0]) == 2
    unknown = made(app, died(seeds, child("annotate", docs(None, None)), item=None, item_index=None))
    assert unknown["what"] == "all 2 items, for the item in hand is not known" and unknown["item"] is None
    assert arguments(unknown)["args"] == [docs(None, None)]
    uncut = seeds.batch(children=[NewChild(
        "cli_shop.nested", str(uuid.uuid4()), codec.dumps({"args": [{"all": docs(None, "SIGSEGV")}]}),
        ("PMC:0", "PMC:1"), 2, queue="celery",
    )])  # fmt: skip
    seeds.crash(seeds.run(uncut, 0, seeds.worker()), death(item="PMC:1", item_index=1))
    found = made(app, uncut)
    assert found["what"] == "all 2 items, for they are no list that can be cut (item in hand: PMC:1)"
    assert arguments(found)["args"] == [{"all": docs(None, "SIGSEGV")}]


def test_the_newest_death_that_knows_its_item_is_taken(app: Celery, seeds: Seeds) -> None:
    worker, batch_id = seeds.worker(), seeds.batch(children=[child("annotate", docs(None, None, None))])
    for index in (0, 2):
        seeds.crash(seeds.run(batch_id, 0, worker), death(item=f"PMC:{index}", item_index=index), again=0.0)
    seeds.crash(seeds.run(batch_id, 0, worker), death(cause=Cause.WORKER_LOST, signal=None))
    assert made(app, batch_id)["item_index"] == 2


def test_a_failure_and_a_child_that_still_waits_can_be_run_too(app: Celery, seeds: Seeds) -> None:
    batch_id = seeds.batch(children=[child("annotate", docs(None, "raise")), child("annotate", docs(None, None))])
    row = seeds.run(batch_id, 0, seeds.worker())
    assert row.run_token is not None
    told = Evidence(Cause.EXCEPTION, exception="ValueError", item="PMC:1", item_index=1)
    seeds.store.settle(row.key, row.run_token, Ending(Status.FAILED, None, Cause.EXCEPTION, told))
    assert "it ended with exit code 1; in the batch: ValueError\n" in invoke(app, "repro", batch_id, 0, "--run").stdout
    assert "not known" in made(app, batch_id, position=1)["what"]


def test_a_part_of_a_split_child_is_run_and_the_split_one_names_its_parts(app: Celery) -> None:
    from cli_shop import skipping  # type: ignore[import-not-found]

    batch = Batch.create("upload", [skipping.s(docs(None, "SIGSEGV", None))], app=app)
    seeds, extension = Seeds(BatchTrack.of(app).store), BatchTrack.of(app)
    key = ChildKey(batch.id, 0)
    row = seeds.child(key)
    policy = extension.tracker.policy_of(row, extension.store.batch(batch.id))  # type: ignore[arg-type]
    assert policy is not None
    seeds.store.claim(key, row.attempt, new_token(), seeds.worker(), "1:1:1:0", policy.as_option())
    assert recovery.run_died(
        extension.tracker, seeds.child(key), death(item="PMC:1", item_index=1), Verdict.OBSERVED
    )  # fmt: skip
    said = error(app, "repro", batch.id, 0, code=66)
    assert "#0 was split, its items went to #1 (crashed), #2 (pending): name one of those" in said
    found = made(app, batch.id, position=1)
    assert arguments(found)["args"] == [docs(None, "SIGSEGV")[1:]] and found["what"] == "its only item: PMC:1"


def test_time_outs_and_memory_are_warned_of(app: Celery, seeds: Seeds) -> None:
    oom = died(seeds, child("annotate", docs(None)), cause=Cause.OOM, signal="SIGKILL", peak_memory=3_200_000_000)
    assert made(app, oom)["caution"] == "it died of memory (it had 3.2 GB): run it where that harms nobody"
    hung = died(seeds, child("annotate", docs(None)), cause=Cause.STALLED)
    assert "mind       it was ended by a time-out" in invoke(app, "repro", hung, 0).stdout


# -- callbacks ------------------------------------------------------------------------------------


def test_a_callback_gets_what_its_batch_gives_it(app: Celery, seeds: Seeds) -> None:
    from cli_shop import annotate, merged

    batch = Batch.create("upload", [annotate.s(docs(None))], on_success=merged.s("x"), app=app)
    row = seeds.run(batch.id, 0, seeds.worker())
    assert row.run_token is not None
    seeds.store.settle(row.key, row.run_token, Ending(Status.COMPLETED, '["en", 1]'))
    seeds.store.finish(batch.id)
    seeds.crash(seeds.run(batch.id, 1, seeds.worker()), death())
    found = made(app, batch.id, position=1)
    assert arguments(found) == {"args": [[["en", 1]], "x"], "kwargs": {}}
    assert run(found).returncode == 139

    said = error(app, "repro", batch.id, 0, code=66)
    assert "#0 completed, and its arguments went with that" in said


def test_an_errback_is_refused_since_no_file_holds_an_exception(app: Celery, seeds: Seeds) -> None:
    entry = {"task": "cli_shop.plain", "task_id": "1", "signature": "{}", "errback": "body"}
    batch_id = seeds.batch(children=[child("annotate", docs(None))], callbacks={"on_failure": [entry]}, tolerance=0)
    seeds.crash(seeds.run(batch_id, 0, seeds.worker()))
    seeds.store.finish(batch_id)
    assert "errback" in error(app, "repro", batch_id, 1, code=66)


# -- what is wrong ----------------------------------------------------------------------------------


def test_errors_say_what_to_do(app: Celery, seeds: Seeds) -> None:
    batch_id = died(seeds, child("annotate", docs(None)))
    assert "has no child #7" in error(app, "repro", batch_id, 7, code=66)
    unknown = died(seeds, child("renamed", docs(None)))
    assert "cli_shop.renamed is no task of cli_shop:app" in error(app, "repro", unknown, 0, code=78)
    assert not list(Path().iterdir())


def test_an_application_that_has_no_name_cannot_be_imported_by_a_script(
    app: Celery, seeds: Seeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = died(seeds, child("annotate", docs(None)))
    monkeypatch.delitem(sys.modules, "cli_shop")
    assert "celery -A <app>" in invoke(app, "repro", batch_id, 0, code=2).stderr


def test_nobody_s_own_files_are_overwritten(app: Celery, seeds: Seeds) -> None:
    batch_id = died(seeds, child("annotate", docs(None, "SIGSEGV")))
    found = made(app, batch_id, "--output", "deep/er")
    assert made(app, batch_id, "--output", "deep/er", "--all-items")["folder"] == found["folder"]
    assert len(arguments(found)["args"][0]) == 2, "what this command has written it writes again"
    assert Path(found["folder"]).stat().st_mode & 0o077 == 0
    for name in ("repro.py", "arguments.json"):
        Path(name).write_text("mine")
        assert name in invoke(app, "repro", batch_id, 0, "--output", ".", code=2).stderr
        assert Path(name).read_text() == "mine"
        Path(name).unlink()
    assert "--output names another folder" in invoke(app, "repro", batch_id, 0, "--output", "/proc/no", code=2).stderr


def test_hostile_names_break_neither_script_nor_terminal(app: Celery, seeds: Seeds) -> None:
    nasty = HOSTILE.replace("\0", "") + "\"\"\"'''\\{}<VALUES>日本"
    items = [{"id": nasty, "does": None}, {"id": "b", "does": "SIGSEGV"}]
    told = death(item=nasty, item_index=0, hostname=nasty, python_frame=nasty)
    page = invoke(app, "repro", died(seeds, child("annotate", items), told), 0, "--output", "x").stdout
    assert not set(ESCAPES) & set(page)
    done = run({"command": f"{sys.executable} x/repro.py"}, Path.cwd(), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and not set(ESCAPES) & set(done.stdout + done.stderr), done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "did not die"), (3, "ended with exit code 3"), (-11, "died of SIGSEGV"), (-99, "died of signal 99")],
)
def test_ends_in_words(code: int, words: str) -> None:
    assert repro.how_it_ended(code) == words


# -- as a user ------------------------------------------------------------------------------------

WHOLE = (
    SOURCE
    + """
if __name__ == "__main__":
    from celery_batchtrack import Batch, LocalCluster
    from cli_shop import app, skipping

    documents = [{"id": f"PMC:{at}"} for at in range(8)]
    documents[5]["does"] = "SIGSEGV"
    with LocalCluster(app, processes=1, logfile="workers.log"):
        batch = Batch.create("upload", [skipping.s(documents)], tolerance="100%", app=app)
        assert batch.wait(timeout=60) == "partial", batch.report()
"""
)


def test_from_a_worker_s_death_to_the_same_death_by_hand(sqlite_url: str, tmp_path: Path) -> None:
    shell = shell_in(tmp_path, sqlite_url, WHOLE)
    shell.env["CLI_BROKER_URL"] = f"batchtrack+filesystem://{tmp_path}/broker"
    subprocess.run([sys.executable, "cli_shop.py"], cwd=tmp_path, env=shell.env, check=True, timeout=120)

    (batch,) = shell.json("list")
    assert (batch["items_completed"], batch["items_crashed"]) == (7, 1)
    page, _ = shell("show", batch["id"])
    assert "(1 split)" in page and "PMC:5   SIGSEGV   cli_shop.py:" in page and "in annotate_one" in page
    (group,) = shell.json("crashes", "--group-by", "item")
    assert (group["key"], group["deaths"], group["signal"]) == ("PMC:5", 1, "SIGSEGV")
    (proposed,) = (line.split()[1:] for line in page.splitlines() if line.startswith("next"))
    assert proposed[:5] == ["celery", "-A", "cli_shop", "batchtrack", "repro"]
    position = proposed[6]
    assert "in annotate_one" in shell("stack", proposed[5], position)[0]

    out, err = shell(*proposed[4:], "--run")
    assert out.endswith("it died of SIGSEGV, as it did in the batch\n")
    assert "Segmentation fault" in err and "in annotate_one" in err
    assert arguments({"arguments": next(tmp_path.glob("repro-*")) / "arguments.json"}) == {
        "args": [[{"id": "PMC:5", "does": "SIGSEGV"}]], "kwargs": {}
    }  # fmt: skip
