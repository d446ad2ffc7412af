"""`chord` as a signature: a Celery chord wherever Celery looks at it, and what is wrong is said at the call."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import celery
import pytest
from celery import Celery, chain, group, signature
from celery.canvas import Signature, _chain, _chord, maybe_signature
from kombu.utils import json as kombu_json

from celery_batchtrack import BatchTrack, CrashPolicy, Tolerance, chord, errors

#: Options of a batch, one of each kind, and how they travel.
OPTIONS = {"name": "upload", "tolerance": "2%", "results": "none", "tags": ["nightly"], "max_crashes": 2}


def application(**conf: Any) -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    BatchTrack(app)
    return app


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """Nobody works for it: what it starts stays where it is."""
    app = application(
        batchtrack_database_url=f"sqlite:///{tmp_path / 'batchtrack.db'}",
        batchtrack_blackbox_dir=str(tmp_path / "boxes"),
    )
    yield app
    app.batchtrack.reset()


@pytest.fixture
def shop(app: Celery) -> SimpleNamespace:
    @app.task(name="shop.add", shared=False)
    def add(left: int, right: int) -> int:
        return left + right

    @app.task(name="shop.total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task(name="shop.note", shared=False)
    def note(*args: Any) -> None: ...

    return SimpleNamespace(app=app, add=add, total=total, note=note)


@pytest.fixture
def made(shop: SimpleNamespace) -> Any:
    """A chord with options of its batch."""
    return chord([shop.add.s(1, 2), shop.add.s(3, 4) | shop.add.s(5)], shop.total.s(), batch=OPTIONS)


def travelled(value: Any) -> Any:
    return json.loads(json.dumps(value))


# -- what it is -----------------------------------------------------------------------------------------------


def test_it_is_a_celery_chord(made: Any) -> None:
    assert isinstance(made, celery.chord)
    assert isinstance(made, _chord)
    assert isinstance(made, Signature)
    assert (made.task, made["subtask_type"]) == ("celery.chord", "chord")


def test_it_has_header_and_body_where_celerys_has_them(made: Any) -> None:
    assert [each.task for each in made.tasks] == ["shop.add", "celery.chain"]
    assert made.body.task == "shop.total"
    assert made.kwargs["body"] == made.body
    assert made.__length_hint__() == 2


COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": lambda made: made.clone(),
    "copy": copy.copy,
    "deepcopy": lambda made: signature(copy.deepcopy(made)),  # Celery's is a plain dictionary
    "from_dict of a dict": lambda made: Signature.from_dict(dict(made)),
    "from_dict of JSON": lambda made: Signature.from_dict(travelled(made)),
    "kombu's JSON": lambda made: signature(kombu_json.loads(kombu_json.dumps(made))),
    "maybe_signature": lambda made: maybe_signature(travelled(made)),
    "Celery's chord.from_dict": lambda made: Signature.from_dict(travelled(chain(made, made)))["kwargs"]["tasks"][0],
    "its own from_dict": lambda made: chord.from_dict(travelled(made)),
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "twice through JSON": lambda made: signature(travelled(signature(travelled(made)))),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_the_same(made: Any, copied: Callable[[Any], Any]) -> None:
    other = copied(made)
    assert type(other) is chord
    assert travelled(other) == travelled(made)
    assert other.kwargs["batchtrack"] == OPTIONS
    assert [type(each) for each in other.tasks] == [Signature, _chain]
    assert isinstance(other.body, Signature)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_one_without_options_is_still_ours(shop: SimpleNamespace, copied: Callable[[Any], Any]) -> None:
    assert type(copied(chord([shop.add.s(1, 2)], shop.total.s()))) is chord


def test_a_clone_is_another(made: Any) -> None:
    other = made.clone()
    other.set(queue="elsewhere")
    other.tasks[0].set(queue="elsewhere")
    assert "queue" not in made.options
    assert "queue" not in made.tasks[0].options


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"tolerance": Tolerance(percent=2)}, {"tolerance": "2%"}),
        ({"tolerance": Tolerance(items=3)}, {"tolerance": {"items": 3}}),
        ({"deadline": timedelta(hours=2)}, {"deadline": 7200.0}),
    ],
)
def test_options_that_are_no_json_travel_as_such(
    shop: SimpleNamespace, given: dict[str, Any], kept: dict[str, Any]
) -> None:
    made = chord([shop.add.s(1, 2)], shop.total.s(), batch=given)
    assert travelled(made)["kwargs"]["batchtrack"] == kept
    other = signature(travelled(made))
    assert type(other) is chord
    assert travelled(other) == travelled(made)


def test_a_crash_policy_travels(shop: SimpleNamespace) -> None:
    made = chord([shop.add.s(1, 2)], shop.total.s(), batch={"on_crash": CrashPolicy("retry", max_crashes=2)})
    other = signature(travelled(made))
    assert travelled(other) == travelled(made)
    assert other.kwargs["batchtrack"]["on_crash"]["on_crash"] == "retry"


def test_callbacks_among_the_options_travel(shop: SimpleNamespace) -> None:
    wanted = {"on_failure": shop.note.s(), "on_progress": {50: shop.note.s("half")}}
    made = chord([shop.add.s(1, 2)], shop.total.s(), batch=wanted)
    kept = signature(travelled(made)).kwargs["batchtrack"]
    assert kept["on_failure"]["task"] == "shop.note"
    assert kept["on_progress"]["50"]["args"] == ["half"]


# -- who does not know this package ---------------------------------------------------------------------------

STRANGER = """
import json, sys
from celery import Celery, chord, signature

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.task_always_eager = True

