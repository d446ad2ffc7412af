"""What a task and a batch declare of their recovery: what is refused, when, and what it comes to for a child."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from pydantic import BaseModel

from celery_batchtrack import Batch, BatchTrack, CrashPolicy, chord, errors, tracked
from celery_batchtrack.glue import declare
from celery_batchtrack.glue.declare import TaskOptions

ITEMS = {"items": "docs", "item_id": "id"}


class Order(BaseModel):
    docs: list[dict[str, Any]]
    how: str = "fast"


class Other(BaseModel):
    number: int = 0


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("declared", set_as_current=False)
    app.conf.update(task_always_eager=True, batchtrack_database_url=f"sqlite:///{tmp_path / 'eager.db'}")
    BatchTrack(app)
    yield app
    BatchTrack.of(app).reset()


def handle(docs: Any) -> None:
    """A function with the argument that is declared."""


def join(results: list[Any]) -> Any:
    """One result of several."""


class Namespace:
    @staticmethod
    def join(results: list[Any]) -> Any: ...


# -- of a task -------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"on_crahs": "skip"}, "tracked() has no option 'on_crahs': did you mean 'on_crash'"),
    ({"policy": CrashPolicy()}, "tracked() has no option 'policy'"),
    ({"quarantine_after": 2}, "no option 'quarantine_after': it belongs to a policy, on_crash=CrashPolicy(…, "),
    *(({name: 1}, f"CrashPolicy(…, {name}=…)") for name in ("backoff", "isolate", "oom_queue", "max_splits")),
    ({"on_crash": "skpi"}, "on_crash must be one of"),
    ({"on_crash": None}, "on_crash must be one of"),
    ({"on_crash": CrashPolicy}, "on_crash must be one of"),
    ({"max_crashes": 0}, "max_crashes must be a whole number of at least 1"),
    ({"on_crash": CrashPolicy(max_crashes=2), "max_crashes": 3}, "max_crashes is given twice"),
    ({"on_crash": "bisect"}, "tracked(): on_crash='bisect' needs items= to name the argument"),
    ({"on_crash": "skip", "items": lambda docs: docs, "merge": "list"}, "tracked(): on_crash='skip' needs items="),
    ({"on_crash": CrashPolicy(quarantine_after=2)}, "tracked(): quarantine_after needs items= to name"),
    ({"on_crash": CrashPolicy(quarantine_after=2), "items": lambda docs: docs}, "quarantine_after needs items="),
    ({"on_crash": "skip", **ITEMS}, "splits a child, but its header position has one result: say how parts become one"),
    ({"on_crash": CrashPolicy("resume"), **ITEMS}, "on_crash='resume' splits a child"),
    ({"on_crash": "bisect", "merge": "concta", **ITEMS}, "merge must be one of ('list', 'concat', 'sum') or"),
    ({"merge": "concta"}, "did you mean 'concat'"),
    ({"merge": "no path"}, "merge must be one of"),
    ({"merge": "shop..join"}, "merge must be one of"),
    ({"merge": "join"}, "merge must be one of"),
    ({"merge": 5}, "merge must be one of"),
    ({"merge": lambda results: results}, "merge must be importable by its path"),
    ({"merge": partial(join)}, "merge must be importable by its path"),
    ({"results": "store it"}, "results must be 'store' or 'none'"),
    ({"results": None}, "results must be 'store' or 'none'"),
    ({"stall_timeout": 0}, "stall_timeout must be more than 0 seconds (None: never), not 0"),
    ({"stall_timeout": -5}, "stall_timeout must be more than 0 seconds"),
    ({"stall_timeout": float("nan")}, "stall_timeout must be more than 0 seconds"),
    ({"stall_timeout": float("inf")}, "stall_timeout must be more than 0 seconds"),
    ({"stall_timeout": timedelta(0)}, "stall_timeout must be more than 0 seconds"),
    ({"stall_timeout": "soon"}, "stall_timeout: 'soon' is no duration"),
    ({"stall_timeout": True}, "stall_timeout: True is no duration"),
    ({"items": 5}, "items must be an argument's name or a callable, not 5"),
    ({"items": "docs", "item_id": []}, "item_id must be names or a callable"),
    ({"items": "docs", "item_id": ("id", 5)}, "item_id must be names or a callable"),
    ({"items": "docs", "item_id": 5}, "item_id must be names or a callable"),
    ({"item_id": "id"}, "item_id needs items: which argument holds the items?"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_what_is_wrong_is_said_at_the_declaration(options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.InvalidOption) as raised:
        tracked(**options)(handle)
    assert said in str(raised.value)


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_what_is_wrong_in_an_annotation_is_said_when_a_batch_is_made(
    app: Celery, options: dict[str, Any], said: str
) -> None:
    app.conf.task_annotations = {"annotated": {"batchtrack": options}}
    task = app.task(handle, name="annotated", shared=False)
    with pytest.raises(errors.InvalidOption) as raised:
        Batch.create("annotated", [task.s([])], app=app)
    assert said in str(raised.value)
    assert task.delay([]).successful(), "outside a batch it is no concern"


def test_an_argument_that_is_not_there_is_said_at_the_declaration() -> None:
    with pytest.raises(errors.InvalidOption, match=r"handle has no argument 'dcos' for items: did you mean 'docs'"):
        tracked(items="dcos")(handle)


@pytest.mark.parametrize("policy", ["skip", CrashPolicy(quarantine_after=1)])
def test_arguments_that_are_collected_cannot_be_taken_apart(policy: Any) -> None:
    def several(*docs: Any) -> None: ...

    def named(**docs: Any) -> None: ...

    for function in (several, named):
        with pytest.raises(errors.InvalidOption, match="collects arguments and cannot be taken apart"):
            tracked(items="docs", on_crash=policy, results="none")(function)
        assert tracked(items="docs", on_crash="retry")(function) is function


def test_an_item_may_be_a_field_of_a_pydantic_argument() -> None:
    def order(order: Order, other: Other) -> None: ...

    assert tracked(items="docs", item_id="id", on_crash="skip", merge="sum")(order) is order
    with pytest.raises(errors.InvalidOption, match="has no argument 'dosc'"):
        tracked(items="dosc")(order)


def test_annotations_that_cannot_be_read_are_no_models() -> None:
    def odd(value: "nowhere.Known") -> None: ...  # type: ignore[name-defined] # noqa: F821, UP037

    with pytest.raises(errors.InvalidOption, match="has no argument 'docs'"):
        tracked(items="docs")(odd)


RIGHT: list[tuple[dict[str, Any], CrashPolicy, dict[str, Any]]] = [
    ({}, CrashPolicy(), {"merge": None, "stall_timeout": None}),
    ({"on_crash": "retry", "max_crashes": 5}, CrashPolicy("retry", max_crashes=5), {}),
    ({"on_crash": CrashPolicy("retry", isolate=True), "max_crashes": 5}, CrashPolicy("retry", 5, isolate=True), {}),
    ({"on_crash": "skip", "merge": "concat", **ITEMS}, CrashPolicy("skip"), {"merge": "concat"}),
    ({"on_crash": "skip", "merge": list, **ITEMS}, CrashPolicy("skip"), {"merge": "list"}),
    ({"on_crash": "skip", "merge": sum, **ITEMS}, CrashPolicy("skip"), {"merge": "sum"}),
    ({"on_crash": "bisect", "results": "none", **ITEMS}, CrashPolicy("bisect"), {"results": "none"}),
    ({"on_crash": CrashPolicy(quarantine_after=1), **ITEMS}, CrashPolicy(quarantine_after=1), {}),
    ({"merge": join}, CrashPolicy(), {"merge": f"{__name__}:join"}),
    ({"merge": Namespace.join}, CrashPolicy(), {"merge": f"{__name__}:Namespace.join"}),
    ({"merge": "shop.tasks:Joined.up"}, CrashPolicy(), {"merge": "shop.tasks:Joined.up"}),
    ({"merge": "shop.tasks.join"}, CrashPolicy(), {"merge": "shop.tasks.join"}),
    ({"stall_timeout": "5m"}, CrashPolicy(), {"stall_timeout": 300.0}),
    ({"stall_timeout": timedelta(seconds=2)}, CrashPolicy(), {"stall_timeout": 2.0}),
    ({"items": "docs", "item_id": ["db", "id"]}, CrashPolicy(), {"item_id": ("db", "id")}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "policy", "more"), RIGHT)
def test_what_is_right_comes_to_a_policy(options: dict[str, Any], policy: CrashPolicy, more: dict[str, Any]) -> None:
    made = TaskOptions.validated(options)
    assert made.policy == policy
    assert {name: getattr(made, name) for name in more} == more


# -- of a batch ------------------------------------------------------------------------------------


@pytest.fixture
def plain(app: Celery) -> Any:
    """A task that declares nothing."""
    return app.task(handle, name="plain", shared=False)


@pytest.fixture
def itemised(app: Celery) -> Any:
    """A task that only names its items."""

    @app.task(name="itemised", shared=False)
    @tracked(**ITEMS)
    def itemised(docs: Any) -> None: ...

    return itemised


WRONG_OF_A_BATCH: list[tuple[dict[str, Any], str]] = [
    ({"on_crash": "skpi"}, "did you mean 'skip'"),
    ({"on_crash": 5}, "on_crash must be one of"),
    ({"max_crashes": 0}, "max_crashes must be a whole number"),
    ({"on_crash": CrashPolicy(max_crashes=2), "max_crashes": 3}, "max_crashes is given twice"),
    ({"oom_queue": "big"}, "a batch has no option 'oom_queue': it belongs to a policy, on_crash=CrashPolicy("),
    ({"on_crsah": "skip"}, "a batch has no option 'on_crsah': did you mean 'on_crash'"),
    ({"max_crash_rate": "x"}, "max_crash_rate"),
]


@pytest.mark.parametrize(("options", "said"), WRONG_OF_A_BATCH)
def test_what_is_wrong_in_a_batch_is_said_at_the_call(
    app: Celery, plain: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(errors.InvalidOption, match=said.replace("(", r"\(")):
        Batch("wrong", app=app, **options)
    with pytest.raises(errors.InvalidOption, match=said.replace("(", r"\(")):
        chord([plain.s([])], batch=options, app=app)(plain.s())
    assert BatchTrack.of(app).store.list_batches() == [], "and nothing was written"


def test_options_of_a_batch_that_are_given_to_the_call_are_not_lost_without_a_word(app: Celery, plain: Any) -> None:
    with pytest.raises(errors.InvalidOption, match="batch= belongs to the chord"):
        chord([plain.s([])], app=app)(plain.s(), batch={"on_crash": "retry"})


def test_a_batch_may_ask_of_a_task_only_what_it_can_do(app: Celery, plain: Any, itemised: Any) -> None:
    for options, task, said in (
        ({"on_crash": "skip"}, plain, r"\(plain\): on_crash='skip' needs items="),
        ({"on_crash": CrashPolicy(quarantine_after=1)}, plain, r"\(plain\): quarantine_after needs items="),
        ({"on_crash": "skip"}, itemised, r"\(itemised\): on_crash='skip' splits a child"),
    ):
        with pytest.raises(errors.InvalidOption, match=said):
            Batch.create("asks", [task.s([])], app=app, **options)
        with pytest.raises(errors.InvalidOption, match=said), Batch("asks", app=app, **options) as batch:
            batch.add(task.s([]))
    store = BatchTrack.of(app).store
    rows = store.batches(store.list_batches())
    assert [row.status for row in rows.values()] == ["cancelled"] * 3, "those that were filled already"


def test_a_batch_without_results_needs_no_merge(app: Celery, itemised: Any) -> None:
    batch = Batch.create("none", [itemised.s([{"id": "a"}])], app=app, on_crash="skip", results="none")
    assert batch.status == "completed"


def test_a_batch_whose_own_policy_does_not_split_needs_nothing(app: Celery) -> None:
    @app.task(name="splitting", shared=False)
    @tracked(items="docs", on_crash="skip", merge="concat")
    def splitting(docs: Any) -> None: ...

    assert Batch.create("plain", [splitting.s(["a"])], app=app, on_crash="record").status == "completed"


def policy(app: Celery, task: Any, *args: Any, override: Any = None, **kwargs: Any) -> Any:
    """What it comes to for a child."""
    return declare.policy_of(task, 3, override, args, kwargs)


def test_a_batchs_own_policy_goes_before_the_tasks_field_by_field(app: Celery) -> None:
    @app.task(name="careful", shared=False)
    @tracked(on_crash=CrashPolicy("skip", max_crashes=7, isolate=True, quarantine_after=4), merge="sum", **ITEMS)
    def careful(docs: Any) -> None: ...

    own = policy(app, careful, ["a"])
    assert (own.on_crash, own.max_crashes, own.isolate, own.items, own.merge) == ("skip", 7, True, ("args", 0), "sum")
    named = policy(app, careful, ["a"], override={"on_crash": "record"})
    assert (named.on_crash, named.max_crashes, named.isolate, named.process) == ("record", 7, True, False)
    assert named.items == ("args", 0), "which quarantine asks for"
    counted = policy(app, careful, ["a"], override={"max_crashes": 1})
    assert (counted.on_crash, counted.max_crashes) == ("skip", 1)
    whole = policy(app, careful, ["a"], override=CrashPolicy("retry").as_option())
    assert (whole.on_crash, whole.isolate, whole.quarantine_after, whole.items) == ("retry", False, None, None)
    assert whole.max_crashes == 3, "the setting's"


# -- where the items stand in a call ---------------------------------------------------------------

DOCS = [{"id": "a"}, {"id": "b"}]


def where(task: Any, *args: Any, **kwargs: Any) -> tuple[str | int, ...] | None:
    """The path, which must lead to what the row's identifiers are made of."""
    path = declare.items_path(task, args, kwargs)
    if path is not None:
        found: Any = {"args": args, "kwargs": kwargs}
        for step in path:
            found = found[step]
        assert found is DOCS
        assert declare.items_of(task, args, kwargs) == (("a", "b"), 2)
    return path


