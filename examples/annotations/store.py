"""The application's own tables, on SQLite or PostgreSQL.

A child may run twice (a redelivery, a retry by hand), so writing a document is an upsert by its identity:
the second time changes nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateTable

STORED, INVALID = "stored", "invalid"
MAX_PROBLEM_LENGTH = 1_000
BUSY_TIMEOUT = 30.0
"""Seconds for which a writer to SQLite waits for another."""
CONNECT_TIMEOUT = 10
"""Seconds for which PostgreSQL may take to answer a connection."""
_CREATION_LOCK = 0x616E6E6F  # "anno": PostgreSQL's advisory lock while the tables are made

metadata = sa.MetaData()

documents = sa.Table(
    "annotations_document",
    metadata,
    sa.Column("sourcedb", sa.Text, primary_key=True),
    sa.Column("sourceid", sa.Text, primary_key=True),
    sa.Column("divid", sa.Text, primary_key=True, comment="empty: the document has no divisions"),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("text_length", sa.Integer, nullable=False),
    sa.Column("objects", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False, comment="normalised JSON; if invalid, the line as it came"),
    sa.Column("problem", sa.Text),
    sa.Column("upload_id", sa.Text, nullable=False),
    sa.CheckConstraint("status IN ('stored', 'invalid')", name="annotations_document_status"),
    sa.Index("annotations_document_upload", "upload_id", "status"),
)

uploads = sa.Table(
    "annotations_upload",
    metadata,
    sa.Column("batch_id", sa.Text, primary_key=True),
    sa.Column("upload_id", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("stored", sa.Integer, nullable=False),
    sa.Column("invalid", sa.Integer, nullable=False),
    sa.Column("crashed", sa.Integer, nullable=False),
    sa.Column("rejected", sa.Integer, nullable=False, comment="lines that were no document; part of invalid"),
    sa.Column("written_at", sa.DateTime(timezone=True)),
    sa.Column("times_written", sa.Integer, nullable=False),
)


class OutputUnavailable(Exception):
    """The output database cannot be used. The message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A row of `annotations_document`."""

    sourcedb: str
    sourceid: str
    divid: str
    status: str
    text_length: int
    objects: int
    body: str
    problem: str | None
    upload_id: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of the documents of an upload."""

    total: int
    stored: int
    invalid: int
    crashed: int


P = ParamSpec("P")
R = TypeVar("R")


def _explained(operation: Callable[P, R]) -> Callable[P, R]:
    """Turns a driver's complaint into `OutputUnavailable`; every operation takes the URL first."""

    @wraps(operation)
    def explaining(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return operation(*args, **kwargs)
        except (DBAPIError, ModuleNotFoundError) as error:
            shown = sa.make_url(str(args[0])).render_as_string(hide_password=True)
            cause = error.orig if isinstance(error, DBAPIError) else error
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            raise OutputUnavailable(
                f"the output database {shown} cannot be used: {reason}. "
                "Check that it exists, runs, and may be written to, or give another by --output."
            ) from error

    return explaining


def output_url(location: str) -> str:
    """The URL of a location on the command line: a URL, or the path of an SQLite file.

    Raises ValueError for a URL that is none of ours.
    """
    if "://" not in location:
        return f"sqlite:///{Path(location).expanduser().absolute()}"
    scheme, rest = location.split("://", 1)
    dialect, _, driver = scheme.partition("+")
    if dialect in ("postgres", "postgresql"):
        return f"postgresql+{driver or 'psycopg'}://{rest}"
    if dialect != "sqlite":
        raise ValueError(f"{dialect} is not supported: give a sqlite:// or postgresql:// URL, or a file name")
    return _absolute_sqlite_url(location)


@_explained
def create_tables(url: str) -> None:
    """Makes the tables that are missing. Safe when several processes do it at once."""
    with _engine(url).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATION_LOCK)))
        for table in metadata.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))
            for index in table.indexes:
                connection.execute(sa.schema.CreateIndex(index, if_not_exists=True))


@_explained
def write_documents(url: str, rows: Iterable[StoredDocument]) -> None:
    """Writes all rows or none. A document that has once been stored is not replaced by an invalid version.

    In order of identity, so that two writers of the same documents cannot wait for each other.
    """
    values = sorted((asdict(row) for row in rows), key=_identity)
    if not values:
        return
    with _engine(url).begin() as connection:
        insert = _insert(connection, documents)
        changes = {c.name: insert.excluded[c.name] for c in documents.columns if not c.primary_key}
        usable = sa.or_(insert.excluded.status == STORED, documents.c.status == INVALID)
        upsert = insert.on_conflict_do_update(
            index_elements=list(documents.primary_key), set_=changes, where=usable
        )
        connection.execute(upsert, values)


