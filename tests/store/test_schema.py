"""What is migrated is what is declared; the database itself refuses what must not be; and errors that help."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from celery_batchtrack import errors
from celery_batchtrack.store import Store, migrate, schema
from celery_batchtrack.store.clock import now
from celery_batchtrack.store.engine import Connected
from celery_batchtrack.store.quarantine import count_kill
from celery_batchtrack.vocabulary.aftermath import Killer
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.states import Cause, Status
from tests.helpers import free_port
from tests.servers import PostgresServer
from tests.store.kit import Scene, killed, part, some

# -- migrated == declared --------------------------------------------------------------------------


def _comparable(thing: Any, name: str | None, kind: str, *_: Any) -> bool:
    """Indexes over expressions are not: the next test compares them as the database has them."""
    return kind != "index" or name not in {f"batchtrack_child_{each}" for each in _OF_EXPRESSIONS}


_OF_EXPRESSIONS = ("open", "undispatched", "on_its_way", "slowest", "item")


@pytest.mark.filterwarnings("ignore:.*expression-based index")
def test_alembic_finds_nothing_to_migrate(store: Store) -> None:
    assert store.store_id
    with store.engine.connect() as connection:
        options = {
            "version_table": migrate.VERSION_TABLE, "compare_type": True, "compare_server_default": True,
            "include_object": _comparable,
        }  # fmt: skip
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []


def test_constraints_indexes_and_columns_are_migrated_as_they_are_declared(
    store: Store, database_url: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Alembic compares no CHECKs and no predicates of partial indexes: this does, in the database's own words."""
    assert store.store_id
    declared = Connected(_another_database(store, request, tmp_path))
    schema.metadata.create_all(declared.engine)
    try:
        wanted, found = _anatomy(declared.engine), _anatomy(store.engine)
        assert wanted["checks"] and wanted["indexes"] and wanted["columns"] and wanted["keys"]
        for part in wanted:
            assert found[part] == wanted[part], part
    finally:
        declared.dispose()


def _another_database(store: Store, request: pytest.FixtureRequest, folder: Path) -> str:
    if store.sqlite:
        return f"sqlite:///{folder / 'declared.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.create_database()
    request.addfinalizer(lambda: server.drop_database(url))
    return url


def _anatomy(engine: sa.Engine) -> dict[str, Any]:
    tables = [table.name for table in schema.metadata.sorted_tables]
    inspector = sa.inspect(engine)
    with engine.connect() as connection:
        return {
            "columns": {name: _columns(inspector, name) for name in tables},
            "keys": {
                name: (inspector.get_pk_constraint(name), inspector.get_foreign_keys(name)) for name in tables
            },
            "checks": {name: _checks(inspector, name) for name in tables},
            "indexes": _indexes(connection),
            "options": _options(connection),
        }


def _columns(inspector: sa.Inspector, table: str) -> dict[str, tuple[Any, ...]]:
    return {
        each["name"]: (str(each["type"]), each["nullable"], str(each["default"]))
        for each in inspector.get_columns(table)
    }


def _checks(inspector: sa.Inspector, table: str) -> dict[Any, str]:
    return {each["name"]: " ".join(each["sqltext"].split()) for each in inspector.get_check_constraints(table)}


def _indexes(connection: sa.Connection) -> dict[str, str]:
    """Name → the database's own definition: columns, uniqueness and predicate."""
    if connection.dialect.name == "postgresql":
        query = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename LIKE 'batchtrack%'"
    else:
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    found = {name: " ".join(sql.split()) for name, sql in connection.execute(sa.text(query))}
    found.pop(f"{migrate.VERSION_TABLE}_pkc", None)
    return found


def _options(connection: sa.Connection) -> dict[str, str]:
    if connection.dialect.name != "postgresql":
        return {}
    query = "SELECT relname, reloptions::text FROM pg_class WHERE relname LIKE 'batchtrack%' AND relkind = 'r'"
    found = {each.relname: each.reloptions for each in connection.execute(sa.text(query))}
    found.pop(migrate.VERSION_TABLE, None)
    assert "fillfactor=50" in found["batchtrack_tally"]
    return found


