"""Batches and chords in the application's own SQLAlchemy transaction: children run after its commit, or never."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, chain
from kombu.utils import json
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from celery_batchtrack import Batch, BatchTrack, chord, errors
from celery_batchtrack.behaviour import finish
from celery_batchtrack.glue import starting


class Base(DeclarativeBase):
    pass


class Upload(Base):
    __tablename__ = "upload"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Shop:
    """An application whose children run where they are sent, and which notes that they did."""

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url)
        if url.startswith("sqlite"):
            event.listen(self.engine, "connect", lambda each, _: each.execute("PRAGMA foreign_keys = ON"))
        Base.metadata.create_all(self.engine)
        self.app = Celery(
            "shop", task_always_eager=True, batchtrack_database_url=url, batchtrack_wait_poll=0.02,
            batchtrack_owners={"upload": "upload.id"},
        )  # fmt: skip
        self.batchtrack = BatchTrack(self.app)
        self.batchtrack.migrate()
        self.ran: list[Any] = []

        @self.app.task(name="index", shared=False)
        def index(word: str) -> str:
            self.ran.append(word)
            return word

        @self.app.task(name="merge", shared=False)
        def merge(words: list[str]) -> str:
            self.ran.append("+".join(words))
            return "+".join(words)

        self.index, self.merge = index, merge

    def uploads(self) -> list[str]:
        with Session(self.engine) as session:
            return list(session.scalars(sa.select(Upload.name).order_by(Upload.id)))


@pytest.fixture
def shop(tables: None, database_url: str) -> Iterator[Shop]:
    shop = Shop(database_url)
    yield shop
    shop.batchtrack.reset()
    shop.engine.dispose()


@pytest.fixture
def session(shop: Shop) -> Iterator[Session]:
    with Session(shop.engine) as session:
        yield session


def test_a_batch_runs_after_the_commit_of_its_session(shop: Shop, session: Session) -> None:
    session.add(Upload(name="poem"))
    batch = Batch.create("upload", [shop.index.s("a"), shop.index.s("b")], app=shop.app, transaction=session)
    assert shop.ran == []
    with pytest.raises(errors.BatchNotFound, match="has not been committed"):
        batch.progress()
    with pytest.raises(errors.BatchNotFound, match="has not been committed"):
        batch.wait(timeout=5)
    session.commit()
    assert sorted(shop.ran) == ["a", "b"]
    assert batch.status == "completed"
    assert batch.row.opened_by is None
    assert shop.uploads() == ["poem"]


def test_a_streamed_batch_belongs_to_its_session(shop: Shop, session: Session) -> None:
    with Batch("upload", app=shop.app, transaction=session, on_success=shop.merge.s(), start="now") as batch:
        for word in "abc":
            batch.add(shop.index.s(word))
            batch.flush()
    assert shop.ran == []
    session.commit()
    assert shop.ran == ["a", "b", "c", "a+b+c"]
    assert [row.kind for row in shop.batchtrack.store.workers(all=True)] == ["client"]  # of the eager runs alone


def test_a_rollback_takes_the_batch_along(shop: Shop, session: Session) -> None:
    session.add(Upload(name="poem"))
    batch = Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction=session)
    session.rollback()
    assert shop.ran == []
    assert Batch.find(app=shop.app) == []
    with pytest.raises(errors.BatchNotFound, match="has not been committed"):
        batch.status


def test_an_exception_in_the_block_leaves_no_batch_although_the_session_is_committed(
    shop: Shop, session: Session
) -> None:
    session.add(Upload(name="poem"))
    with pytest.raises(KeyError), Batch("upload", app=shop.app, transaction=session) as batch:
        batch.add(shop.index.s("a"))
        batch.flush()
        raise KeyError
    session.commit()
    assert Batch.find(app=shop.app) == []
    assert shop.ran == []
    assert shop.uploads() == ["poem"]


def test_a_commit_inside_the_block_leaves_no_open_batch(shop: Shop, session: Session) -> None:
    with (
        pytest.raises(errors.BatchStateError, match="committed or rolled back while"),
        Batch("upload", app=shop.app, transaction=session) as batch,
    ):
        batch.add(shop.index.s("a"))
        batch.flush()
        session.commit()
    assert shop.ran == []
    assert batch._extension.store.progress(batch.id).status == "cancelled"


def test_a_connection_starts_its_batch_when_it_is_given_back(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        batch = Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction=connection)
        assert shop.ran == []
    assert shop.ran == ["a"]
    assert batch.status == "completed"


def test_a_commit_of_which_nobody_tells_is_left_to_the_sweep(shop: Shop) -> None:
    connection = shop.engine.connect()
    batch = Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction=connection)
    connection.commit()
    assert shop.ran == []
    shop.batchtrack.sweep()
    assert shop.ran == ["a"]
    assert batch.status == "completed"
    connection.close()
    assert shop.ran == ["a"]


def test_a_scoped_session_stands_for_its_session(shop: Shop) -> None:
    scoped = scoped_session(sessionmaker(shop.engine))
    Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction=scoped)
    scoped.commit()
    assert shop.ran == ["a"]
    scoped.remove()


def test_an_owner_that_is_not_flushed_yet_is_written_first(shop: Shop, session: Session) -> None:
    upload = Upload(name="poem")
    session.add(upload)
    batch = Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction=session, owner=upload)
    session.commit()
    assert batch.status == "completed"
    session.delete(upload)
    session.commit()
    assert Batch.find(app=shop.app) == []


def test_a_nested_batch_and_its_parent_are_of_one_transaction(shop: Shop, session: Session) -> None:
    with Batch("outer", app=shop.app, transaction=session) as outer:
        outer.add(shop.index.s("a"))
        inner = Batch.create("inner", [shop.index.s("b")], app=shop.app, transaction=session, parent_batch=outer)
    assert shop.ran == []
    session.commit()
    assert sorted(shop.ran) == ["a", "b"]
    assert (outer.status, inner.status) == ("completed", "completed")


def test_a_commit_does_not_fail_because_its_batch_cannot_be_sent(
    shop: Shop, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such broker")

    monkeypatch.setattr(finish, "started", broken)
    session.add(Upload(name="poem"))
    Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction=session)
    session.commit()
    assert shop.uploads() == ["poem"]
    assert "action=start_waits" in caplog.text
    monkeypatch.undo()
    shop.batchtrack.sweep()
    assert shop.ran == ["a"]


def test_nothing_is_registered_for_who_creates_in_a_transaction(shop: Shop, session: Session) -> None:
    with Batch("upload", app=shop.app, transaction=session) as batch:
        batch.add(shop.index.s("a"))
    session.rollback()
    assert shop.batchtrack.store.workers(all=True) == []


# -- chords ----------------------------------------------------------------------------------------


def test_a_chord_runs_after_the_commit(shop: Shop, session: Session) -> None:
    header = [shop.index.s("a"), shop.index.s("b")]
    result = chord(header, app=shop.app, batch={"transaction": session})(shop.merge.s())
    result.batch._pause = lambda seconds: pytest.fail("waits for what only its own commit could bring")
    with pytest.raises(errors.BatchNotFound, match="has not been committed"):
        result.get(timeout=5)
    assert shop.ran == []
    session.commit()
    assert result.get(timeout=5) == "a+b"
    assert result.batch.status == "completed"


def test_a_generators_chord_runs_after_the_commit_too(shop: Shop, session: Session) -> None:
    result = chord((shop.index.s(word) for word in "ab"), app=shop.app, batch={"transaction": session})(shop.merge.s())
    assert shop.ran == []
    session.commit()
    assert result.get(timeout=5) == "a+b"


def test_a_copied_chord_keeps_its_session(shop: Shop, session: Session) -> None:
    made = chord([shop.index.s("a"), shop.index.s("b")], shop.merge.s(), app=shop.app, batch={"transaction": session})
    same = made.clone().clone()
    for each in (same, copy.copy(made), copy.deepcopy(made), copy.deepcopy(dict(made))):
        assert each["kwargs"]["batchtrack"]["transaction"].value is session
    same.apply_async()
    session.commit()
    assert "a+b" in shop.ran


def test_a_chord_with_a_session_is_not_sent_anywhere(shop: Shop, session: Session) -> None:
    made = chord([shop.index.s("a"), shop.index.s("b")], shop.merge.s(), app=shop.app, batch={"transaction": session})
    for dump in (json.dumps, pickle.dumps):
        with pytest.raises(errors.InvalidOption, match="where no session can go"):
            dump(made)
    with pytest.raises(errors.InvalidOption, match="where no session can go"):
        Batch.create("outer", [chain(shop.index.s("z"), made)], app=shop.app)


def test_django_as_text_may_travel(shop: Shop) -> None:
    made = chord([shop.index.s("a")], shop.merge.s(), app=shop.app, batch={"transaction": "django"})
    assert json.loads(json.dumps(made))["kwargs"]["batchtrack"]["transaction"] == "django"


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["djnago", 5, object(), True])
def test_what_is_no_transaction_is_refused_at_the_call(shop: Shop, wrong: Any) -> None:
    with pytest.raises(errors.InvalidOption, match="transaction takes an SQLAlchemy Session or Connection"):
        Batch("upload", app=shop.app, transaction=wrong)
    with pytest.raises(errors.InvalidOption, match="transaction takes an SQLAlchemy Session or Connection"):
        chord([shop.index.s("a")], app=shop.app, batch={"transaction": wrong})


def test_an_engine_or_a_factory_is_no_transaction(shop: Shop) -> None:
    for wrong in (shop.engine, sessionmaker(shop.engine), Session):
        with pytest.raises(errors.InvalidOption, match="transaction takes"):
            Batch("upload", app=shop.app, transaction=wrong)


def test_django_without_its_settings_is_an_error(shop: Shop) -> None:
    with pytest.raises(errors.InvalidOption, match="DJANGO_SETTINGS_MODULE"):
        Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction="django")


def test_django_that_is_not_installed_is_an_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("django", "django.db", "django.core.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(errors.InvalidOption, match="pip install"):
        Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction="django")
    assert Batch.find(app=shop.app) == []


def test_a_session_on_another_database_is_refused_and_goes_on(shop: Shop, tmp_path: Any) -> None:
    elsewhere = sa.create_engine(f"sqlite:///{tmp_path / 'elsewhere.db'}")
    Base.metadata.create_all(elsewhere)
    with Session(elsewhere) as session:
        session.add(Upload(name="poem"))
        with pytest.raises(errors.InvalidOption, match=r"elsewhere\.db.*but the tracking database is"):
            Batch.create("upload", [shop.index.s("a")], app=shop.app, transaction=session)
        session.commit()
        assert session.scalar(sa.select(sa.func.count()).select_from(Upload)) == 1
    assert starting.captured(shop.batchtrack) is None
