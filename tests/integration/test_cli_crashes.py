"""The commands about crashes: which item, which frame, which group; stacks, quarantine, pauses."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_batchtrack import BatchTrack
from celery_batchtrack.store import schema
from celery_batchtrack.surfaces import crash_pages, pages
from celery_batchtrack.surfaces.render import Screen, size
from celery_batchtrack.vocabulary.aftermath import Killer
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict
from tests.integration.cli_kit import ESCAPES, HOSTILE, Run, Seeds, Shell, death, error, invoke, make_app

STACK = """Fatal Python error: Segmentation fault

Current thread 0x00007fb8a4462b80 (most recent call first):
  File "/srv/shop/annotate.py", line 88 in annotate_one
  File "/srv/shop/annotate.py", line 12 in annotate"""
FRAME = "annotate.py:88 in annotate_one"
KNOWN = {
    "item": "DOI:0", "item_index": 1, "items_done": 1, "note": "page 7", "stack": STACK, "python_frame": FRAME,
    "peak_memory": 412_000_000, "boot_id": "6f2e", "versions": {"python": "3.11.7", "app": "1.2"},
}  # fmt: skip


@pytest.fixture
def crashed(seeds: Seeds) -> uuid.UUID:
    """A batch whose child 0 died with its second item in hand."""
    batch_id = seeds.batch()
    seeds.crash(seeds.run(batch_id, 0, seeds.worker()), death(**KNOWN))
    return batch_id


# -- crashes --------------------------------------------------------------------------------------


def test_crashes_are_all_deaths_but_those_overturned(seeds: Seeds, text: Run, data: Run) -> None:
    worker, batch_id = seeds.worker(), seeds.batch(children=5)
    seeds.crash(seeds.run(batch_id, 0, worker), again=0.0)  # its child ran again, and completed
    seeds.complete(seeds.run(batch_id, 0, worker))
    unclaimed = seeds.child(ChildKey(batch_id, 1))
    decoding = Evidence(Cause.EXIT, phase="before_claim", exit_code=3, pid=9, detected_by=Detector.MAIN)
    seeds.store.crash_unclaimed(unclaimed, decoding, None)
    silent = seeds.run(batch_id, 2, worker)
    seeds.crash(silent, death(Detector.LEASE))
    seeds.complete(silent)  # it had not died
    seeds.fail(seeds.run(batch_id, 3, worker), "ValueError: not a crash")
    seeds.crash(seeds.run(batch_id, 4, worker))

    found = data("crashes")
    assert [(each["position"], each["outcome"]) for each in found] == [(0, "retried"), (1, "crashed"), (4, "crashed")]
    _, second, last = found
    wanted = {
        "batch_id": str(batch_id), "position": 4, "task": "shop.parse", "attempt": 1, "items": ["PMC:4", "DOI:4"],
        "cause": "signal", "signal": "SIGSEGV", "exit_code": None, "hostname": "web-3", "pid": 771,
        "detected_by": "main", "worker": "w1@here", "phase": "running", "message": "killed", "verdict": "observed",
    }  # fmt: skip
    assert {name: last[name] for name in wanted} == wanted
    assert last["task_id"] and last["died_at"].endswith("Z") and last["detected_at"] >= last["died_at"]
    assert (second["phase"], second["exit_code"], second["signal"]) == ("before_claim", 3, None)

    lines = text("crashes").splitlines()
    assert len(lines) == 4
    assert "SIGSEGV" in lines[1] and lines[1].endswith("retried") and "exit code 3" in lines[2]


def test_crashes_of_one_batch_lately(seeds: Seeds, data: Run) -> None:
    first, second = seeds.ended(), seeds.ended()
    assert [each["batch_id"] for each in data("crashes")] == [str(first), str(second)]
    assert [each["batch_id"] for each in data("crashes", "--batch", first)] == [str(first)]
    assert [each["batch_id"] for each in data("crashes", "--limit", 1)] == [str(second)]
    with seeds.store.write() as connection:
        long_ago = schema.incident.c.detected_at - sa.text("INTERVAL '2 days'")
        if seeds.store.sqlite:
            long_ago = sa.func.strftime("%Y-%m-%d %H:%M:%f000", schema.incident.c.detected_at, "-2 days")
        statement = sa.update(schema.incident).where(schema.incident.c.batch_id == first)
        connection.execute(statement.values(detected_at=long_ago))
    assert [each["batch_id"] for each in data("crashes", "--since", "24h")] == [str(second)]
    assert len(data("crashes", "--since", "7d")) == 2


def test_a_crash_names_the_item_in_hand_and_the_frame_and_keeps_its_stack_for_json(
    crashed: uuid.UUID, text: Run, data: Run
) -> None:
    (line,) = text("crashes").splitlines()[1:]
    assert " DOI:0 " in line and "PMC:0" not in line and FRAME in line
    assert "Current thread" not in text("crashes") + text("show", crashed)
    (found,) = data("crashes")
    assert {name: found[name] for name in KNOWN} == KNOWN
    (shown,) = data("show", crashed)["incidents"]
    assert shown["stack"] == STACK


def test_a_death_with_no_known_item_names_those_it_is_one_of(seeds: Seeds, text: Run) -> None:
    seeds.crash(seeds.run(seeds.batch(), 0, seeds.worker()))
    assert " PMC:0, DOI:0 " in text("crashes")


def kill(seeds: Seeds, batch_id: uuid.UUID, position: int, evidence: Evidence, killer: Killer | None = None) -> None:
    row = seeds.run(batch_id, position, seeds.worker())
    assert seeds.store.crash(row, evidence, Verdict.OBSERVED, None, killer).written


@pytest.fixture
def deaths(seeds: Seeds) -> tuple[uuid.UUID, uuid.UUID]:
    """Five deaths in two batches; PMC:13900 is in quarantine after the second of its three."""
    first, second = seeds.batch(children=3), seeds.batch(children=2)
    killer = Killer("PMC:13900", "a" * 32, "", 2)
    poison = death(item="PMC:13900", stack=STACK, python_frame=FRAME)
    kill(seeds, first, 0, poison, killer)
    kill(seeds, first, 1, poison, killer)
    kill(seeds, second, 0, poison, killer)
    kill(seeds, first, 2, death(item="PMC:7", hostname="web-4", signal="SIGABRT"))
    kill(seeds, second, 1, death(cause=Cause.EXIT, signal=None, exit_code=3, hostname="web-4", item=None))
    return first, second


def cells(page: str) -> list[list[str]]:
    """A table's cells; two spaces at least are between them."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in page.splitlines()]


