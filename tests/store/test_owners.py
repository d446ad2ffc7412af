"""A batch goes with the application's own row: by a real foreign key, whatever its key's type, also while it runs."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack import errors
from celery_batchtrack.store import Store, migrate, schema
from celery_batchtrack.store.clock import Identifier
from celery_batchtrack.vocabulary.ids import ChildKey, uuid7
from celery_batchtrack.vocabulary.records import NewBatch
from celery_batchtrack.vocabulary.states import Verdict
from tests.store.kit import HERE, SEGFAULT, Scene, refused, some

#: An application's table, and what its tools write into it.
TABLES = {
    "integer": "CREATE TABLE shop_upload (id integer PRIMARY KEY, title varchar(80))",
    "bigint": "CREATE TABLE shop_upload (id bigint PRIMARY KEY, title varchar(80))",
    "text": "CREATE TABLE shop_upload (id varchar(40) PRIMARY KEY, title varchar(80))",
}
UUID_TYPE = {"sqlite": "char(32)", "postgresql": "uuid"}  # as Django and SQLAlchemy declare it
AN_ID = uuid.UUID("0190f3c2-9a3e-7cc1-8a54-0f3b6a2d9e11")

Open = Callable[..., Store]


def execute(store: Store, *statements: str, **values: Any) -> None:
    with store.engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement), values)


def ask(store: Store, query: str, **values: Any) -> list[Any]:
    with store.engine.connect() as connection:
        return list(connection.execute(sa.text(query), values).scalars())


@pytest.fixture
def opened(database_url: str) -> Iterator[Open]:
    """A store on the test's database with these owners."""
    stores: list[Store] = []

    def open_store(**owners: str) -> Store:
        stores.append(Store(database_url, auto_migrate=False, owners=owners))
        return stores[-1]

    yield open_store
    for store in stores:
        store.dispose()


@pytest.fixture
def shop(opened: Open) -> Scene:
    """The uploads 4711 and 4712, and a store that knows `upload` as an owner."""
    store = opened(upload="shop_upload.id")
    execute(store, TABLES["bigint"], "INSERT INTO shop_upload VALUES (4711, 'a'), (4712, 'b')")
    store.migrate()
    scene = Scene(store)
    scene.worker(HERE, id=scene.worker_id, name="w1@here", pid=40)
    return scene


def column(store: Store, name: str = "owner_upload") -> Mapping[str, Any]:
    return next(dict(each) for each in sa.inspect(store.engine).get_columns("batchtrack_batch") if each["name"] == name)


def owned(store: Store, owner: tuple[str, Any], **more: Any) -> uuid.UUID:
    batch_id = uuid7()
    store.create(NewBatch(batch_id, "upload", "{}", {"tolerance": 0}, owner=owner, **more), some(3, items=2), seal=True)
    return batch_id


def named_in(store: Store, batch_id: uuid.UUID) -> list[str]:
    """Every column of every table that names the batch."""
    found = []
    with store.read() as connection:
        for table in schema.metadata.sorted_tables:
            for each in table.columns:
                if isinstance(each.type, Identifier):
                    count = sa.select(sa.func.count()).where(each == batch_id)
                    found += [f"{table.name}.{each.name}"] * connection.execute(count).scalar_one()
    return found


# -- migrating -------------------------------------------------------------------------------------


def test_migrate_makes_the_column_its_foreign_key_and_its_index(shop: Scene) -> None:
    found = column(shop.store)
    assert found["nullable"] and str(found["type"]).upper() == "BIGINT"
    keys = sa.inspect(shop.store.engine).get_foreign_keys("batchtrack_batch")
    key = next(each for each in keys if each["constrained_columns"] == ["owner_upload"])
    assert (key["referred_table"], key["referred_columns"]) == ("shop_upload", ["id"])
    rule = "on_delete FROM pragma_foreign_key_list('batchtrack_batch') WHERE \"table\" = 'shop_upload'"
    if not shop.store.sqlite:
        rule = "delete_rule FROM information_schema.referential_constraints WHERE constraint_name LIKE '%owner%'"
    assert ask(shop.store, f"SELECT {rule}") == ["CASCADE"]
    catalogue = "sqlite_master WHERE name" if shop.store.sqlite else "pg_indexes WHERE indexname"
    word = "sql" if shop.store.sqlite else "indexdef"
    [index] = ask(shop.store, f"SELECT {word} FROM {catalogue} = 'batchtrack_batch_owner_upload'")
    assert "owner_upload" in index and "IS NOT NULL" in index


