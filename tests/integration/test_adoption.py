"""What an existing application runs into when it adopts the package."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, Task, shared_task
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError
from celery.utils.imports import symbol_by_name
from celery.worker.request import Request
from pydantic import BaseModel

from celery_batchtrack import Batch, BatchTrack, Tolerance, chord, current_batch, current_child, errors, tracked
from celery_batchtrack.glue.request import TrackedRequest
from celery_batchtrack.glue.tracked_task import TrackedTask
from tests.acceptance.scene import QUICK, environment, load
from tests.helpers import unique
from tests.nodes import ProcessWorker

#: Nobody listens there, and the refusal is immediate.
UNREACHABLE = "postgresql+psycopg://nobody@127.0.0.1:1/none"


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'batchtrack.db'}"


@pytest.fixture
def conf(database: str, tmp_path: Path) -> dict[str, Any]:
    return {
        **QUICK,
        "batchtrack_database_url": database,
        "batchtrack_blackbox_dir": str(tmp_path / "boxes"),
        "task_always_eager": True,
    }


def bare_app(name: str = "shop") -> Celery:
    return Celery(name, broker="memory://", set_as_current=False)


@pytest.fixture
def app(conf: dict[str, Any]) -> Iterator[Celery]:
    """Eager, with one task of each kind."""
    app = bare_app()
    app.conf.update(conf)
    BatchTrack(app)
    yield app
    app.batchtrack.reset()


def task_of(app: Celery, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    return app.task(shared=False, **options)  # type: ignore[no-any-return]


def add_to(app: Celery, **options: Any) -> Any:
    @task_of(app, name="shop.add", **options)
    @tracked(items="pair")
    def add(pair: list[int]) -> int:
        return sum(pair)

    return add


@contextlib.contextmanager
def working(app: Celery, **options: Any) -> Iterator[Any]:
    """A worker in a thread of this process, for what needs a real Request but no crash."""
    app.conf.update(task_always_eager=False, broker_transport_options={"polling_interval": 0.02})
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=20, **options) as worker:
        yield worker


def statuses(batch: Batch) -> list[str]:
    return [child.status for child in batch.children()]


def assert_tracks(app: Celery, task: Any) -> Batch:
    batch = Batch.create("adopted", [task.s([1, 2]), task.s([3, 4])], app=app)
    assert batch.wait(10) == "completed"
    assert list(batch.results()) == [3, 7]
    assert [child.items for child in batch.children()] == [["1", "2"], ["3", "4"]]
    return batch


# -- installing, in every order ------------------------------------------------------------------------------


def test_before_the_configuration(conf: dict[str, Any]) -> None:
    app = bare_app()
    BatchTrack(app)
    task = add_to(app)
    app.conf.update(conf)
    assert_tracks(app, task)


def test_before_a_configuration_object_although_something_read_the_configuration(conf: dict[str, Any]) -> None:
    app = bare_app()
    BatchTrack(app)
    assert app.conf.task_always_eager is False
    app.config_from_object(SimpleNamespace(**conf))
    assert_tracks(app, add_to(app))


def test_after_finalization(conf: dict[str, Any]) -> None:
    app = bare_app()
    app.conf.update(conf)
    task = add_to(app)
    app.finalize()
    BatchTrack(app)
    assert_tracks(app, task)


def test_a_task_registered_long_after(app: Celery) -> None:
    class Late(Task):  # type: ignore[misc]
        name = "shop.late"

        @tracked(items="pair")
        def run(self, pair: list[int]) -> int:
            return sum(pair)

    app.finalize()
    assert_tracks(app, app.register_task(Late()))
    assert_tracks(app, add_to(app))


def test_every_task_has_a_class_of_its_own(app: Celery) -> None:
    class Base(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

    for name in ("shop.a", "shop.b"):
        app.task(sum_pair, name=name, base=Base, shared=False)
    one, two = (type(app.tasks[name]) for name in ("shop.a", "shop.b"))
    assert issubclass(one, TrackedTask)
    assert issubclass(two, Base)
    assert one is not two
    assert not issubclass(Base, TrackedTask), "the user's class stays as it is"


def sum_pair(pair: list[int]) -> int:
    return sum(pair)


def test_a_second_batchtrack_is_refused(app: Celery) -> None:
    with pytest.raises(errors.ImproperlyConfigured, match="called twice"):
        BatchTrack(app)


def test_an_app_without_it_is_told_so() -> None:
    with pytest.raises(errors.ImproperlyConfigured, match=r"call BatchTrack\(app\)"):
        Batch("lonely", app=bare_app())


def test_a_shared_task_belongs_to_each_of_two_apps(conf: dict[str, Any], tmp_path: Path) -> None:
    name = unique("shared")

    @shared_task(name=name)
    @tracked(items="pair")
    def add(pair: list[int]) -> int:
        return sum(pair)

    apps = []
    for at in range(2):
        app = bare_app(f"shop{at}")
        app.conf.update(conf, batchtrack_database_url=f"sqlite:///{tmp_path / f'{at}.db'}")
        BatchTrack(app)
        apps.append(app)
    batches = [assert_tracks(app, app.tasks[name]) for app in apps]
    for app, other in ((apps[0], batches[1]), (apps[1], batches[0])):
        with pytest.raises(errors.BatchNotFound):
            Batch.get(other.id, app=app)
        assert len(app.batchtrack.store.workers(all=True)) == 1


# -- configuration -----------------------------------------------------------------------------------------


def test_the_celery_namespace_of_a_settings_module(database: str) -> None:
    settings = SimpleNamespace(
        DEBUG=True, CELERY_BATCHTRACK_DATABASE_URL=database, CELERY_BATCHTRACK_LEASE="40s",
        CELERY_TASK_ALWAYS_EAGER=True,
        CELERY_BATCHTRACK_RETENTION={"completed": "1d"},
    )  # fmt: skip
    app = bare_app()
    app.config_from_object(settings, namespace="CELERY")
    BatchTrack(app)
    assert app.batchtrack.settings.lease == 40
    assert app.batchtrack.settings.retention["completed"] == 86400
    assert_tracks(app, add_to(app))


@pytest.mark.parametrize(
    ("key", "namespace"),
    [
        ("batchtrack_laese", None), ("BATCHTRACK_LAESE", None), ("CELERY_BATCHTRACK_LAESE", "CELERY"),
        ("CELERY_BATCHTRACK_LAESE", None), ("BATCHTRACK_LAESE", "CELERY"),
    ],
)  # fmt: skip
def test_a_misspelt_setting_is_answered_in_every_spelling(key: str, namespace: str | None) -> None:
    app = bare_app()
    app.config_from_object(SimpleNamespace(**{key: 3}), namespace=namespace)
    BatchTrack(app)
    right = "CELERY_BATCHTRACK_LEASE" if namespace else "batchtrack_lease"
    with pytest.raises(errors.ImproperlyConfigured, match=f"{key} is not a setting: did you mean '{right}'"):
        app.batchtrack.settings


def test_a_misspelt_setting_in_a_dictionary_is_answered_too() -> None:
    app = bare_app()
    BatchTrack(app)
    app.conf.batchtrack_detect_evry = 3
    with pytest.raises(errors.ImproperlyConfigured, match="did you mean 'batchtrack_detect_every'"):
        app.batchtrack.settings


def test_a_spelling_that_does_not_count_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    app = bare_app()
    app.config_from_object(SimpleNamespace(BATCHTRACK_LEASE=99), namespace="CELERY")
    BatchTrack(app)
    with caplog.at_level(logging.WARNING, "celery_batchtrack"):
        assert app.batchtrack.settings.lease == 15
    assert "BATCHTRACK_LEASE is ignored: write it as CELERY_BATCHTRACK_LEASE" in caplog.text


def test_the_environment_overrides(app: Celery) -> None:
    with environment({"BATCHTRACK_LEASE": "44", "BATCHTRACK_ENABLED": "no"}):
        assert app.batchtrack.settings.lease == 44
        assert app.batchtrack.enabled is False


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lease", "soon", "batchtrack_lease 'soon' is no duration"),
        ("heartbeat", 0, "batchtrack_heartbeat must be more than 0 seconds"),
        ("lease", 0.6, "at least twice batchtrack_heartbeat"),
        ("shards", 1.5, "batchtrack_shards must be a whole number"),
        ("enabled", "maybe", "batchtrack_enabled must be true or false"),
    ],
)
def test_a_wrong_value_names_its_setting(app: Celery, name: str, value: Any, said: str) -> None:
    app.conf[f"batchtrack_{name}"] = value
    with pytest.raises(errors.ImproperlyConfigured, match=said):
        app.batchtrack.settings


def test_a_server_broker_needs_a_database() -> None:
    app = Celery("shop", broker="redis://127.0.0.1:1/0", set_as_current=False)
    BatchTrack(app)
    with pytest.raises(errors.ImproperlyConfigured, match="batchtrack_database_url is not set"):
        Batch.create("none", [], app=app)


def test_batchtrack_disabled_sends_new_chords_through_celery(app: Celery) -> None:
    app.conf.batchtrack_enabled = False
    app.conf.result_backend = "cache+memory://"
    add = add_to(app)

    @task_of(app, name="shop.total")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    assert chord([add.s([1, 2]), add.s([3])])(total.s()).get() == 6
    assert app.batchtrack._tracker is None


# -- beat --------------------------------------------------------------------------------------------------------

DETECT = "celery_batchtrack.detect_crashes"


def detect_entries(app: Celery) -> dict[str, Any]:
    return {name: entry for name, entry in app.conf.beat_schedule.items() if entry["task"] == DETECT}


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_detector_is_in_beats_schedule_with_expiry_and_queue(when: str) -> None:
    app = bare_app()
    if when == "before":
        BatchTrack(app)
    app.config_from_object(
        {"batchtrack_detect_every": 7, "batchtrack_detect_queue": "ops", "beat_schedule": {"mine": {"task": "x"}}}
    )
    if when == "after":
        BatchTrack(app)
    assert detect_entries(app) == {
        "batchtrack-detect-crashes": {"task": DETECT, "schedule": 7.0, "options": {"expires": 7.0, "queue": "ops"}}
    }
    assert app.conf.beat_schedule["mine"] == {"task": "x"}


@pytest.mark.parametrize("name", ["batchtrack-detect-crashes", "nightly"])
def test_a_users_own_entry_of_the_detector_overrides(name: str) -> None:
    mine = {"task": DETECT, "schedule": 99.0}
    app = bare_app()
    app.conf.beat_schedule = {name: mine}
    BatchTrack(app)
    assert detect_entries(app) == {name: mine}


# -- outside a batch ---------------------------------------------------------------------------------------------


@pytest.fixture
def cut_off(app: Celery) -> Celery:
    """The tracking database is away."""
    app.conf.batchtrack_database_url = UNREACHABLE
    return app


def test_a_direct_call_never_touches_the_database(cut_off: Celery) -> None:
    add = add_to(cut_off)
    assert add([1, 2]) == 3
    assert add.run([1, 2]) == 3
    assert add.apply(([1, 2],)).get() == 3
    assert add.delay([1, 2]).get() == 3
    assert cut_off.batchtrack._tracker is None


def test_an_untracked_message_runs_while_the_database_is_away(cut_off: Celery) -> None:
    cut_off.conf.result_backend = "cache+memory://"
    add = add_to(cut_off)
    with working(cut_off):
        assert add.delay([1, 2]).get(timeout=20) == 3


def test_a_batch_while_the_database_is_away_is_a_clear_error(cut_off: Celery) -> None:
    with pytest.raises(errors.DatabaseUnavailable, match=r"nobody@127\.0\.0\.1:1/none"):
        Batch.create("none", [add_to(cut_off).s([1])], app=cut_off)


def test_a_direct_call_from_within_a_child_is_not_the_child(app: Celery) -> None:
    @task_of(app, name="shop.recursive", bind=True)
    def recursive(self: Task, depth: int) -> int:
        return 1 if depth == 0 else 1 + recursive(depth - 1)

    batch = Batch.create("recursive", [recursive.s(3)], app=app)
    assert list(batch.results()) == [4]
    assert [child.attempt for child in batch.children()] == [1]


# -- the decorator -----------------------------------------------------------------------------------------------


def test_the_decorator_returns_the_same_function() -> None:
    def function(docs: list[int]) -> None: ...

    assert tracked(items="docs")(function) is function
    assert tracked(function) is function


def test_the_wrong_order_is_named(app: Celery) -> None:
    task = task_of(app, name="shop.x")(lambda_free)
    with pytest.raises(TypeError, match=r"tracked\(\) goes below @app.task"):
        tracked(items="docs")(task)
    with pytest.raises(TypeError, match=r"tracked\(\) goes below @app.task"):
        tracked(task)


def lambda_free(docs: list[int]) -> None: ...


def test_a_class_is_refused() -> None:
    with pytest.raises(errors.InvalidOption, match=r"run\(\) method of a Task class"):
        tracked(type("K", (), {}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"itmes": "docs"}, "no option 'itmes': did you mean 'items'"),
        ({"items": "dosc"}, "no argument 'dosc' for items: did you mean 'docs'"),
        ({"item_id": "id"}, "item_id needs items"),
        ({"items": 3}, "items must be"),
        ({"items": "docs", "item_id": 3}, "item_id must be"),
        ({"on_crash": "rtry"}, "did you mean 'retry'"),
        ({"on_crash": "skip"}, "needs items= to name the argument"),
        ({"max_crashes": 0}, "max_crashes must be"),
    ],
)
def test_a_wrong_option_is_an_error_at_the_declaration(options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.InvalidOption, match=said):
        tracked(**options)(lambda_free)


def test_an_items_argument_that_is_not_there_is_an_error_at_the_call(app: Celery) -> None:
    @task_of(app, name="shop.open", typing=False)
    @tracked(items="docs")
    def open_ended(**kwargs: Any) -> None: ...

    with pytest.raises(errors.InvalidOption, match="this call has no argument 'docs'"):
        Batch.create("none", [open_ended.s(other=1)], app=app)
    assert Batch.create("one", [open_ended.s(docs=["a"])], app=app).wait(5) == "completed"


def test_an_annotation_tracks_the_task_of_another_package(app: Celery) -> None:
    app.conf.task_annotations = {"vendor.ocr": {"batchtrack": {"items": "pages"}}}

    @task_of(app, name="vendor.ocr")
    def ocr(pages: list[str]) -> int:
        return len(pages)

    batch = Batch.create("vendor", [ocr.s(["p1", "p2"])], app=app)
    assert [child.items for child in batch.children()] == [["p1", "p2"]]


class Order(BaseModel):
    number: int


def test_pydantic_arguments_arrive_as_models(app: Celery) -> None:
    @task_of(app, name="shop.order", pydantic=True)
    def order(order: Order) -> int:
        assert isinstance(order, Order)
        return order.number

    assert list(Batch.create("pydantic", [order.s({"number": 3})], app=app).results()) == [3]


# -- other people's classes --------------------------------------------------------------------------------------


def wrapped_like_sentry(calls: list[str], original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.name)
        return original(self, *args, **kwargs)

    return __call__


@pytest.mark.parametrize("when", ["before", "after"])
def test_sentrys_way_of_patching(conf: dict[str, Any], when: str) -> None:
    """`type(task).__call__ = wrap(…)`: once for each task, and the run is tracked all the same."""
    calls: list[str] = []
    app = bare_app()
    app.conf.update(conf)

    class Base(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

    tasks = [app.task(sum_pair, name=f"shop.{at}", base=Base, shared=False) for at in "ab"]
    app.finalize()
    if when == "after":
        BatchTrack(app)
    for task in tasks:
        kind = type(task._get_current_object())
        kind.__call__ = wrapped_like_sentry(calls, kind.__call__)
    if when == "before":
        BatchTrack(app)
    batch = Batch.create("sentry", [task.s([1, 2]) for task in tasks], app=app)
    assert batch.wait(5) == "completed"
    assert [child.attempt for child in batch.children()] == [1, 1]
    assert calls == ["shop.a", "shop.b"]


class OwnRequest(Request):
    """As in Celery's documentation."""

    accepted: list[str] = []

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        self.accepted.append(self.name)
        super().on_accepted(pid, time_accepted)