def test_crashes_by_item_say_what_is_in_quarantine(deaths: object, text: Run, data: Run) -> None:
    header, worst, other = cells(text("crashes", "--group-by", "item"))
    assert header == ["ITEM", "TASK", "DEATHS", "BATCHES", "SIGNAL", "FRAME", "LAST", "STATE"]
    assert worst[:6] == ["PMC:13900", "shop.parse", "3", "2", "SIGSEGV", FRAME] and worst[-1] == "quarantined"
    assert other[:5] == ["PMC:7", "shop.parse", "1", "1", "SIGABRT"] and other[-1].endswith("ago")

    found = data("crashes", "--group-by", "item")
    wanted = {
        "by": "item", "key": "PMC:13900", "task": "shop.parse", "deaths": 3, "batches": 2, "items": 1,
        "cause": "signal", "signal": "SIGSEGV", "python_frame": FRAME, "item": "PMC:13900", "state": "quarantined",
    }  # fmt: skip
    assert {name: found[0][name] for name in wanted} == wanted
    assert found[0]["first_at"] <= found[0]["last_at"] and found[0]["last_at"].endswith("Z")
    assert found[1]["state"] is None


def test_crashes_by_fingerprint_are_one_line_for_one_root_cause(deaths: object, text: Run, data: Run) -> None:
    found = data("crashes", "--group-by", "fingerprint")
    assert [(each["deaths"], each["batches"], each["items"]) for each in found] == [(3, 2, 1), (1, 1, 0), (1, 1, 1)]
    assert len({each["key"] for each in found}) == 3
    header, first, *_ = cells(text("crashes", "--group-by", "fingerprint"))
    assert header == ["FINGERPRINT", "TASK", "DEATHS", "BATCHES", "ITEMS", "SIGNAL", "FRAME", "LAST"]
    assert first[:7] == [found[0]["key"], "shop.parse", "3", "2", "1", "SIGSEGV", FRAME]


