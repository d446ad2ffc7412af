"""Pages of batches, children and failures: what they hold, in which order, and how they go on."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa

from celery_batchtrack import errors
from celery_batchtrack.store import Store, browsing, charts, reading_at_most, schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.surfaces import jsonio, reading
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.settings import Settings
from celery_batchtrack.vocabulary.states import Cause, Detector, EndReason, Verdict
from tests.store.kit import Scene, documents, killed, part, some

DIED = Evidence(
    Cause.SIGNAL, signal="SIGSEGV", item="PMC:7", item_index=0, hostname="web-3", worker="w1@web-3", pid=7,
    python_frame="annotate.py:88 in annotate_one", stack='  File "annotate.py", line 88 in annotate_one',
    detected_by=Detector.MAIN,
)  # fmt: skip
NO_SPAN = Evidence(Cause.EXCEPTION, exception="ValueError", message="no span", traceback='  File "b.py", line 1, in g')


def ended(scene: Scene, how: str = "complete", *names: str, **more: object) -> uuid.UUID:
    batch_id = scene.batch([documents(*(names or ("a",)))], **more)
    claimed = scene.run(batch_id)
    {"complete": scene.complete, "fail": scene.fail, "crash": scene.crash}[how](claimed)
    scene.store.finish(batch_id)
    return batch_id


def listed(store: Store, **how: object) -> list[uuid.UUID]:
    return [each["batch_id"] for each in pages(store, **how)]


def pages(store: Store, **how: object) -> Iterator[reading.Object]:
    """All of a list, page by page."""
    after: str | None = None
    while True:
        page = reading.batch_list(store, after=after, **{"limit": 2, **how})  # type: ignore[arg-type]
        assert len(page["batches"]) <= 2
        yield from page["batches"]
        after = page["next"]
        if after is None:
            return


def ids(*batches: uuid.UUID) -> list[str]:
    return [str(each) for each in batches]


# -- batches ----------------------------------------------------------------------------------------


def test_chips_choose_and_pages_go_on_without_gap_or_repeat(scene: Scene) -> None:
    good, failed, crashed = ended(scene), ended(scene, "fail"), ended(scene, "crash")
    tolerated = ended(scene, "crash", tolerance=1)
    runs, paused = scene.batch(2), scene.batch(1)
    scene.store.pause(paused, "by hand")
    by_hand, late = scene.batch(1), scene.batch(1)
    scene.store.cancel(by_hand, EndReason.USER)
    scene.store.cancel(late, EndReason.DEADLINE)
    expected = {
        "all": [late, by_hand, paused, runs, tolerated, crashed, failed, good],
        "attention": [late, paused, runs, tolerated, crashed, failed],
        "running": [paused, runs], "crashed": [tolerated, crashed], "failed": [crashed, failed], "completed": [good],
    }  # fmt: skip
    assert set(expected) == set(reading.CHIPS)
    for chip, wanted in expected.items():
        assert listed(scene.store, chip=chip) == ids(*wanted), chip
    (row,) = [each for each in pages(scene.store, chip="running") if each["stuck"]]
    assert row["stuck"] == "paused" and row["short_id"] == str(paused)[:13]


@pytest.mark.parametrize("kind", ["name", "tag", "id", "beginning", "item", "one of several items", "dead", "task id"])
def test_a_batch_is_found_by_what_people_know_of_it(scene: Scene, kind: str) -> None:
    ended(scene, "complete", "other")
    batch_id = scene.batch([documents("PMC:7"), documents("PMC:8", 'quo"te')], tags=["nightly"])
    scene.set_batch(batch_id, name="100% [red]_invoices")
    scene.crash(scene.run(batch_id, 1), evidence=DIED)
    known = {
        "name": "% [RED]_inv", "tag": "nightly", "id": str(batch_id), "beginning": str(batch_id)[:18], "item": "PMC:7",
        "one of several items": 'quo"te', "dead": "PMC:7", "task id": scene.at(batch_id, 0).task_id,
    }  # fmt: skip
    assert listed(scene.store, chip="all", search=f"  {known[kind]} ") == ids(batch_id)
    assert listed(scene.store, chip="all", search=known[kind] + "!") == []


def test_how_far_an_item_was_looked_for_is_said(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    old = scene.batch([documents("a", "b")])
    scene.batch(some(5))
    found = reading.batch_list(scene.store, chip="all", search="b")
    assert [each["batch_id"] for each in found["batches"]] == ids(old) and found["searched"] is None
    monkeypatch.setattr(browsing, "SEARCHED", 5)
    found = reading.batch_list(scene.store, chip="all", search="b")
    assert found["batches"] == [] and "newest" in found["searched"]


def test_a_large_batch_hides_no_other_and_the_newest_of_many_are_found(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browsing, "SEARCHED", 3)
    monkeypatch.setattr(browsing, "HAVING", 2)
    waiting = scene.batch([documents("needle")])
    scene.batch(6)
    found = reading.batch_list(scene.store, chip="all", search="needle")
    assert [each["batch_id"] for each in found["batches"]] == ids(waiting) and found["searched"]
    many = [ended(scene, "complete", "NIGHTLY-1") for _ in range(4)]
    found = reading.batch_list(scene.store, chip="all", search="NIGHTLY-1")
    assert [each["batch_id"] for each in found["batches"]] == ids(*many[:-3:-1]) and found["searched"]


def test_odd_text_from_outside_finds_nothing(scene: Scene) -> None:
    batch_id = ended(scene)
    for odd in ("\0", "\ud800", "x" * 200_000, "\\"):
        assert reading.batch_list(scene.store, chip="all", search=odd)["batches"] == []
        for how in ("item", "worker", "fingerprint"):
            assert reading.child_list(scene.store, batch_id, **{how: odd})["children"] == []  # type: ignore[arg-type]
        assert reading.crashes(scene.store, task=odd, signal=odd, host=odd)["signatures"] == []
    assert reading.child_list(scene.store, batch_id, after=2**70)["children"] == []
    with pytest.raises(errors.InvalidOption):
        reading.batch_list(scene.store, after=f"0001-01-01T00:00:00+14:00~{batch_id}")


def test_what_is_no_page_and_no_chip_is_a_clear_error(store: Store) -> None:
    with pytest.raises(errors.InvalidOption, match="begin with the first"):
        reading.batch_list(store, after="2026-01-01'; DROP")
    with pytest.raises(errors.InvalidOption, match="there are attention, running"):
        reading.batch_list(store, chip="broken")
    assert reading.batch_list(store, search="nul \0 and 100 kB" + "x" * 100_000)["batches"] == []


# -- one batch --------------------------------------------------------------------------------------


def test_one_batch_in_full(scene: Scene) -> None:
    parent = scene.batch(1)
    batch_id = scene.batch([documents("PMC:7", "PMC:8"), *some(3)], parent_batch=parent, calls=("on_finish",))
    scene.crash(scene.run(batch_id, 0), evidence=DIED)
    scene.fail(scene.run(batch_id, 1), NO_SPAN)
    scene.fail(scene.run(batch_id, 2), NO_SPAN)
    scene.complete(scene.run(batch_id, 3))
    nested = scene.batch(1, parent_batch=batch_id)
    scene.store.finish(batch_id)
    page = reading.batch_page(scene.store, batch_id)
    assert page["batch"]["crashed"] == 1 and page["parent"]["batch_id"] == str(parent)
    assert [each["batch_id"] for each in page["nested"]] == ids(nested) and page["nested_complete"]
    assert [each["kind"] for each in page["callbacks"]] == ["on_finish"]
    bins = page["throughput"]["bins"]
    assert [sum(each[name] for each in bins) for name in ("completed", "failed", "crashed")] == [1, 2, 1]
    assert len(page["crash_times"]) == 1
    durations = page["durations"]
    assert durations["count"] == 4 and durations["sampled"] is None
    assert durations["p50"] <= durations["p99"] <= durations["max"]
    assert len(page["slowest"]) == 4
    signatures = {each["signal"] or each["exception"]: each for each in page["signatures"]}
    assert signatures["ValueError"]["occurrences"] == 2 and signatures["ValueError"]["stack"] == NO_SPAN.traceback
    assert signatures["SIGSEGV"]["last_item"] == "PMC:7" and signatures["SIGSEGV"]["stack"] == DIED.stack
    assert jsonio.dumps(page), "all of it is JSON"


def test_a_large_batch_is_counted_by_the_minute_and_sampled(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = scene.batch(6)
    scene.set_batch(batch_id, started_at=later(-7000.0))
    for position in range(6):
        claimed = scene.run(batch_id, position)
        scene.set_child(claimed.key, started_at=later(-float(position)))
        scene.complete(claimed)
    monkeypatch.setattr(charts, "EXACT", 3)
    monkeypatch.setattr(charts, "SAMPLE", 4)
    page = reading.batch_page(scene.store, batch_id)
    assert page["durations"]["sampled"] == 4 and page["durations"]["max"] > 4.9
    bins = page["throughput"]["bins"]
    assert page["throughput"]["bin_seconds"] == 60 and sum(each["completed"] for each in bins) == 6
    assert len(bins) >= 116 and bins[1]["time"] - bins[0]["time"] == timedelta(seconds=60)


def test_what_ended_before_the_seal_is_in_the_plot(scene: Scene) -> None:
    batch_id = scene.batch(3, seal=False, start_now=True)
    scene.set_batch(batch_id, created_at=later(-700.0))
    for position in range(3):
        claimed = scene.run(batch_id, position)
        scene.complete(claimed)
        scene.set_child(claimed.key, finished_at=later(-600.0 + 60 * position))
    scene.execute(sa.update(schema.outcome).values(time=later(-600.0)))
    for seal in (lambda: None, lambda: scene.store.seal(batch_id)):
        seal()
        bins = reading.batch_page(scene.store, batch_id)["throughput"]["bins"]
        assert sum(each["completed"] for each in bins) == 3 and len([each for each in bins if each["completed"]]) == 3


def test_unknown_ids_are_told_apart(scene: Scene) -> None:
    batch_id = scene.batch(1)
    with pytest.raises(errors.BatchNotFound):
        reading.batch_page(scene.store, uuid.uuid4())
    with pytest.raises(errors.ChildNotFound, match="no child #9"):
        reading.child_page(scene.store, batch_id, 9)
    with pytest.raises(errors.ChildNotFound):
        reading.child_page(scene.store, batch_id, 2**70)


# -- children ---------------------------------------------------------------------------------------


@pytest.fixture
def many(scene: Scene) -> uuid.UUID:
    """#0 crashed, #1 failed, #2 completed, #3 runs, #4 split into #6 (crashed) and #7, #5 waits."""
    batch_id = scene.batch(
        [documents("PMC:7"), documents("b"), documents("c"), documents("d"), documents("e", "f"), documents("g")]
    )
    scene.crash(scene.run(batch_id, 0), evidence=DIED)
    scene.fail(scene.run(batch_id, 1), NO_SPAN)
    scene.complete(scene.run(batch_id, 2))
    scene.run(batch_id, 3)
    scene.split(scene.run(batch_id, 4), killed("e", evidence=DIED), part("f"))
    return batch_id


