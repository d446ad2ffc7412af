"""A store in the application's own transaction."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_batchtrack import errors
from celery_batchtrack.store import BorrowedStore, Store
from celery_batchtrack.store.borrowed import check_place, over
from celery_batchtrack.store.sessions import SqlTransaction
from celery_batchtrack.vocabulary.ids import uuid7
from celery_batchtrack.vocabulary.records import NewBatch
from tests.servers import PostgresServer
from tests.store.kit import some

metadata = sa.MetaData()
upload = sa.Table("upload", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.Text))


@pytest.fixture
def engine(store: Store) -> Iterator[sa.Engine]:
    """The application's own, on the same database."""
    store.migrate()
    engine = sa.create_engine(store.url)
    metadata.create_all(engine)
    yield engine
    engine.dispose()


Open = Callable[[sa.Engine], Any]
OPENERS: dict[str, Open] = {
    "session": Session,
    "scoped_session": lambda engine: scoped_session(sessionmaker(engine)),
    "connection": lambda engine: engine.connect(),
}


@pytest.fixture(params=list(OPENERS))
def given(request: pytest.FixtureRequest, engine: sa.Engine) -> Iterator[Any]:
    """What the application would pass as `transaction=`."""
    opened = OPENERS[request.param](engine)
    yield opened
    opened.close()


def new() -> NewBatch:
    return NewBatch(uuid7(), "upload", "{}", {"tolerance": 0})


def transaction_of(given: Any) -> SqlTransaction:
    found = SqlTransaction.of(given)
    assert found is not None
    return found


@contextlib.contextmanager
def block(store: Store, given: Any) -> Iterator[tuple[BorrowedStore, SqlTransaction]]:
    transaction = transaction_of(given)
    with transaction.block() as connection:
        check_place(store, connection)
        yield store.within(lambda: contextlib.nullcontext(connection)), transaction


def create(store: Store, given: Any, calls: list[bool] | None = None) -> uuid.UUID:
    """A sealed batch of four; `calls`: whether it was there when its transaction's end was told."""
    batch = new()
    with block(store, given) as (borrowed, transaction):
        borrowed.create(batch, some(2))
        assert borrowed.add(batch.id, some(2)) == 2
        assert borrowed.seal(batch.id)
        assert borrowed.progress(batch.id).total == 4
        if calls is not None:
            transaction.after_commit(lambda: calls.append(store.batch(batch.id) is not None))
    return batch.id


def ids(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(upload.c.id).order_by(upload.c.id)).scalars())


def test_a_batch_is_there_after_the_commit_and_not_before(store: Store, engine: sa.Engine, given: Any) -> None:
    calls: list[bool] = []
    given.execute(sa.insert(upload).values(id=1))
    batch_id = create(store, given, calls)
    assert store.batch(batch_id) is None
    assert calls == []
    given.commit()
    assert store.progress(batch_id).total == 4
    given.close()
    assert calls == [True]
    assert ids(engine) == [1]


def test_a_rollback_leaves_nothing(store: Store, engine: sa.Engine, given: Any) -> None:
    calls: list[bool] = []
    given.execute(sa.insert(upload).values(id=1))
    batch_id = create(store, given, calls)
    given.rollback()
    given.close()
    assert store.batch(batch_id) is None
    assert True not in calls
    assert ids(engine) == []


def test_an_exception_that_is_caught_leaves_nothing_of_the_block(
    store: Store, engine: sa.Engine, given: Any
) -> None:
    batch = new()
    given.execute(sa.insert(upload).values(id=1))
    with contextlib.suppress(KeyError), block(store, given) as (borrowed, _):
        borrowed.create(batch, some(2))
        given.execute(sa.insert(upload).values(id=2))
        raise KeyError
    given.execute(sa.insert(upload).values(id=3))
    given.commit()
    assert store.batch(batch.id) is None
    assert ids(engine) == [1, 3]


def test_an_exception_in_the_first_block_of_a_transaction_leaves_nothing(store: Store, given: Any) -> None:
    batch = new()
    with contextlib.suppress(KeyError), block(store, given) as (borrowed, _):
        borrowed.create(batch)
        raise KeyError
    given.commit()
    assert store.batch(batch.id) is None


def test_what_is_created_first_in_a_transaction_is_rolled_back_with_it(store: Store, given: Any) -> None:
    batch_id = create(store, given)
    given.rollback()
    assert store.batch(batch_id) is None


def test_a_batch_goes_with_the_savepoint_around_it(store: Store, engine: sa.Engine, given: Any) -> None:
    calls: list[bool] = []
    given.execute(sa.insert(upload).values(id=1))
    savepoint = given.begin_nested()
    batch_id = create(store, given, calls)
    savepoint.rollback()
    given.commit()
    given.close()
    assert store.batch(batch_id) is None
    assert True not in calls
    assert ids(engine) == [1]


def test_a_write_that_fails_leaves_the_transaction_as_it_was(store: Store, engine: sa.Engine, given: Any) -> None:
    batch, other = new(), new()
    with block(store, given) as (borrowed, _):
        borrowed.create(batch)
        with pytest.raises(exc.IntegrityError):
            borrowed.create(batch)
        borrowed.create(other)
    given.commit()
    assert store.batch(batch.id) is not None
    assert store.batch(other.id) is not None


def test_a_transaction_that_is_committed_inside_the_block_is_told(store: Store, given: Any) -> None:
    with pytest.raises(errors.BatchStateError, match="committed or rolled back while"), block(store, given):
        given.commit()


def test_each_end_is_told_once(store: Store, engine: sa.Engine, given: Any) -> None:
    calls: list[bool] = []
    for _ in range(3):
        create(store, given, calls)
        given.commit()
    given.execute(sa.insert(upload).values(id=1))
    given.commit()
    given.close()
    assert calls == [True] * 3


