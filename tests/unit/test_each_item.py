"""`each_item` and `note` as their users write them, in children that run in this very process."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_batchtrack import Batch, BatchTrack, each_item, errors, note, tracked
from celery_batchtrack.behaviour.blackbox import InHand, PageState
from celery_batchtrack.glue.tracked_task import current_run
from tests.store.behaviour_kit import killed

DOCS = [{"id": f"PMC:{at}", "size": at} for at in range(4)]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """One whose children run here, with the black boxes of a worker."""
    app = Celery("eager", set_as_current=False)
    app.conf.update(
        task_always_eager=True, batchtrack_database_url=f"sqlite:///{tmp_path / 'eager.db'}",
        batchtrack_blackbox_dir=str(tmp_path / "boxes"), batchtrack_faulthandler=False,
    )  # fmt: skip
    extension = BatchTrack(app)
    extension.begin_worker("w@here", "solo")
    assert extension._pulse is not None
    extension._pulse.register()
    yield app
    extension.end_worker()
    extension.reset()


class Child:
    """A task made of a function over its documents, and what became of the child that ran it."""

    def __init__(self, app: Celery, act: Callable[[Any], Any], docs: Any = DOCS, **options: Any) -> None:
        declared = {"items": "docs", "item_id": "id", "results": "none", **options}

        @app.task(name=f"act-{next(_numbers)}", shared=False)
        @tracked(**declared)
        def task(docs: Any) -> None:
            act(docs)

        with Batch("one", app=app) as self.batch:
            self.batch.add(task.s(docs))
        (self.child,) = self.batch.children()
        self.incidents = self.batch.incidents()

    def completed(self) -> bool:
        return self.child.status == "completed"


_numbers = count()


def page() -> PageState:
    """What the running child's page says."""
    current = current_run()
    assert current is not None
    state = current.run.page.state()
    assert state is not None
    return state


def in_hand() -> tuple[int | None, str | None, int]:
    """(index, identifier, how many are done)."""
    item = page().item
    assert item is not None
    return item.index, item.identifier, item.done


# -- outside a batch -------------------------------------------------------------------------------


def test_outside_a_batch_it_is_plain_iteration_and_a_note_is_nothing(app: Celery) -> None:
    note("nobody listens")
    assert list(each_item(DOCS)) == DOCS
    assert list(each_item([], done="on_next")) == []
    assert list(each_item(str(at) for at in range(3))) == ["0", "1", "2"]
    with pytest.raises(TypeError):
        each_item(5)  # type: ignore[call-overload]


def test_a_task_that_is_called_or_sent_without_a_batch_is_outside_one(app: Celery) -> None:
    seen: list[Any] = []

    @app.task(name="alone", shared=False)
    @tracked(items="docs", item_id="id", on_crash="resume", results="none")
    def alone(docs: Any) -> None:
        note("x")
        seen.extend(each_item(docs))

    alone(DOCS)
    alone.delay(DOCS).get()
    assert seen == DOCS * 2


@pytest.mark.parametrize("done", ["", "on_last", True, False, 1, ["on_next"]])
def test_another_promise_is_refused_inside_and_outside_a_batch(app: Celery, done: Any) -> None:
    with pytest.raises(errors.InvalidOption, match="knows 'on_next' only"):
        each_item(DOCS, done=done)
    (incident,) = Child(app, lambda docs: each_item(docs, done=done)).incidents
    assert incident.exception == "InvalidOption"


# -- what is in hand -------------------------------------------------------------------------------


def test_items_come_in_order_and_each_is_in_hand_while_the_loops_body_has_it(app: Celery) -> None:
    seen: list[Any] = []

    def act(docs: Any) -> None:
        for at, doc in enumerate(each_item(docs)):
            assert in_hand() == (at, doc["id"], at)
            seen.append(doc)
        assert in_hand() == (None, None, 4)

    assert Child(app, act).completed() and seen == DOCS


def test_the_flags_say_whether_it_is_the_declared_list_and_what_was_promised(app: Celery) -> None:
    found: list[tuple[bool, bool]] = []

    def act(docs: Any) -> None:
        for source, done in ((docs, None), (docs, "on_next"), (list(docs), None), (reversed(docs), "on_next")):
            for _ in each_item(source, done=done):
                item = page().item
                assert item is not None
            found.append((item.declared, item.promised))

    assert Child(app, act).completed()
    assert found == [(True, False), (True, True), (True, False), (False, True)], "a copy has the same items"