def test_every_partial_index_of_the_design_has_its_predicate(store: Store) -> None:
    assert store.store_id
    with store.engine.connect() as connection:
        found = _indexes(connection)
    for name, predicate in {
        "batchtrack_child_callback": "kind", "batchtrack_child_slot": "running", "batchtrack_child_open": "pending",
        "batchtrack_child_undispatched": "dispatched_at IS NULL",
        "batchtrack_child_dispatched": "dispatched_at IS NOT NULL",
        "batchtrack_batch_alive": "open", "batchtrack_worker_alive": "stopped_at",
        "batchtrack_child_origin": "origin IS NOT NULL", "batchtrack_child_isolated": "isolated",
        "batchtrack_incident_worker": "worker_lost", "batchtrack_quarantine_active": "quarantined_at IS NOT NULL",
    }.items():  # fmt: skip
        assert re.search(rf"WHERE .*{predicate}", found[name]), found[name]
    assert all("UNIQUE" in found[name] for name in ("batchtrack_child_callback", "batchtrack_child_slot"))


# -- the database refuses bad rows -----------------------------------------------------------------

_TOKEN = uuid.UUID(int=7)

BAD_CHILDREN: dict[str, dict[str, Any]] = {
    "an unknown status": {"status": "asleep", "finished_at": now()},
    "an unknown kind": {"kind": "nephew"},
    "an unknown verdict": {"verdict": "guessed"},
    "pending on a worker": {"worker_id": _TOKEN},
    "pending in a slot": {"slot": "1:1:1:0"},
    "pending, but finished": {"finished_at": now()},
    "running without a worker": {"status": "running", "slot": "1:1:1:0", "run_token": _TOKEN, "started_at": now()},
    "running without a slot": {"status": "running", "worker_id": _TOKEN, "run_token": _TOKEN, "started_at": now()},
    "running without a token": {"status": "running", "worker_id": _TOKEN, "slot": "1", "started_at": now()},
    "running without a start": {"status": "running", "worker_id": _TOKEN, "slot": "1", "run_token": _TOKEN},
    "completed, never finished": {"status": "completed"},
    "completed with a cause": {"status": "completed", "finished_at": now(), "cause": "signal"},
    "crashed, never finished": {"status": "crashed", "cause": "signal"},
    "less than no item": {"item_count": -1},
    "less than no attempt": {"attempt": -1},
    "no status": {"status": None},
    "no task": {"task": None},
    "another row's position": {"position": 1},
    "a batch that is not there": {"batch_id": uuid.UUID(int=9)},
}

BAD_BATCHES: dict[str, dict[str, Any]] = {
    "an unknown status": {"status": "asleep", "finished_at": now()},
    "running, but finished": {"finished_at": now()},
    "completed, never finished": {"status": "completed"},
    "running, never sealed": {"sealed_at": None},
    "open, but sealed": {"status": "open"},
    "cancelled without a reason": {"status": "cancelled", "finished_at": now()},
    "completed for a reason": {"status": "completed", "finished_at": now(), "reason": "user"},
    "a window that lets nothing through": {"max_in_flight": 0},
}

BAD_WORKERS: dict[str, dict[str, Any]] = {
    "an unknown kind": {"kind": "butler"},
    "suspected at no beat": {"suspected_at": now()},
    "suspected at no time": {"suspected_beat": 1},
    "lost by nobody": {"lost_at": now()},
    "lost at no time": {"lost_by": "host"},
}


BAD_QUARANTINE: dict[str, dict[str, Any]] = {
    "less than no death": {"deaths": -1},
    "a patience of nothing": {"quarantine_after": 0},
    "in quarantine and released": {"released_at": now()},
    "no item": {"item": None},
    "no version": {"version": None},
}


