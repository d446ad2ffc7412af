"""One rich database, with copies for tests that change it; one Flower on it, and a process of each version.

`--screenshots`: the browser tests write pictures of the pages into docs/images.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from celery_batchtrack.store import Store
from tests.flower import processes, scenes
from tests.flower.kit import Served, served, shop
from tests.helpers import eventually
from tests.servers import require


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flower")
    group.addoption("--screenshots", action="store_true", help="write pictures of Flower's pages into docs/images")


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[scenes.Rich]:
    """Nothing may change it."""
    path = tmp_path_factory.mktemp("rich") / "batchtrack.db"
    shutil.copy(migrated_sqlite, path)
    store = Store(f"sqlite:///{path}")
    yield scenes.build(store)
    store.dispose()


@pytest.fixture(scope="session")
def rich_url(rich: scenes.Rich) -> str:
    return rich.scene.store.url.render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def site(rich_url: str) -> Iterator[Served]:
    """Without authentication; its API is open."""
    before = os.environ.get("FLOWER_UNAUTHENTICATED_API")
    os.environ["FLOWER_UNAUTHENTICATED_API"] = "true"
    with served(shop(rich_url)) as found:
        yield found
    if before is None:
        del os.environ["FLOWER_UNAUTHENTICATED_API"]
    else:
        os.environ["FLOWER_UNAUTHENTICATED_API"] = before


@pytest.fixture
def own(rich: scenes.Rich, tmp_path: Path) -> str:
    """A copy of the rich database, to be changed."""
    return copy_of(rich, tmp_path / "own.db")


def copy_of(rich: scenes.Rich, path: Path) -> str:
    with closing(sqlite3.connect(str(rich.scene.store.url.database))) as one, closing(sqlite3.connect(path)) as other:
        one.backup(other)
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def flowers(rich: scenes.Rich, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, processes.Running]]:
    """By version, started together."""
    for version in processes.VERSIONS:
        require(partial(processes.installed, version))
    started: dict[str, processes.Running] = {}
    try:
        for version in processes.VERSIONS:
            folder = tmp_path_factory.mktemp(f"flower-{version}")
            started[version] = processes.start(version, folder, copy_of(rich, folder / "batchtrack.db"))
        for version, each in started.items():
            eventually(each.answers, 60, what=f"Flower {version}")
        yield started
    finally:
        for each in started.values():
            each.close()