def test_crashes_by_signal_and_host_count_all_deaths(deaths: object, text: Run, data: Run) -> None:
    def counted(by: str) -> dict[str, int]:
        return {each["key"]: each["deaths"] for each in data("crashes", "--group-by", by)}

    assert counted("signal") == {"SIGSEGV": 3, "SIGABRT": 1, "exit": 1}
    assert counted("host") == {"web-3": 3, "web-4": 2}
    assert "SIGNAL" in text("crashes", "--group-by", "signal")
    _, web3, web4 = cells(text("crashes", "--group-by", "host"))
    assert web3[:5] == ["web-3", "3", "2", "1", "SIGSEGV"]
    assert web4[:5] == ["web-4", "2", "2", "1", "exit code 3"], "of its newest death, not the last in the alphabet"


def test_groups_of_crashes_are_of_one_batch_lately_and_bounded(
    deaths: tuple[uuid.UUID, uuid.UUID], seeds: Seeds, text: Run, data: Run
) -> None:
    first, _ = deaths
    by_item = ("crashes", "--group-by", "item")
    assert [each["deaths"] for each in data(*by_item, "--batch", first)] == [2, 1]
    assert [each["key"] for each in data(*by_item, "--limit", 1)] == ["PMC:13900"]
    assert data(*by_item, "--since", "1h")[0]["deaths"] == 3
    assert data(*by_item, "--since", "0s") == []
    assert text(*by_item, "--batch", seeds.batch()) == "no crashes\n"
    invoke(None, "crashes", "--group-by", "moon", code=2)


# -- stack ----------------------------------------------------------------------------------------


def test_stack_prints_the_dossier_and_the_python_stack(crashed: uuid.UUID, text: Run, data: Run) -> None:
    page = text("stack", crashed, 0)
    head, _, printed = page.partition("\n\n")
    assert printed == STACK + "\n"
    for words in (
        f"#0 shop.parse   attempt 1   crashed   upload {crashed}", "signal SIGSEGV",
        "DOI:0   number 2 of 2 (index 1)   1 done before it", "page 7", "killed", FRAME, "peak 412 MB",
        "web-3 pid 771   worker w1@here   queue celery   boot 6f2e", "app 1.2   python 3.11.7", " by main ",
        "observed", "fingerprint ",
    ):  # fmt: skip
        assert words in head
    found = data("stack", crashed, 0)
    assert {name: found[name] for name in KNOWN} == KNOWN
    assert found["batch_id"] == str(crashed) and found["fingerprint"] in head


def test_stack_is_of_the_newest_incident_that_has_one_or_of_the_attempt_asked_for(
    seeds: Seeds, text: Run, data: Run
) -> None:
    worker, batch_id = seeds.worker(), seeds.batch()
    for line in (1, 2):
        seeds.crash(seeds.run(batch_id, 0, worker), death(stack=STACK.replace("line 88", f"line {line}")), again=0.0)
    seeds.crash(seeds.run(batch_id, 0, worker), death(signal="SIGKILL"))
    assert data("stack", batch_id, 0)["attempt"] == 2
    assert "line 2 in" in text("stack", batch_id, 0) and "attempt 1, 3: see --attempt" in text("stack", batch_id, 0)
    assert "line 1 in" in text("stack", batch_id, 0, "--attempt", 1)
    assert "no stack: SIGKILL leaves none" in text("stack", batch_id, 0, "--attempt", 3)


def test_the_stack_of_a_failure_is_its_traceback(seeds: Seeds, text: Run) -> None:
    batch_id = seeds.batch()
    row = seeds.run(batch_id, 0, seeds.worker())
    assert row.run_token is not None
    told = Evidence(Cause.EXCEPTION, exception="KeyError", message="KeyError('span')", traceback="Traceback …\n  at x")
    seeds.store.settle(row.key, row.run_token, Ending(Status.FAILED, None, Cause.EXCEPTION, told))
    page = text("stack", batch_id, 0)
    assert "exception   KeyError" in page and page.endswith("\n\nTraceback …\n  at x\n")


def test_an_incident_without_a_stack_says_why(seeds: Seeds, text: Run) -> None:
    worker, batch_id = seeds.worker(), seeds.batch(children=3)
    seeds.crash(seeds.run(batch_id, 0, worker))
    seeds.crash(seeds.run(batch_id, 1, worker), death(cause=Cause.OOM, signal="SIGKILL"))
    seeds.crash(seeds.run(batch_id, 2, worker), death(cause=Cause.EXIT, signal=None, exit_code=3))
    assert "batchtrack_faulthandler" in text("stack", batch_id, 0)
    assert "leaves none" in text("stack", batch_id, 1)
    assert "cause      exit code 3\n" in text("stack", batch_id, 2) and "no stack" in text("stack", batch_id, 2)
    assert "not known, one of 2: PMC:0, DOI:0" in text("stack", batch_id, 0)