def anatomy(store: Store) -> Any:
    inspector = sa.inspect(store.engine)
    return (
        [(each["name"], str(each["type"])) for each in inspector.get_columns("batchtrack_batch")],
        inspector.get_foreign_keys("batchtrack_batch"),
        [each["name"] for each in inspector.get_indexes("batchtrack_batch")],
    )  # fmt: skip


def test_migrate_twice_changes_nothing_and_keeps_every_owner(shop: Scene) -> None:
    batch_id = owned(shop.store, ("upload", 4711))
    before = anatomy(shop.store)
    shop.store.migrate()
    assert anatomy(shop.store) == before
    assert ask(shop.store, "SELECT owner_upload FROM batchtrack_batch") == [4711]
    assert shop.status(batch_id) == "running"


def test_two_that_migrate_at_once_make_one_column(opened: Open) -> None:
    execute(opened(), TABLES["bigint"])
    stores = [opened(upload="shop_upload.id") for _ in range(2)]
    threads = [threading.Thread(target=store.migrate) for store in stores]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    keys = sa.inspect(stores[0].engine).get_foreign_keys("batchtrack_batch")
    assert [each["constrained_columns"] for each in keys].count(["owner_upload"]) == 1


def test_an_owner_more_is_a_column_more_and_an_owner_less_drops_nothing(shop: Scene, opened: Open) -> None:
    execute(shop.store, "CREATE TABLE orders (number integer PRIMARY KEY)", "INSERT INTO orders VALUES (1)")
    more = opened(upload="shop_upload.id", order="orders.number")
    more.migrate()
    owned(more, ("order", 1))
    opened(order="orders.number").migrate()
    assert column(more) and column(more, "owner_order")


def test_names_in_upper_case_and_reserved_words_are_taken_as_they_are(opened: Open) -> None:
    store = opened(User="Order.Select")
    execute(store, 'CREATE TABLE "Order" ("Select" integer PRIMARY KEY)', 'INSERT INTO "Order" VALUES (1)')
    store.migrate()
    store.migrate()
    batch_id = owned(store, ("User", 1))
    execute(store, 'DELETE FROM "Order"')
    assert store.batch(batch_id) is None


def test_the_longest_name_has_a_column_a_key_and_an_index_of_its_own(opened: Open) -> None:
    names = ["a" * 39 + "1", "a" * 39 + "2"]
    store = opened(**dict.fromkeys(names, "shop_upload.id"))
    execute(store, TABLES["integer"], "INSERT INTO shop_upload VALUES (1, '')")
    store.migrate()
    store.migrate()
    for each in names:
        assert owned(store, (each, 1))
    execute(store, "DELETE FROM shop_upload")
    assert ask(store, "SELECT count(*) FROM batchtrack_batch") == [0]
    indexes = {each["name"] for each in sa.inspect(store.engine).get_indexes("batchtrack_batch")}
    assert {f"batchtrack_batch_owner_{each}" for each in names} <= indexes


def test_sqlite_makes_the_columns_at_first_use(sqlite_url: str) -> None:
    store = Store(sqlite_url, owners={"upload": "shop_upload.id"})
    execute(store, TABLES["integer"], "INSERT INTO shop_upload VALUES (1, '')")
    assert owned(store, ("upload", 1)) and column(store)
    store.dispose()


