"""The Celery app of the upload: the child that stores a few documents, and the callback that sums up."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict
from uuid import UUID

from celery import Celery

from celery_batchtrack import Batch, BatchTrack, each_item, tracked
from examples.annotations import outcome, store
from examples.annotations.documents import Identifier, Reference
from examples.annotations.parsing import parse
from examples.annotations.validation import count_objects, normalise, validate

BROKER_VARIABLE = "ANNOTATIONS_BROKER_URL"
DATABASE_VARIABLE = "ANNOTATIONS_DATABASE_URL"


class DocumentMessage(TypedDict):
    """One document on its way to a child. `line` stays text: decoding the message cannot kill anybody."""

    sourcedb: str
    sourceid: str
    divid: Identifier | None
    line: str


def embedded_broker_url(folder: Path) -> str:
    """The broker without a server, keeping its messages in `folder`."""
    return f"batchtrack+filesystem://{folder.absolute()}"


def configure(broker_url: str, database_url: str) -> None:
    """Points the app, and the worker processes that this process starts, at a broker and a database."""
    os.environ[BROKER_VARIABLE] = broker_url
    os.environ[DATABASE_VARIABLE] = database_url
    app.conf.update(broker_url=broker_url, batchtrack_database_url=database_url)


app = Celery("annotations")
app.conf.update(
    broker_url=os.environ.get(BROKER_VARIABLE) or embedded_broker_url(Path("annotations-work")),
    batchtrack_database_url=os.environ.get(DATABASE_VARIABLE)
    or f"sqlite:///{Path('batchtrack.db').absolute()}",
    task_serializer="json",
    accept_content=["json"],
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)
BatchTrack(app)


@app.task(name="annotations.store_documents")  # type: ignore[untyped-decorator]
@tracked(
    items="docs",
    item_id=("sourcedb", "sourceid", "divid"),
    on_crash="skip",
    merge="examples.annotations.tasks:add_up",
)
def store_documents(docs: Sequence[DocumentMessage], output: str, upload: str) -> dict[str, int]:
    """Stores documents one by one, each durable before the next; may run twice without harm."""
    counts = {"stored": 0, "invalid": 0, "objects": 0}
    for document in each_item(docs, done="on_next"):
        row = examine(document, upload)
        store.write_documents(output, [row])
        counts[row.status] += 1
        counts["objects"] += row.objects
    return counts


def add_up(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    """The counts of a child that was split, from those of its parts."""
    return {name: sum(part[name] for part in parts) for name in ("stored", "invalid", "objects")}


@app.task(name="annotations.summarise")  # type: ignore[untyped-decorator]
def summarise(report: dict[str, Any], output: str, upload: str) -> dict[str, int]:
    """Writes the upload's summary, when all children are over, however they ended."""
    summary = outcome.summarise(Batch.get(UUID(report["batch_id"])), output, upload)
    store.finish_upload(output, report["batch_id"], report["status"], summary)
    return {"stored": summary.stored, "invalid": summary.invalid, "crashed": summary.crashed}


def message(reference: Reference) -> DocumentMessage:
    """A document as it is sent to a child."""
    return {
        "sourcedb": reference.sourcedb,
        "sourceid": reference.sourceid,
        "divid": reference.divid,
        "line": reference.line,
    }


def examine(document: DocumentMessage, upload: str) -> store.StoredDocument:
    """The row of a document: its normal form, or its line and what is wrong with it."""
    try:
        parsed = parse(document["line"])
        problems = validate(parsed)
        if not problems:
            return _row(document, upload, store.STORED, parsed, json.dumps(normalise(parsed)), None)
    except RecursionError:
        problems = ["nested too deep to be written"]
    except ValueError as error:
        problems = [f"not JSON: {error}"]
    return _row(document, upload, store.INVALID, {}, document["line"], "; ".join(problems))


def _row(
    document: DocumentMessage,
    upload: str,
    status: str,
    parsed: dict[str, Any],
    body: str,
    problem: str | None,
) -> store.StoredDocument:
    sourcedb, sourceid, divid = store.identity(document)
    return store.StoredDocument(
        sourcedb=sourcedb,
        sourceid=sourceid,
        divid=divid,
        status=status,
        text_length=len(parsed.get("text", "")),
        objects=count_objects(parsed),
        body=body,
        problem=problem and problem[: store.MAX_PROBLEM_LENGTH],
        upload_id=upload,
    )