def test_a_verdict_that_was_overturned_says_so(seeds: Seeds, text: Run) -> None:
    batch_id = seeds.batch()
    silent = seeds.run(batch_id, 0, seeds.worker())
    seeds.crash(silent, death(Detector.LEASE, cause=Cause.WORKER_LOST, signal=None))
    seeds.complete(silent)
    assert "overturned 20" in text("stack", batch_id, 0)


def test_stack_of_what_is_not_there_exits_with_66_and_says_where_to_look(
    app: Celery, seeds: Seeds, crashed: uuid.UUID
) -> None:
    assert f"has no child #7: see `batchtrack children {crashed}`" in error(app, "stack", crashed, 7, code=66)
    assert "#1 has no incident" in error(app, "stack", crashed, 1, code=66)
    assert "no incident of attempt 9, only of 1" in error(app, "stack", crashed, 0, "--attempt", 9, code=66)
    assert "no batch" in error(app, "stack", uuid.uuid4(), 0, code=66)
    split = seeds.batch(children=1)
    seeds.split(seeds.run(split, 0, seeds.worker()))
    assert "its items went to #1 (crashed), #2 (pending): look there" in error(app, "stack", split, 0, code=66)
    for position in ("x", "-1", "99999999999999999999"):
        invoke(app, "stack", crashed, position, code=2)


# -- show and children of what was split, or paused ------------------------------------------------


def test_show_and_children_tell_what_was_split(seeds: Seeds, text: Run, data: Run) -> None:
    worker, batch_id = seeds.worker(), seeds.batch()
    seeds.split(seeds.run(batch_id, 0, worker))
    page = text("show", batch_id)
    assert "3 = 1 crashed + 2 pending, 2 open (1 split)" in page
    assert "#2 PMC:0   SIGSEGV" in page and f"batchtrack repro {str(batch_id)[:13]} 2\n" in page
    assert data("show", batch_id)["split"] == 1 and "split" not in data("show", batch_id)["children"]

    seeds.split(seeds.run(batch_id, 1, worker), death(item="DOI:1", item_index=1))
    rows = data("children", batch_id)
    assert [(each["position"], each["status"], each["split_from"], each["origin"]) for each in rows] == [
        (0, "split", None, None), (1, "split", None, None), (2, "crashed", 0, 0), (3, "pending", 0, 0),
        (4, "pending", 1, 1), (5, "pending", 1, 1),
    ]  # fmt: skip
    assert [each["position"] for each in data("children", batch_id, "--status", "split")] == [0, 1]
    assert "part of 1" in text("children", batch_id)
    assert [each["outcome"] for each in data("crashes")] == ["crashed", "split"]
    assert data("show", batch_id)["split"] == data("list")[0]["total"] - 2 == 2


def test_show_proposes_what_to_do_only_after_a_crash(seeds: Seeds, shell: Shell, text: Run) -> None:
    failed, crashed = seeds.batch(), seeds.ended()
    seeds.fail(seeds.run(failed, 0, seeds.worker()), "ValueError")
    assert "next " not in text("show", failed)
    assert f"next       celery -A cli_shop batchtrack repro {str(crashed)[:13]} 1\n" in shell("show", str(crashed))[0]


def test_a_short_id_is_long_enough_to_name_one_batch(seeds: Seeds, text: Run) -> None:
    for at in range(2):
        batch_id = seeds.batch(id=uuid.UUID(f"019a3f7c-1111-7{at}00-8000-000000000000"))
    seeds.crash(seeds.run(batch_id, 0, seeds.worker()))
    assert "batchtrack repro 019a3f7c-1111-7100 0\n" in text("show", batch_id)


def test_pause_and_resume_once_each(seeds: Seeds, text: Run, data: Run) -> None:
    batch_id = seeds.batch()
    assert text("pause", batch_id) == f"paused upload {batch_id}: 0 running, 2 pending\n"
    assert "is paused already: by hand" in text("pause", batch_id)
    (told,) = data("pause", batch_id)
    assert told["id"] == str(batch_id) and told["paused"] is False and told["pause_reason"] == "by hand"

    page = text("show", batch_id)
    assert f"upload {batch_id}   paused" in page and "by hand   since 20" in page
    assert f"batchtrack resume {str(batch_id)[:13]}\n" in page
    assert " paused " in text("list") and data("list")[0]["status"] == "running"
    assert data("list")[0]["paused_at"].endswith("Z")

    assert data("resume", batch_id)[0]["resumed"] is True
    assert "is not paused" in text("resume", batch_id)
    assert "paused" not in text("show", batch_id)


