"""pytest-celery with process nodes: `celery_setup` without Docker.

pytest-celery would otherwise parametrise over container images. A test module points the worker at its own
application by overriding `celery_node_app`, and adds environment with `celery_node_env`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_celery import CeleryTestWorker, CeleryWorkerCluster

from tests.nodes import ProcContainer, ProcessWorker


@pytest.fixture
def celery_node_app() -> str:
    """Module of the Celery application that the worker runs."""
    return "tests.acceptance.apps.smoke"


@pytest.fixture
def celery_node_env(redis_url: str) -> dict[str, str]:
    """Environment in which the application finds its services."""
    return {"BATCHTRACK_TEST_BROKER_URL": redis_url, "BATCHTRACK_TEST_RESULT_BACKEND": redis_url}


@pytest.fixture
def celery_broker_cluster() -> None:
    """The broker is a fixture of ours, not a node."""


@pytest.fixture
def celery_backend_cluster() -> None:
    """The result backend is a fixture of ours, not a node."""


@pytest.fixture
def celery_worker_cluster_config(redis_url: str) -> dict[str, Any]:
    """From which pytest-celery configures `celery_setup.app`."""
    place = {"urls": [redis_url], "host_urls": [redis_url]}
    return {"celery_broker_cluster_config": place, "celery_backend_cluster_config": place}


@pytest.fixture
def celery_worker_cluster(
    celery_node_app: str, celery_node_env: dict[str, str], tmp_path: Path
) -> Iterator[CeleryWorkerCluster]:
    container = ProcContainer(ProcessWorker(celery_node_app, folder=tmp_path, env=celery_node_env))
    try:
        container.start().ready()
        yield CeleryWorkerCluster(CeleryTestWorker(container, app=None))
    finally:
        # A cluster's teardown leaves its nodes alone.
        container.teardown()