def test_a_list_that_the_task_has_sorted_is_not_the_declared_one_any_more(app: Celery) -> None:
    found: list[bool] = []

    def act(docs: Any) -> None:
        docs.reverse()
        for _ in each_item(docs):
            item = page().item
            assert item is not None
        found.append(item.declared)

    assert Child(app, act).completed()
    assert found == [False], "an index in it would name another item"


def test_the_declared_list_is_recognised_in_whichever_argument_it_stands(app: Celery) -> None:
    found: list[bool] = []

    def tell(docs: Any) -> None:
        next(each_item(docs))
        item = page().item
        assert item is not None
        found.append(item.declared)

    @app.task(name="first", shared=False)
    @tracked(items="docs", item_id="id")
    def first(docs: Any, how: str = "fast") -> None:
        tell(docs)

    @app.task(name="bound", shared=False, bind=True)
    @tracked(items="docs", item_id="id")
    def bound(self: Any, how: str, docs: Any = ()) -> None:
        tell(docs)

    @app.task(name="nested", shared=False)
    def nested(work: dict[str, Any]) -> None:
        tell(work["docs"])

    nested.batchtrack = {"items": "docs", "item_id": "id"}  # as an annotation does

    @app.task(name="computed", shared=False)
    @tracked(items=lambda work: work["docs"], item_id="id")
    def computed(work: dict[str, Any]) -> None:
        tell(work["docs"])

    with Batch("four", app=app) as batch:
        batch.add(first.s(DOCS), first.s(docs=DOCS), bound.s("x", DOCS), bound.s("x", docs=DOCS))
        batch.add(nested.s({"docs": DOCS}), computed.s({"docs": DOCS}))
    assert batch.status == "completed", batch.incidents()
    assert found == [True] * 5 + [False], "what a callable finds has no place that it could be taken from"


def test_a_generator_is_asked_for_one_item_at_a_time(app: Celery) -> None:
    asked: list[int] = []

    def source() -> Iterator[dict[str, Any]]:
        for at in range(3):
            asked.append(at)
            yield DOCS[at]

    def act(docs: Any) -> None:
        for at, _ in enumerate(each_item(source())):
            assert asked == list(range(at + 1))

    assert Child(app, act).completed() and asked == [0, 1, 2]


def test_while_a_generator_makes_the_next_item_none_is_in_hand(app: Celery) -> None:
    """If loading item 2 kills, item 1 has not done it."""
    between: list[tuple[int | None, str | None, int]] = []

    def source(docs: Any) -> Iterator[Any]:
        for doc in docs:
            between.append(in_hand())
            yield doc

    assert Child(app, lambda docs: [in_hand() for _ in each_item(source(docs))]).completed()
    assert between == [(None, None, done) for done in range(4)]


@pytest.mark.parametrize(
    ("item_id", "doc", "name"),
    [
        ("id", {"id": "PMC:1"}, "PMC:1"),
        ("id", {"id": 17}, "17"),
        ("id", {"id": "a\0b"}, "a\\0b"),
        ("id", {"id": "x" * 300}, "x" * 255),
        ("id", {"id": "\U0001f9ec" * 300}, "\U0001f9ec" * 255),
        ("id", {"id": "cut \udcff off"}, "cut \\udcff off"),
        ("id", {"id": ""}, None),
        ("id", {"id": None}, "[0]"),
        (("db", "id"), {"db": "PMC", "id": 5}, "PMC:5"),
        (("db", "id"), {"id": 5}, "5"),
        (("db", "id"), {"db": "a\0", "id": "\udcff"}, "a\\0:\\udcff"),
        (lambda doc: doc["id"].upper(), {"id": "x"}, "X"),
        (None, "by itself", "by itself"),
        (None, 12, "12"),
        (None, True, "True"),
        (None, {"id": "x"}, "[0]"),
        (None, 1.5, "[0]"),
    ],
)  # fmt: skip
def test_an_item_is_called_in_hand_as_its_row_calls_it(app: Celery, item_id: Any, doc: Any, name: str | None) -> None:
    found: list[Any] = []

    def act(docs: Any) -> None:
        for _ in each_item([doc]):
            found.append(in_hand())

    child = Child(app, act, [1], items="docs", item_id=None)
    assert child.completed()
    found.clear()

    @app.task(name="named", shared=False)
    @tracked(items="docs", item_id=item_id)
    def named(docs: Any) -> None:
        act(docs)

    from celery_batchtrack.glue import declare

    with Batch("named", app=app) as batch:
        safe = [{"id": "x", "db": "y"}] if item_id is not None else ["x"]
        batch.add(named.s(safe))
    assert found == [(0, name, 0)]
    assert declare.identifier(doc, item_id, 0) == (name or "")


