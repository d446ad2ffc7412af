"""Two or more real connections to PostgreSQL. Nothing sleeps: one side is held, the other is seen to wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from celery_batchtrack.store import Store
from tests.races.rivals import Held, Rivals
from tests.store.kit import HERE, Scene


@pytest.fixture
def scene(tables: None, postgres_url: str) -> Iterator[Scene]:
    store = Store(postgres_url)
    scene = Scene(store)
    scene.worker(HERE, id=scene.worker_id, name="w1@here", pid=40)
    yield scene
    store.dispose()


@pytest.fixture
def rivals(scene: Scene) -> Iterator[Rivals]:
    """Runs the other sides of a race in threads."""
    with Rivals(scene.store) as rivals:
        yield rivals


@pytest.fixture
def hold(postgres_url: str, rivals: Rivals) -> Iterator[Callable[[], Held]]:
    """Makes stores whose next write stops right before its commit, with all its locks."""
    held: list[Held] = []

    def make() -> Held:
        store = Held(postgres_url)
        assert store.store_id
        held.append(store)
        rivals.held.append(store)
        return store

    yield make
    for store in held:
        store.commit()
    rivals.join()
    for store in held:
        store.dispose()
