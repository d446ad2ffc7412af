"""`from celery_batchtrack import chord` instead of Celery's: what Celery promises of a chord holds for ours.

On real prefork workers. Most of it twice: with a Redis result backend, and without any result backend at all.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chain, group
from celery.canvas import StampingVisitor
from celery.canvas import chord as celery_chord
from celery.exceptions import ChordError, ImproperlyConfigured
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, GroupResult, result_from_tuple

from celery_batchtrack import chord
from tests.acceptance.apps.canvas import (
    ADDED,
    BODIES,
    FAILURES,
    HEADERS,
    PLACES,
    REPLACED,
    WITH_GROUPS,
    Expected,
    Make,
)
from tests.acceptance.scene import Scene
from tests.helpers import eventually, unique
from tests.nodes import ProcessWorker
from tests.servers import PostgresServer, RedisServer

APP = "tests.acceptance.apps.canvas"
#: Generous: the machine may be busy.
LONG = 90.0
#: For what follows at once on something that was waited for.
SOON = 20.0
#: No message waits for long in a broker that asks rarely.
QUICK_REDIS = {"broker_transport_options": {"polling_interval": 0.05}}


class Stage:
    """A scene with a worker that runs; and what was called in it, to be looked at again at the end."""

    def __init__(self, scene: Scene, worker: ProcessWorker, chord: Any) -> None:
        self.scene, self.worker, self.chord = scene, worker, chord
        self.t: SimpleNamespace = scene.tasks
        self._called: dict[str, list[str]] = {}

    @property
    def has_backend(self) -> bool:
        return bool(self.scene.app.conf.result_backend)

    def make(self, make: Make) -> Any:
        return make(self.t, self.chord)

    def place(self) -> str:
        return self.scene.place(unique("place"))

    def lines(self, place: str) -> list[str]:
        return self.scene.lines(Path(place).name)

    def called(self, place: str, *lines: object) -> None:
        """Until these lines were written there, and, at the end of all, no other ones."""
        wanted = sorted(str(line) for line in lines)
        eventually(
            lambda: len(self.lines(place)) >= len(wanted) or None, SOON, what=f"{len(wanted)} lines in {place}"
        )
        assert sorted(self.lines(place)) == wanted
        self._called[place] = wanted

    def told(self, place: str, count: int) -> dict[Any, dict[str, Any]]:
        """What `context` tasks wrote there, by their labels."""
        eventually(lambda: len(self.lines(place)) >= count or None, LONG, what=f"{count} lines in {place}")
        found = [json.loads(line) for line in self.lines(place)]
        assert len(found) == count
        self._called[place] = sorted(self.lines(place))
        return {each["label"]: each for each in found}

    def check(self) -> None:
        """Everything has ended, nothing was called more often than it was told, nothing is wrong in the tables."""
        store = self.scene.batchtrack.store
        eventually(lambda: not store.list_batches(statuses=("open", "running"), limit=None), LONG, what="all ends")
        assert {place: sorted(self.lines(place)) for place in self._called} == self._called
        assert self.scene.violations() == []
        log = self.worker.logs()
        for trouble in ("must not be empty", "action=follow_up_failed", "action=backend_away", "action=publish_failed"):
            assert trouble not in log


@contextlib.contextmanager
def staged(
    folder: Path, broker: str, database: str, made_by: Any = chord, **conf: Any
) -> Iterator[Stage]:
    scene = Scene(folder, broker, database, APP, **conf)
    try:
        with scene.worker("--queues=celery,special") as worker:
            yield Stage(scene, worker, made_by)
    finally:
        scene.close()


@pytest.fixture(scope="module")
def redis(redis_server: RedisServer) -> Callable[[int], str]:
    """URLs of its databases, which are empty."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return lambda number: f"{redis_server.url.rpartition('/')[0]}/{number}"


@pytest.fixture(scope="module")
def databases(postgres_server: PostgresServer) -> Iterator[Callable[[], str]]:
    made: list[str] = []

    def make() -> str:
        made.append(postgres_server.create_database())
        return made[-1]

    yield make
    for each in made:
        postgres_server.drop_database(each)


@pytest.fixture(scope="module", params=["with a result backend", "without"])
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis: Callable[[int], str],
    databases: Callable[[], str],
) -> Iterator[Stage]:  # fmt: skip
    conf: dict[str, Any] = {"result_backend": redis(1)} if request.param == "with a result backend" else {}
    number = 0 if conf else 2
    with staged(tmp_path_factory.mktemp("stage"), redis(number), databases(), **QUICK_REDIS, **conf) as stage:
        yield stage


def each_of(*tables: dict[str, Any]) -> Any:
    """Parametrises over `make`, and, where the tables have it, `expected`."""
    pairs = [(name, value) for table in tables for name, value in table.items()]
    if isinstance(pairs[0][1], tuple):
        return pytest.mark.parametrize(
            ("make", "expected"), [value for _, value in pairs], ids=[name for name, _ in pairs]
        )
    return pytest.mark.parametrize("make", [value for _, value in pairs], ids=[name for name, _ in pairs])


# -- results --------------------------------------------------------------------------------------------------


@each_of(HEADERS)
def test_a_header_may_be(stage: Stage, make: Make, expected: Any) -> None:
    assert stage.make(make).apply_async().get(timeout=LONG) == expected


@each_of(BODIES)
def test_a_body_may_be(stage: Stage, make: Make, expected: Any) -> None:
    assert stage.make(make).apply_async().get(timeout=LONG) == expected


@each_of(PLACES)
def test_a_chord_may_be_in(stage: Stage, make: Make, expected: Any) -> None:
    assert stage.make(make).apply_async().get(timeout=LONG) == expected


@each_of(WITH_GROUPS)
def test_a_chord_may_be_next_to_a_group_of_celerys_in(stage: Stage, make: Make, expected: Any) -> None:
    if not stage.has_backend:
        pytest.skip("Celery's own groups and chords have results in a result backend only")
    assert stage.make(make).apply_async().get(timeout=LONG) == expected