def test_an_item_that_cannot_be_named_is_known_by_its_index(app: Celery) -> None:
    class Odd:
        @property
        def id(self) -> str:
            raise RuntimeError("no")

    found: list[Any] = []

    def act(docs: Any) -> None:
        for _ in each_item([{"id": "a"}, {"no id": 1}, object(), Odd(), None, {"id": "e"}]):
            found.append(in_hand())

    assert Child(app, act).completed()
    assert found == [(0, "a", 0), (1, None, 1), (2, None, 2), (3, None, 3), (4, None, 4), (5, "e", 5)]


def test_a_task_that_declares_nothing_tells_its_index_and_what_names_itself(app: Celery) -> None:
    found: list[Any] = []

    @app.task(name="plain", shared=False)
    def plain(pages: int) -> None:
        for _ in each_item(range(10, 10 + pages)):
            found.append(in_hand())

    with Batch("plain", app=app) as batch:
        batch.add(plain.s(2))
    assert batch.status == "completed" and found == [(0, "10", 0), (1, "11", 1)]


# -- how a loop ends -------------------------------------------------------------------------------


def test_an_error_in_the_loop_is_told_with_its_item_and_what_was_done(app: Celery) -> None:
    def act(docs: Any) -> None:
        for doc in each_item(docs):
            note(f"size {doc['size']}")
            if doc["size"] == 2:
                raise ValueError("too big")

    (incident,) = Child(app, act).incidents
    assert (incident.item, incident.item_index, incident.items_done, incident.note) == ("PMC:2", 2, 2, "size 2")
    assert (incident.exception, incident.outcome) == ("ValueError", "failed")


def test_an_error_is_told_with_its_item_through_what_wraps_the_loop(app: Celery) -> None:
    def shown(items: Any) -> Iterator[Any]:
        """As a progress bar does."""
        yield from items

    def work(doc: Any) -> None:
        if doc["size"] == 1:
            raise KeyError("x")

    for act in (
        lambda docs: [work(doc) for doc in each_item(docs)],
        lambda docs: list(map(work, each_item(docs))),
        lambda docs: [work(doc) for doc in shown(each_item(docs))],
        lambda docs: {at: work(doc) for at, doc in enumerate(each_item(docs))},
    ):
        (incident,) = Child(app, act).incidents
        assert (incident.item, incident.items_done) == ("PMC:1", 1)


def test_an_error_before_and_after_the_loop_has_no_item(app: Celery) -> None:
    def before(docs: Any) -> None:
        raise ValueError("before")

    def after(docs: Any) -> None:
        for _ in each_item(docs):
            pass
        raise ValueError("after")

    (first,), (second,) = Child(app, before).incidents, Child(app, after).incidents
    assert (first.item, first.item_index, first.items_done) == (None, None, 0)
    assert (second.item, second.item_index, second.items_done) == (None, None, 4)


def test_an_error_after_a_loop_that_was_left_has_no_item(app: Celery) -> None:
    def act(docs: Any) -> None:
        for doc in each_item(docs):
            if doc["size"] == 2:
                break
        raise ValueError("of something else")

    (incident,) = Child(app, act).incidents
    assert (incident.item, incident.items_done) == (None, 2)


def test_an_error_in_another_function_than_the_one_that_left_its_loop_has_no_item(app: Celery) -> None:
    def first_big(docs: Any) -> Any:
        for doc in each_item(docs):
            if doc["size"] == 1:
                return doc
        return None

    def act(docs: Any) -> None:
        raise ValueError(first_big(docs))

    (incident,) = Child(app, act).incidents
    assert (incident.item, incident.items_done) == (None, 1)


