"""Tables as CSV, row by row, with nothing in them that a spreadsheet would run."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from tornado.iostream import StreamClosedError

from celery_batchtrack.surfaces import jsonio, reading
from celery_batchtrack.surfaces.render import harmless
from celery_batchtrack.surfaces.views import SHORT_ID
from celery_batchtrack.vocabulary.records import isoformat

#: Rows that are read, and sent, at once.
PAGE = 1000
#: Seconds for one page of a download.
PATIENCE = 30.0
_RUN_BY_SPREADSHEETS = ("=", "+", "-", "@", "\t", "\r", "\n")


def cell(value: Any) -> str:
    """Text of one value. What a spreadsheet would take for a formula begins with an apostrophe."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return isoformat(value) or ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    text = jsonio.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
    text = harmless(text)
    return "'" + text if text.lstrip(" ").startswith(_RUN_BY_SPREADSHEETS) else text


def lines(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, header: bool) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    if header:
        writer.writerow(columns)
    for row in rows:
        writer.writerow([cell(row[name]) for name in columns])
    return out.getvalue()


def begin(handler: Any, name: str) -> None:
    handler.set_header("Content-Type", "text/csv; charset=UTF-8")
    handler.set_header("Content-Disposition", f"attachment; filename={json.dumps(name)}")
    handler.set_header("Cache-Control", "no-store")


def until_the_reader_goes(send: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(send)
    async def wrapper(*args: Any) -> None:
        with contextlib.suppress(StreamClosedError):
            await send(*args)

    return wrapper


@until_the_reader_goes
async def send(handler: Any, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows that are all there."""
    begin(handler, name)
    handler.write(lines((), columns, header=True))
    for start in range(0, len(rows), PAGE):
        handler.write(lines(rows[start : start + PAGE], columns, header=False))
        await handler.flush()
    handler.finish()


@until_the_reader_goes
async def send_children(handler: Any, batch_id: uuid.UUID, chosen: Mapping[str, Any]) -> None:
    """All children of a batch that the filters leave, read page by page: memory does not grow with the batch."""
    after, columns = chosen["after"], None
    filters = {name: value for name, value in chosen.items() if name != "after"}
    while True:
        found = await handler.reading(
            ("csv", batch_id, *filters.values(), after),
            lambda store, after=after: reading.child_list(store, batch_id, **filters, after=after, limit=PAGE),
            keep=0.0, patience=PATIENCE,
        )  # fmt: skip
        rows = found["children"]
        if columns is None:
            if not rows:
                await handler.reading(("progress", batch_id), lambda store: store.progress(batch_id))  # is it there?
            begin(handler, f"batch-{str(batch_id)[:SHORT_ID]}-children.csv")
            columns = list(rows[0]) if rows else ["batch_id", "position"]
            handler.write(lines((), columns, header=True))
        handler.write(lines(rows, columns, header=False))
        await handler.flush()
        after = found["next"]
        if after is None:
            handler.finish()
            return