#: Of ours, as one of two elements of Celery's own chord.
WITHIN_CELERYS: dict[str, tuple[Make, Any]] = {
    "one task": (lambda t, chord: chord([t.identity.s(1), t.identity.s(2)], t.total.s()), 3),
    "a chain": (lambda t, chord: chord([t.identity.s(1)], chain(t.total.s(), t.identity.s())), 1),
    "a chord": (lambda t, chord: chord([t.identity.s(1)], chord([t.total.s(), t.total.s()], t.total.s())), 2),
    "a group": (lambda t, chord: chord([t.identity.s(1)], group(t.total.s(), t.total.s())), [1, 1]),
    "a chain with a group": (
        lambda t, chord: chord([t.identity.s(1)], chain(t.total.s(), group(t.identity.s(), t.identity.s()))), [1, 1],
    ),
}  # fmt: skip


@each_of(WITHIN_CELERYS)
def test_celerys_own_chord_waits_for_ours_whose_body_is(stage: Stage, make: Make, expected: Any) -> None:
    if not stage.has_backend:
        pytest.skip("Celery's own groups and chords have results in a result backend only")
    around = celery_chord([stage.make(make), stage.t.identity.s("other")], stage.t.identity.s())
    assert around.apply_async().get(timeout=LONG) == [expected, "other"]


@pytest.mark.parametrize("fails", ["header", "body"])
def test_celerys_own_chord_hears_of_ours_that_fails(stage: Stage, fails: str) -> None:
    if not stage.has_backend:
        pytest.skip("Celery's own groups and chords have results in a result backend only")
    t = stage.t
    ours = stage.chord([t.fail.s() if fails == "header" else t.identity.s(1)], t.fail.s())
    with pytest.raises((Expected, ChordError)):
        celery_chord([ours, t.identity.s(2)], t.identity.s()).apply_async().get(timeout=LONG)