def test_an_error_that_the_loops_owner_turned_into_another_keeps_its_item(app: Celery) -> None:
    def act(docs: Any) -> None:
        try:
            for doc in each_item(docs):
                1 / doc["size"]
        except ZeroDivisionError as error:
            raise RuntimeError("in other words") from error

    (incident,) = Child(app, act).incidents
    assert (incident.item, incident.item_index, incident.exception) == ("PMC:0", 0, "RuntimeError")


def test_an_error_that_passes_through_handlers_within_the_loop_keeps_its_item(app: Celery) -> None:
    def logged(docs: Any) -> None:
        for doc in each_item(docs):
            try:
                1 / (doc["size"] - 1)
            except ZeroDivisionError:
                note("logged")
                raise

    def managed(docs: Any) -> None:
        for doc in each_item(docs):
            with threading.Lock():
                1 / (doc["size"] - 1)

    def tidied(docs: Any) -> None:
        try:
            for doc in each_item(docs):
                try:
                    1 / (doc["size"] - 1)
                finally:
                    note("tidied")
        finally:
            note("outside")

    def renamed(docs: Any) -> None:
        for doc in each_item(docs):
            try:
                1 / (doc["size"] - 1)
            except ZeroDivisionError as error:
                raise KeyError("in other words") from error

    def results(docs: Any) -> Iterator[float]:
        for doc in each_item(docs):
            yield doc["size"] - 1

    for act in (logged, managed, tidied, renamed, lambda docs: [1 / result for result in results(docs)]):
        (incident,) = Child(app, act).incidents
        assert (incident.item, incident.item_index, incident.items_done) == ("PMC:1", 1, 1), act


def test_an_error_that_was_dealt_with_does_not_count_for_a_later_one(app: Celery) -> None:
    def act(docs: Any) -> None:
        try:
            for doc in each_item(docs):
                1 / doc["size"]
        except ZeroDivisionError:
            pass
        raise ValueError("of something else")

    (incident,) = Child(app, act).incidents
    assert incident.item is None


def test_a_break_leaves_nothing_in_hand_for_a_later_death(app: Celery) -> None:
    seen: list[InHand | None] = []

    def act(docs: Any) -> None:
        for doc in each_item(docs):
            if doc["size"] == 2:
                break
        seen.append(page().item)
        for _ in each_item(docs[:1]):
            seen.append(page().item)

    assert Child(app, act).completed()
    left, again = seen
    assert left is not None and left.left and left.done == 2
    assert again is not None and not again.left and again.identifier == "PMC:0"


def test_an_error_of_the_items_own_making_passes_through(app: Celery) -> None:
    def source(docs: Any) -> Iterator[Any]:
        yield docs[0]
        raise OSError("the file ended")

    def act(docs: Any) -> None:
        with pytest.raises(OSError, match="the file ended"):
            for _ in each_item(source(docs)):
                pass
        assert in_hand()[0] is None

    assert Child(app, act).completed()


# -- nesting, and several loops --------------------------------------------------------------------


def test_a_loop_within_a_loop_only_notes_progress(app: Celery) -> None:
    def act(docs: Any) -> None:
        for at, doc in enumerate(each_item(docs)):
            before = page().progress
            seen = list(each_item(["part", "part", "part"]))
            assert seen == ["part"] * 3 and page().progress == before + 3
            assert in_hand() == (at, doc["id"], at)

    assert Child(app, act).completed()


def test_a_loop_that_was_asked_for_before_but_begins_within_another_only_notes_progress(app: Celery) -> None:
    def act(docs: Any) -> None:
        for at, (doc, _) in enumerate(zip(each_item(docs), each_item(["a", "b", "c", "d"]), strict=False)):
            assert in_hand() == (at, doc["id"], at)
        outer, inner = each_item(docs), each_item(["part"])
        next(outer)
        assert list(inner) == ["part"] and in_hand() == (0, "PMC:0", 0)

    assert Child(app, act).completed()


def test_loops_one_after_the_other_each_tell_their_items(app: Celery) -> None:
    def act(docs: Any) -> None:
        for source in (docs, docs[2:], docs[:0], docs):
            found = [in_hand()[:2] for _ in each_item(source)]
            assert found == [(at, doc["id"]) for at, doc in enumerate(source)]
            assert in_hand() == (None, None, len(source))

    assert Child(app, act).completed()


