"""One scene per test, once on each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_batchtrack.store import Store
from tests.store.kit import HERE, Scene


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url, auto_migrate=True)
    yield store
    store.dispose()


@pytest.fixture
def scene(store: Store) -> Scene:
    """A store that knows one living worker, `scene.worker_id`."""
    scene = Scene(store)
    scene.worker(HERE, id=scene.worker_id, name="w1@here", pid=40)
    return scene