def test_a_group_behind_a_chord_runs_with_what_the_body_returned(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    (stage.chord([t.add.s(1, 2)], t.total.s()) | group(t.note.s(place), t.note.s(place))).apply_async()
    stage.called(place, 3, 3)


@each_of(REPLACED)
def test_a_task_may_replace_itself(stage: Stage, make: Make, expected: Any) -> None:
    assert stage.make(make).apply_async().get(timeout=LONG) == expected


@each_of(ADDED)
def test_a_header_task_may_add_to_its_chord(stage: Stage, make: Make, expected: Any) -> None:
    assert sorted(stage.make(make).apply_async().get(timeout=LONG)) == expected


def test_replacements_of_replacements_run_from_the_outside_in_and_out_again(stage: Stage) -> None:
    place = stage.place()
    stage.chord([stage.t.becomes_twice.si(place, "A", ["B"])], stage.t.identity.si(1))().get(timeout=LONG)
    assert stage.lines(place) == ["into A", "into B", '"innermost"', '"out of B"', '"out of A"']


def test_a_thousand_header_tasks(stage: Stage) -> None:
    result = stage.chord([stage.t.identity.si(at) for at in range(1000)], stage.t.total.s())()
    assert result.get(timeout=LONG) == 499_500


def test_children_start_while_a_generator_is_read(stage: Stage) -> None:
    place = stage.place()

    def header() -> Iterator[Any]:
        for at in range(3):
            yield stage.t.identity.s(at, place=place)
        eventually(lambda: "0" in stage.lines(place), LONG, what="the first child's effect")
        yield stage.t.identity.s("last", place=place)

    assert stage.chord(header(), stage.t.identity.s())().get(timeout=LONG) == [0, 1, 2, "last"]
    stage.called(place, 0, 1, 2, '"last"')


def test_the_ways_to_call_it(stage: Stage) -> None:
    t, header = stage.t, [stage.t.add.s(1, 2), stage.t.add.s(3, 4)]
    for result in (
        stage.chord(header)(t.total.s()), stage.chord(header, t.total.s())(), stage.chord(header, t.total.s()).delay(),
        stage.chord(header, t.total.s()).apply_async(), stage.chord(header=header, body=t.total.s()).apply_async(),
    ):  # fmt: skip
        assert result.get(timeout=LONG) == 10


def test_a_signature_may_be_started_twice(stage: Stage) -> None:
    made = stage.chord([stage.t.add.s(1, 2), stage.t.add.s(3, 4)], stage.t.total.s())
    results = [made.delay(), made.delay()]
    assert [each.get(timeout=LONG) for each in results] == [10, 10]
    assert results[0].id != results[1].id


def test_arguments_of_the_call_go_to_each_header_task(stage: Stage) -> None:
    t = stage.t
    made = stage.chord([t.add.s(1), t.add.s(2) | t.add.s(10)], t.identity.s())
    assert made.apply_async(args=(4,)).get(timeout=LONG) == [5, 16]
    made = stage.chord([t.add.s(1), t.add.s(2)], t.identity.s())
    assert made.apply_async(args=(4,), kwargs={"more": 1}).get(timeout=LONG) == [6, 7]
    made = stage.chord([t.add.si(1, 1), t.identity.s()], t.identity.s())
    assert made.apply_async(args=(4,)).get(timeout=LONG) == [2, 4]


def test_arguments_of_a_chain_go_to_the_chord_that_it_begins_with(stage: Stage) -> None:
    t = stage.t
    made = chain(stage.chord([t.identity.s(), t.identity.s()], t.identity.s()), t.identity.s())
    assert made.apply_async(args=(1,)).get(timeout=LONG) == [1, 1]


def test_the_body_of_the_call_counts(stage: Stage) -> None:
    made = stage.chord([stage.t.add.s(1, 2)], stage.t.identity.s())
    assert made(stage.t.total.s()).get(timeout=LONG) == 3


def test_the_id_of_the_call_is_the_bodys(stage: Stage) -> None:
    wanted = unique("body")
    place = stage.place()
    result = stage.chord([stage.t.identity.s(1)], stage.t.context.si(place=place)).apply_async(task_id=wanted)
    assert result.get(timeout=LONG)["id"] == result.id == wanted


# -- what a chord's result is ---------------------------------------------------------------------------------


def test_the_results_parent_is_the_headers_group_result(stage: Stage) -> None:
    t = stage.t
    result = stage.chord([t.add.s(1, 2), t.add.s(3, 4) | t.add.s(5), t.identity.s("x")], t.identity.s())()
    assert isinstance(result, AsyncResult)
    assert isinstance(result.parent, GroupResult)
    assert result.get(timeout=LONG) == [3, 12, "x"]
    assert [each.get(timeout=LONG) for each in result.parent.results] == [3, 12, "x"]
    assert result.parent.get(timeout=LONG) == [3, 12, "x"]
    assert (result.parent.ready(), result.parent.successful(), result.parent.completed_count()) == (True, True, 3)
    assert (result.ready(), result.successful(), result.failed(), result.state) == (True, True, False, "SUCCESS")
    assert result.result == [3, 12, "x"]


def test_the_result_of_a_body_that_is_a_group_is_a_group_result(stage: Stage) -> None:
    t = stage.t
    result = stage.chord([t.add.s(1, 2)], group(t.identity.s(), t.total.s()))()
    assert isinstance(result, GroupResult)
    assert isinstance(result.parent, GroupResult)
    assert len(result.results) == 2
    assert result.get(timeout=LONG) == [[3], 3]


def test_the_results_of_a_body_that_is_a_chain_lead_to_the_header(stage: Stage) -> None:
    t = stage.t
    result = stage.chord([t.add.s(1, 2)], t.total.s() | t.add.s(1) | t.add.s(2))()
    assert result.get(timeout=LONG) == 6
    header = result
    while not isinstance(header, GroupResult):
        header = header.parent
    assert header.parent is None
    assert [each.get(timeout=LONG) for each in header.results] == [3]


def test_a_result_is_found_by_its_id_and_by_its_tuple(stage: Stage) -> None:
    app = stage.scene.app
    result = stage.chord([stage.t.add.s(1, 2)], stage.t.identity.s())()
    assert app.AsyncResult(result.id).get(timeout=LONG) == [3]
    assert result_from_tuple(result.as_tuple(), app=app).get(timeout=LONG) == [3]
    failed = stage.chord([stage.t.fail.s()], stage.t.identity.s())()
    with pytest.raises((Expected, ChordError)):
        app.AsyncResult(failed.id).get(timeout=LONG)


def test_a_result_that_was_frozen_before_is_the_bodys(stage: Stage) -> None:
    made = stage.chord([stage.t.add.s(1, 2)], stage.t.identity.s())
    frozen = made.freeze()
    assert made.delay().id == frozen.id
    assert frozen.get(timeout=LONG) == [3]


def test_header_results_of_a_frozen_chain_are_in_the_result_backend_where_that_is_wanted(stage: Stage) -> None:
    if not stage.has_backend:
        pytest.skip("there is no result backend")
    t = stage.t
    made = chord([t.add.s(1), t.add.s(2)], t.total.s(), batch={"results": "backend"})
    result = (t.identity.si(1) | made)()
    assert result.get(timeout=LONG) == 5
    assert [each.get(timeout=LONG) for each in result.parent.results] == [2, 3]


def test_the_body_gets_results_that_celery_is_told_to_ignore(stage: Stage) -> None:
    t = stage.t
    header = [t.add.s(1, 2).set(ignore_result=True), t.identity.s(1)]
    assert stage.chord(header, t.identity.s())().get(timeout=LONG) == [3, 1]


def test_who_waits_too_briefly_gets_celerys_timeout_error(stage: Stage) -> None:
    place = stage.place()
    result = stage.chord([stage.t.wait.s(place)], stage.t.identity.s())()
    with pytest.raises(CeleryTimeout):
        result.get(timeout=0.2)
    assert not result.ready()
    Path(f"{place}.go").touch()
    assert result.get(timeout=LONG) == ["went on"]


def test_a_failed_chords_result_says_so(stage: Stage) -> None:
    result = stage.chord([stage.t.fail.s()], stage.t.identity.s())()
    with pytest.raises(Expected):
        result.get(timeout=LONG)
    assert (result.ready(), result.successful(), result.failed(), result.state) == (True, False, True, "FAILURE")
    assert isinstance(result.get(timeout=LONG, propagate=False), Exception)


# -- errors ---------------------------------------------------------------------------------------------------


@each_of(FAILURES)
def test_what_was_raised_reaches_who_waits(stage: Stage, make: Make) -> None:
    result = stage.make(make).apply_async()
    with pytest.raises(Expected, match="as wanted"):
        result.get(timeout=LONG)


def test_a_replacement_by_an_empty_chain_fails(stage: Stage) -> None:
    result = stage.chord([stage.t.becomes_empty_chain.s()], stage.t.identity.s())()
    with pytest.raises(ImproperlyConfigured):
        result.get(timeout=LONG)


def test_who_waits_for_a_chain_learns_of_a_chord_within_that_failed(stage: Stage) -> None:
    """The result is frozen before anything of it is started: it knows nothing of the chord's batch."""
    t = stage.t
    result = (t.identity.si(1) | stage.chord([t.identity.s(), t.fail.s()], t.identity.s()) | t.identity.s())()
    assert not hasattr(result, "batch")
    with pytest.raises((Expected, ChordError)):
        result.get(timeout=LONG)


@pytest.mark.parametrize("at", ["first", "last"])
def test_who_waits_for_a_group_learns_of_a_chord_that_failed(stage: Stage, at: str) -> None:
    t = stage.t
    well, failing = stage.chord([t.add.s(1, 2)], t.total.s()), stage.chord([t.fail.s()], t.total.s())
    result = group([failing, well] if at == "first" else [well, failing]).delay()
    with pytest.raises(Expected):
        result.get(timeout=LONG)


#: A failing task, with others around it.
Around = Callable[[SimpleNamespace, Any, Any], Any]

AROUND: dict[str, Around] = {
    "a task": lambda t, chord, fails: fails,
    "a chain, before its end": lambda t, chord, fails: chain(t.identity.si(1), fails, t.identity.si(1)),
    "a chain, at its end": lambda t, chord, fails: chain(t.identity.si(1), fails),
    "a group": lambda t, chord, fails: group(t.identity.si(1), fails),
}

AROUND_IN_HEADERS: dict[str, Around] = {
    **AROUND,
    "a chord's header": lambda t, chord, fails: chord([t.identity.si(1), fails], t.identity.s()),
    "a chord's body": lambda t, chord, fails: chord([t.identity.si(1)], fails),
    "a group of several": lambda t, chord, fails: group(fails, t.fail.s(), t.identity.si(1), t.fail.s()),
}

STYLES = pytest.mark.parametrize("style", ["old_errback", "new_errback"])
LINKED = pytest.mark.parametrize("linked", ["link_error", "on_error", "option"])


def around(table: dict[str, Around]) -> Any:
    return pytest.mark.parametrize("around", table.values(), ids=table)


def raises(result: Any) -> None:
    with pytest.raises(Expected):
        result.get(timeout=LONG)


@STYLES
@around(AROUND_IN_HEADERS)
def test_an_errback_is_called_once_with_the_bodys_id_when_the_header_fails(
    stage: Stage, style: str, around: Around
) -> None:
    place = stage.place()
    made = stage.chord((around(stage.t, stage.chord, stage.t.fail.s()),), stage.t.identity.s())
    made.link_error(getattr(stage.t, style).s(place=place))
    body_id = made.body.freeze().id
    raises(made.delay())
    stage.called(place, body_id)


@STYLES
@around(AROUND)
def test_an_errback_is_called_once_with_the_failing_tasks_id_when_the_body_fails(
    stage: Stage, style: str, around: Around
) -> None:
    place = stage.place()
    failing = stage.t.fail.s()
    failing_id = failing.freeze().id
    made = stage.chord((stage.t.identity.si(1),), around(stage.t, stage.chord, failing))
    made.link_error(getattr(stage.t, style).s(place=place))
    raises(made.delay())
    stage.called(place, failing_id)


@STYLES
def test_an_errback_is_called_for_each_task_of_a_body_group_that_fails(stage: Stage, style: str) -> None:
    place = stage.place()
    failing = [stage.t.fail.s() for _ in range(3)]
    ids = [each.freeze().id for each in failing]
    made = stage.chord((stage.t.identity.si(1),), group(stage.t.identity.si(1), *failing))
    made.link_error(getattr(stage.t, style).s(place=place))
    raises(made.delay())
    stage.called(place, *ids)


@STYLES
def test_an_errback_is_called_for_each_task_of_a_body_group_when_the_header_fails(stage: Stage, style: str) -> None:
    place = stage.place()
    tasks = [stage.t.identity.s() for _ in range(2)]
    ids = [each.freeze().id for each in tasks]
    made = stage.chord([stage.t.fail.s()], group(tasks))
    made.link_error(getattr(stage.t, style).s(place=place))
    raises(made.delay())
    stage.called(place, *ids)


@STYLES
def test_an_errback_is_called_with_the_last_links_id_when_the_header_fails_before_a_body_chain(
    stage: Stage, style: str
) -> None:
    place = stage.place()
    made = stage.chord([stage.t.fail.s()], stage.t.identity.s() | stage.t.identity.s())
    made.link_error(getattr(stage.t, style).s(place=place))
    result = made.delay()
    raises(result)
    stage.called(place, result.id)


@around(AROUND_IN_HEADERS)
def test_an_immutable_errback_is_called_once_when_the_header_fails(stage: Stage, around: Around) -> None:
    place = stage.place()
    made = stage.chord((around(stage.t, stage.chord, stage.t.fail.s()),), stage.t.identity.s())
    made.link_error(stage.t.note.si("called", place))
    raises(made.delay())
    stage.called(place, '"called"')


@around(AROUND)
def test_an_immutable_errback_is_called_once_when_the_body_fails(stage: Stage, around: Around) -> None:
    place = stage.place()
    made = stage.chord((stage.t.identity.si(1),), around(stage.t, stage.chord, stage.t.fail.s()))
    made.link_error(stage.t.note.si("called", place))
    raises(made.delay())
    stage.called(place, '"called"')


@LINKED
def test_the_ways_to_give_an_errback(stage: Stage, linked: str) -> None:
    place = stage.place()
    errback = stage.t.note.si("called", place)
    made = stage.chord([stage.t.fail.s(), stage.t.fail.s()], stage.t.identity.s())
    if linked != "option":
        getattr(made, linked)(errback)
    raises(made.apply_async(link_error=[errback]) if linked == "option" else made.delay())
    stage.called(place, '"called"')


def test_several_errbacks_are_each_called_once(stage: Stage) -> None:
    places = [stage.place() for _ in range(3)]
    made = stage.chord([stage.t.fail.s()], stage.t.identity.s())
    for at, place in enumerate(places):
        made.link_error(stage.t.note.si(at, place))
    raises(made.delay())
    for at, place in enumerate(places):
        stage.called(place, at)


def test_an_errback_is_not_called_where_all_goes_well(stage: Stage) -> None:
    place = stage.place()
    made = stage.chord([stage.t.identity.s(1)], stage.t.identity.s()).on_error(stage.t.note.si("called", place))
    assert made.delay().get(timeout=LONG) == [1]
    stage.called(place)


def test_what_a_new_style_errback_is_told(stage: Stage) -> None:
    header, body = stage.place(), stage.place()
    made = stage.chord([stage.t.fail.s()], stage.t.identity.s()).on_error(stage.t.told_errback.s(place=header))
    result = made.delay()
    raises(result)
    failed = result.parent.results[0].id
    stage.called(header, json.dumps([result.id, "ChordError", f"Dependency {failed} raised Expected('as wanted')"]))
    made = stage.chord([stage.t.identity.s(1)], stage.t.fail.s()).on_error(stage.t.told_errback.s(place=body))
    result = made.delay()
    raises(result)
    stage.called(body, json.dumps([result.id, "Expected", "as wanted"]))


@STYLES
def test_a_header_tasks_own_errback_is_called_with_its_id(stage: Stage, style: str) -> None:
    own, bodys = stage.place(), stage.place()
    failing = stage.t.fail.s().on_error(getattr(stage.t, style).s(place=own))
    failing_id = failing.freeze().id
    well = stage.t.identity.s(1).on_error(getattr(stage.t, style).s(place=own))
    made = stage.chord([well, failing], stage.t.identity.s().on_error(getattr(stage.t, style).s(place=bodys)))
    body_id = made.body.freeze().id
    raises(made.delay())
    stage.called(own, failing_id)
    stage.called(bodys, body_id)


CHAINS: dict[str, Around] = {
    "the header": lambda t, chord, fails: (
        t.identity.si(1) | chord([t.identity.s(), fails], t.identity.s()) | t.identity.s()
    ),
    "the header, last in the chain": lambda t, chord, fails: (
        t.identity.si(1) | chord([t.identity.s(), fails], t.identity.s())
    ),
    "the body": lambda t, chord, fails: t.identity.si(1) | chord([t.identity.s()], fails) | t.identity.s(),
    "what follows": lambda t, chord, fails: t.identity.si(1) | chord([t.identity.s()], t.identity.s()) | fails,
    "the header of the first of two": lambda t, chord, fails: chain(
        chord([fails], t.identity.s()), chord([t.identity.s(), t.identity.s()], t.identity.s())
    ),
    "the header of the second of two": lambda t, chord, fails: chain(
        chord([t.identity.si(1)], t.identity.s()), chord([t.identity.s(), fails], t.identity.s())
    ),
}


@around(CHAINS)
def test_an_errback_of_a_chain_is_called_once_when_something_of_a_chord_within_fails(
    stage: Stage, around: Around
) -> None:
    place = stage.place()
    made = around(stage.t, stage.chord, stage.t.fail.s()).on_error(stage.t.note.si("called", place))
    raises(made.delay())
    stage.called(place, '"called"')


def test_an_errback_given_at_the_call_is_called_for_the_task_of_a_body_group_that_fails(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    made = stage.chord([t.identity.si(1)], group(t.fail.s(), t.identity.s()))
    raises(made.apply_async(link_error=t.note.si("called", place)))
    stage.called(place, '"called"')


@contextlib.contextmanager
def errbacks_on_headers(stage: Stage) -> Iterator[None]:
    conf = stage.scene.app.conf
    conf.task_allow_error_cb_on_chord_header = True
    try:
        yield
    finally:
        conf.task_allow_error_cb_on_chord_header = False


@pytest.mark.parametrize("failing", ["x", "xxx", "x.", "x.x.x"])
def test_with_errbacks_on_headers_each_header_task_that_fails_and_the_body_call_it(stage: Stage, failing: str) -> None:
    place = stage.place()
    with errbacks_on_headers(stage):
        header = [stage.t.fail.si() if each == "x" else stage.t.identity.si(1) for each in failing]
        made = stage.chord(header, stage.t.identity.s()).on_error(stage.t.note.si("called", place))
        raises(made.delay())
    stage.called(place, *['"called"'] * (failing.count("x") + 1))


@pytest.mark.parametrize("failing", ["x", "xxx", "x.x.x"])
def test_without_errbacks_on_headers_it_is_called_once(stage: Stage, failing: str) -> None:
    place, never = stage.place(), stage.place()
    header = [stage.t.fail.si() if each == "x" else stage.t.identity.si(1) for each in failing]
    made = stage.chord(header, stage.t.note.s(never)).on_error(stage.t.note.si("called", place))
    raises(made.delay())
    stage.called(place, '"called"')
    stage.called(never)


# -- callbacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", ["link", "option", "set"])
def test_a_chords_callback_gets_what_the_body_returned(stage: Stage, linked: str) -> None:
    place = stage.place()
    callback = stage.t.note.s(place)
    made = stage.chord([stage.t.add.s(1, 2), stage.t.add.s(3, 4)], stage.t.total.s())
    if linked == "link":
        made.link(callback)
    elif linked == "set":
        made.set(link=[callback])
    result = made.apply_async(link=callback) if linked == "option" else made.apply_async()
    assert result.get(timeout=LONG) == 10
    stage.called(place, 10)


def test_header_tasks_and_links_call_their_own_callbacks(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    first, link, body = t.add.s(1, 2), t.add.s(10), t.total.s()
    for each in (first, link, body):
        each.link(t.note.s(place))
    assert stage.chord([first, t.add.s(3, 4) | link], body)().get(timeout=LONG) == 20
    stage.called(place, 3, 17, 20)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda t: t.total.s() | t.add.s(1), 4),
        (lambda t: t.total.s() | t.becomes_add.s(1), 4),
        (lambda t: t.becomes_chain.s(), [3]),
        (lambda t: celery_chord([t.total.s()], t.identity.s()), [3]),
    ],
    ids=["chain", "chain, replaced", "replaced", "chord"],
)
def test_a_chords_callback_is_that_of_the_end_of_its_body(
    stage: Stage, body: Callable[[Any], Any], expected: Any
) -> None:
    place, made_body = stage.place(), body(stage.t)
    if isinstance(made_body, celery_chord):
        made_body = stage.chord(made_body.tasks, made_body.body)
    made = stage.chord([stage.t.add.s(1, 2)], made_body)
    made.link(stage.t.note.s(place))
    assert made().get(timeout=LONG) == expected
    stage.called(place, json.dumps(expected))