@pytest.mark.parametrize("setting", ["shop_uplod.id", "shop_upload.key"])
def test_a_table_or_a_column_that_is_missing_is_told_with_what_to_do(opened: Open, setting: str) -> None:
    store = opened(upload=setting)
    execute(store, TABLES["integer"])
    with pytest.raises(errors.ImproperlyConfigured, match=r"no table shop_uplo.*run the application's migrations"):
        store.migrate()
    assert store.schema_state() is migrate.State.EMPTY  # all or nothing


def test_a_column_that_is_not_unique_is_no_owner(opened: Open) -> None:
    store = opened(upload="shop_upload.title")
    execute(store, TABLES["integer"])
    with pytest.raises(errors.ImproperlyConfigured, match="Name the primary key, or a unique column"):
        store.migrate()


def test_a_view_is_no_owner(opened: Open) -> None:
    store = opened(upload="shop_view.id")
    execute(store, TABLES["integer"], "CREATE VIEW shop_view AS SELECT id FROM shop_upload")
    with pytest.raises(errors.ImproperlyConfigured, match="of a table"):
        store.migrate()


def test_a_part_of_a_key_is_no_owner(opened: Open) -> None:
    store = opened(upload="part.upload")
    execute(store, "CREATE TABLE part (upload integer, number integer, PRIMARY KEY (upload, number))")
    with pytest.raises(errors.ImproperlyConfigured, match="unique column"):
        store.migrate()


def test_a_unique_column_is_an_owner(opened: Open) -> None:
    store = opened(upload="shop_upload.slug")
    execute(
        store, "CREATE TABLE shop_upload (id integer PRIMARY KEY, slug varchar(20) NOT NULL UNIQUE)",
        "INSERT INTO shop_upload VALUES (1, 'spring')",
    )  # fmt: skip
    store.migrate()
    batch_id = owned(store, ("upload", "spring"))
    execute(store, "DELETE FROM shop_upload")
    assert store.batch(batch_id) is None


def test_an_owner_that_now_means_another_table_is_refused_and_nothing_is_dropped(shop: Scene, opened: Open) -> None:
    owned(shop.store, ("upload", 4711))
    execute(shop.store, "CREATE TABLE other (id bigint PRIMARY KEY)")
    with pytest.raises(errors.ImproperlyConfigured, match="owner_upload is there already, and refers to something"):
        opened(upload="other.id").migrate()
    assert ask(shop.store, "SELECT owner_upload FROM batchtrack_batch") == [4711]


def test_a_foreign_key_that_went_with_its_table_is_made_again(postgres_url: str) -> None:
    store = Store(postgres_url, owners={"upload": "shop_upload.id"})
    execute(store, TABLES["bigint"])
    store.migrate()
    execute(store, "DROP TABLE shop_upload CASCADE", TABLES["bigint"], "INSERT INTO shop_upload VALUES (1, '')")
    store.migrate()
    batch_id = owned(store, ("upload", 1))
    execute(store, "DELETE FROM shop_upload")
    assert store.batch(batch_id) is None
    store.dispose()


def test_on_sqlite_a_schema_is_refused(sqlite_url: str) -> None:
    store = Store(sqlite_url, owners={"upload": "main.shop_upload.id"})
    with pytest.raises(errors.ImproperlyConfigured, match="without a schema"):
        store.migrate()
    store.dispose()


def test_a_table_in_a_schema_of_its_own(postgres_url: str) -> None:
    store = Store(postgres_url, owners={"upload": "shop.upload.id", "other": "upload.id"})
    execute(
        store, "CREATE SCHEMA shop", "CREATE TABLE shop.upload (id bigint PRIMARY KEY)",
        "CREATE TABLE upload (id uuid PRIMARY KEY)", "INSERT INTO shop.upload VALUES (1)",
    )  # fmt: skip
    store.migrate()
    store.migrate()
    assert str(column(store)["type"]) == "BIGINT" and str(column(store, "owner_other")["type"]) == "UUID"
    batch_id = owned(store, ("upload", 1))
    execute(store, "DELETE FROM shop.upload")
    assert store.batch(batch_id) is None
    store.dispose()


