"""pytest-celery drives workers that are plain processes."""

from __future__ import annotations

import signal
from pathlib import Path

from pytest_celery import CeleryTestSetup

from tests.helpers import group_members
from tests.nodes import ProcessWorker


def add(setup: CeleryTestSetup, left: int, right: int) -> int:
    result: int = setup.app.send_task("smoke.add", (left, right)).get(timeout=20)
    return result


def test_a_killed_node_runs_tasks_again_after_its_restart(celery_setup: CeleryTestSetup) -> None:
    worker = celery_setup.worker
    assert add(celery_setup, 1, 2) == 3
    worker.assert_log_exists("adding 1 and 2", timeout=10)

    worker.kill()
    assert worker.container.status == "exited"
    waiting = celery_setup.app.send_task("smoke.add", (3, 4))
    worker.restart()

    assert waiting.get(timeout=20) == 7
    worker.assert_log_exists("adding 3 and 4", timeout=10)


def test_a_hanging_worker_is_ended_with_its_pool(
    celery_node_app: str, celery_node_env: dict[str, str], tmp_path: Path
) -> None:
    with ProcessWorker(celery_node_app, folder=tmp_path, env=celery_node_env) as worker:
        main = worker.pid
        assert len(group_members(main)) == 3, "the main process and two pool processes"
        worker.send_signal(signal.SIGSTOP)
    assert not group_members(main)


def test_a_terminated_worker_ends_by_itself_and_comes_back(
    celery_node_app: str, celery_node_env: dict[str, str], tmp_path: Path
) -> None:
    with ProcessWorker(celery_node_app, folder=tmp_path, env=celery_node_env) as worker:
        first = worker.pid
        worker.terminate()
        assert worker.wait() == 0
        assert worker.restart().pid != first
        worker.kill()
        assert worker.exit_code == -signal.SIGKILL