def test_what_has_ended_is_neither_paused_nor_resumed(seeds: Seeds, text: Run) -> None:
    batch_id = seeds.ended()
    for command in ("pause", "resume"):
        assert text(command, batch_id) == f"upload {batch_id} had ended already: partial\n"
    paused = seeds.batch()
    text("pause", paused)
    text("cancel", paused)
    assert "paused" not in text("show", paused) + text("list")


def test_a_paused_batch_is_not_said_to_end_soon(seeds: Seeds, text: Run) -> None:
    batch_id = seeds.batch()
    seeds.complete(seeds.run(batch_id, 0, seeds.worker()))
    assert " left" in text("show", batch_id)
    text("pause", batch_id)
    assert " left" not in text("show", batch_id)


def test_pause_is_not_logged_beside_its_own_words(seeds: Seeds, shell: Shell) -> None:
    batch_id = str(seeds.batch())
    assert shell("pause", batch_id) == (f"paused upload {batch_id}: 0 running, 2 pending\n", "")
    assert shell("resume", batch_id)[1] == ""


# -- quarantine -----------------------------------------------------------------------------------


@pytest.fixture
def quarantined(seeds: Seeds) -> Iterator[None]:
    batch_id = seeds.batch(children=4)
    for position, killer in enumerate((
        Killer("PMC:1", "1" * 32, "", 1), Killer("PMC:2", "2" * 32, "", 1), Killer("PMC:3", "3" * 32, "", 9),
        Killer("PMC:4", "4" * 32, "0.9", 1),
    )):  # fmt: skip
        kill(seeds, batch_id, position, death(item=killer.item, python_frame=FRAME), killer)
    yield


@pytest.mark.usefixtures("quarantined")
def test_quarantine_is_listed_with_what_put_an_item_there(seeds: Seeds, text: Run, data: Run) -> None:
    states = {each["item"]: each["state"] for each in data("quarantine", "list")}
    assert states == {"PMC:1": "quarantined", "PMC:2": "quarantined", "PMC:4": "another version"}
    assert data("quarantine", "list", "--task", "shop.other") == []
    everything = {each["item"]: each for each in data("quarantine", "list", "--all")}
    assert everything["PMC:3"]["state"] == "counted" and everything["PMC:3"]["quarantine_after"] == 9
    wanted = {"task": "shop.parse", "deaths": 1, "cause": "signal", "signal": "SIGSEGV", "python_frame": FRAME}
    assert {name: everything["PMC:1"][name] for name in wanted} == wanted
    header, *_, oldest = cells(text("quarantine", "list"))
    assert header[:4] == ["ITEM", "TASK", "VERSION", "DEATHS"]
    assert oldest[:2] == ["PMC:1", "shop.parse"] and oldest[-1] == "quarantined"


@pytest.mark.usefixtures("quarantined")
def test_items_are_released_by_name_or_all_of_a_task(app: Celery, text: Run, data: Run) -> None:
    def listed() -> set[str]:
        return {each["item"] for each in data("quarantine", "list")}

    assert text("quarantine", "release", "PMC:1") == "released PMC:1 of shop.parse\n"
    assert listed() == {"PMC:2", "PMC:4"}
    assert "not in quarantine: PMC:1" in error(app, "quarantine", "release", "PMC:1", code=66)
    assert "of shop.other: PMC:2" in error(app, "quarantine", "release", "PMC:2", "--task", "shop.other", code=66)
    (told,) = data("quarantine", "release", "PMC:2", "PMC:9")
    assert (told["item"], told["state"], told["deaths"]) == ("PMC:2", "released", 0)
    assert text("quarantine", "release", "--all", "--task", "shop.parse") == (
        "released PMC:4 of shop.parse (version 0.9)\n"
    )
    assert text("quarantine", "release", "--all") == text("quarantine", "list") == "nothing in quarantine\n"
    assert data("quarantine", "release", "--all") == []


