"""The queries of the documentation run on both databases and find what is written below them; the views' columns have
the types that docs/sql.md says.

A block that starts with ``-- PostgreSQL`` or ``-- SQLite`` runs there only. A table right behind a query is what it
finds on the scene of `docs_scene`: ``…`` stands for anything but NULL, an empty cell for NULL.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import Store
from celery_batchtrack.store.views import VIEWS
from tests.helpers import ROOT
from tests.servers import find_postgres
from tests.unit.docs_scene import DocsScene
from tests.unit.docs_views import kind_on_postgresql, type_of
from tests.unit.test_docs import Block, blocks

ANY = "…"


@pytest.fixture(params=["sqlite", "postgresql"])
def scene(request: pytest.FixtureRequest) -> Iterator[DocsScene]:
    store = Store(request.getfixturevalue({"sqlite": "sqlite_url"}.get(request.param, "postgres_url")))
    yield DocsScene(store)
    store.dispose()


def _blocks_for(store: Store) -> list[Block]:
    other = "-- PostgreSQL" if store.sqlite else "-- SQLite"
    return [each for each in blocks("sql") if not each.code.startswith(other)]


def _table_behind(block: Block) -> list[list[str]] | None:
    """What is written below a query, or below its spellings for both databases: the header, and rows of cells."""
    behind = block.path.read_text().split("\n")[block.line - 1 + block.code.count("\n") + 1 :]
    text = re.sub(r"\A\s*```sql\n-- SQLite.*?\n```\n", "", "\n".join(behind), flags=re.DOTALL)
    found = re.match(r"\n((?:\|[^\n]*\n)+)", text)
    if found is None:
        return None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return [lines[0], *lines[2:]]


def _shown(value: Any, wanted: str) -> str:
    if wanted == ANY and value is not None:
        return ANY
    if isinstance(value, float | Decimal) and "." in wanted:
        return f"{value:.1f}"
    if isinstance(value, float | Decimal):
        return f"{value:.0f}"
    return "" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def test_every_query_finds_what_is_written_below_it(scene: DocsScene) -> None:
    compared = 0
    with scene.store.engine.connect() as connection:
        for block in _blocks_for(scene.store):
            given = {"id": str(scene.articles)} if ":id" in block.code else {}
            result = connection.execute(sa.text(block.code), given)
            names, rows = list(result.keys()), result.all()
            assert rows, f"{block} finds nothing"
            table = _table_behind(block)
            if table is None:
                continue
            assert names == table[0], block
            assert len(rows) == len(table) - 1, f"{block}: {rows}"
            for row, wanted in zip(rows, table[1:], strict=True):
                assert [_shown(*each) for each in zip(row, wanted, strict=True)] == wanted, block
            compared += 1
    assert compared >= 15


def test_views_have_the_columns_and_types_that_are_written(scene: DocsScene) -> None:
    for view in VIEWS.values():
        kinds = _kinds_on_sqlite if scene.store.sqlite else _kinds_on_postgresql
        found = kinds(scene.store, view.relation)
        assert list(found) == list(view.columns)
        for column, kind in found.items():
            assert kind in (None, type_of(view, column)), (view.relation, column)


def _kinds_on_postgresql(store: Store, relation: str) -> dict[str, str | None]:
    query = sa.text(
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = to_regclass(:name) AND attnum > 0 ORDER BY attnum"
    )
    with store.engine.connect() as connection:
        return {name: kind_on_postgresql(kind) for name, kind in connection.execute(query, {"name": relation})}


def _kinds_on_sqlite(store: Store, relation: str) -> dict[str, str | None]:
    """Of the first value that is there; None where there is none in the scene."""
    with store.engine.connect() as connection:
        rows = connection.exec_driver_sql(f"SELECT * FROM {relation}")
        names, values = list(rows.keys()), rows.all()
    found: dict[str, str | None] = {}
    for at, name in enumerate(names):
        value = next((row[at] for row in values if row[at] is not None), None)
        wanted = type_of(VIEWS[relation.removeprefix("batchtrack_")], name)
        found[name] = None if value is None else _kind_of(value, wanted)
    return found


def _kind_of(value: Any, wanted: str) -> str:
    """What SQLite's value may stand for: `wanted`, if it may be that."""
    forms = {
        "uuid": lambda: str(uuid.UUID(value)) == value,
        "time": lambda: re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", value),
        "json": lambda: isinstance(json.loads(value), list | dict),
        "text": lambda: isinstance(value, str),
        "integer": lambda: isinstance(value, int),
        "number": lambda: isinstance(value, int | float),
        "boolean": lambda: value in (0, 1),
    }
    return wanted if forms[wanted]() else type(value).__name__


def test_the_reader_reads_the_views_and_nothing_else(postgres_url: str) -> None:
    """Also a view that a migration makes anew."""
    scene = DocsScene(Store(postgres_url))
    engine = scene.store.engine
    script = (ROOT / "docs" / "batchtrack_reader.sql").read_text()

    def run(text: str, *, reader: bool = False) -> None:
        with engine.begin() as connection:
            if reader:
                connection.exec_driver_sql("SET LOCAL ROLE batchtrack_reader")
            driver: Any = connection.connection.driver_connection
            driver.execute(text)

    try:
        run(script)
        run(script)
        run("DROP VIEW batchtrack_slowest")
        scene.store.migrate()
        for view in VIEWS.values():
            run(f"SELECT * FROM {view.relation} LIMIT 1", reader=True)
        rest = ("SELECT * FROM batchtrack_child", "DELETE FROM batchtrack_batch", "CREATE TABLE batchtrack_x ()")
        for refused in rest:
            with pytest.raises(Exception, match="permission denied"):
                run(refused, reader=True)
    finally:
        run("DROP OWNED BY batchtrack_reader; DROP ROLE batchtrack_reader")
        scene.store.dispose()


def test_what_was_dumped_is_restored(postgres_url: str, tmp_path: Path) -> None:
    """By the commands of docs/operations.md."""
    scene = DocsScene(Store(postgres_url))
    block = next(each for each in blocks("sh") if "pg_dump" in each.code)
    before = scene.store.view("batch_progress", order_by=["created_at"])
    tools = {**os.environ, "PATH": f"{find_postgres()}{os.pathsep}{os.environ['PATH']}"}
    tools["DATABASE"] = postgres_url.replace("+psycopg", "")
    for command in block.code.splitlines():
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=tools, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with scene.store.write() as connection:
            if "pg_dump" in command:
                connection.exec_driver_sql("DELETE FROM batchtrack_batch")
    found = scene.store.view("batch_progress", order_by=["created_at"])
    assert [(each["batch_id"], each["done"]) for each in found] == [(each["batch_id"], each["done"]) for each in before]
    assert [each for each in scene.store.view("invariant") if each["violations"]] == []
    scene.store.dispose()
