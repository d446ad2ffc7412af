"""The throw-away servers themselves: a test that trusts them may trust them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
import sqlalchemy as sa

from tests.helpers import ROOT, NeverHappened, eventually, running
from tests.servers import PostgresServer, RabbitQueues, RedisServer, ServiceMissing, require


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    with require(PostgresServer) as server:
        yield server


def run(url: str, statement: str) -> sa.CursorResult[tuple[object, ...]] | object:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        result = connection.execute(sa.text(statement))
        return result.scalar() if result.returns_rows else None


def test_a_fresh_database_answers(database_url: str) -> None:
    assert run(database_url, "select 1") == 1


def test_each_database_is_empty_and_its_own(postgres_server: PostgresServer) -> None:
    one, other = postgres_server.create_database(), postgres_server.create_database()
    run(one, "create table t (id int)")
    run(other, "create table t (id int)")
    for url in (one, other):
        postgres_server.drop_database(url)
        with pytest.raises(sa.exc.OperationalError, match="does not exist"):
            run(url, "select 1")


def test_a_database_is_dropped_under_a_connected_client(postgres_server: PostgresServer) -> None:
    url = postgres_server.create_database()
    with sa.create_engine(url).connect() as connection:
        connection.execute(sa.text("select 1"))
        postgres_server.drop_database(url)
        connection.invalidate()


def test_committed_rows_survive_the_kill_of_postgresql(own_postgres: PostgresServer) -> None:
    url = own_postgres.create_database()
    run(url, "create table t as select 42 as answer")
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        connection.execute(sa.text("select 1"))
        own_postgres.kill()
        with pytest.raises(sa.exc.OperationalError):
            connection.execute(sa.text("select 1"))
    own_postgres.start()
    assert run(url, "select answer from t") == 42
    assert run(own_postgres.restart().create_database(), "select 1") == 1


def test_redis_answers_and_is_empty_again_after_a_kill() -> None:
    with require(RedisServer) as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        assert client.get("key") == b"value"
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.ping()
        assert client.get("key") is None


def test_the_shared_redis_is_empty(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


def test_rabbitmq_takes_a_message_and_keeps_no_queue(rabbitmq: RabbitQueues) -> None:
    from kombu import Connection

    with Connection(rabbitmq.url) as connection:
        with connection.SimpleQueue(rabbitmq.queue) as queue:
            queue.put("hello")
            assert queue.get(timeout=5).payload == "hello"
        rabbitmq.clean_up()
        with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
            connection.channel().queue_declare(rabbitmq.queue, passive=True)


def missing() -> str:
    raise ServiceMissing("no such service")


def missing_but_optional() -> str:
    raise ServiceMissing("no Docker", optional=True)


def test_a_missing_service_skips_the_test_locally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no such service"):
        require(missing)


def test_a_missing_service_fails_the_test_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no such service"):
        require(missing)


def test_docker_may_be_missing_even_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.skip.Exception, match="no Docker"):
        require(missing_but_optional)


def test_a_chosen_folder_without_postgresql_is_a_missing_service(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BATCHTRACK_TEST_PG_BIN", str(tmp_path))
    with pytest.raises(ServiceMissing, match="BATCHTRACK_TEST_PG_BIN"):
        PostgresServer()


def test_eventually_names_what_never_happened() -> None:
    with pytest.raises(NeverHappened, match="pigs fly"):
        eventually(lambda: None, timeout=0.05, what="pigs fly")


OWNER = """
import time
from tests.servers import PostgresServer, RedisServer
postgres, redis = PostgresServer().start(), RedisServer().start()
print(postgres.pid, redis.pid, postgres.folder, redis.folder, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="process groups as on Linux")
def test_servers_and_folders_do_not_outlive_a_killed_test_run(postgres_server: PostgresServer) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert owner.stdout is not None
        postgres, server, *folders = owner.stdout.readline().split()
        orphans = [psutil.Process(int(pid)) for pid in (postgres, server)]
        orphans += orphans[0].children(recursive=True)
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.communicate()
    eventually(lambda: not running(orphans), what="end of the orphaned servers")
    eventually(lambda: not any(Path(folder).exists() for folder in folders), what="removal of their folders")