@pytest.mark.parametrize("what", BAD_CHILDREN)
def test_a_bad_child_is_refused(scene: Scene, what: str) -> None:
    batch_id = scene.batch(2)
    with pytest.raises(sa.exc.IntegrityError):
        scene.set_child(ChildKey(batch_id, 0), **BAD_CHILDREN[what])


@pytest.mark.parametrize("what", BAD_BATCHES)
def test_a_bad_batch_is_refused(scene: Scene, what: str) -> None:
    batch_id = scene.batch(1)
    with pytest.raises(sa.exc.IntegrityError):
        scene.set_batch(batch_id, **BAD_BATCHES[what])


@pytest.mark.parametrize("what", BAD_WORKERS)
def test_a_bad_worker_is_refused(scene: Scene, what: str) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        scene.set_worker(scene.worker_id, **BAD_WORKERS[what])


@pytest.mark.parametrize("what", BAD_QUARANTINE)
def test_a_bad_item_in_quarantine_is_refused(scene: Scene, what: str) -> None:
    scene.kill("doc-1", after=1)
    with pytest.raises(sa.exc.IntegrityError):
        scene.execute(sa.update(schema.quarantine).values(**BAD_QUARANTINE[what]))


def test_the_bad_rows_above_exercise_every_check_that_is_declared(scene: Scene) -> None:
    broken: set[str] = set()
    batch_id = scene.batch(2)
    key = ChildKey(batch_id, 0)
    scene.kill("doc-1", after=1)
    for cases, forge in (
        (BAD_CHILDREN, lambda values: scene.set_child(key, **values)),
        (BAD_BATCHES, lambda values: scene.set_batch(batch_id, **values)),
        (BAD_WORKERS, lambda values: scene.set_worker(scene.worker_id, **values)),
        (BAD_QUARANTINE, lambda values: scene.execute(sa.update(schema.quarantine).values(**values))),
        ({"a second row": {}}, lambda _: scene.execute(_second_meta())),
    ):
        for values in cases.values():
            with pytest.raises(sa.exc.IntegrityError) as caught:
                forge(values)
            broken |= set(re.findall(r"ck_batchtrack_\w+", str(caught.value.orig)))
    declared = {
        str(each.name) if str(each.name).startswith("ck_") else f"ck_{table.name}_{each.name}"
        for table in schema.metadata.sorted_tables
        for each in table.constraints
        if isinstance(each, sa.CheckConstraint)
    }
    assert broken == declared


def _second_meta() -> sa.Insert:
    return sa.insert(schema.meta).values(id=2, store_id=uuid.uuid4(), created_at=now())


def test_two_rows_cannot_run_in_one_slot_nor_be_one_callback(scene: Scene) -> None:
    batch_id = scene.batch(2, calls=("on_first_failure", "on_finish"))
    scene.run(batch_id, 0, slot="1:1:1:0")
    claimed = scene.run(batch_id, 1)
    with pytest.raises(sa.exc.IntegrityError):
        scene.set_child(claimed.key, slot="1:1:1:0")
    scene.fail(claimed)
    scene.store.cancel(batch_id)
    with pytest.raises(sa.exc.IntegrityError):
        scene.set_child(ChildKey(batch_id, 3), kind="on_first_failure")


def test_deleting_a_batch_takes_everything_that_hangs_on_it(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.fail(scene.run(batch_id))
    scene.execute(sa.delete(schema.batch))
    with scene.store.read() as connection:
        for table in (schema.child, schema.tally, schema.incident):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0


def test_every_status_of_the_vocabulary_fits_the_table(scene: Scene) -> None:
    """And a `split` row counts nowhere, as `verify` sees it: its part does."""
    batch_id = scene.batch(2)
    scene.set_child(ChildKey(batch_id, 0), status=Status.SPLIT.value, finished_at=now())
    scene.set_child(ChildKey(batch_id, 1), split_from=0, origin=0)
    table = schema.tally
    scene.execute(sa.update(table).where(table.c.shard == 0).values(total=0, items_total=0, weight_total=0))
    assert scene.violations() == {}


# -- schema versions -------------------------------------------------------------------------------


def _version(store: Store, value: str | None) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.text(f"DELETE FROM {migrate.VERSION_TABLE}"))
        if value is not None:
            connection.execute(sa.text(f"INSERT INTO {migrate.VERSION_TABLE} VALUES ('{value}')"))