@pytest.mark.parametrize(
    ("how", "positions"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]), ({"status": "crashed"}, [0, 6]), ({"status": "pending"}, [5, 7]),
        ({"status": "running"}, [3]), ({"status": "completed"}, [2]), ({"status": "split"}, [4]),
        ({"status": "cancelled"}, []), ({"item": "PMC:7"}, [0]), ({"item": "f"}, [4, 7]), ({"item": "nope"}, []),
        ({"worker": "w1@here"}, [0, 1, 2, 3, 4, 6]), ({"worker": "here", "status": "failed"}, [1]),
        ({"worker": "nobody"}, []),
    ],
)  # fmt: skip
def test_children_are_filtered_and_paged(
    scene: Scene, many: uuid.UUID, how: dict[str, str], positions: list[int]
) -> None:
    found: list[int] = []
    after: int | None = None
    while True:
        page = reading.child_list(scene.store, many, after=after, limit=2, **how)  # type: ignore[arg-type]
        found += [each["position"] for each in page["children"]]
        after = page["next"]
        if after is None:
            break
    assert found == positions


def test_children_by_signature_and_with_what_is_known_of_them(scene: Scene, many: uuid.UUID) -> None:
    (dead, part_of_it) = reading.child_list(scene.store, many, status="crashed")["children"]
    assert (dead["signal"], dead["item"], dead["worker"], dead["hostname"]) == ("SIGSEGV", "PMC:7", "w1@here", "here")
    assert dead["seconds"] is not None and dead["fingerprint"] == part_of_it["fingerprint"]
    alike = reading.child_list(scene.store, many, fingerprint=dead["fingerprint"])["children"]
    assert [each["position"] for each in alike] == [0, 6]
    with pytest.raises(errors.InvalidOption, match="no status 'dead'"):
        reading.child_list(scene.store, many, status="dead")