def test_callbacks_of_a_chain_and_of_a_chord_in_a_header(stage: Stage) -> None:
    t, chains, chords = stage.t, stage.place(), stage.place()
    in_chain, in_chord = t.identity.si(1) | t.add.s(1), stage.chord([t.identity.si(1)], t.total.s())
    in_chain.link(t.note.s(chains))
    in_chord.link(t.note.s(chords))
    assert stage.chord([in_chain, in_chord], t.identity.s())().get(timeout=LONG) == [2, 1]
    stage.called(chains, 2)
    stage.called(chords, 1)


def test_callbacks_of_a_replaced_task_are_called_with_the_replacements_result(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    replaced = t.becomes_add.s(1, 2)
    replaced.link(t.note.s(place))
    assert stage.chord([replaced], t.identity.s())().get(timeout=LONG) == [3]
    stage.called(place, 3)


def test_errbacks_of_a_replaced_task_are_called_when_the_replacement_fails(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    replaced = t.becomes_failing.s().on_error(t.note.si("called", place))
    raises(stage.chord([replaced, t.identity.s(1)], t.identity.s())())
    stage.called(place, '"called"')


# -- what a run knows of its message --------------------------------------------------------------------------


def test_parents_and_roots_are_celerys(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    result = chain(
        t.context.si(label=1, place=place),
        t.context.si(label=2, place=place),
        stage.chord(
            group(t.context.si(label=at, place=place) for at in range(3, 10)),
            chain(t.context.si(label=50, place=place), t.context.si(label=51, place=place)),
        ),
    )()
    assert result.get(timeout=LONG)["label"] == 51
    told = stage.told(place, 11)
    assert {each["root"] for each in told.values()} == {told[1]["id"]}
    assert told[1]["parent"] is None
    assert told[2]["parent"] == told[1]["id"]
    header = [told[at] for at in range(3, 10)]
    assert {each["parent"] for each in header} == {told[2]["id"]}
    assert told[50]["parent"] in {each["id"] for each in header}
    assert told[51]["parent"] == told[50]["id"]

    assert result.id == told[51]["id"]
    assert result.parent.id == told[50]["id"]
    assert isinstance(result.parent.parent, GroupResult)
    assert [each.id for each in result.parent.parent.results] == [each["id"] for each in header]
    assert result.parent.parent.parent.id == told[2]["id"]
    assert result.parent.parent.parent.parent.id == told[1]["id"]


def test_a_chord_within_a_task_has_that_one_as_its_parent(stage: Stage) -> None:
    place = stage.place()
    stage.t.starts.delay(place)
    eventually(lambda: len(stage.lines(place)) == 4 or None, LONG, what="a chord within a task")
    told = [json.loads(line) for line in stage.lines(place)]
    (starter,) = (each for each in told if each["label"] == "starter")
    header = [each for each in told if each["label"] == "header"]
    (body,) = (each for each in told if each["label"] == "body")
    assert {each["parent"] for each in header} == {starter["id"]}
    assert body["parent"] in {each["id"] for each in header}
    assert {each["root"] for each in told} == {starter["root"]}


def test_a_chord_that_nothing_came_before_begins_with_its_header(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    header = [t.context.si(label=at, place=place) for at in range(3)]
    stage.chord(header, t.context.si(label="body", place=place))().get(timeout=LONG)
    told = stage.told(place, 4)
    for at in range(3):
        assert told[at]["parent"] is None
        assert told[at]["root"] == told[at]["id"]
    assert told["body"]["parent"] in {told[at]["id"] for at in range(3)}


@pytest.mark.parametrize("given", ["call", "set"])
def test_options_reach_header_and_body(stage: Stage, given: str) -> None:
    t, place = stage.t, stage.place()
    header = [t.context.si(label=0, place=place), t.identity.si(1) | t.context.si(label=1, place=place)]
    made = stage.chord(header, t.context.si(label="body", place=place))
    options = {"queue": "special", "priority": 7, "headers": {"own": "mine"}, "expires": 600}
    (made.set(**options).apply_async() if given == "set" else made.apply_async(**options)).get(timeout=LONG)
    told = stage.told(place, 3)
    for each in (told[0], told["body"]):
        assert (each["queue"], each["priority"], each["own"], each["expires"]) == ("special", 7, "mine", True)


def test_options_of_single_tasks_are_theirs(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    header = [
        t.context.si(label=0, place=place).set(queue="special", priority=3, expires=600),
        t.context.si(label=1, place=place),
    ]
    body = t.context.si(label="body", place=place).set(queue="special", headers={"own": "mine"})
    stage.chord(header, body)().get(timeout=LONG)
    told = stage.told(place, 3)
    assert (told[0]["queue"], told[0]["priority"], told[0]["expires"]) == ("special", 3, True)
    assert (told[1]["queue"], told[1]["own"], told[1]["expires"]) == ("celery", None, False)
    assert (told["body"]["queue"], told["body"]["own"]) == ("special", "mine")


def test_a_countdown_delays_the_header(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    started = time.time()
    made = stage.chord([t.context.si(label=at, place=place) for at in range(2)], t.identity.si(1))
    made.apply_async(countdown=0.5).get(timeout=LONG)
    assert min(each["at"] for each in stage.told(place, 2).values()) >= started + 0.5


def test_a_bodys_countdown_delays_the_body(stage: Stage) -> None:
    t, place = stage.t, stage.place()
    body = t.context.si(label="body", place=place).set(countdown=0.5)
    stage.chord([t.context.si(label="header", place=place)], body)().get(timeout=LONG)
    told = stage.told(place, 2)
    assert told["body"]["at"] >= told["header"]["at"] + 0.5


def stampable(t: SimpleNamespace, chord: Any, place: str) -> Any:
    """A chord with seven tasks that tell their stamps."""
    return chord(
        [
            t.context.si(label="task", place=place),
            t.context.si(label="first link", place=place) | t.context.si(label="last link", place=place),
            chord([t.context.si(label="inner", place=place)], t.context.si(label="inner body", place=place)),
        ],
        t.context.si(label="body", place=place) | t.context.si(label="end", place=place),
    )


class Visitor(StampingVisitor):  # type: ignore[misc]
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"visited": 42}


def test_a_visitors_stamps_are_in_header_and_body(stage: Stage) -> None:
    place = stage.place()
    made = stampable(stage.t, stage.chord, place)
    made.stamp(visitor=Visitor())
    made.apply_async().get(timeout=LONG)
    for each in stage.told(place, 7).values():
        assert each["stamps"]["visited"] == 42
        assert "visited" in each["stamped"]


def test_stamps_without_a_visitor_are_in_the_header(stage: Stage) -> None:
    """Celery stamps no body then."""
    place = stage.place()
    made = stampable(stage.t, stage.chord, place)
    made.stamp(order="4711")
    made.apply_async().get(timeout=LONG)
    told = stage.told(place, 7)
    for label in ("task", "first link", "last link", "inner"):
        assert told[label]["stamps"] == {"order": "4711"}
        assert told[label]["stamped"] == ["order"]
    for label in ("inner body", "body", "end"):
        assert told[label]["stamps"] == {}


def test_stamps_of_single_tasks_are_theirs(stage: Stage) -> None:
    place = stage.place()
    header = [stage.t.context.si(label=at, place=place) for at in range(2)]
    body = stage.t.context.si(label="body", place=place)
    header[0].stamp(order="4711")
    body.stamp(order="4712")
    stage.chord(header, body)().get(timeout=LONG)
    stamps = {label: each["stamps"] for label, each in stage.told(place, 3).items()}
    assert stamps == {0: {"order": "4711"}, 1: {}, "body": {"order": "4712"}}


def test_a_retry_keeps_the_stamps(stage: Stage) -> None:
    place = stage.place()
    made = stage.chord([stage.t.retries.si(place=place)], stage.t.identity.si(1))
    made.stamp(visitor=Visitor())
    made.apply_async().get(timeout=LONG)
    stage.called(place, '{"visited": 42}', '{"visited": 42}')


def test_a_soft_time_limit_that_the_task_takes_is_no_failure(stage: Stage) -> None:
    t = stage.t
    result = stage.chord([t.add.s(1, 2), t.guarded.s().set(soft_time_limit=1)], t.total.s())()
    assert result.get(timeout=LONG) == 3


# -- what Celery cannot do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["header", "chain", "nested", "body"])
def test_a_process_that_dies_ends_the_chord_for_who_waits(stage: Stage, where: str) -> None:
    t, runs, errors = stage.t, stage.place(), stage.place()
    dies = t.segfault.si(runs)
    made = {
        "header": lambda: stage.chord([t.identity.s(1), dies], t.identity.s()),
        "chain": lambda: stage.chord([t.identity.s(1) | dies | t.identity.s()], t.identity.s()),
        "nested": lambda: stage.chord([stage.chord([dies], t.identity.s()), t.identity.s(1)], t.identity.s()),
        "body": lambda: stage.chord([t.identity.s(1)], dies),
    }[where]()
    made.link_error(t.old_errback.s(place=errors))
    result = made.delay()
    with pytest.raises(ChordError):
        result.get(timeout=LONG)
    stage.called(errors, result.id)
    stage.called(runs, "killed")


# -- the end --------------------------------------------------------------------------------------------------


def test_the_stage_is_left_in_order(stage: Stage) -> None:
    stage.check()


# -- on the embedded broker -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("embedded")
    with staged(
        folder, f"batchtrack+filesystem://{folder / 'broker'}", f"sqlite:///{folder / 'batchtrack.db'}"
    ) as stage:
        yield stage


SOME = {
    "in order": HEADERS["a list"],
    "a generator": HEADERS["a generator"],
    "nothing": HEADERS["nothing"],
    "every shape": HEADERS["every shape"],
    "a body group": BODIES["a group"],
    "a body chord": BODIES["a chord"],
    "in a group": PLACES["a group"],
    "chords in a chain": PLACES["a chain of two chains of chords"],
    "nested chords, replaced": REPLACED["nested chords"],
    "body chain, replaced within": REPLACED["body chain, link within"],
}


@each_of(SOME)
def test_it_is_the_same_on_the_embedded_broker(embedded: Stage, make: Make, expected: Any) -> None:
    assert embedded.make(make).apply_async().get(timeout=LONG) == expected


@pytest.mark.parametrize("where", ["a header task", "a body chain, before its end", "a chord in the header"])
def test_errors_are_the_same_on_the_embedded_broker(embedded: Stage, where: str) -> None:
    place = embedded.place()
    made = embedded.make(FAILURES[where]).on_error(embedded.t.note.si("called", place))
    raises(made.apply_async())
    embedded.called(place, '"called"')


def test_a_process_that_dies_ends_the_chord_on_the_embedded_broker(embedded: Stage) -> None:
    place = embedded.place()
    made = embedded.chord([embedded.t.segfault.s(), embedded.t.identity.s(1)], embedded.t.identity.s())
    made.link_error(embedded.t.old_errback.s(place=place))
    result = made.delay()
    with pytest.raises(ChordError):
        result.get(timeout=LONG)
    embedded.called(place, result.id)


def test_the_embedded_stage_is_left_in_order(embedded: Stage) -> None:
    embedded.check()


# -- Celery's own chords, replaced ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replacing(
    tmp_path_factory: pytest.TempPathFactory, redis: Callable[[int], str], databases: Callable[[], str]
) -> Iterator[Stage]:
    """`celery.chord` is what is imported; there is no result backend."""
    with staged(
        tmp_path_factory.mktemp("replacing"), redis(3), databases(), celery_chord, replace_celery_chord=True,
        **QUICK_REDIS,
    ) as stage:  # fmt: skip
        yield stage


PIPES: dict[str, tuple[Make, Any]] = {
    "group, task": (lambda t, _: group(t.add.s(1, 2), t.add.s(3, 4)) | t.total.s(), 10),
    "group of one, task": (lambda t, _: group([t.add.s(2, 5)]) | t.identity.s(), [7]),
    "empty group, task": (lambda t, _: group([]) | t.identity.s(), []),
    "task, group, task": (
        lambda t, _: t.add.si(1, 1) | group(t.add.s(at) for at in range(4)) | t.identity.s(), [2, 3, 4, 5],
    ),
    "group, task, group, task": (
        lambda t, _: chain(
            group(t.add.s(1, 1), t.add.s(1, 1)), t.total.s(), t.add.s(1), group(t.add.s(1), t.add.s(1)), t.identity.s()
        ),
        [6, 6],
    ),
    "task, group, chord": WITH_GROUPS["a chain, after a group"],
    "task, group, group, task": (
        lambda t, _: t.add.si(1, 0) | group(t.add.s(1), t.add.s(1)) | group(t.total.s(), t.total.s()) | t.total.s(), 8,
    ),
    "twice": (
        lambda t, _: (
            t.add.si(1, 0) | group(t.add.s(1), t.add.s(1)) | t.total.s() | t.add.s(1)
            | group(t.add.s(1), t.add.s(1)) | t.total.s()
        ),
        12,
    ),
    "a chain of groups in a group": (
        lambda t, _: chain(
            t.add.si(1, 0),
            group(
                t.add.si(1, 100), chain(t.add.si(1, 200), group(t.add.si(1, 1000), t.add.si(1, 2000)))
            ),
            t.add.si(1, 10),
        ),
        11,
    ),
    "within groups": (
        lambda t, _: group(
            [group([t.add.s(1, 2), t.add.s(3, 4)]) | t.add.s([5]), group([t.add.s(6, 7)]) | t.add.s([10])]
        ) | t.identity.s(),
        [[3, 7, 5], [13, 10]],
    ),
    "replaced in the header": (
        lambda t, _: group([t.becomes_group.s([1, 2], 4), t.becomes_chord.s([1], 1)]) | t.identity.s(), [[5, 6], 2],
    ),
}  # fmt: skip


@each_of(PIPES)
def test_a_group_and_what_follows_is_a_chord_too(replacing: Stage, make: Make, expected: Any) -> None:
    assert replacing.make(make).apply_async().get(timeout=LONG) == expected


@each_of(HEADERS, BODIES)
def test_celerys_own_chord_is_ours(replacing: Stage, make: Make, expected: Any) -> None:
    result = replacing.make(make).apply_async()
    assert result.get(timeout=LONG) == expected
    assert result.batch.status == "completed"


@each_of(PLACES, REPLACED)
def test_celerys_own_chord_is_ours_wherever_it_is(replacing: Stage, make: Make, expected: Any) -> None:
    assert replacing.make(make).apply_async().get(timeout=LONG) == expected


@each_of(FAILURES)
def test_what_celerys_own_chord_raises_reaches_who_waits(replacing: Stage, make: Make) -> None:
    raises(replacing.make(make).apply_async())


@STYLES
@around(AROUND_IN_HEADERS)
def test_errbacks_of_celerys_own_chord_are_called_once(replacing: Stage, style: str, around: Around) -> None:
    test_an_errback_is_called_once_with_the_bodys_id_when_the_header_fails(replacing, style, around)


def test_errbacks_of_celerys_own_chord_are_called_for_header_tasks_where_that_is_wanted(replacing: Stage) -> None:
    place = replacing.place()
    t = replacing.t
    with errbacks_on_headers(replacing):
        made = chain(group(t.fail.si(), t.identity.si(1), t.fail.si()), t.identity.s())
        made.link_error(t.note.si("called", place))
        raises(made.delay())
    replacing.called(place, *['"called"'] * 3)


def test_a_task_that_becomes_celerys_own_chord(replacing: Stage) -> None:
    made = celery_chord([replacing.t.becomes_celery_chord.s([1, 2], 4)], replacing.t.becomes_celery_chord.s(1))
    assert made.apply_async().get(timeout=LONG) == 12


def test_a_large_group_in_a_chain(replacing: Stage) -> None:
    made = replacing.t.identity.si(1) | group(replacing.t.identity.s() for _ in range(300)) | replacing.t.total.s()
    assert made.delay().get(timeout=LONG) == 300


def test_a_process_that_dies_ends_celerys_own_chord_for_who_waits(replacing: Stage) -> None:
    test_a_process_that_dies_ends_the_chord_for_who_waits(replacing, "header")


def test_the_replacing_stage_is_left_in_order(replacing: Stage) -> None:
    replacing.check()


# -- switched off ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disabled(
    tmp_path_factory: pytest.TempPathFactory, redis: Callable[[int], str], databases: Callable[[], str]
) -> Iterator[Stage]:
    with staged(
        tmp_path_factory.mktemp("disabled"), redis(4), databases(), batchtrack_enabled=False, result_backend=redis(5),
        **QUICK_REDIS,
    ) as stage:  # fmt: skip
        yield stage


@each_of(
    {name: HEADERS[name] for name in ("a list", "a generator", "a group", "nothing", "chords")},
    {"a body chain": BODIES["a chain"], "in a chain": PLACES["a chain, within"]},
)
def test_switched_off_it_is_celerys(disabled: Stage, make: Make, expected: Any) -> None:
    result = disabled.make(make).apply_async()
    assert not hasattr(result, "batch")
    assert result.get(timeout=LONG) == expected


def test_switched_off_errors_are_celerys(disabled: Stage) -> None:
    test_an_errback_is_called_once_with_the_bodys_id_when_the_header_fails(disabled, "old_errback", AROUND["a task"])


def test_switched_off_nothing_is_tracked(disabled: Stage) -> None:
    assert disabled.scene.batchtrack.store.list_batches(limit=None) == []
    disabled.check()


def test_switched_off_it_needs_celerys_result_backend(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "memory://", f"sqlite:///{tmp_path / 'batchtrack.db'}", APP, batchtrack_enabled=False)
    try:
        with pytest.raises(NotImplementedError, match="result backend"):
            chord([scene.tasks.identity.s(1)], scene.tasks.identity.s())()
    finally:
        scene.close()
