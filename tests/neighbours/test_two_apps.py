"""Two apps in one process, each with a tracking database of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app, shared_task
from celery.contrib.testing.worker import start_worker

from celery_batchtrack import Batch, BatchTrack, chord, current_batch, errors
from tests.acceptance.scene import QUICK
from tests.helpers import unique


def made(name: str, folder: Path) -> Celery:
    app = Celery(name, broker=f"memory://{unique()}", set_as_current=False)
    app.conf.update(
        QUICK, batchtrack_database_url=f"sqlite:///{folder / name}.db", batchtrack_auto_migrate=True,
        batchtrack_blackbox_dir=str(folder / f"{name}-boxes"), task_always_eager=True,
        task_default_queue=name,  # kombu has one broker in memory for the whole process
    )  # fmt: skip
    BatchTrack(app)

    @app.task(name="both.name", shared=False)
    def name_of_app(*args: Any) -> str:
        """Of the same name in both."""
        return name

    return app


@pytest.fixture
def apps(tmp_path: Path) -> Iterator[tuple[Celery, Celery]]:
    both = made("left", tmp_path), made("right", tmp_path)
    yield both
    for app in both:
        app.batchtrack.reset()


def task_of(app: Celery, name: str) -> Callable[[Callable[..., Any]], Any]:
    return app.task(name=name, shared=False)  # type: ignore[no-any-return]


def see(app: Celery) -> Any:
    return app.tasks["both.name"]


def test_each_batch_is_in_its_own_apps_database(apps: tuple[Celery, Celery]) -> None:
    for app in apps:
        batch = Batch.create("own", [see(app).s()], app=app, on_success=see(app).s())
        assert batch.wait(10, callbacks=True) == "completed"
        assert list(batch.results()) == [app.main]
        assert [found.id for found in Batch.find(app=app)] == [batch.id]


def test_a_chord_goes_to_the_database_of_its_bodys_app(apps: tuple[Celery, Celery]) -> None:
    left, right = apps
    result = chord([see(right).s()])(see(right).s())
    assert result.get(timeout=10) == "right"
    assert [found.id for found in Batch.find(app=right)] == [result.batch.id]
    assert Batch.find(app=left) == []


def test_the_id_of_another_apps_batch_is_not_found(apps: tuple[Celery, Celery]) -> None:
    left, right = apps
    batch = Batch.create("own", [see(left).s()], app=left)
    with pytest.raises(errors.BatchNotFound, match=str(batch.id)):
        Batch.get(batch.id, app=right)
    assert Batch.get(batch.id, app=left).status == "completed"


@contextlib.contextmanager
def current(app: Celery) -> Iterator[None]:
    before = current_app._get_current_object()
    app.set_current()
    try:
        yield
    finally:
        before.set_current()


def test_without_naming_one_it_is_the_current_app(apps: tuple[Celery, Celery]) -> None:
    left, right = apps
    batch = Batch.create("own", [see(left).s()], app=left)
    with current(left):
        assert Batch.get(batch.id).id == batch.id
    with current(right), pytest.raises(errors.BatchNotFound):
        Batch.get(batch.id)
    nobody = Celery("nobody", set_as_current=False)
    with current(nobody), pytest.raises(errors.ImproperlyConfigured, match=r"'nobody' has no BatchTrack.*app="):
        Batch.get(batch.id)


def test_a_child_of_one_app_may_start_a_batch_of_the_other(apps: tuple[Celery, Celery]) -> None:
    left, right = apps
    seen: list[Any] = []

    @task_of(right, "right.inner")
    def inner() -> str:
        seen.append(current_batch().id)
        return "inner"

    @task_of(left, "left.outer")
    def outer() -> str:
        batch = Batch.create("inner", [inner.s()], app=right)
        seen.append(current_batch().id)
        return f"{batch.id} {batch.status}"

    batch = Batch.create("outer", [outer.s()], app=left)
    (result,) = batch.results()
    (found,) = Batch.find(app=right)
    assert result == f"{found.id} completed"
    assert seen == [found.id, batch.id], "each run knows its own batch"
    assert Batch.get(found.id, app=right).row.parent_task == "left.outer"


def test_a_shared_task_is_tracked_by_the_app_that_runs_it(apps: tuple[Celery, Celery]) -> None:
    name = unique("both.shared")  # `shared.name` would be asked of the current app, whichever that is

    @shared_task(name=name)
    def shared() -> str:
        return str(current_batch().id)

    for app in apps:
        task = app.tasks[name]
        batch = Batch.create("shared", [task.s()], app=app)
        assert list(batch.results()) == [str(batch.id)]


def test_a_signature_of_another_apps_task_runs_in_the_batchs_own_app(apps: tuple[Celery, Celery]) -> None:
    """By its name, as a message would: never untracked, and never in the other database."""
    left, right = apps
    batch = Batch.create("foreign", [see(left).s()], app=right)
    assert batch.wait(10) == "completed"
    assert list(batch.results()) == ["right"]
    assert Batch.find(app=left) == []


def test_a_worker_of_one_app_leaves_the_batches_of_the_other_alone(apps: tuple[Celery, Celery]) -> None:
    for app in apps:
        app.conf.update(task_always_eager=False, broker_transport_options={"polling_interval": 0.02})
    left, right = apps
    with start_worker(left, pool="solo", perform_ping_check=False, shutdown_timeout=20):
        batches = [Batch.create("own", [see(app).s()] * 3, app=app) for app in apps]
        assert batches[0].wait(10) == "completed"
        assert [row for row in left.batchtrack.store.workers(all=True) if row.kind == "worker"]
        assert not [row for row in right.batchtrack.store.workers(all=True) if row.kind == "worker"]
        assert [child.status for child in batches[1].children()] == ["pending"] * 3
