"""Items that killed, over all batches: counted, set apart, listed, released; and deaths grouped by what they share."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import schema
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.aftermath import Killer, QuarantinedItem, Rerun
from celery_batchtrack.vocabulary.evidence import Evidence, fingerprint
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.states import Cause, Detector, Verdict
from tests.store.kit import ERROR, SEGFAULT, SET_ASIDE, Scene, add_up, documents, done, killed, killer, part, some

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")


def only(scene: Scene) -> QuarantinedItem:
    (entry,) = scene.store.quarantine_list(all=True)
    return entry


# -- counting --------------------------------------------------------------------------------------


def test_an_item_that_killed_often_enough_is_in_quarantine_from_then_on(scene: Scene) -> None:
    assert [scene.kill("doc-1", after=3) for _ in range(4)] == [False, False, True, False]
    entry = only(scene)
    assert (entry.deaths, entry.quarantine_after, entry.state) == (4, 3, "quarantined")
    assert entry.quarantined_at is not None and entry.first_at <= entry.quarantined_at <= entry.last_at


def test_one_death_is_enough_where_the_policy_says_so(scene: Scene) -> None:
    assert scene.kill("doc-1", after=1)
    assert only(scene).state == "quarantined"


def test_an_item_that_has_not_killed_enough_is_merely_counted(scene: Scene) -> None:
    scene.kill("doc-1", after=3)
    assert only(scene).state == "counted"
    assert scene.store.quarantine_list() == []
    assert scene.store.quarantined(["demo.task"], "1") == {}


def test_the_register_tells_what_the_last_death_was(scene: Scene) -> None:
    first, second = ChildKey(uuid.uuid4(), 3), ChildKey(uuid.uuid4(), 5)
    scene.kill("doc-1", key=first)
    before = only(scene)
    told = replace(SEGFAULT, cause=Cause.OOM, signal="SIGKILL", python_frame="native.py:12 in parse")
    scene.kill("doc-1", key=second, evidence=told)
    entry = only(scene)
    assert (entry.item, entry.item_hash, entry.task, entry.version) == ("doc-1", "hash of doc-1", "demo.task", "1")
    assert (entry.cause, entry.signal, entry.python_frame) == ("oom", "SIGKILL", "native.py:12 in parse")
    assert (entry.batch_id, entry.position) == (second.batch_id, 5)
    assert entry.first_at == before.first_at and entry.last_at >= before.last_at


def test_what_a_database_refuses_in_text_keeps_no_kill_from_being_counted(scene: Scene) -> None:
    strange = replace(SEGFAULT, python_frame="lone \udce9 and nul \0 in " + "f" * 300)
    scene.kill("nul \0 and lone \udce9", evidence=strange)
    assert only(scene).item == "nul \\0 and lone \\udce9"
    assert len(only(scene).python_frame or "") == 255


def test_tasks_items_and_versions_are_counted_apart(scene: Scene) -> None:
    for task, item, version in (("a", "1", "v1"), ("b", "1", "v1"), ("a", "2", "v1"), ("a", "1", "v2")):
        assert not scene.kill(item, task=task, version=version)
    assert len(scene.store.quarantine_list(all=True)) == 4
    assert scene.kill("1", task="a", version="v1")
    assert set(scene.store.quarantined(["a", "b"], "v1")) == {("a", "hash of 1")}
    assert scene.store.quarantined(["a"], "v2") == {}, "a new version of the application gets its chance"
    assert scene.store.quarantined(["b"], "v1") == {} == scene.store.quarantined([], "v1")


def test_a_policy_of_less_patience_sets_aside_what_was_counted_before(scene: Scene) -> None:
    assert [scene.kill("doc-1", after=9) for _ in range(3)] == [False] * 3
    assert scene.kill("doc-1", after=2), "it has killed more than often enough"
    assert only(scene).state == "quarantined"


def test_a_policy_of_more_patience_lets_nothing_out(scene: Scene) -> None:
    assert scene.kill("doc-1", after=1)
    assert not scene.kill("doc-1", after=9)
    assert only(scene).state == "quarantined", "only a release does that, or another version"


# -- with the death that it counts -----------------------------------------------------------------


def test_a_crash_counts_its_killer_in_its_own_transaction(scene: Scene) -> None:
    batch_id = scene.batch([documents("a"), documents("a")])
    first = scene.row(scene.run(batch_id, 0).key)
    assert not scene.store.crash(first, SEGFAULT, Verdict.OBSERVED, Rerun(), killer("a")).quarantined
    assert not scene.store.crash(first, SEGFAULT, Verdict.OBSERVED, Rerun(), killer("a")).written
    assert only(scene).deaths == 1, "a verdict that lost its guard counts nothing"
    second = scene.row(scene.run(batch_id, 1).key)
    assert scene.store.crash(second, SEGFAULT, Verdict.OBSERVED, None, killer("a")).quarantined
    assert (only(scene).batch_id, only(scene).position) == (batch_id, 1)
    assert add_up(scene, batch_id)


def test_a_death_before_the_claim_counts_its_killer_too(scene: Scene) -> None:
    batch_id = scene.batch([documents("a")])
    row = scene.at(batch_id, 0)
    assert scene.store.crash_unclaimed(row, SEGFAULT, None, killer("a", after=1)).quarantined
    assert only(scene).position == 0


def test_a_split_counts_the_killer_of_the_part_that_died_and_no_other(scene: Scene) -> None:
    batch_id = scene.batch([documents(*"abc"), documents(*"xy")])
    assert scene.split(scene.run(batch_id, 0), done("a"), killed("b"), part("c"), killer=killer("b", 1)).quarantined
    entry = only(scene)
    assert (entry.item, entry.deaths, entry.position) == ("b", 1, 3)
    scene.split(scene.run(batch_id, 1), part("x"), part("y"), evidence=SEGFAULT, killer=killer("x", 1))
    assert only(scene) == entry, "who halves does not know yet who it was"


def test_who_is_not_sent_is_not_counted_again(scene: Scene) -> None:
    batch_id = scene.batch([documents("a"), documents(*"ab")])
    scene.kill("a", after=1)
    scene.store.quarantine(scene.at(batch_id, 0), SET_ASIDE)
    parts = [killed("a", evidence=SET_ASIDE), part("b")]
    scene.store.split(scene.at(batch_id, 1), parts, None, claimed=False, death=False)
    assert only(scene).deaths == 1
    assert scene.store.incidents(batch_id, crashes_only=True) == [], "nobody died of it this time"


# -- list and release ------------------------------------------------------------------------------


def _register(scene: Scene) -> None:
    """In quarantine: 1 and 2 of task a, 1 of task b. Merely counted: 3 of a."""
    for task, item in (("a", "1"), ("a", "2"), ("b", "1")):
        scene.kill(item, task=task, after=1)
    scene.kill("3", task="a", after=2)


def _names(entries: list[QuarantinedItem]) -> list[tuple[str, str]]:
    return sorted((each.task, each.item) for each in entries)


def test_the_list_shows_what_is_in_quarantine_and_on_demand_the_rest(scene: Scene) -> None:
    _register(scene)
    assert _names(scene.store.quarantine_list()) == [("a", "1"), ("a", "2"), ("b", "1")]
    assert _names(scene.store.quarantine_list(all=True)) == [("a", "1"), ("a", "2"), ("a", "3"), ("b", "1")]
    assert _names(scene.store.quarantine_list(task="b")) == [("b", "1")]
    moments = [each.last_at for each in scene.store.quarantine_list(all=True)]
    assert moments == sorted(moments, reverse=True)


@pytest.mark.parametrize(
    ("how", "released"),
    [
        ({}, [("a", "1"), ("a", "2"), ("b", "1")]),
        ({"items": ["1"]}, [("a", "1"), ("b", "1")]),
        ({"items": ["1"], "task": "a"}, [("a", "1")]),
        ({"items": ["hash of 2", "nobody"]}, [("a", "2")]),
        ({"task": "a"}, [("a", "1"), ("a", "2")]),
        ({"items": ["3"]}, []),
        ({"task": "c"}, []),
    ],
    ids=str,
)
def test_a_release_lets_out_what_it_names_and_nothing_else(
    scene: Scene, how: dict, released: list[tuple[str, str]]
) -> None:
    _register(scene)
    everybody = _names(scene.store.quarantine_list())
    out = scene.store.release_from_quarantine(**how)
    assert _names(out) == released
    assert all(each.state == "released" and each.deaths == 0 for each in out)
    assert _names(scene.store.quarantine_list()) == [each for each in everybody if each not in released]
    assert scene.store.release_from_quarantine(**how) == [], "once is enough"


def test_after_a_release_the_count_of_deaths_begins_anew(scene: Scene) -> None:
    scene.kill("doc-1"), scene.kill("doc-1")
    scene.store.release_from_quarantine()
    assert not scene.kill("doc-1")
    assert (only(scene).deaths, only(scene).state) == (1, "released")
    assert scene.kill("doc-1"), "it says so again"
    assert (only(scene).deaths, only(scene).state, only(scene).released_at) == (2, "quarantined", None)


def test_the_register_outlives_its_batches(scene: Scene) -> None:
    batch_id = scene.batch([documents("a")])
    scene.store.crash(scene.row(scene.run(batch_id).key), SEGFAULT, Verdict.OBSERVED, None, killer("a", 1))
    scene.store.finish(batch_id)
    scene.set_batch(batch_id, finished_at=later(-10.0))
    assert scene.store.prune(completed=1, other=1) == 1
    assert only(scene).batch_id == batch_id
    assert scene.store.quarantined(["demo.task"], "1")


def test_what_has_not_killed_for_long_is_forgotten_unless_it_is_in_quarantine(scene: Scene) -> None:
    scene.kill("counted", after=3), scene.kill("released", after=1)
    scene.store.release_from_quarantine(items=["released"])
    scene.kill("kept", after=1)
    scene.execute(sa.update(schema.quarantine).values(last_at=later(-100.0)))
    scene.kill("fresh", after=3)
    assert scene.store.prune_quarantine(50) == 2
    assert {each.item for each in scene.store.quarantine_list(all=True)} == {"kept", "fresh"}


# -- groups of deaths ------------------------------------------------------------------------------


def _die(scene: Scene, batch_id: uuid.UUID, position: int, again: float | None = None, **told: object) -> None:
    scene.crash(scene.run(batch_id, position), again=again, evidence=replace(SEGFAULT, **told))


def test_deaths_are_grouped_by_root_cause_item_signal_and_host_over_all_batches(scene: Scene) -> None:
    first, second = scene.batch(some(4, items=2), tolerance=4), scene.batch(some(2, items=2), tolerance=2)
    _die(scene, first, 0, item="doc-a", hostname="h1", python_frame="native.py:1 in parse")
    _die(scene, first, 1, item="doc-b", hostname="h2", signal="SIGABRT")
    _die(scene, second, 0, 0.0, item="doc-a", hostname="h2", python_frame="native.py:2 in parse")
    _die(scene, second, 0, item="doc-a", hostname="h2", python_frame="native.py:2 in parse")
    _die(scene, first, 2, item=None, hostname=None, cause=Cause.EXIT, signal=None, exit_code=3)
    scene.fail(scene.run(first, 3), replace(ERROR, item="doc-a"))
    groups = scene.store.crash_groups
    segfault = fingerprint("demo.task", SEGFAULT)
    assert [(each.deaths, each.batches) for each in groups("fingerprint") if each.key == segfault] == [(3, 2)]
    assert [each.deaths for each in groups("fingerprint")] == [3, 1, 1]
    newest = groups("fingerprint")[0]
    assert (newest.items, newest.item, newest.python_frame) == (1, "doc-a", "native.py:2 in parse")
    assert newest.first_at <= newest.last_at
    assert [(each.key, each.deaths) for each in groups("item")] == [("doc-a", 3), ("doc-b", 1)]
    assert groups("signal")[0].key == "SIGSEGV"
    assert {each.key: each.deaths for each in groups("signal")} == {"SIGSEGV": 3, "exit": 1, "SIGABRT": 1}
    assert [(each.key, each.deaths) for each in groups("host")] == [("h2", 3), ("h1", 1)]
    assert {each.key: each.deaths for each in groups("item", first)} == {"doc-b": 1, "doc-a": 1}
    assert groups("item", since=-60) == [] and len(groups("item", since=3600)) == 2
    assert [each.key for each in groups("item", limit=1)] == ["doc-a"]


def test_an_item_of_two_tasks_is_two_groups(scene: Scene) -> None:
    children = [documents("a"), replace(documents("a"), task="other.task")]
    batch_id = scene.batch(children)
    for position in range(2):
        _die(scene, batch_id, position, item="a")
    for by in ("item", "fingerprint"):
        assert sorted(each.task for each in scene.store.crash_groups(by)) == ["demo.task", "other.task"]
    assert [each.deaths for each in scene.store.crash_groups("signal")] == [2]


def test_a_verdict_that_was_overturned_is_no_death_of_a_group(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    silent = Evidence(Cause.WORKER_LOST, detected_by=Detector.LEASE, item="a")
    scene.crash(claimed, Verdict.LEASE, evidence=silent)
    assert [each.key for each in scene.store.crash_groups("item")] == ["a"]
    scene.complete(claimed)
    assert scene.store.crash_groups("item") == []


def test_parts_and_splits_of_a_child_are_told(scene: Scene) -> None:
    batch_id = scene.batch([documents(*"abcd"), documents("x")])
    assert scene.store.split_count(batch_id) == 0 and scene.store.parts_of(scene.at(batch_id, 0)) == []
    scene.split(scene.run(batch_id, 0), part("a", "b"), part("c", "d"), evidence=SEGFAULT)
    scene.split(scene.run(batch_id, 3), killed("c"), part("d"))
    assert scene.store.split_count(batch_id) == 2
    assert [row.position for row in scene.store.parts_of(scene.at(batch_id, 0))] == [2, 3]
    assert [row.position for row in scene.store.parts_of(scene.at(batch_id, 3))] == [4, 5]


def test_a_killer_of_one_name_and_another_value_is_another(scene: Scene) -> None:
    batch_id = scene.batch([documents("[0]"), documents("[0]")])
    for position, told in enumerate(("one", "other")):
        row = scene.row(scene.run(batch_id, position).key)
        scene.store.crash(row, SEGFAULT, Verdict.OBSERVED, None, Killer("[0]", told, "1", 2))
    assert [each.deaths for each in scene.store.quarantine_list(all=True)] == [1, 1]
