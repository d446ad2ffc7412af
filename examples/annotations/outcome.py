"""Counts what became of the documents of a batch, from the rows of its children."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from celery_batchtrack import Batch
from examples.annotations.documents import Identifier
from examples.annotations.store import Summary


@dataclass(frozen=True, slots=True)
class CrashedDocument:
    """A document of a child that died, and that child's position. One of them killed it, and the others
    were in the same child."""

    sourcedb: str
    sourceid: str
    divid: Identifier | None
    signal: str | None
    child: int

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.sourcedb, self.sourceid, self.divid) if part is not None)


def summarise_children(batch: Batch) -> Summary:
    """The documents in the children of a batch that has ended. Lines that were no documents are not there."""
    stored = invalid = 0
    for child in batch.children(status="completed"):
        stored += child.result["stored"]
        invalid += child.result["invalid"]
    progress = batch.progress()
    return Summary(total=progress.items_total, stored=stored, invalid=invalid, crashed=progress.items_crashed)


def crashed_documents(batch: Batch) -> Iterator[CrashedDocument]:
    """The documents of the children that died, in order of the file."""
    signals = {incident.position: incident.signal for incident in batch.incidents()}
    for child in batch.children(status="crashed"):
        for document in child.args[0]:
            yield CrashedDocument(
                sourcedb=document["sourcedb"],
                sourceid=document["sourceid"],
                divid=document["divid"],
                signal=signals.get(child.position),
                child=child.position,
            )


def callback_starts(batch: Batch) -> int:
    """How often the callback of a batch was started. One is what the library promises."""
    return sum(callback.attempt for callback in batch.children(kind="callbacks"))