@pytest.mark.parametrize("given", ["class", "string"])
def test_a_users_request_class_stays_in_use(app: Celery, given: str) -> None:
    own = OwnRequest if given == "class" else "tests.integration.test_adoption:OwnRequest"
    OwnRequest.accepted.clear()
    add = add_to(app, Request=own)
    mixed = symbol_by_name(app.tasks["shop.add"].Request)
    assert issubclass(mixed, TrackedRequest)
    assert issubclass(mixed, OwnRequest)
    with working(app):
        assert_tracks(app, add)
    assert OwnRequest.accepted == ["shop.add", "shop.add"]


def test_a_worker_in_a_thread_leaves_nothing_behind(app: Celery) -> None:
    """As in the tests of many applications: the process goes on, and has been a worker for a while."""
    add = add_to(app)
    with working(app):
        assert_tracks(app, add)
    (row,) = (row for row in app.batchtrack.store.workers(all=True) if row.kind == "worker")
    assert row.stopped_at is not None
    assert not [thread for thread in threading.enumerate() if thread.name == "batchtrack-attendant"]
    app.conf.task_always_eager = True
    assert_tracks(app, add)


def test_a_task_with_its_own_apply_async_is_sent_by_it(app: Celery) -> None:
    calls: list[str] = []

    class Counted(Task):  # type: ignore[misc]
        def apply_async(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.name)
            return super().apply_async(*args, **kwargs)

    @app.task(name="shop.counted", base=Counted, shared=False)
    @tracked(items="pair")
    def counted(pair: list[int]) -> int:
        return sum(pair)

    assert_tracks(app, counted)
    assert calls == ["shop.counted", "shop.counted"]