def test_looking_through_a_large_batch_stops_and_says_where(
    scene: Scene, many: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browsing, "SEARCHED", 3)
    first = reading.child_list(scene.store, many, item="f")
    assert (first["children"], first["next"]) == ([], 2) and "#2" in first["searched"]
    second = reading.child_list(scene.store, many, item="f", after=2)
    assert [each["position"] for each in second["children"]] == [4] and second["next"] == 5


def test_one_child_in_full(scene: Scene, many: uuid.UUID) -> None:
    other = scene.batch([documents("PMC:7")])
    scene.crash(scene.run(other), evidence=DIED, again=0.0)
    scene.crash(scene.run(other), evidence=DIED)
    page = reading.child_page(scene.store, other, 0)
    assert [each["attempt"] for each in page["attempts"]] == [2, 1], "newest first"
    assert page["attempts"][0]["stack"] == DIED.stack
    assert {(each["batch_id"], each["position"]) for each in page["same_signature"]} == {(many, 0), (many, 6)}
    assert page["repro"].endswith(f"repro {str(other)[:13]} 0") and page["batch"]["batch_id"] == str(other)
    split = reading.child_page(scene.store, many, 4)
    assert [each["position"] for each in split["parts"]] == [6, 7]
    assert jsonio.dumps([page, split])