def test_an_eager_child_within_a_child_has_a_page_of_its_own(app: Celery) -> None:
    @app.task(name="inner", shared=False)
    @tracked(items="docs", item_id="id")
    def inner(docs: Any) -> None:
        for _ in each_item(docs):
            assert in_hand()[1] == "inner"

    def act(docs: Any) -> None:
        for _ in each_item(docs):
            before = in_hand()
            with Batch("inner", app=app) as batch:
                batch.add(inner.s([{"id": "inner"}]))
            assert batch.status == "completed" and in_hand() == before

    assert Child(app, act).completed()


# -- what a former run left behind -----------------------------------------------------------------


def test_a_generator_that_is_collected_or_goes_on_late_does_not_write_into_the_next_run(app: Celery) -> None:
    kept: list[Iterator[Any]] = []

    def former(docs: Any) -> None:
        for _ in range(2):
            loop = each_item(docs)
            next(loop)
            kept.append(loop)
            current = current_run()
            assert current is not None
            current.walking = False  # so that the second one walks too

    def later(docs: Any) -> None:
        for doc in each_item(docs):
            if doc["size"] == 1:
                before = page()
                next(kept[0])
                kept.clear()
                gc.collect()
                assert page() == before
                assert in_hand() == (1, "PMC:1", 1)

    assert Child(app, former).completed()
    assert Child(app, later).completed()
    assert kept == []


def test_a_process_that_a_task_forks_leaves_its_page_alone(app: Celery) -> None:
    def forked() -> None:
        note("of the child")
        list(each_item(DOCS))

    def act(docs: Any) -> None:
        for doc in each_item(docs):
            if doc["size"] == 1:
                before = page()
                killed(forked)
                assert page() == before

    assert Child(app, act).completed()


def test_a_forked_process_that_goes_on_with_its_parents_loop_changes_nothing(app: Celery) -> None:
    def act(docs: Any) -> None:
        loop = each_item(docs)
        next(loop)
        before = page()
        killed(lambda: [next(loop), next(loop), loop.close()])  # type: ignore[attr-defined]
        assert page() == before
        next(loop)
        assert in_hand() == (1, "PMC:1", 1)

    assert Child(app, act).completed()


# -- resume ----------------------------------------------------------------------------------------


def test_without_the_promise_a_task_that_resumes_is_told_what_to_write(app: Celery) -> None:
    (incident,) = Child(app, lambda docs: list(each_item(docs)), on_crash="resume").incidents
    assert incident.exception == "InvalidOption" and "each_item(…, done='on_next')" in (incident.message or "")


def test_with_the_promise_it_runs_and_a_loop_within_needs_none(app: Celery) -> None:
    def act(docs: Any) -> None:
        for _ in each_item(docs, done="on_next"):
            list(each_item(["part"]))

    assert Child(app, act, on_crash="resume").completed()


def test_a_batch_that_resumes_asks_for_the_promise_too(app: Celery) -> None:
    @app.task(name="declared", shared=False)
    @tracked(items="docs", item_id="id", merge="concat")
    def declared(docs: Any) -> list[Any]:
        return list(each_item(docs))

    with Batch("resumes", app=app, on_crash="resume") as batch:
        batch.add(declared.s(DOCS))
    (incident,) = batch.incidents()
    assert incident.exception == "InvalidOption"


# -- notes -----------------------------------------------------------------------------------------


def test_a_note_is_anything_that_can_be_told(app: Celery) -> None:
    class Mute:
        def __str__(self) -> str:
            raise RuntimeError("no")

    def act(docs: Any) -> None:
        for told, kept in (("x", "x"), (5, "5"), (None, "None"), ("", None), ("é" * 400, "é" * 256), (Mute(), "Mute")):
            note(told)
            assert page().note == kept

    assert Child(app, act).completed()


def test_a_note_with_what_no_database_takes_is_kept_in_the_incident_all_the_same(app: Celery) -> None:
    def act(docs: Any) -> None:
        for _ in each_item([{"id": "nul\0 \udcff"}]):
            note("nul\0 and \udcff")
            raise ValueError("nul\0 \udcff")

    (incident,) = Child(app, act).incidents
    assert (incident.item, incident.note) == ("nul\\0 \\udcff", "nul\\0 and ?")


# -- threads, signals, memory ----------------------------------------------------------------------


