"""Coming and going: workers that do not have the package yet, or any more, beside those that have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.result import AsyncResult

from celery_batchtrack import chord
from tests.acceptance.scene import Scene
from tests.acceptance.test_batch_life import LIFE
from tests.helpers import eventually, unique
from tests.nodes import ProcessWorker

STOCK = "tests.acceptance.apps.stock"


@pytest.fixture
def scene(tmp_path: Path, redis_url: str, postgres_url: str) -> Iterator[Scene]:
    made = Scene(
        tmp_path, redis_url, postgres_url, module=LIFE, result_backend=redis_url,
        batchtrack_redispatch_after=1.0, batchtrack_redispatch_wait=1.0,
    )  # fmt: skip
    yield made
    assert made.violations() == []
    made.close()


def old_worker(scene: Scene, *args: str) -> ProcessWorker:
    folder = scene.folder / unique("old")
    folder.mkdir()
    env = {"BATCHTRACK_TEST_BROKER_URL": scene.broker, "BATCHTRACK_TEST_RESULT_BACKEND": scene.broker}
    return ProcessWorker(STOCK, *args, folder=folder, env=env)


def test_a_child_that_an_old_worker_took_is_sent_again_until_one_that_tracks_it_runs_it(scene: Scene) -> None:
    """It runs twice: hence the order of deployment in the docs. It is never lost."""
    with old_worker(scene) as old:
        old.wait_ready()
        batch = scene.start(*(scene.tasks.value.s(at, scene.place("runs")) for at in range(6)))
        eventually(lambda: len(scene.lines("runs.stock")) >= 6, 30, what="the old worker to have taken them all")
        assert scene.statuses(batch) == ["pending"] * 6, "it reports to nobody"
    with scene.worker() as worker:
        worker.wait_ready()
        assert batch.wait(60) == "completed"
    assert sorted(scene.lines("runs")) == sorted(map(str, range(6)))


def test_a_chord_that_reaches_an_old_worker_is_run_as_celerys_own(scene: Scene) -> None:
    tasks = scene.tasks
    made = chord(
        [tasks.value.s(1, scene.place("runs")), tasks.value.s(2, scene.place("runs"))],
        tasks.kept.s(scene.place("body")), app=scene.app, batch={"name": "travelling", "tolerance": 1},
    )  # fmt: skip
    client = Celery("client", broker=scene.broker, backend=scene.broker, set_as_current=False)
    with old_worker(scene, "--concurrency=3") as old:
        old.wait_ready()
        started = client.send_task("stock.relay", [json.loads(json.dumps(made))])
        body_id = started.get(timeout=30)
        assert AsyncResult(body_id, app=client).get(timeout=30) == 2
    assert scene.lines("body.stock") == ["[1, 2]"]
    assert scene.batchtrack.store.list_batches() == [], "nobody tracked it"


def test_switched_off_new_chords_are_celerys_and_running_batches_end(scene: Scene) -> None:
    tasks = scene.tasks
    with scene.worker("--concurrency=3") as worker:
        worker.wait_ready()
        running = chord([tasks.held.s(1, scene.place("held"))], app=scene.app)(tasks.kept.s(scene.place("first")))
        scene.wait_met("held")
        scene.app.conf.batchtrack_enabled = False
        scene.batchtrack.reset()
        untracked = chord([tasks.value.s(2)], app=scene.app)(tasks.kept.s(scene.place("second")))
        assert untracked.get(timeout=30) == 1
        assert not hasattr(untracked, "batch")
        scene.go("held")
        assert running.get(timeout=30) == 1
    assert (scene.lines("first"), scene.lines("second")) == (["[1]"], ["[2]"])
    assert [scene.batchtrack.store.batch(each).status for each in scene.batchtrack.store.list_batches()] == [
        "completed"
    ]