@app.task(name="shop.add")
def add(left, right):
    return left + right

@app.task(name="shop.total")
def total(numbers):
    return sum(numbers)

made = signature(json.load(sys.stdin), app=app)
inner = made.tasks[2] if len(made.tasks) > 2 else made
json.dump({
    "celerys": type(made) is chord and type(inner) is chord,
    "known": any(name.startswith("celery_batchtrack") for name in sys.modules),
    "header": [each.task for each in made.tasks],
    "args": list(made.tasks[0].args),
    "body": made.body.task,
    "result": made.apply_async().get(),
}, sys.stdout)
"""


@pytest.mark.parametrize("nested", [False, True])
def test_a_process_that_does_not_know_this_package_has_celerys_chord(
    shop: SimpleNamespace, made: Any, nested: bool
) -> None:
    if nested:
        made = chord([*made.tasks, chord([shop.add.s(1, 1)], shop.total.s())], shop.total.s(), batch=OPTIONS)
    told = json.loads(
        subprocess.run(
            [sys.executable, "-c", STRANGER], input=json.dumps(made), text=True, check=True, capture_output=True
        ).stdout
    )
    assert told == {
        "celerys": True, "known": False, "header": ["shop.add", "celery.chain", "celery.chord"][: 2 + nested],
        "args": [1, 2], "body": "shop.total", "result": 3 + 12 + 2 * nested,
    }  # fmt: skip


def test_one_of_celerys_own_stays_celerys(shop: SimpleNamespace) -> None:
    stock = celery.chord([shop.add.s(1, 2)], shop.total.s())
    assert "batchtrack" not in stock.kwargs
    for copied in COPIES.values():
        other = copied(stock)
        assert type(other) is celery.chord
        assert travelled(other) == travelled(stock)


def test_what_travels_is_celerys_and_one_key_more(shop: SimpleNamespace) -> None:
    stock = celery.chord([shop.add.s(1, 2), shop.add.s(3, 4)], shop.total.s())
    ours = travelled(chord([shop.add.s(1, 2), shop.add.s(3, 4)], shop.total.s()))
    assert ours["kwargs"].pop("batchtrack") == {}
    assert ours == travelled(stock)


# -- within other canvas --------------------------------------------------------------------------------------


def test_it_looks_like_celerys(shop: SimpleNamespace) -> None:
    for header in ([shop.add.s(1, 2), shop.add.s(3, 4)], [shop.add.s(1, 2)], []):
        for body in (shop.total.s(), shop.total.s() | shop.note.s(), None):
            assert repr(chord(header, body, app=shop.app)) == repr(celery.chord(header, body, app=shop.app))


WITHIN: dict[str, Callable[[Any, Any], Any]] = {
    "task | chord": lambda t, made: (t.add.s(1, 2) | made).tasks[1],
    "chord | task": lambda t, made: made | t.note.s(),
    "chord | chain": lambda t, made: (made | (t.note.s() | t.note.s())).tasks[0],
    "chord | group": lambda t, made: (made | group(t.note.s(), t.note.s())).tasks[0],
    "chord | group of one": lambda t, made: made | group(t.note.s()),
    "chord | chord": lambda t, made: made | made,
    "task | chord | task": lambda t, made: (t.add.s(1, 2) | made | t.note.s()).tasks[1],
    "chain": lambda t, made: chain(t.add.s(1, 2), made).tasks[1],
    "chain of one": lambda t, made: chain(made).tasks[0],
    "group": lambda t, made: group(t.add.s(1, 2), made).tasks[1],
    "group of a generator": lambda t, made: next(iter(group(each for each in [made, made]).tasks)),
    "header": lambda t, made: chord([made], t.total.s()).tasks[0],
    "body": lambda t, made: chord([t.add.s(1, 2)], made).body,
    "header of Celery's": lambda t, made: celery.chord([made], t.total.s()).tasks[0],
    "body of Celery's": lambda t, made: celery.chord([t.add.s(1, 2)], made).body,
}


@pytest.mark.parametrize("put", WITHIN.values(), ids=WITHIN)
def test_it_stays_ours_in(shop: SimpleNamespace, made: Any, put: Callable[[Any, Any], Any]) -> None:
    found = put(shop, made)
    assert type(found) is chord
    assert found.kwargs["batchtrack"] == OPTIONS


def test_it_stays_ours_in_a_canvas_that_travels(shop: SimpleNamespace, made: Any) -> None:
    outer = signature(travelled(chord([made, group(made, made), shop.add.s(1, 2) | made], made)))
    alone, within_group, within_chain = outer.tasks
    found = (outer, alone, *within_group.tasks, within_chain.tasks[1], outer.body)
    assert [type(each) for each in found] == [chord] * 6


def test_what_is_chained_behind_becomes_part_of_the_body(shop: SimpleNamespace, made: Any) -> None:
    longer = made | shop.note.s() | shop.note.s()
    assert type(longer) is chord
    assert [each.task for each in longer.body.tasks] == ["shop.total", "shop.note", "shop.note"]
    assert made.body.task == "shop.total"


def test_a_group_and_what_follows_is_celerys(shop: SimpleNamespace) -> None:
    assert type(group(shop.add.s(1, 2), shop.add.s(3, 4)) | shop.total.s()) is celery.chord


# -- ids ------------------------------------------------------------------------------------------------------


def ids_of(made: Any) -> list[str]:
    return [str(each.id) for each in made.tasks.tasks]


def test_freezing_gives_ids_that_stay(shop: SimpleNamespace) -> None:
    made = chord([shop.add.s(1, 2), shop.add.s(3, 4)], shop.total.s())
    result = made.freeze()
    ids = ids_of(made)
    assert len({*ids, result.id}) == 3
    again = made.freeze()
    assert again.id == result.id == made.body.id
    assert ids_of(made) == ids
    assert [each.id for each in result.parent.results] == ids


def test_frozen_ids_are_those_of_the_children_and_of_the_body(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()
    made = chord([shop.add.s(1, 2), shop.add.s(3, 4)], shop.total.s())
    frozen = made.freeze()
    result = made.apply_async()
    assert [child.task_id for child in result.batch.children()] == ids_of(made)
    assert [each.id for each in result.parent.results] == ids_of(made)
    assert result.id == result.batch.row.result_id == frozen.id


def test_ids_that_were_set_are_those_of_the_children(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()
    header = [shop.add.s(1, 2).set(task_id="one"), shop.add.s(3, 4) | shop.add.s(5).set(task_id="last link")]
    result = chord(header, shop.total.s().set(task_id="body"))()
    assert result.id == "body"
    assert [each.id for each in result.parent.results] == ["one", "last link"]


# -- options and callbacks ------------------------------------------------------------------------------------


def test_set_returns_it_and_keeps_the_options(made: Any) -> None:
    assert made.set(queue="heavy", priority=3) is made
    assert (made.options["queue"], made.options["priority"]) == ("heavy", 3)
    assert signature(travelled(made)).options == made.options


def tasks_in(options: Any, name: str) -> list[str]:
    return [each["task"] for each in options.get(name, [])]


def test_a_callback_is_the_bodys(shop: SimpleNamespace, made: Any) -> None:
    callback = shop.note.s()
    assert made.link(callback) == callback
    assert tasks_in(made.body.options, "link") == ["shop.note"]
    assert "link" not in made.options
    assert not any("link" in each.options for each in made.tasks)


def test_an_errback_is_the_bodys(shop: SimpleNamespace, made: Any) -> None:
    errback = shop.note.s()
    assert made.link_error(errback) == errback
    assert tasks_in(made.body.options, "link_error") == ["shop.note"]
    assert not any("link_error" in each.options for each in made.tasks)


def test_an_errback_may_be_a_dictionary(shop: SimpleNamespace, made: Any) -> None:
    made.link_error(travelled(shop.note.s()))
    assert tasks_in(made.body.options, "link_error") == ["shop.note"]


def test_on_error_returns_the_chord(shop: SimpleNamespace, made: Any) -> None:
    assert made.on_error(shop.note.s()) is made
    assert tasks_in(made.body.options, "link_error") == ["shop.note"]


def test_an_errback_is_the_header_tasks_too_where_that_is_wanted(shop: SimpleNamespace, made: Any) -> None:
    shop.app.conf.task_allow_error_cb_on_chord_header = True
    made.link_error(shop.note.s())
    assert tasks_in(made.body.options, "link_error") == ["shop.note"]
    for each in made.tasks:
        assert tasks_in(each.options, "link_error") == ["shop.note"]


def test_an_errback_of_a_chord_without_a_body_is_an_error(shop: SimpleNamespace) -> None:
    with pytest.raises((errors.InvalidOption, AttributeError)):
        chord([shop.add.s(1, 2)], app=shop.app).link_error(shop.note.s())


# -- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (lambda t: [t.add.s(1, 2), 42], "header element 1 must be a signature"),
        (lambda t: [None], "header element 0 must be a signature"),
        (lambda t: ["shop.add"], "header element 0 must be a signature"),
        (lambda t: [{"no": "task"}], "header element 0"),
        (lambda t: ({"subtask_type": "hexagon", "task": "x", "args": [], "kwargs": {}},), "header element 0"),
        (lambda t: 42, "a header is signatures in a list"),
        (lambda t: "shop.add", "a header is signatures in a list"),
    ],
)
def test_a_header_of_something_else_is_refused_at_once(
    shop: SimpleNamespace, header: Callable[[Any], Any], said: str
) -> None:
    with pytest.raises(errors.UnsupportedCanvas, match=said):
        chord(header(shop), shop.total.s())


def test_a_generator_of_something_else_is_refused_when_it_is_read_and_starts_no_body(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()
    made = chord((each for each in [shop.add.s(1, 2), shop.add.s(3, 4), 42]), shop.total.s())
    with pytest.raises(errors.UnsupportedCanvas, match="header element 2 must be a signature"):
        made.apply_async()
    assert ends(shop) in ([], ["cancelled"])


def ends(shop: SimpleNamespace) -> list[str]:
    store = shop.app.batchtrack.store
    return [store.batch(each).status for each in store.list_batches(limit=None)]


def test_an_exception_in_a_generator_cancels_what_it_began(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()

    def header() -> Iterator[Any]:
        yield shop.add.s(1, 2)
        yield shop.add.s(1, 2)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        chord(header(), shop.total.s())()
    assert ends(shop) in ([], ["cancelled"])


def test_a_chord_without_a_body_cannot_start(shop: SimpleNamespace) -> None:
    for start in (lambda made: made(), lambda made: made.delay(), lambda made: made.apply_async()):
        with pytest.raises(errors.InvalidOption, match="needs a body"):
            start(chord([shop.add.s(1, 2)], app=shop.app))


@pytest.mark.parametrize("body", [42, "shop.total", object()])
def test_a_body_of_something_else_is_refused(shop: SimpleNamespace, body: Any) -> None:
    with pytest.raises(errors.UnsupportedCanvas, match="the body must be a signature"):
        chord([shop.add.s(1, 2)], app=shop.app)(body)


def test_a_task_itself_stands_for_its_signature(shop: SimpleNamespace) -> None:
    """As with Celery's, in a header, as a header and as a body."""
    shop.app.batchtrack.migrate()
    assert [each.task for each in chord([shop.note, shop.note.s()], shop.total.s()).tasks] == ["shop.note"] * 2
    for header in ([shop.note, shop.note.s()], (each for each in [shop.note, shop.note])):
        result = chord(header)(shop.total)
        assert [child.task for child in result.batch.children()] == ["shop.note"] * 2