def test_a_task_with_its_own_strategy_is_a_clear_error(app: Celery) -> None:
    task = app.task(sum_pair, name="shop.batches", Strategy="celery_batches:strategy", shared=False)
    with pytest.raises(errors.UnsupportedCanvas, match="own worker strategy"):
        Batch.create("batches", [task.s([1])], app=app)


# -- eager mode, outcomes, callbacks ---------------------------------------------------------------------------------


@pytest.fixture
def shop(app: Celery) -> SimpleNamespace:
    """Tasks that note how they were called."""
    calls: list[tuple[Any, ...]] = []

    @task_of(app, name="shop.fail")
    def fail(number: int) -> None:
        raise ValueError(f"no {number}")

    @task_of(app, name="shop.note")
    def note(*args: Any) -> str:
        calls.append(args)
        return "noted"

    return SimpleNamespace(app=app, calls=calls, add=add_to(app), fail=fail, note=note)


def test_eager_mode_runs_a_batch_inline(shop: SimpleNamespace) -> None:
    @task_of(shop.app, name="shop.who", bind=True)
    def who(self: Task) -> list[Any]:
        return [str(current_batch().id), current_child().position, self.request.id]

    result = chord([who.s(), who.s()])(shop.note.s())
    assert result.get() == "noted"
    ((seen,),) = shop.calls
    ids = [child.task_id for child in result.batch.children()]
    assert seen == [[str(result.batch.id), at, ids[at]] for at in range(2)]


