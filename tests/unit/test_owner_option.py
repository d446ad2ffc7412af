"""``owner=`` is understood by name and by object, and what is not understood says what to write."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy import orm

from celery_batchtrack import Batch, BatchTrack, chord
from celery_batchtrack.errors import BatchNotFound, ImproperlyConfigured, InvalidOption
from celery_batchtrack.glue import configuration
from celery_batchtrack.glue.owner import owner_of
from celery_batchtrack.vocabulary.settings import Settings

SETTINGS = Settings(owners={"upload": "shop_upload.id", "slug": "shop_page.slug", "order": "sales.orders.number"})
AN_ID = uuid.UUID("0190f3c2-9a3e-7cc1-8a54-0f3b6a2d9e11")


class Base(orm.DeclarativeBase):
    pass


class Upload(Base):
    __tablename__ = "shop_upload"
    key: orm.Mapped[int] = orm.mapped_column("id", primary_key=True)
    kind: orm.Mapped[str] = orm.mapped_column(sa.String(10), default="plain")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}


class BigUpload(Upload):
    __tablename__ = "shop_bigupload"
    upload_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("shop_upload.id"), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "big"}


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = {"schema": "sales"}
    number: orm.Mapped[int] = orm.mapped_column(primary_key=True)


class Invoice(Base):
    __tablename__ = "shop_invoice"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)


class Model:
    """What an object of a Django model has, as far as an owner goes."""

    def __init__(
        self, table: str, pk: Any, *, adding: bool = False, parents: tuple[Any, ...] = (), **columns: str
    ) -> None:
        fields = [SimpleNamespace(column=column, attname=attname) for column, attname in columns.items()]
        self._meta = SimpleNamespace(db_table=table, fields=fields, get_parent_list=lambda: parents)
        self._state = SimpleNamespace(adding=adding)
        self.pk = pk


class Page(Model):
    slug_text = "spring"


# -- what is understood ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, None),
        ({"upload": 4711}, ("upload", 4711)),
        (("upload", 4711), ("upload", 4711)),
        (["upload", "4711"], ("upload", "4711")),  # a tuple, after it was JSON
        ({"upload": AN_ID}, ("upload", AN_ID)),
        ({"order": Decimal(7)}, ("order", Decimal(7))),
        (Model("shop_upload", 4711), ("upload", 4711)),
        (Model("shop_upload", AN_ID), ("upload", AN_ID)),
        (Model('sales"."orders', 7), ("order", 7)),
        (Model("orders", 7), ("order", 7)),  # its schema is on the search path
        (Page("shop_page", 1, slug="slug_text"), ("slug", "spring")),
        (Model("shop_bigupload", 5, parents=(Model("shop_upload", None),)), ("upload", 5)),
        (Upload(key=4711), ("upload", 4711)),
        (BigUpload(key=4711, upload_id=4711), ("upload", 4711)),
        (Order(number=7), ("order", 7)),
        ({"upload": Upload(key=4711)}, ("upload", 4711)),
        (("upload", Model("shop_upload", 4711)), ("upload", 4711)),
    ],
)  # fmt: skip
def test_an_owner_is_a_name_with_a_key_or_an_object(value: Any, wanted: Any) -> None:
    assert owner_of(SETTINGS, value) == wanted


def test_a_key_of_a_class_of_its_own_is_read_as_its_field_writes_it() -> None:
    page = Page("shop_page", 1, slug="slug_text")
    page._meta.fields[0].get_prep_value = str.upper
    assert owner_of(SETTINGS, page) == ("slug", "SPRING")


def test_two_owners_of_one_table_are_told_apart_by_name() -> None:
    settings = Settings(owners={"first": "shop_upload.id", "second": "shop_upload.id"})
    with pytest.raises(InvalidOption, match=r"several owners for Upload, 'first', 'second': say which"):
        owner_of(settings, Upload(key=1))
    assert owner_of(settings, {"second": Upload(key=1)}) == ("second", 1)


def test_of_two_tables_the_one_in_the_same_schema_is_meant() -> None:
    settings = Settings(owners={"here": "orders.number", "there": "sales.orders.number"})
    assert owner_of(settings, Order(number=1)) == ("there", 1)
    assert owner_of(settings, Model("orders", 1)) == ("here", 1)


# -- what is not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{"upload": 1}, ("upload", 1), Upload(key=1), Model("shop_upload", 1), 1])
def test_an_owner_without_the_setting_says_how_to_write_it(value: Any) -> None:
    with pytest.raises(InvalidOption, match=r"needs the setting batchtrack_owners, such as .*batchtrack migrate"):
        owner_of(Settings(), value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"uplaod": 1}, "names no owner 'uplaod': did you mean 'upload'"),
        (("Upload", 1), "names no owner 'Upload': did you mean 'upload'"),
        ((1, 2), "names no owner 1"),
        (Invoice(id=1), "names no owner for Invoice, whose table is shop_invoice"),
        (Model("shop_uploads", 1), r"whose table is shop_uploads: did you mean 'shop_upload'\? \(it has 'shop_upload'"),
        (Model("other.orders", 1), "names no owner for Model, whose table is other.orders"),
        (Model("shop_upload", None), "'upload' has no id yet: save it"),
        (Model("shop_upload", AN_ID, adding=True), "'upload' has no id yet: save it"),
        (Upload(), "'upload' has no id yet: save it"),
        ({"upload": None}, "'upload' has no id yet: save it"),
        ({"upload": True}, "must be a number, text or a UUID, not True"),
        ({"upload": (1, 2)}, r"must be a number, text or a UUID, not \(1, 2\)"),
        ({"order": Upload(key=1)}, "Upload has no column number"),
        ({}, "owner must be one owner's name and key"),
        ({"upload": 1, "order": 2}, "owner must be one owner's name and key"),
        (("upload",), "owner must be one owner's name and key"),
        ("upload", "owner must be one owner's name and key"),
        (4711, "owner must be one owner's name and key"),
        (Upload, "or an object of a model"),
    ],
)  # fmt: skip
def test_what_is_no_owner_says_what_to_write(value: Any, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        owner_of(SETTINGS, value)


# -- the setting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"upload": "shop_upload.id"}, {"upload": "shop_upload.id"}),
        ('{"upload": "public.shop_upload.id"}', {"upload": "public.shop_upload.id"}),
        ("", {}), ({}, {}),
    ],
)  # fmt: skip
def test_the_setting_is_a_mapping_or_its_json(value: Any, wanted: Any) -> None:
    assert Settings.validated({"owners": value}).owners == wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["upload"], "must be a mapping such as"),
        ("upload=shop_upload.id", "must be a mapping such as"),
        ({"up-load": "a.b"}, "letters, digits and underscores, at most 40 of them, not 'up-load'"),
        ({"u" * 41: "a.b"}, "at most 40"),
        ({"": "a.b"}, "at most 40"),
        ({1: "a.b"}, "at most 40"),
        ({"upload": "shop_upload"}, r"\['upload'\] must be 'table.column' or 'schema.table.column'"),
        ({"upload": "a.b.c.d"}, "must be 'table.column'"),
        ({"upload": "a."}, "must be 'table.column'"),
        ({"upload": 'a".b'}, "must be 'table.column'"),
        ({"upload": None}, "must be 'table.column'"),
        ({"upload": "a.b", "Upload": "a.b"}, "the same but for upper case"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(value: Any, message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"batchtrack_owners.*{message}"):
        Settings.validated({"owners": value}, lambda name: f"batchtrack_{name}")


def test_the_environment_gives_the_setting_as_json(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHTRACK_OWNERS", '{"order": "orders.id"}')
    assert configuration.load(app).owners == {"order": "orders.id"}


# -- a batch with an owner -------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    """Eager, in one database with its upload 4711."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(
        task_always_eager=True, batchtrack_database_url=f"sqlite:///{tmp_path / 'shop.db'}",
        batchtrack_blackbox_dir=str(tmp_path / "boxes"), batchtrack_owners={"upload": "shop_upload.id"},
    )  # fmt: skip
    BatchTrack(app)

    @app.task(name="shop.index", shared=False)
    def index(number: int) -> int:
        return number

    @app.task(name="shop.total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    with app.batchtrack.store.engine.begin() as connection:
        Base.metadata.tables["shop_upload"].create(connection)
        connection.execute(sa.insert(Upload).values(key=4711, kind="plain"))
    app.batchtrack.migrate()
    yield app
    app.batchtrack.reset()


def uploads_deleted(app: Celery) -> None:
    with app.batchtrack.store.engine.begin() as connection:
        connection.execute(sa.delete(Upload))


@pytest.mark.parametrize(
    "owner", [{"upload": 4711}, Model("shop_upload", 4711), Upload(key=4711)], ids=["name", "model", "orm"]
)
def test_a_batch_goes_with_its_owner(app: Celery, owner: Any) -> None:
    batch = Batch.create("upload", [app.signature("shop.index", (1,))], owner=owner, app=app)
    assert batch.status == "completed"
    uploads_deleted(app)
    with pytest.raises(BatchNotFound):
        batch.status


def test_a_chord_goes_with_its_owner(app: Celery) -> None:
    header = [app.signature("shop.index", (at,)) for at in range(3)]
    begun = chord(header, batch={"owner": {"upload": 4711}}, app=app)(app.signature("shop.total"))
    assert begun.get(timeout=10) == 3
    count = sa.text("SELECT count(*) FROM batchtrack_batch WHERE owner_upload = 4711")
    with app.batchtrack.store.engine.connect() as connection:
        assert connection.execute(count).scalar_one() == 1
    uploads_deleted(app)
    with app.batchtrack.store.engine.connect() as connection:
        assert connection.execute(count).scalar_one() == 0


def test_an_owner_that_is_not_there_is_told_at_the_call(app: Celery) -> None:
    with pytest.raises(InvalidOption, match="no upload 1 in shop_upload"):
        Batch.create("upload", [app.signature("shop.index", (1,))], owner={"upload": 1}, app=app)
