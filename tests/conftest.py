"""Fixtures for every test: servers once a session, databases once a test.

pytest-celery is installed on purpose, and overrides the fixture `celery_worker` of celery.contrib.pytest with
one that needs Docker: use `ProcessWorker` of `tests.nodes`, or `celery.contrib.testing.worker.start_worker`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_batchtrack.store import Store
from tests import helpers
from tests.servers import PostgresServer, RabbitQueues, RedisServer, rabbitmq_url, require


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Shared: a fault test starts a PostgresServer of its own."""
    with require(PostgresServer) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """Shared: a fault test starts a RedisServer of its own."""
    with require(RedisServer) as server:
        yield server


@pytest.fixture
def tables() -> None:
    """Taken by a test or a fixture, so that its database has our tables from the start. So does `store`."""


def _with_tables(request: pytest.FixtureRequest) -> bool:
    return not {"store", "tables"}.isdisjoint(request.fixturenames)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh database: empty, or with our `tables`."""
    url = postgres_server.create_database(migrated=_with_tables(request))
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty Redis."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def rabbitmq() -> Iterator[RabbitQueues]:
    """`rabbitmq.url`, and `rabbitmq.queue` / `rabbitmq.new_queue()` for names that are removed afterwards."""
    queues = RabbitQueues(require(rabbitmq_url))
    yield queues
    queues.clean_up()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with our tables, to be copied: much faster than to migrate one for each test."""
    path = tmp_path_factory.mktemp("migrated") / "batchtrack.db"
    store = Store(f"sqlite:///{path}")
    store.migrate()
    store.dispose()
    return path


@pytest.fixture
def sqlite_url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A file that is not there yet, or has our `tables`."""
    path = tmp_path / "batchtrack.db"
    if _with_tables(request):
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The test runs once on each database."""
    fixture = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(fixture)
    return url


@pytest.fixture(name="eventually")
def eventually_fixture() -> object:
    """`tests.helpers.eventually`, for tests that rather take it as an argument."""
    return helpers.eventually