def test_zero_children_call_back_at_once(shop: SimpleNamespace) -> None:
    assert chord([], shop.note.s())().get(timeout=5) == "noted"
    assert shop.calls == [([],)]
    with Batch("none", app=shop.app, on_finish=shop.note.s("end")) as batch:
        pass
    assert batch.wait(5) == "completed"
    assert batch.progress().percent == 100
    assert len(shop.calls) == 2


@pytest.mark.parametrize(
    ("tolerance", "failures", "outcome"),
    [
        (0, 0, "completed"), (0, 1, "failed"), (1, 1, "partial"), (1, 2, "failed"), ("20%", 2, "partial"),
        ("19%", 2, "failed"), ("100%", 10, "partial"), (Tolerance(children=3), 3, "partial"),
    ],
)  # fmt: skip
def test_the_tolerance_decides_the_outcome(shop: SimpleNamespace, tolerance: Any, failures: int, outcome: str) -> None:
    children = [shop.fail.s(at) for at in range(failures)] + [shop.add.s([at]) for at in range(10 - failures)]
    batch = Batch.create(
        "tolerant", children, app=shop.app, tolerance=tolerance, on_success=shop.note.s("success"),
        on_failure=shop.note.s("failure"), on_finish=shop.note.s("finish"), on_first_failure=shop.note.s("first"),
    )  # fmt: skip
    assert batch.wait(5) == outcome
    called = [args[-1] for args in shop.calls]
    expected = ["success" if outcome in ("completed", "partial") else "failure", "finish"]
    assert called == (["first"] if failures else []) + expected
    if outcome == "partial":
        assert shop.calls[-2][0] == list(range(10 - failures)), "results of completed children, in order"


