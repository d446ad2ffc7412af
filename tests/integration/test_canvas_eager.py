"""Canvases in eager mode: in the caller's own process, each chord tracked all the same, with the same results."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, group
from celery.canvas import StampingVisitor
from celery.canvas import chord as celery_chord
from celery.exceptions import ImproperlyConfigured
from celery.result import GroupResult

from celery_batchtrack import Batch, chord
from tests.acceptance.apps.canvas import (
    ADDED,
    BODIES,
    FAILURES,
    HEADERS,
    PLACES,
    REPLACED,
    Expected,
    Make,
    make,
    tasks_of,
)
from tests.acceptance.scene import QUICK

#: Nothing waits in eager mode.
LONG = 30.0


class Visitor(StampingVisitor):  # type: ignore[misc]
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"visited": 42}


class Eager:
    """An application, and what was started in it since a test began."""

    def __init__(self, app: Celery, t: SimpleNamespace, folder: Path, chord: Any) -> None:
        self.app, self.t, self.folder, self.chord = app, t, folder, chord
        self._before = set(self._ids())

    def _ids(self) -> list[uuid.UUID]:
        found: list[uuid.UUID] = self.app.batchtrack.store.list_batches(limit=None)
        return found

    def make(self, make: Make) -> Any:
        return make(self.t, self.chord)

    def place(self, name: str = "place") -> str:
        return str(self.folder / name)

    def lines(self, name: str = "place") -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def batches(self) -> list[Batch]:
        return [Batch.get(each, app=self.app) for each in self._ids() if each not in self._before]

    def check(self) -> list[Batch]:
        """The batches that there are: all ended, and nothing is wrong in the tables."""
        found = self.batches()
        assert [each.status for each in found if each.status in ("open", "running")] == []
        assert [each for each in self.app.batchtrack.store.verify(0.0) if each.violations] == []
        return found


@contextlib.contextmanager
def eager_app(folder: Path, **conf: Any) -> Iterator[tuple[Celery, SimpleNamespace]]:
    app = make(
        "memory://",
        {
            **QUICK, "batchtrack_database_url": f"sqlite:///{folder / 'batchtrack.db'}",
            "batchtrack_blackbox_dir": str(folder / "boxes"), "task_always_eager": True, **conf,
        },
    )  # fmt: skip
    try:
        app.batchtrack.migrate()
        yield app, tasks_of(app)
    finally:
        app.batchtrack.reset()


@pytest.fixture(scope="module", params=["ours", "celery's, replaced"])
def application(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Celery, SimpleNamespace, Any]]:
    """With its tasks, and the chord that it imports."""
    replaced = request.param != "ours"
    with eager_app(tmp_path_factory.mktemp("eager"), replace_celery_chord=replaced) as made:
        yield *made, celery_chord if replaced else chord


@pytest.fixture
def eager(application: tuple[Celery, SimpleNamespace, Any], tmp_path: Path) -> Eager:
    app, t, used = application
    return Eager(app, t, tmp_path, used)


SHAPES = {
    f"{kind} {name}": shape
    for kind, table in {
        "header:": HEADERS, "body:": BODIES, "in": PLACES, "replaced:": REPLACED,
    }.items()
    for name, shape in table.items()
}  # fmt: skip


@pytest.mark.parametrize(("shape", "expected"), SHAPES.values(), ids=SHAPES)
def test_a_canvas_comes_to_the_same_and_is_tracked(eager: Eager, shape: Make, expected: Any) -> None:
    assert eager.make(shape).apply_async().get(timeout=LONG) == expected
    batches = eager.check()
    assert batches
    assert {str(each.status) for each in batches} == {"completed"}


@pytest.mark.parametrize(("shape", "expected"), ADDED.values(), ids=ADDED)
def test_what_is_added_to_a_chord_runs_and_is_tracked(eager: Eager, shape: Make, expected: Any) -> None:
    assert sorted(eager.make(shape).apply_async().get(timeout=LONG)) == expected
    assert {str(each.status) for each in eager.check()} == {"completed"}


@pytest.mark.parametrize("shape", FAILURES.values(), ids=FAILURES)
def test_what_was_raised_reaches_who_waits(eager: Eager, shape: Make) -> None:
    with pytest.raises(Expected, match="as wanted"):
        eager.make(shape).apply_async().get(timeout=LONG)
    assert eager.check()


def test_each_element_of_a_header_is_a_row(eager: Eager) -> None:
    t = eager.t
    header = [t.add.s(1, 2), t.add.s(3, 4) | t.add.s(5), group(t.identity.s(0), t.identity.s(1))]
    result = eager.chord(header, t.total.s())()
    assert result.get(timeout=LONG) == 16
    (batch,) = eager.check()
    assert batch.id == result.batch.id
    assert [(child.position, child.status) for child in batch.children()] == [(at, "completed") for at in range(4)]
    assert list(batch.results()) == [3, 12, 0, 1]
    (body,) = batch.children(kind="callbacks")
    assert (body.kind, body.status, body.result) == ("on_success", "completed", 16)
    assert isinstance(result.parent, GroupResult)
    assert result.parent.get(timeout=LONG) == [3, 12, 0, 1]


def test_a_chord_in_a_chord_is_a_batch_in_a_batch(eager: Eager) -> None:
    t = eager.t
    result = eager.chord([eager.chord([t.add.s(1, 2)], t.total.s()), t.identity.s(4)], t.total.s())()
    assert result.get(timeout=LONG) == 7
    assert len(eager.check()) == 2
    (nested,) = result.batch.nested()
    assert nested.row.parent_batch == result.batch.id


def test_the_ways_to_call_it(eager: Eager) -> None:
    header = [eager.t.add.s(1, 2), eager.t.add.s(3, 4)]
    body = eager.t.total.s()
    for result in (
        eager.chord(header)(body), eager.chord(header, body)(), eager.chord(header, body).delay(),
        eager.chord(header, body).apply_async(), eager.chord(header, body).apply(),
    ):  # fmt: skip
        assert result.get(timeout=LONG) == 10
    assert len(eager.check()) == 5


def test_arguments_of_the_call_go_to_each_header_task(eager: Eager) -> None:
    made = eager.chord([eager.t.add.s(1), eager.t.add.s(2) | eager.t.add.s(10)], eager.t.identity.s())
    assert made.apply_async(args=(4,)).get(timeout=LONG) == [5, 16]
    made = eager.chord([eager.t.add.s(1), eager.t.add.s(2)], eager.t.identity.s())
    assert made.apply_async(args=(4,), kwargs={"more": 1}).get(timeout=LONG) == [6, 7]
    eager.check()


def test_arguments_of_a_chain_go_to_the_chord_that_it_begins_with(eager: Eager) -> None:
    t = eager.t
    made = chain(eager.chord([t.identity.s(), t.identity.s()], t.identity.s()), t.identity.s())
    assert made.apply_async(args=(1,)).get(timeout=LONG) == [1, 1]
    eager.check()


def test_a_generator_is_run_while_it_is_read(eager: Eager) -> None:
    place = eager.place()

    def header() -> Iterator[Any]:
        for at in range(3):
            yield eager.t.identity.s(at, place=place)
        assert eager.lines()[0] == "0"
        yield eager.t.identity.s(3, place=place)

    assert eager.chord(header(), eager.t.total.s())().get(timeout=LONG) == 6
    assert sorted(eager.lines()) == ["0", "1", "2", "3"]
    eager.check()


@pytest.mark.parametrize("style", ["old_errback", "new_errback"])
@pytest.mark.parametrize("failing", ["header", "body"])
def test_errbacks_of_both_styles_are_called_once(eager: Eager, style: str, failing: str) -> None:
    t = eager.t
    tasks = {"header": t.identity.s(1), "body": t.identity.s(), failing: t.fail.s()}
    made = eager.chord([tasks["header"]], tasks["body"]).on_error(getattr(t, style).s(place=eager.place()))
    result = made.apply_async()
    with pytest.raises(Expected):
        result.get(timeout=LONG)
    assert eager.lines() == [result.id]
    eager.check()


def test_callbacks_of_the_chord_and_of_its_tasks_are_called_once(eager: Eager) -> None:
    t = eager.t
    task, body = t.add.s(1, 2), t.total.s()
    task.link(t.note.s(eager.place("task")))
    made = eager.chord([task, t.add.s(3, 4)], body)
    made.link(t.note.s(eager.place("body")))
    assert made().get(timeout=LONG) == 10
    assert (eager.lines("task"), eager.lines("body")) == (["3"], ["10"])
    eager.check()


def test_a_replacement_by_an_empty_chain_fails(eager: Eager) -> None:
    with pytest.raises(ImproperlyConfigured):
        eager.chord([eager.t.becomes_empty_chain.s()], eager.t.identity.s())().get(timeout=LONG)
    eager.check()


def test_a_chord_within_a_task_runs_and_is_tracked(eager: Eager) -> None:
    eager.t.starts.delay(eager.place())
    told = [json.loads(line) for line in eager.lines()]
    assert sorted(each["label"] for each in told) == ["body", "header", "header", "starter"]
    (batch,) = eager.check()
    (starter,) = (each for each in told if each["label"] == "starter")
    assert (batch.row.parent_task_id, batch.row.parent_task) == (starter["id"], "canvas.starts")


def test_stamps_are_in_header_and_body(eager: Eager) -> None:
    t, place = eager.t, eager.place()
    made = eager.chord([t.context.si(label="header", place=place)], t.context.si(label="body", place=place))
    made.stamp(visitor=Visitor())
    made.apply_async().get(timeout=LONG)
    told = [json.loads(line) for line in eager.lines()]
    assert [each["label"] for each in told] == ["header", "body"]
    for each in told:
        assert each["stamps"]["visited"] == [42], "in eager mode, Celery's are lists"


def test_switched_off_nothing_is_tracked(tmp_path: Path) -> None:
    with eager_app(tmp_path, batchtrack_enabled=False, result_backend="cache+memory://") as (app, t):
        eager = Eager(app, t, tmp_path, chord)
        for name in ("header: a list", "header: a generator", "header: chords", "body: a chain", "in a chain, within"):
            shape, expected = SHAPES[name]
            assert eager.make(shape).apply_async().get(timeout=LONG) == expected
        for made in (chord([t.add.s(1, 2)])(t.total.s()), chord([t.add.s(1, 2)], t.total.s()).apply()):
            assert made.get(timeout=LONG) == 3
        assert eager.batches() == []