def test_a_type_that_only_the_database_knows(postgres_url: str) -> None:
    store = Store(postgres_url, owners={"upload": "shop_upload.id"})
    execute(
        store, "CREATE DOMAIN sku AS varchar(12) CHECK (VALUE LIKE 'S%')", "CREATE TABLE shop_upload "
        "(id sku COLLATE \"C\" PRIMARY KEY)", "INSERT INTO shop_upload VALUES ('S1')",
    )  # fmt: skip
    store.migrate()
    [kind] = ask(
        store, "SELECT format_type(atttypid, atttypmod) || ' ' || CAST(CAST(attcollation AS regcollation) AS text) "
        "FROM pg_attribute WHERE attrelid = CAST('batchtrack_batch' AS regclass) AND attname = 'owner_upload'"
    )  # fmt: skip
    assert kind == 'sku "C"'
    assert owned(store, ("upload", "S1"))
    store.dispose()


# -- creating --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "key", "given"),
    [
        ("integer", 4711, 4711), ("integer", 4711, "4711"), ("bigint", 2**40, 2**40),
        ("text", "PMC:1", "PMC:1"), ("text", "4711", 4711), ("text", str(AN_ID), AN_ID),
    ],
)  # fmt: skip
def test_a_key_of_any_type_is_written_as_the_table_has_it(opened: Open, kind: str, key: Any, given: Any) -> None:
    store = opened(upload="shop_upload.id")
    execute(store, TABLES[kind])
    execute(store, "INSERT INTO shop_upload VALUES (:key, 'x')", key=key)
    store.migrate()
    batch_id = owned(store, ("upload", given))
    assert ask(store, "SELECT owner_upload FROM batchtrack_batch") == [key]
    execute(store, "DELETE FROM shop_upload")
    assert named_in(store, batch_id) == []


@pytest.mark.parametrize("given", [AN_ID, str(AN_ID), AN_ID.hex], ids=["uuid", "text", "hex"])
@pytest.mark.parametrize("stored", ["hex", "text", "bytes"])
def test_a_uuid_is_written_as_the_row_has_it(opened: Open, given: Any, stored: str) -> None:
    """PostgreSQL has one way, and each library one of its own for SQLite."""
    store = opened(upload="shop_upload.id")
    key: Any = {"hex": AN_ID.hex, "text": str(AN_ID), "bytes": AN_ID.bytes}[stored]
    kind = UUID_TYPE["sqlite" if store.sqlite else "postgresql"]
    execute(store, f"CREATE TABLE shop_upload (id {kind} PRIMARY KEY)")
    execute(store, "INSERT INTO shop_upload VALUES (:key)", key=key if store.sqlite else AN_ID)
    store.migrate()
    batch_id = owned(store, ("upload", given))
    assert ask(store, "SELECT owner_upload FROM batchtrack_batch") == [key if store.sqlite else AN_ID]
    execute(store, "DELETE FROM shop_upload")
    assert store.batch(batch_id) is None


@pytest.mark.parametrize("key", [4713, "4713", 2**70], ids=str)
def test_an_owner_that_does_not_exist_is_told_at_the_call_and_no_batch_is_made(shop: Scene, key: Any) -> None:
    with pytest.raises(errors.InvalidOption, match=rf"no upload {key} in shop_upload|no id of shop_upload"):
        owned(shop.store, ("upload", key))
    assert ask(shop.store, "SELECT count(*) FROM batchtrack_batch") == [0]


@pytest.mark.parametrize("key", ["many", AN_ID], ids=str)
def test_a_key_of_another_type_is_told_at_the_call(shop: Scene, key: Any) -> None:
    with pytest.raises(errors.InvalidOption, match=r"no upload .* in shop_upload|is no id of shop_upload"):
        owned(shop.store, ("upload", key))