def test_the_first_failure_calls_once_while_others_still_run(shop: SimpleNamespace) -> None:
    batch = Batch.create(
        "failing", [shop.fail.s(1), shop.fail.s(2), shop.add.s([1])], app=shop.app, on_first_failure=shop.note.s()
    )
    ((report,),) = shop.calls
    assert (report["failed"], report["status"]) == (1, "running")
    assert batch.progress().failed == 2


@pytest.mark.parametrize(
    ("callback_arg", "expected"), [("results", [3, 7]), ("nothing", None), ("report", "completed")]
)
def test_what_a_success_callback_gets(shop: SimpleNamespace, callback_arg: str, expected: Any) -> None:
    Batch.create(
        "arg", [shop.add.s([1, 2]), shop.add.s([3, 4])], app=shop.app, on_success=shop.note.s("x"),
        callback_arg=callback_arg,
    )  # fmt: skip
    (args,) = shop.calls
    if callback_arg == "nothing":
        assert args == ("x",)
    else:
        assert (args[0]["status"] if callback_arg == "report" else args[0]) == expected


@pytest.mark.parametrize("eager", [True, False])
def test_errbacks_of_both_styles(shop: SimpleNamespace, eager: bool) -> None:
    """Old: the body's id. New: request, ChordError, traceback, as Celery's chord calls them."""
    seen: list[Any] = []

    @task_of(shop.app, name="shop.old_style")
    def old_style(body_id: str) -> None:
        seen.append(("old", body_id))

    @task_of(shop.app, name="shop.new_style")
    def new_style(request: Any, error: BaseException, traceback: Any) -> None:
        seen.append(("new", request.id, type(error), str(error)))

    with contextlib.nullcontext() if eager else working(shop.app):
        body = shop.note.s().on_error(old_style.s()).on_error(new_style.s())
        result = chord([shop.fail.s(7), shop.add.s([1])])(body)
        assert result.batch.wait(10, callbacks=True) == "failed"
    failed = next(iter(result.batch.children(status="failed")))
    assert ("old", result.id) in seen
    new = next(each for each in seen if each[0] == "new")
    assert new[:3] == ("new", result.id, ChordError)
    assert new[3] == f"Dependency {failed.task_id} raised ValueError('no 7')"
    assert len(seen) == 2
    assert not shop.calls
    with pytest.raises(errors.BatchFailed):
        result.get(timeout=5)