def test_release_says_what_was_not_there_beside_what_was(app: Celery, seeds: Seeds) -> None:
    kill(seeds, seeds.batch(), 0, death(), Killer("PMC:1", "1" * 32, "", 1))
    result = invoke(app, "quarantine", "release", "PMC:1", "PMC:9")
    assert result.stdout == "released PMC:1 of shop.parse\n" and result.stderr == "not in quarantine: PMC:9\n"


@pytest.mark.usefixtures("quarantined")
def test_release_without_saying_what_releases_nothing(app: Celery, data: Run) -> None:
    for args in ((), ("--task", "shop.parse"), ("PMC:1", "--all")):
        assert "--all" in invoke(app, "quarantine", "release", *args, code=2).stderr
    assert len(data("quarantine", "list")) == 3


# -- what users named -----------------------------------------------------------------------------


def test_hostile_evidence_reaches_a_terminal_as_plain_bounded_text(app: Celery, seeds: Seeds) -> None:
    nasty = HOSTILE.replace("\0", "")
    batch_id = seeds.batch(nasty)
    told = death(
        item=nasty * 5, note=nasty * 9, python_frame=nasty, hostname=nasty, message="x" * 10_000 + nasty,
        stack=f"{nasty}\n  File {nasty}", worker=nasty, versions={nasty: nasty},
    )  # fmt: skip
    kill(seeds, batch_id, 0, told, Killer(nasty, "1" * 32, nasty, 1))
    seeds.store.pause(batch_id, nasty)
    for args in (
        ("crashes",), *(("crashes", "--group-by", by) for by in ("item", "fingerprint", "signal", "host")),
        ("show", batch_id), ("stack", batch_id, 0), ("quarantine", "list"), ("pause", batch_id),
        ("quarantine", "release", "x", nasty),
    ):  # fmt: skip
        raw = invoke(app, *args, "--json").stdout if args[1:2] != ("release",) else ""
        assert raw.isascii() and not set(ESCAPES) & set(raw)
        result = invoke(app, *args)
        for line in (result.stdout + result.stderr).splitlines():
            assert not set(ESCAPES) & set(line) and all(char.isprintable() for char in line)
            assert len(line) < 3000
    assert not set(ESCAPES) & set(error(app, "quarantine", "release", nasty, code=66))


def test_pages_about_crashes_can_be_ascii() -> None:
    names = ("signal", "exit_code", "note", "message", "peak_memory", "python_frame", "hostname", "pid", "worker")
    one = {
        **dict.fromkeys(names), "boot_id": None, "queue": None, "versions": None, "fingerprint": None,
        "position": 0, "task": "日本", "attempt": 1, "outcome": "crashed", "cause": "oom", "exception": None,
        "phase": "before_claim", "overturned_at": None, "item": "ä", "item_index": None, "items_done": None,
        "items": [], "died_at": None, "detected_at": None, "detected_by": None, "verdict": None,
    }  # fmt: skip
    lines = list(crash_pages.dossier(Screen("ascii", None, False), one, "upload"))
    assert all(line.isascii() for line in lines) and "before it was claimed" in lines[1]
    assert [size(count) for count in (12, 1200, 41_300_000, 3_240_000_000)] == ["12 B", "1.2 kB", "41 MB", "3.2 GB"]
    assert pages.short("x" * 500) == "x" * 79 + "…"


def test_commands_about_crashes_as_processes(seeds: Seeds, crashed: uuid.UUID, shell: Shell) -> None:
    assert shell.json("stack", str(crashed), "0")["item"] == "DOI:0"
    assert shell.json("quarantine", "release", "--all") == []


def test_a_read_only_database_lists_quarantine_and_refuses_to_release(seeds: Seeds) -> None:
    kill(seeds, seeds.batch(), 0, death(), Killer("PMC:1", "1" * 32, "", 1))
    url = seeds.store.url
    if seeds.store.sqlite:
        url = url.set(database=f"file:{url.database}").update_query_dict({"mode": "ro", "uri": "true"})
    else:
        url = url.update_query_dict({"options": "-c default_transaction_read_only=on"})
    app = make_app(url.render_as_string(hide_password=False))
    assert json.loads(invoke(app, "quarantine", "list", "--json").stdout)
    for command in (("quarantine", "release", "--all"), ("pause", str(seeds.batch()))):
        assert "read-only" in error(app, *command, code=69)
    BatchTrack.of(app).reset()