# -- failures, workers, health ----------------------------------------------------------------------


def test_failures_by_root_cause_in_windows(scene: Scene, many: uuid.UUID) -> None:
    again = scene.batch([documents("PMC:7")])
    scene.crash(scene.run(again), evidence=DIED)
    found = reading.crashes(scene.store)
    signatures = {each["signal"] or each["exception"]: each for each in found["signatures"]}
    segfault = signatures["SIGSEGV"]
    assert segfault["counts"] == {"1h": 3, "3h": 3, "24h": 3, "7d": 3} and segfault["batches"] == 2
    assert segfault["last_batch_id"] == again and segfault["stack"] == DIED.stack
    (item,) = [each for each in found["repeat_items"] if each["item"] == "PMC:7"]
    assert (item["deaths"], item["batches"], item["last_batch_id"], item["state"]) == (3, 2, again, None)
    assert (found["tasks"], found["signals"], found["hosts"]) == (["demo.task"], ["SIGSEGV", "exception"], ["web-3"])
    narrowed = reading.crashes(scene.store, signal="SIGSEGV", host="web-3", task="demo.task")
    assert [each["signal"] for each in narrowed["signatures"]] == ["SIGSEGV"]
    assert reading.crashes(scene.store, host="elsewhere")["signatures"] == []
    assert jsonio.dumps(found)


def test_workers_have_what_they_run(scene: Scene, many: uuid.UUID) -> None:
    gone = scene.worker(name="gone")
    scene.store.lose(gone, Detector.HOST)
    long_gone = scene.worker(name="long gone")
    scene.set_worker(long_gone, stopped_at=later(-3 * 86_400.0))
    found = {each["name"]: each for each in reading.workers(scene.store)["workers"]}
    assert set(found) == {"w1@here", "gone"}
    assert [each["position"] for each in found["w1@here"]["children"]] == [3]
    assert found["gone"]["state"] == "lost"


def test_health_says_what_is_wrong(scene: Scene, many: uuid.UUID) -> None:
    settings = Settings.validated({})
    before = reading.health(scene.store, settings)
    assert not before["ok"] and before["sweep_age_seconds"] is None, "children wait, and nobody has ever swept"
    scene.store.begin_sweep("test", 15.0)
    well = reading.health(scene.store, settings)
    assert well["ok"] and well["open_batches"] == 1 and well["workers"]["alive"] == 1 and well["schema"] == "current"
    scene.store.pause(many, "by hand")
    assert not reading.health(scene.store, settings)["ok"]
    assert [each["violations"] for each in reading.invariants(scene.store) if each["violations"]] == []
    assert jsonio.dumps(well)


def test_failures_that_were_overturned_are_no_failures(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.crash(claimed, Verdict.LEASE)
    assert len(reading.crashes(scene.store)["signatures"]) == 1
    scene.complete(claimed)
    assert reading.crashes(scene.store)["signatures"] == []
    assert scene.store.newest_incidents(batch_id, [0]) == {}


def test_a_read_that_nobody_waits_for_any_longer_is_given_up_by_the_server(postgres_url: str) -> None:
    store = Store(postgres_url, auto_migrate=True)
    other = Store(postgres_url)
    assert store.store_id and other.store_id
    with store.write() as connection:
        connection.exec_driver_sql("LOCK TABLE batchtrack_batch IN ACCESS EXCLUSIVE MODE")
        with reading_at_most(0.2), pytest.raises(errors.DatabaseUnavailable, match="statement timeout"):
            other.list_batches()
    assert other.list_batches() == [], "only what was asked within"
    store.dispose()
    other.dispose()