def test_an_empty_chain_is_no_body(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()
    with pytest.raises(errors.UnsupportedCanvas, match="empty chain"):
        chord([shop.add.s(1, 2)], chain(app=shop.app), app=shop.app)()
    assert ends(shop) == []


def test_empty_chains_in_a_header_are_left_out(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()
    result = chord([chain(app=shop.app), shop.add.s(1, 2)], shop.total.s())()
    assert len(list(result.batch.children())) == 1


@pytest.mark.parametrize("start", [lambda made, b: made(batch=b), lambda made, b: made.apply_async(batch=b)])
def test_options_of_the_batch_at_the_call_are_refused(made: Any, start: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(errors.InvalidOption, match=r"chord\(header, batch=\{…\}\)\(body\)"):
        start(made, {"tolerance": 1})


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"tolerence": 1}, "no option 'tolerence': did you mean 'tolerance'"),
        ({"on_sucess": None}, "no option 'on_sucess': did you mean 'on_success'"),
        ({"xyzzy": 1}, "no option 'xyzzy'"),
        ({"on_success": None}, "a chord's on_success is its body"),
        ({"tolerance": -1}, "tolerance must not be negative"),
        ({"tolerance": "101%"}, "tolerance must be at most 100%"),
        ({"tolerance": 0.5}, "tolerance must be a number of children or text"),
        ({"tolerance": True}, "tolerance must be a number of children or text"),
        ({"tolerance": {"items": -1}}, "items must be a whole number"),
        ({"start": "later"}, "start must be one of"),
        ({"results": "nowhere"}, "results must be one of"),
        ({"on_crash": "rtry"}, "did you mean 'retry'"),
        ({"max_crash_rate": "100%"}, "below 100%"),
        ({"crash_window": 60}, "crash_window needs max_crash_rate"),
        ({"deadline": 0}, "deadline must be more than 0 seconds"),
        ({"on_progress": {0: None}}, "no whole percent between 1 and 100"),
        ({"metadata": {"x": object()}}, "metadata must be a mapping of JSON values"),
        ({"name": "x" * 256}, "text of at most 255 characters"),
        ({"parent_batch": "none"}, "parent_batch must be a Batch or its whole id"),
        ("tolerance", "batch= takes a mapping of options"),
        ([("tolerance", 1)], "batch= takes a mapping of options"),
    ],
)
def test_wrong_options_are_refused_at_once(shop: SimpleNamespace, batch: Any, said: str) -> None:
    with pytest.raises(errors.InvalidOption, match=said):
        chord([shop.add.s(1, 2)], shop.total.s(), batch=batch)