def test_a_connection_that_is_kept_tells_of_a_commit_when_it_begins_anew(store: Store, engine: sa.Engine) -> None:
    calls: list[bool] = []
    with engine.connect() as connection:
        create(store, connection, calls)
        connection.commit()
        assert calls == []
        connection.execute(sa.select(1))
        assert calls == [True]


def test_a_connection_in_autocommit_mode_is_refused(store: Store, engine: sa.Engine) -> None:
    set_aside = engine.execution_options(isolation_level="AUTOCOMMIT")
    with set_aside.connect() as connection, pytest.raises(errors.InvalidOption, match="AUTOCOMMIT"):
        create(store, connection)


def test_a_session_in_another_time_zone_is_on_the_same_database(store: Store, engine: sa.Engine) -> None:
    with engine.connect() as connection:
        if not store.sqlite:
            connection.execute(sa.text("SET TimeZone = 'Asia/Tokyo'"))
        batch_id = create(store, connection)
        connection.commit()
    row = store.batch(batch_id)
    assert row is not None
    assert row.created_at is not None
    assert abs((datetime.now(UTC) - row.created_at).total_seconds()) < 60


def test_asynchronous_sessions_are_refused_with_what_to_do() -> None:
    asynchronous = type("AsyncSession", (), {"__module__": "sqlalchemy.ext.asyncio.session"})  # which needs greenlet
    with pytest.raises(errors.InvalidOption, match="run_sync"):
        SqlTransaction.of(type("Mine", (asynchronous,), {})())
    assert SqlTransaction.of(object()) is None


# -- another database ------------------------------------------------------------------------------


def test_a_database_without_tables_is_refused_and_its_transaction_goes_on(store: Store, engine: sa.Engine) -> None:
    elsewhere = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    metadata.create_all(elsewhere)
    with Session(elsewhere) as session:
        session.execute(sa.insert(upload).values(id=1))
        with pytest.raises(errors.InvalidOption, match="no batchtrack tables") as refused:
            create(store, session)
        assert "sqlite://" in str(refused.value)
        assert store.shown_url in str(refused.value)
        session.execute(sa.insert(upload).values(id=2))
        session.commit()
    assert ids(elsewhere) == [1, 2]


def test_a_copy_of_the_tracking_database_is_refused_on_sqlite(sqlite_url: str) -> None:
    store = Store(sqlite_url)
    store.migrate()
    store.dispose()
    copied = f"{store.url.database}.copy"
    shutil.copy(str(store.url.database), copied)
    engine = sa.create_engine(f"sqlite:///{copied}")
    with Session(engine) as session, pytest.raises(errors.InvalidOption, match="tracking database"):
        create(store, session)


def test_a_copy_of_the_tracking_database_is_refused_on_postgresql(postgres_server: PostgresServer) -> None:
    url, other = (postgres_server.create_database(migrated=True) for _ in range(2))
    store, copied = Store(url), Store(other)
    assert store.store_id == copied.store_id
    with copied.engine.connect() as connection, pytest.raises(errors.InvalidOption, match="tracking database"):
        create(store, connection)
    for each in (store, copied):
        each.dispose()
        postgres_server.drop_database(each.url.render_as_string())


def test_tables_that_are_missing_are_not_waited_for_while_the_application_writes(sqlite_url: str) -> None:
    engine = sa.create_engine(sqlite_url)
    metadata.create_all(engine)
    with Session(engine) as session:
        session.execute(sa.insert(upload).values(id=1))
        with pytest.raises(errors.SchemaMissing, match="batchtrack migrate"):
            create(Store(sqlite_url), session)


# -- a driver's connection, as Django has them -----------------------------------------------------


@pytest.fixture
def host(store: Store) -> Iterator[Any]:
    """In a transaction, with Django's ways to read."""
    store.migrate()
    if store.sqlite:
        sqlite3.register_converter("datetime", lambda text: datetime.fromisoformat(text.decode()))
        connection: Any = sqlite3.connect(
            str(store.url.database), detect_types=sqlite3.PARSE_DECLTYPES, isolation_level=None
        )
        connection.create_function("regexp", 2, lambda *_: 42)
        connection.execute("BEGIN")
    else:
        import psycopg
        from psycopg.types.string import TextLoader

        connection = psycopg.connect(store.url.set(drivername="postgresql").render_as_string(), autocommit=False)
        connection.adapters.register_loader("jsonb", TextLoader)
        connection.adapters.register_loader("timestamptz", TextLoader)
    yield connection
    connection.close()


def test_a_drivers_connection_is_written_in_and_stays_as_it_is(store: Store, host: Any) -> None:
    batch = new()
    borrowed = store.within(over(lambda: host, sqlite=store.sqlite))
    borrowed.create(batch, some(1), seal=True)
    row = borrowed.batch(batch.id)
    assert row is not None
    assert row.options == {"tolerance": 0}
    assert row.created_at is not None
    assert row.created_at.tzinfo is not None
    assert abs((datetime.now(UTC) - row.created_at).total_seconds()) < 60
    assert store.batch(batch.id) is None
    if store.sqlite:
        assert host.execute("SELECT 'a' REGEXP 'b'").fetchone() == (42,)
    host.rollback()
    assert store.batch(batch.id) is None


def test_a_drivers_connection_commits_when_its_host_does(store: Store, host: Any) -> None:
    batch = new()
    store.within(over(lambda: host, sqlite=store.sqlite)).create(batch, some(1), seal=True)
    host.commit()
    assert store.progress(batch.id).total == 1