@_explained
def open_upload(url: str, batch_id: str, upload_id: str, name: str, rejected: int) -> None:
    """Notes a new upload, with the number of its lines that were no documents."""
    with _engine(url).begin() as connection:
        connection.execute(
            uploads.insert().values(
                batch_id=batch_id, upload_id=upload_id, name=name, status="running", times_written=0,
                total=rejected, stored=0, invalid=rejected, crashed=0, rejected=rejected,
            )
        )  # fmt: skip


@_explained
def finish_upload(url: str, batch_id: str, status: str, summary: Summary) -> None:
    """Writes the summary of an upload's documents; rejected lines are added here."""
    with _engine(url).begin() as connection:
        connection.execute(
            uploads.update()
            .where(uploads.c.batch_id == batch_id)
            .values(
                status=status,
                total=uploads.c.rejected + summary.total,
                stored=summary.stored,
                invalid=uploads.c.rejected + summary.invalid,
                crashed=summary.crashed,
                written_at=sa.func.now(),
                times_written=uploads.c.times_written + 1,
            )
        )


@_explained
def count_documents(url: str, upload_id: str) -> tuple[int, int]:
    """(stored, invalid) documents of an upload."""
    c = documents.c
    query = sa.select(c.status, sa.func.count()).where(c.upload_id == upload_id).group_by(c.status)
    with _engine(url).connect() as connection:
        counts = {status: int(count) for status, count in connection.execute(query)}
    return counts.get(STORED, 0), counts.get(INVALID, 0)


def identity(document: Mapping[str, Any]) -> tuple[str, str, str]:
    """The primary key of a document: sourcedb, sourceid, divid (empty where there is none)."""
    divid = document["divid"]
    return document["sourcedb"], document["sourceid"], "" if divid is None else str(divid)


@_explained
def identities(url: str, upload_id: str, wanted: Iterable[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """Which of these documents are there, by this upload."""
    c = documents.c
    keys = [identity(each) for each in wanted]
    query = sa.select(c.sourcedb, c.sourceid, c.divid).where(
        c.upload_id == upload_id, c.sourceid.in_({key[1] for key in keys})
    )
    with _engine(url).connect() as connection:
        return {tuple(row) for row in connection.execute(query)} & set(keys)


@_explained
def invalid_documents(url: str, upload_id: str, limit: int) -> Sequence[sa.RowMapping]:
    """sourcedb, sourceid, divid and problem of the first invalid documents of an upload."""
    c = documents.c
    query = (
        sa.select(c.sourcedb, c.sourceid, c.divid, c.problem)
        .where(c.upload_id == upload_id, c.status == INVALID)
        .order_by(c.sourcedb, c.sourceid, c.divid)
        .limit(limit)
    )
    with _engine(url).connect() as connection:
        return connection.execute(query).mappings().all()


def _absolute_sqlite_url(location: str) -> str:
    try:
        url = sa.make_url(location)
    except ArgumentError as error:
        raise ValueError(f"not a database URL: {location}") from error
    if not url.database or url.database == ":memory:":
        raise ValueError("an SQLite database in memory is lost between processes: give a file name")
    return url.set(database=str(Path(url.database).absolute())).render_as_string(hide_password=False)


def _identity(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["sourcedb"], row["sourceid"], row["divid"]


def _insert(connection: sa.Connection, table: sa.Table) -> postgresql.Insert | sqlite.Insert:
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


_engines: dict[tuple[int, str], sa.Engine] = {}
_engines_lock = threading.Lock()


def _engine(url: str) -> sa.Engine:
    """One engine a process: a connection that crosses a fork serves two masters."""
    with _engines_lock:
        key = os.getpid(), url
        if key not in _engines:
            _engines[key] = _new_engine(url)
        return _engines[key]


def _new_engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(
            parsed, pool_size=1, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_TIMEOUT}
        )
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT})
    sa.event.listen(engine, "connect", _prefer_wal)
    return engine


def _prefer_wal(connection: Any, _record: Any) -> None:
    """Readers beside a writer, and no fsync for each document: what is committed survives the death of every
    process. Without it (a busy or read-only file) all is slower, not wrong."""
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
    except connection.OperationalError:
        pass