@pytest.mark.parametrize("percent", [-1, 100.5])
def test_a_tolerance_out_of_range_is_refused(percent: float) -> None:
    with pytest.raises(errors.InvalidOption, match="between 0% and 100%"):
        Tolerance(percent=percent)


def within_header(made: Any) -> None:
    made.tasks.append(made)


def within_body(made: Any) -> None:
    made.kwargs["body"] = made


def within_chain(made: Any) -> None:
    made.tasks[1].tasks.append(made)


@pytest.mark.parametrize("put", [within_header, within_body, within_chain])
def test_a_canvas_that_contains_itself_is_refused(
    shop: SimpleNamespace, made: Any, put: Callable[[Any], None]
) -> None:
    shop.app.batchtrack.migrate()
    put(made)
    with pytest.raises(errors.InvalidOption, match="contains itself"):
        made.apply_async()
    assert ends(shop) == []


def test_arguments_that_are_no_json_are_refused_before_anything_starts(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()
    with pytest.raises(errors.NotSerialisable, match=r"the arguments of shop\.add cannot be stored"):
        chord([shop.add.s(1, 2), shop.add.s(object(), 1)], shop.total.s())()
    assert ends(shop) == []


def test_arguments_that_do_not_fit_are_refused_before_anything_starts(shop: SimpleNamespace) -> None:
    shop.app.batchtrack.migrate()
    with pytest.raises(TypeError):
        chord([shop.add.s(1, 2), shop.add.s(1, 2, 3)], shop.total.s())()
    assert ends(shop) == []


def test_an_app_without_batchtrack_is_told_so() -> None:
    bare = Celery("bare", broker="memory://", set_as_current=False)

    @bare.task(name="bare.add", shared=False)
    def add(left: int, right: int) -> int:
        return left + right

    with pytest.raises(errors.ImproperlyConfigured, match=r"call BatchTrack\(app\)"):
        chord([add.s(1, 2)], add.s(1))()