def test_a_refusal_leaves_the_transaction_of_the_caller_usable(shop: Scene) -> None:
    with shop.store.write() as connection:
        with pytest.raises(errors.InvalidOption):
            shop.store.create_in(connection, NewBatch(uuid7(), "upload", "{}", {}, owner=("upload", 1)))
        connection.execute(sa.text("UPDATE shop_upload SET title = 'still here'"))
    assert set(ask(shop.store, "SELECT title FROM shop_upload")) == {"still here"}


def test_an_owner_of_the_same_transaction_is_there(shop: Scene) -> None:
    batch_id = uuid7()
    with shop.store.write() as connection:
        connection.execute(sa.text("INSERT INTO shop_upload VALUES (5000, 'new')"))
        shop.store.create_in(connection, NewBatch(batch_id, "upload", "{}", {}, owner=("upload", 5000)))
    assert shop.status(batch_id) == "open"


def test_an_owner_that_the_store_was_not_told_of_is_refused(shop: Scene) -> None:
    with pytest.raises(errors.InvalidOption, match="names no owner 'order'"):
        owned(shop.store, ("order", 1))


def test_a_column_that_was_not_migrated_yet_says_migrate(opened: Open) -> None:
    execute(opened(), TABLES["integer"], "INSERT INTO shop_upload VALUES (1, '')")
    opened().migrate()
    store = opened(upload="shop_upload.id")
    with pytest.raises(errors.SchemaOutdated, match=r"no column owner_upload.*batchtrack migrate"):
        owned(store, ("upload", 1))
    store.migrate()
    assert owned(store, ("upload", 1))


def test_a_batch_without_an_owner_needs_no_column(opened: Open) -> None:
    opened().migrate()
    scene = Scene(opened(upload="shop_upload.id"))
    assert scene.status(scene.batch(1)) == "running"


# -- deleting --------------------------------------------------------------------------------------


def test_deleting_the_owner_while_a_child_runs_leaves_nothing_and_its_late_settle_is_harmless(shop: Scene) -> None:
    kept = owned(shop.store, ("upload", 4712))
    gone = owned(shop.store, ("upload", 4711))
    nested = shop.batch(2, parent_batch=gone)
    shop.fail(shop.run(gone, 0))
    completing, failing, crashing = shop.run(gone, 1), shop.run(gone, 2), shop.run(nested, 0)
    row = shop.row(crashing.key)
    assert {"batchtrack_incident.batch_id", "batchtrack_batch.parent_batch"} <= set(named_in(shop.store, gone))

    execute(shop.store, "DELETE FROM shop_upload WHERE id = 4711")

    counts = ["batchtrack_outcome.batch_id"]
    assert named_in(shop.store, gone) == counts and named_in(shop.store, nested) == [], "what ended stays counted"
    assert shop.store.keep_outcomes() and named_in(shop.store, gone) == []
    settled = [shop.complete(completing), shop.fail(failing)]
    assert not any(each.written or each.late or each.look for each in settled)
    assert not shop.store.crash(row, SEGFAULT, Verdict.OBSERVED, None).written
    assert refused(shop.claim(ChildKey(gone, 0), attempt=0)).reason == "its row is gone"
    assert shop.store.finish(gone) is None and shop.store.cancel(gone) is None
    assert named_in(shop.store, gone) == [] and shop.violations(0) == {}
    assert shop.status(kept) == "running" and shop.statuses(kept) == ["pending"] * 3


def test_a_batch_without_the_deleted_owner_stays(shop: Scene) -> None:
    batch_id = shop.batch(1)
    execute(shop.store, "DELETE FROM shop_upload")
    assert shop.status(batch_id) == "running"


def test_deleting_a_batch_leaves_its_owner(shop: Scene) -> None:
    owned(shop.store, ("upload", 4711))
    execute(shop.store, "DELETE FROM batchtrack_batch")
    assert sorted(ask(shop.store, "SELECT id FROM shop_upload")) == [4711, 4712]