def test_an_empty_database_is_migrated_at_first_use_where_that_is_asked_for(database_url: str) -> None:
    with pytest.raises(errors.SchemaMissing, match="batchtrack migrate"):
        Store(database_url, auto_migrate=False).store_id
    store = Store(database_url, auto_migrate=True)
    assert store.store_id == Store(database_url, auto_migrate=False).store_id
    store.dispose()


def test_by_default_only_sqlite_migrates_by_itself(database_url: str) -> None:
    store = Store(database_url)
    if store.sqlite:
        assert store.store_id
    else:
        with pytest.raises(errors.SchemaMissing):
            store.store_id
    store.dispose()


def test_a_database_with_older_tables_is_refused_with_the_way_out(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.store_id
    monkeypatch.setattr(migrate, "_revisions", lambda: ("9998", {"0001", "0002", "0003", "0004", "0005", "9998"}))
    with pytest.raises(errors.SchemaOutdated, match="batchtrack migrate"):
        Store(database_url, auto_migrate=True).store_id


def test_a_database_with_newer_tables_is_refused_and_never_touched(store: Store, database_url: str) -> None:
    assert store.store_id
    _version(store, "9999")
    newer = Store(database_url, auto_migrate=True)
    with pytest.raises(errors.SchemaTooNew, match="upgrade the package"):
        newer.store_id
    with pytest.raises(errors.SchemaTooNew):
        newer.migrate()
    newer.dispose()


def test_every_use_of_a_database_that_does_not_fit_says_so(store: Store, database_url: str) -> None:
    assert store.store_id
    _version(store, "9999")
    other = Store(database_url)
    for use in (
        lambda: other.batch(uuid.uuid4()), lambda: other.beat(uuid.uuid4()), lambda: other.take_undispatched(None, 1),
    ):  # fmt: skip
        with pytest.raises(errors.SchemaTooNew):
            use()
    other.dispose()


def test_migrating_twice_changes_nothing(store: Store) -> None:
    before = store.store_id
    store.migrate()
    assert store.store_id == before


def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    stores = [Store(database_url, auto_migrate=True) for _ in range(4)]
    start, seen, trouble = threading.Barrier(4), [], []

    def use(store: Store) -> None:
        start.wait()
        try:
            seen.append(store.store_id)
        except Exception as error:  # noqa: BLE001
            trouble.append(error)

    threads = [threading.Thread(target=use, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.dispose()
    assert trouble == [] and len(set(seen)) == 1


# -- from one version to the next ------------------------------------------------------------------

#: Columns that a row of the first schema has not.
_ADDED = {
    "batchtrack_batch": {
        "pause_reason", "watch_crashes", "deaths", "crash_samples", "parent_batch", "parent_position", "watch_progress",
        "untold", "result_id", "description", "tags", "metadata", "deadline_at",
        "max_in_flight", "priority", "dispatch_at", "paid_until", "round_at",
    },
    "batchtrack_child": {"origin", "isolated", "rerouted", "weight", "result_id"},
    "batchtrack_meta": {"counted_from"},
    "batchtrack_tally": {"weight_total", "weight_done"},
    "batchtrack_incident": {
        "exception", "stack", "python_frame", "fingerprint", "item", "item_index", "items_done", "note",
        "peak_memory", "boot_id", "worker_id", "queue", "versions", "error",
    },
}  # fmt: skip


def _migrated(store: Store, revision: str, way: Callable[..., None] = command.upgrade) -> None:
    settings = migrate.config()
    with store.engine.begin() as connection:
        settings.attributes["connection"] = connection
        way(settings, revision)


def _everything(store: Store) -> dict[str, list[dict[str, Any]]]:
    """All rows, as the database itself has them."""
    found = sa.MetaData()
    with store.engine.connect() as connection:
        found.reflect(connection)
        return {
            table.name: [dict(row._mapping) for row in connection.execute(table.select().order_by(*table.primary_key))]
            for table in found.sorted_tables
        }


def _first_rows(store: Store, worker_id: uuid.UUID) -> uuid.UUID:
    """A batch as the first schema knew it: a child of every kind of life, a callback, an incident."""
    batch_id, token = uuid7(), uuid.uuid4()
    child = {"batch_id": batch_id, "kind": "child", "shard": 0, "task": "demo.task", "created_at": now()}
    life: list[dict[str, Any]] = [
        {"status": "completed", "finished_at": now(), "result": '"done"', "attempt": 1, "items": ["a"]},
        {"status": "running", "started_at": now(), "attempt": 2, "worker_id": worker_id, "slot": "1:1:1:0",
         "run_token": token, "policy": {"on_crash": "retry", "process": True}, "items": ["b", "c"], "item_count": 2,
         "signature": '{"task": "demo.task", "args": [["b", "c"]]}'},
        {"status": "crashed", "finished_at": now(), "cause": "signal", "verdict": "observed", "attempt": 1,
         "crashes": 1},
        {"status": "pending", "dispatched_at": now(), "queue": "q", "items": ["d"]},
        {"kind": "on_first_failure", "status": "pending", "item_count": 0},
    ]  # fmt: skip
    with store.engine.begin() as connection:
        connection.execute(sa.insert(schema.worker).values(
            id=worker_id, kind="worker", name="w@h", hostname="h", pid=1, pool="prefork", lease=15.0, version="0",
            beat_at=now(), started_at=now(),
        ))  # fmt: skip
        connection.execute(sa.insert(schema.batch).values(
            id=batch_id, name="old", status="running", options={"tolerance": 3}, callbacks="{}", start_now=False,
            watch_failure=True, shards=1, next_position=len(life), created_at=now(), sealed_at=now(), started_at=now(),
        ))  # fmt: skip
        for position, values in enumerate(life):
            row = {**child, "position": position, "task_id": f"t{position}", **values}
            connection.execute(sa.insert(schema.child).values(**row))
        connection.execute(sa.insert(schema.tally).values(
            batch_id=batch_id, shard=0, total=4, completed=1, crashed=1, items_total=5, items_completed=1,
            items_crashed=1,
        ))  # fmt: skip
        connection.execute(sa.insert(schema.incident).values(
            id=uuid7(), batch_id=batch_id, position=2, attempt=1, outcome="crashed", cause="signal", phase="running",
            signal="SIGSEGV", message="died", detected_by="main", detected_at=now(), died_at=now(),
        ))  # fmt: skip
    return batch_id


def _without_added(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    return {
        table: [{name: value for name, value in row.items() if name not in _ADDED.get(table, ())} for row in found]
        for table, found in rows.items()
        if table not in ("batchtrack_quarantine", "batchtrack_outcome", migrate.VERSION_TABLE)
    }


@pytest.mark.filterwarnings("ignore:.*expression-based index")
def test_rows_of_the_first_schema_are_kept_and_go_on_under_the_present_one(database_url: str) -> None:
    store = Store(database_url, auto_migrate=False)
    _migrated(store, "0001")
    worker_id = uuid.uuid4()
    batch_id = _first_rows(store, worker_id)
    before = _everything(store)
    assert "batchtrack_quarantine" not in before
    with pytest.raises(errors.SchemaOutdated):
        store.store_id
    store.migrate()
    after = _everything(store)
    assert _without_added(after) == _without_added(before)
    for table, names in _ADDED.items():
        assert names == set(after[table][0]) - set(before[table][0]), table
    counted = {(each.status, each.detail, each.children) for each in store.outcome_totals()}
    assert counted == {("completed", "", 1), ("crashed", "", 1), ("died", "SIGSEGV", 1)}, "as if counted at their end"
    with store.write() as connection:
        connection.execute(sa.delete(schema.outcome))
    assert {each.check for each in store.verify(60.0) if each.violations} & {"what_ended_is_counted"} == set()
    scene = Scene(store, worker_id)
    assert scene.violations() == {}
    assert {(row.origin, row.isolated, row.rerouted) for row in scene.rows(batch_id)} == {(None, False, False)}
    row = store.batch(batch_id)
    assert row is not None and (row.paused_at, row.pause_reason) == (None, None)
    (incident,) = store.incidents(batch_id)
    assert (incident.signal, incident.fingerprint, incident.item) == ("SIGSEGV", None, None)
    running = scene.at(batch_id, 1)
    assert store.split(running, [killed("b"), part("c")], None).written, "what ran meanwhile may be split"
    for position in (3, 6):
        scene.complete(scene.run(batch_id, position))
    finished = store.finish(batch_id)
    assert finished is not None and finished.status == "partial"
    assert scene.violations() == {}
    store.dispose()


def test_the_way_back_to_the_first_schema_keeps_what_it_knew(database_url: str) -> None:
    store = Store(database_url, auto_migrate=False)
    _migrated(store, "0001")
    anatomy = _reflected(store)
    _first_rows(store, uuid.uuid4())
    before = _everything(store)
    _migrated(store, "head")
    with store.write() as connection:
        killer = Killer("doc-1", "hash", "1", 1)
        count_kill(connection, "demo.task", killer, ChildKey(uuid7(), 0), Evidence(Cause.SIGNAL))
    _migrated(store, "0001", command.downgrade)
    assert _everything(store) == before
    assert _reflected(store) == anatomy
    _migrated(store, "head")
    assert store.store_id and store.quarantine_list(all=True) == []
    store.dispose()


def _reflected(store: Store) -> dict[str, Any]:
    """Columns, constraints and indexes that are really there."""
    inspector = sa.inspect(store.engine)
    tables = [name for name in inspector.get_table_names() if name != migrate.VERSION_TABLE]
    with store.engine.connect() as connection:
        indexes = _indexes(connection)
    return {
        "columns": {name: _columns(inspector, name) for name in tables},
        "checks": {name: _checks(inspector, name) for name in tables},
        "indexes": indexes,
    }


# -- databases that cannot be used -----------------------------------------------------------------


def _refusal(use: Any) -> str:
    with pytest.raises(errors.DatabaseUnavailable) as caught:
        use()
    return str(caught.value)


def test_an_unreachable_server_is_named_without_its_password() -> None:
    place = f"127.0.0.1:{free_port()}/name"
    store = Store(f"postgresql://someone:s3cret@{place}", engine_options={"connect_args": {"connect_timeout": 3}})
    text = _refusal(lambda: store.store_id)
    assert "s3cret" not in text and place in text and "batchtrack_database_url" in text


def test_a_password_in_the_query_is_not_shown_either() -> None:
    store = Store(f"postgresql://127.0.0.1:{free_port()}/name?user=me&password=s3cret")
    assert "s3cret" not in _refusal(lambda: store.store_id)


def test_a_database_file_that_can_only_be_read_is_read_and_a_write_says_why(tmp_path: Path) -> None:
    path = tmp_path / "batchtrack.db"
    writer = Scene(Store(f"sqlite:///{path}"))
    batch_id = writer.batch(1)
    writer.store.dispose()
    reader = Store(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert reader.progress(batch_id).total == 1
    assert "read-only" in _refusal(lambda: reader.cancel(batch_id))
    reader.dispose()


def test_a_missing_file_that_cannot_be_created_is_an_error_and_not_a_new_database(tmp_path: Path) -> None:
    store = Store(f"sqlite:///file:{tmp_path / 'missing.db'}?mode=ro&uri=true")
    assert "missing.db" in _refusal(lambda: store.store_id)
    assert "unable to open" in _refusal(lambda: Store(f"sqlite:///{tmp_path}/no/such/folder/x.db").store_id)


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "batchtrack.db"
    path.write_bytes(b"PK\3\4 certainly no database" * 100)
    assert "not a database" in _refusal(lambda: Store(f"sqlite:///{path}").store_id)


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    """File permissions mean nothing to root: be somebody else for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_or_folder_without_permission_to_write_says_so(what: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        path = folder / "batchtrack.db"
        writer = Scene(Store(f"sqlite:///{path}"))
        batch_id = writer.batch(1)
        writer.store.dispose()
        if what == "file":
            path.chmod(0o444)
            folder.chmod(0o777)
        else:
            folder.chmod(0o555)
            path.chmod(0o666)
        store = Store(f"sqlite:///{path}", engine_options={"connect_args": {"timeout": 1}})
        try:
            with _as_nobody():
                text = _refusal(lambda: store.cancel(batch_id))
            assert str(path) in text
            assert "permissions" in text or "unable to open" in text
        finally:
            store.dispose()
            folder.chmod(0o755)


def test_a_role_that_may_not_write_says_so(postgres_url: str) -> None:
    writer = Scene(Store(postgres_url, auto_migrate=True))
    batch_id = writer.batch(1)
    role = f"reader_{uuid.uuid4().hex[:8]}"
    with writer.store.engine.begin() as connection:
        connection.execute(sa.text(f"CREATE ROLE {role} LOGIN"))
        connection.execute(sa.text(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"))
    store = Store(sa.make_url(postgres_url).set(username=role).render_as_string())
    try:
        assert store.progress(batch_id).total == 1
        assert "read-only" in _refusal(lambda: store.cancel(batch_id))
    finally:
        store.dispose()
        with writer.store.engine.begin() as connection:
            connection.execute(sa.text(f"DROP OWNED BY {role}"))
            connection.execute(sa.text(f"DROP ROLE {role}"))
        writer.store.dispose()


def test_a_standby_that_only_reads_says_so(postgres_url: str) -> None:
    writer = Scene(Store(postgres_url, auto_migrate=True))
    batch_id = writer.batch(1)
    options = {"connect_args": {"options": "-c default_transaction_read_only=on"}}
    store = Store(postgres_url, engine_options=options)
    assert store.progress(batch_id).total == 1
    assert "read-only" in _refusal(lambda: store.cancel(batch_id))
    store.dispose()
    writer.store.dispose()


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", ""])
def test_another_kind_of_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(errors.ImproperlyConfigured, match="batchtrack_database_url"):
        Store(url)


def test_postgresql_without_a_driver_named_uses_psycopg_3() -> None:
    assert Store("postgresql://h/x").url.drivername == Store("postgres://h/x").url.drivername == "postgresql+psycopg"


def test_sqlite_is_in_wal_mode_and_enforces_foreign_keys(sqlite_url: str) -> None:
    store = Store(sqlite_url)
    with store.read() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA foreign_keys")).scalar() == 1
    store.dispose()


def test_every_write_on_sqlite_begins_immediately_and_every_read_does_not(sqlite_url: str) -> None:
    from tests.store.kit import statements

    scene = Scene(Store(sqlite_url))
    batch_id = scene.batch(some(1))
    with statements(scene.store.engine) as reading:
        scene.store.progress(batch_id)
    with statements(scene.store.engine) as writing:
        scene.store.cancel(batch_id)
    assert reading[0] == "BEGIN" and writing[0] == "BEGIN IMMEDIATE"
    scene.store.dispose()


def test_a_fork_gets_connections_of_its_own(store: Store) -> None:
    before = store.engine
    child = os.fork()
    if child == 0:
        try:
            mine = store.engine is not before and store.current_time() is not None
        except BaseException:  # noqa: BLE001
            mine = False
        os._exit(0 if mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.engine is before