def test_items_are_found_by_the_arguments_place_or_name(app: Celery) -> None:
    @app.task(name="free", shared=False)
    @tracked(**ITEMS)
    def free(how: str, docs: Any = (), *more: Any, trace: bool = False) -> None: ...

    @app.task(name="bound", shared=False, bind=True)
    @tracked(**ITEMS)
    def bound(self: Task, docs: Any, how: str = "fast") -> None: ...

    @app.task(name="by_name_only", shared=False)
    @tracked(**ITEMS)
    def by_name_only(*, docs: Any) -> None: ...

    @app.task(name="by_place_only", shared=False)
    @tracked(**ITEMS)
    def by_place_only(docs: Any, /, how: str = "") -> None: ...

    class ByClass(Task):
        name = "by_class"

        @tracked(**ITEMS)
        def run(self, how: str, docs: Any) -> None: ...

    by_class = app.tasks[app.register_task(ByClass()).name]
    assert where(free, "fast", DOCS) == ("args", 1)
    assert where(free, "fast", DOCS, "more", trace=True) == ("args", 1)
    assert where(free, "fast", docs=DOCS) == ("kwargs", "docs")
    assert where(free, docs=DOCS, how="fast") == ("kwargs", "docs")
    assert where(bound, DOCS) == ("args", 0), "self is no argument of a message"
    assert where(bound, docs=DOCS) == ("kwargs", "docs")
    assert where(by_name_only, docs=DOCS) == ("kwargs", "docs")
    assert where(by_place_only, DOCS, how="x") == ("args", 0)
    assert where(by_class, "fast", DOCS) == ("args", 1)