def test_the_parent_task_is_recorded(shop: SimpleNamespace) -> None:
    @task_of(shop.app, name="shop.upload", bind=True)
    def upload(self: Task) -> list[str]:
        batch = Batch.create("children", [shop.add.s([1])], app=shop.app)
        return [str(batch.id), self.request.id]

    batch_id, task_id = upload.delay().get()
    row = Batch.get(batch_id, app=shop.app).row
    assert (row.parent_task_id, row.parent_task) == (task_id, "shop.upload")


def test_a_retry_in_eager_mode_runs_again(app: Celery) -> None:
    runs: list[int] = []

    @task_of(app, name="shop.retry", autoretry_for=(ValueError,), default_retry_delay=0, max_retries=3)
    def retry() -> str:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError("again")
        return "in the end"

    batch = Batch.create("retry", [retry.s()], app=app)
    assert batch.wait(10) == "completed"
    assert list(batch.results()) == ["in the end"]
    assert len(runs) == 3


# -- who publishes is not who created ----------------------------------------------------------------------------------


@pytest.fixture
def adopting(tmp_path: Path, database: str) -> Iterator[tuple[Any, ProcessWorker]]:
    """A client of tenant "acme" whose broker is away, and a worker of tenant "other" that sweeps."""
    broker = f"batchtrack+filesystem://{tmp_path / 'broker'}"
    conf = {
        **QUICK, "batchtrack_database_url": database, "batchtrack_blackbox_dir": str(tmp_path / "boxes"),
        "broker_connection_timeout": 1,
    }  # fmt: skip
    values = {"BATCHTRACK_TEST_BROKER_URL": broker, "BATCHTRACK_TEST_CONF": json.dumps(conf)}
    here = load(
        "tests.acceptance.apps.adopting",
        {**values, "BATCHTRACK_TEST_BROKER_URL": "redis://127.0.0.1:1/0", "TENANT": "acme"},
    )
    with (
        environment({"TENANT": "acme"}),
        ProcessWorker(
            "tests.acceptance.apps.adopting", "--queues=celery,special", folder=tmp_path,
            env={**values, "TENANT": "other"},
        ) as worker,
    ):  # fmt: skip
        yield here, worker
    here.app.batchtrack.reset()


