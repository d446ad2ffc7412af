"""Counts what became of the documents of a batch, from the rows of its children."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from celery_batchtrack import Batch
from examples.annotations import store
from examples.annotations.documents import Identifier


@dataclass(frozen=True, slots=True)
class CrashedDocument:
    """A document of a child that died, that child's position, and where it was. Under `skip` and `bisect` the
    document is alone in it: it is the killer."""

    sourcedb: str
    sourceid: str
    divid: Identifier | None
    signal: str | None
    frame: str | None
    child: int

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.sourcedb, self.sourceid, self.divid) if part is not None)


def summarise(batch: Batch, output: str, upload: str) -> store.Summary:
    """The documents of a batch that has ended. Lines that were no documents are not there."""
    stored, invalid = store.count_documents(output, upload)
    crashed = sum(1 for _ in crashed_documents(batch, output, upload))
    return store.Summary(batch.progress().items_total, stored, invalid, crashed)


def crashed_documents(batch: Batch, output: str, upload: str) -> Iterator[CrashedDocument]:
    """The documents of the children that died, in order of their children, but for those that were stored before."""
    incidents = {each.position: each for each in batch.incidents()}
    for child in batch.children(status="crashed"):
        incident = incidents.get(child.position)
        there = store.identities(output, upload, child.args[0])
        for document in child.args[0]:
            if store.identity(document) not in there:
                yield CrashedDocument(
                    sourcedb=document["sourcedb"],
                    sourceid=document["sourceid"],
                    divid=document["divid"],
                    signal=None if incident is None else incident.signal,
                    frame=None if incident is None else incident.python_frame,
                    child=child.position,
                )


def callback_starts(batch: Batch) -> int:
    """How often the callback of a batch was started. One is what the library promises."""
    return sum(callback.attempt for callback in batch.children(kind="callbacks"))