def test_items_within_a_pydantic_argument_are_found_as_they_are_sent(app: Celery) -> None:
    @app.task(name="order", shared=False, pydantic=True)
    @tracked(on_crash="skip", merge="sum", **ITEMS)
    def order(other: Other, order: Order) -> int:
        return len(order.docs)

    @app.task(name="bound_order", shared=False, pydantic=True, bind=True)
    @tracked(on_crash="skip", merge="sum", **ITEMS)
    def bound_order(self: Task, order: Order) -> int:
        return len(order.docs)

    assert where(order, {"number": 1}, {"docs": DOCS}) == ("args", 1, "docs")
    assert where(order, {"number": 1}, order={"docs": DOCS}) == ("kwargs", "order", "docs")
    assert where(bound_order, {"docs": DOCS, "how": "slow"}) == ("args", 0, "docs")
    batch = Batch.create("orders", [order.s(Other(), Order(docs=DOCS)), bound_order.s(Order(docs=DOCS))], app=app)
    assert list(batch.results()) == [2, 2]
    assert [child.items for child in batch.children()] == [["a", "b"]] * 2


def test_items_that_stand_nowhere_in_the_message_have_no_place(app: Celery) -> None:
    @app.task(name="defaulted", shared=False)
    @tracked(items="docs")
    def defaulted(how: str = "", docs: Any = ("x", "y")) -> None: ...

    @app.task(name="collected", shared=False)
    @tracked(items="docs")
    def collected(*docs: Any) -> None: ...

    @app.task(name="computed", shared=False)
    @tracked(items=lambda docs: docs)
    def computed(docs: Any) -> None: ...

    @app.task(name="undeclared", shared=False)
    def undeclared(docs: Any) -> None: ...

    for task, args in ((defaulted, ("fast",)), (collected, ("x", "y")), (computed, (["x", "y"],))):
        assert declare.items_of(task, args, {}) == (("x", "y"), 2)
        assert declare.items_path(task, args, {}) is None
    assert declare.items_path(undeclared, (DOCS,), {}) is None


def test_a_child_whose_items_have_no_place_follows_a_splitting_batch_as_a_whole(app: Celery) -> None:
    @app.task(name="collected", shared=False)
    @tracked(items="docs", merge="sum")
    def collected(*docs: Any) -> None: ...

    resolved = policy(app, collected, "x", "y", override={"on_crash": "skip"})
    assert (resolved.on_crash, resolved.items) == ("skip", None)