def test_a_sweep_of_another_process_sends_the_creators_context(adopting: tuple[Any, ProcessWorker]) -> None:
    here, _ = adopting
    special = here.context.s().set(
        queue="special", priority=7, countdown=0.5, expires=60, headers={"own": "mine"}, root_id="root", parent_id="up"
    )
    stamped = here.context.s()
    stamped.stamp(order="4711")
    batch = Batch.create("captured", [here.context.s(), special, stamped], app=here.app, on_success=here.context.s())
    assert {child.dispatches for child in batch.children()} <= {0, 1}
    batch.wait(30, callbacks=True)
    assert batch.status == "completed"
    plain, special_seen, stamped_seen = batch.results()
    ids = [child.task_id for child in batch.children()]

    for at, seen in enumerate((plain, special_seen, stamped_seen)):
        assert (seen["tenant"], seen["process"]) == ("acme", "other")
        assert seen["trace"] == {"parent": os.getpid()}
        assert seen["id"] == ids[at]
        assert seen["group"] == str(batch.id)
    assert plain["parent"] is None, "the sweep's task is not its parent"
    assert special_seen["own"] == "mine"
    assert (special_seen["root"], special_seen["parent"]) == ("root", "up")
    assert special_seen["queue"] == "special"
    assert special_seen["priority"] == 7
    assert special_seen["expires"] is not None
    assert stamped_seen["stamps"] == {"order": "4711"}
    child = list(batch.children())[1]
    assert (child.started_at - batch.row.started_at).total_seconds() >= 0.5
    (callback,) = batch.children(kind="callbacks")
    assert callback.result["tenant"] == "acme"


def test_an_expired_child_is_withdrawn(adopting: tuple[Any, ProcessWorker]) -> None:
    here, _ = adopting
    batch = Batch.create(
        "expiring", [here.context.s().set(countdown=60, expires=0.5), here.context.s()], app=here.app, tolerance=1
    )
    assert batch.wait(30) == "partial"
    assert [(child.status, child.cause) for child in batch.children()] == [
        ("cancelled", "expired"),
        ("completed", None),
    ]