def test_in_a_thread_that_a_task_starts_it_is_plain_iteration(app: Celery) -> None:
    def act(docs: Any) -> None:
        seen: list[Any] = []

        def work() -> None:
            note("of the thread")
            seen.extend(each_item(docs, done="on_next"))

        for _ in each_item(docs[:1]):
            before = page()
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert seen == docs and page() == before

    assert Child(app, act).completed()


def test_an_error_that_strikes_in_the_middle_of_a_loop_never_mixes_two_items(app: Celery) -> None:
    """A soft time limit may strike between any two instructions."""

    class Struck(Exception):
        pass

    def strike(*_: Any) -> None:
        raise Struck

    wrong: list[Any] = []

    def act(docs: Any) -> None:
        many = [{"id": f"{at}:" * (at % 50 + 1)} for at in range(2000)]
        former = signal.signal(signal.SIGALRM, strike)
        try:
            for attempt in range(150):
                try:  # the alarm may come at once
                    signal.setitimer(signal.ITIMER_REAL, 0.0001 + attempt % 37 * 0.00002)
                    for _ in each_item(many):
                        pass
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    for _ in range(3):  # what came at the last moment is raised in here
                        pass
                except Struck:
                    pass
                item = page().item
                if item is not None and item.index is not None and item.identifier != many[item.index]["id"]:
                    wrong.append(item)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)

    assert Child(app, act).completed() and wrong == []


def test_a_hundred_thousand_items_and_notes_take_no_memory(app: Celery) -> None:
    grown: list[int] = []

    def act(docs: Any) -> None:
        many = [{"id": f"PMC:{at}"} for at in range(100_000)]
        tracemalloc.start()
        try:
            for at, doc in enumerate(each_item(many)):
                note(doc["id"])
                if at == 1000:
                    before = tracemalloc.get_traced_memory()[0]
            grown.append(tracemalloc.get_traced_memory()[0] - before)
        finally:
            tracemalloc.stop()

    assert Child(app, act).completed()
    # Less than a byte an item: anything that stays takes at least 16. (Other threads of the process allocate too.)
    assert grown[0] < 100_000, f"{grown[0]} bytes more"


def test_without_a_black_box_children_run_all_the_same(tmp_path: Path) -> None:
    """As in eager mode outside a worker, or where no folder can be written."""
    app = Celery("boxless", set_as_current=False)
    app.conf.update(task_always_eager=True, batchtrack_database_url=f"sqlite:///{tmp_path / 'eager.db'}")
    extension = BatchTrack(app)
    seen: list[Any] = []

    def act(docs: Any) -> None:
        for doc in each_item(docs):
            note(doc["id"])
            seen.append(doc)

    assert Child(app, act).completed() and seen == DOCS
    (incident,) = Child(app, lambda docs: [1 / doc["size"] for doc in each_item(docs)]).incidents
    assert (incident.exception, incident.item) == ("ZeroDivisionError", None)
    extension.reset()


def test_a_worker_whose_folder_cannot_be_written_says_so_once_and_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # a worker in this process may have set another
    (tmp_path / "file").write_text("")
    app = Celery("folderless", set_as_current=False)
    app.conf.update(
        task_always_eager=True, batchtrack_database_url=f"sqlite:///{tmp_path / 'eager.db'}",
        batchtrack_blackbox_dir=str(tmp_path / "file" / "x"), batchtrack_faulthandler=True,
    )  # fmt: skip
    extension = BatchTrack(app)
    extension.begin_worker("w@here", "solo")
    assert extension._pulse is not None
    extension._pulse.register()
    try:
        for _ in range(3):
            assert Child(app, lambda docs: list(each_item(docs))).completed()
    finally:
        extension.end_worker()
        extension.reset()
    told = [record.getMessage() for record in caplog.records if "no_blackbox" in record.getMessage()]
    assert len(told) == 1 and str(tmp_path / "file" / "x") in told[0]
    assert not any("no_stacks" in record.getMessage() for record in caplog.records), "one warning is enough"


def test_the_worker_that_made_the_boxes_takes_them_away(app: Celery, tmp_path: Path) -> None:
    assert Child(app, lambda docs: list(each_item(docs))).completed()
    (folder,) = (tmp_path / "boxes").iterdir()
    assert len(list(folder.glob(f"{os.getpid()}-*.box"))) == 1
    BatchTrack.of(app).end_worker()
    assert list((tmp_path / "boxes").iterdir()) == []
