"""What `watch` looks at: batches, their callbacks and newest deaths, look by look, and what changed between two."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from celery_batchtrack import errors
from celery_batchtrack.surfaces import views
from celery_batchtrack.surfaces.pages import how_it_died, item_in_hand, short
from celery_batchtrack.surfaces.render import clean
from celery_batchtrack.vocabulary.states import BATCH_ALIVE, OPEN, BatchStatus, Status

if TYPE_CHECKING:
    from celery_batchtrack.store import Store

Object = Mapping[str, Any]

#: What makes a look at a batch differ from the one before: rate and time left change with every look.
_TELLING = (
    "status", "round", "total", "pending", "running", "completed", "failed", "crashed", "cancelled", "items_completed",
    "items_failed", "items_crashed", "progress_percent", "paused_at", "pause_reason",
)  # fmt: skip
#: Batches that are watched at a time where none is named, and deaths that one look takes in.
_MOST, _DEATHS = 1000, 20
_OPEN = tuple(each.value for each in OPEN)
_DEAD = (Status.FAILED.value, Status.CRASHED.value)
_PLAIN = re.compile(r"[\w.:@+/%-]+")


@dataclass(frozen=True, slots=True)
class Watched:
    """A batch as it was when last looked at; `gone`: it is not there any more."""

    batch: Object
    callbacks: tuple[str, ...] = ()  # their statuses
    gone: bool = False

    @property
    def open_callbacks(self) -> int:
        return sum(each in _OPEN for each in self.callbacks)

    @property
    def failed_callbacks(self) -> int:
        return sum(each in _DEAD for each in self.callbacks)

    @property
    def over(self) -> bool:
        """It has ended and so have its callbacks, or it is not there any more."""
        return self.gone or (self.batch["finished_at"] is not None and not self.open_callbacks)

    def ended_well(self, *, partial: bool) -> bool:
        """`partial`: that outcome counts as a good one."""
        good = (BatchStatus.COMPLETED, BatchStatus.PARTIAL) if partial else (BatchStatus.COMPLETED,)
        return self.batch["status"] in good and not self.failed_callbacks

    @property
    def state(self) -> str:
        """For people: its status, or what it waits for."""
        if self.gone:
            return "gone"
        if self.batch["paused_at"] and not self.batch["finished_at"]:
            return "paused"
        if self.batch["finished_at"] and self.open_callbacks:
            return f"{self.batch['status']}, {self.open_callbacks} callback{'s' * (self.open_callbacks > 1)} open"
        failed = f", {self.failed_callbacks} callback{'s' * (self.failed_callbacks > 1)} failed"
        return str(self.batch["status"]) + (failed if self.failed_callbacks else "")

    def told(self) -> tuple[Any, ...]:
        return (*(self.batch[name] for name in _TELLING), self.callbacks, self.gone)


@dataclass(slots=True)
class Watch:
    """Batches that are watched until all of them are over. Without `wanted`, those that run, and those that begin to
    run meanwhile."""

    store: Store
    wanted: Sequence[str] = ()
    batches: dict[uuid.UUID, Watched] = field(default_factory=dict)
    crashes: list[Object] = field(default_factory=list)  # the newest, oldest first
    _ids: list[uuid.UUID] = field(default_factory=list)
    _seen: set[Any] = field(default_factory=set)

    def begin(self) -> None:
        """Find what is wanted. Raises BatchNotFound."""
        if not self.wanted:
            self._ids = self.store.unsettled(_MOST, roots=True)
            return
        self._ids = list(dict.fromkeys(each for text in self.wanted for each in named(self.store, text)))

    def look(self) -> tuple[list[Watched], list[Object]]:
        """Batches that changed since the last look, and deaths that are new; all of them at the first."""
        if not self.wanted:
            self._ids = list(dict.fromkeys([*self._ids, *_running(self.store)]))
        ids = [each for each in self._ids if each not in self.batches or not self.batches[each].over]
        found = {uuid.UUID(each["id"]): each for each in views.batches(self.store, ids)}
        callbacks = self.store.callbacks_of(ids) if ids else {}
        changed = []
        for id in ids:
            before = self.batches.get(id)
            if id in found:
                now = Watched(found[id], tuple(sorted(callbacks.get(id, ()))))
            elif before is not None:
                now = Watched(before.batch, before.callbacks, gone=True)
            else:
                continue
            if before is None or before.told() != now.told():
                changed.append(now)
            self.batches[id] = now
        return changed, self._new_crashes(ids)

    def _new_crashes(self, ids: Sequence[uuid.UUID]) -> list[Object]:
        if not ids:
            return []
        rows = self.store.incidents(ids, crashes_only=True, limit=_DEATHS, stacks=False, nested=True)
        new: list[Object] = [views.incident(row) for row in rows if row.id not in self._seen]
        self._seen.update(each["id"] for each in new)
        self.crashes = [*self.crashes, *new][-_DEATHS:]
        return new

    @property
    def over(self) -> bool:
        return all(each.over for each in self.batches.values())

    def ended_well(self, *, partial: bool) -> bool:
        return all(not each.gone and each.ended_well(partial=partial) for each in self.batches.values())


def _running(store: Store) -> list[uuid.UUID]:
    return store.list_batches(statuses=[str(each) for each in BATCH_ALIVE], roots=True, limit=_MOST)[::-1]


def named(store: Store, text: str) -> list[uuid.UUID]:
    """The batch of this id, or of this beginning of an id; or those of this name that run, or else the newest of that
    name. Raises BatchNotFound."""
    try:
        return [store.resolve(text)]
    except errors.BatchNotFound as error:
        running = store.list_batches(statuses=[str(each) for each in BATCH_ALIVE], name=text, limit=_MOST)[::-1]
        found = running or store.list_batches(name=text, limit=1)
        if not found:
            raise errors.BatchNotFound(
                f"{error}, and none of that name" if str(error).startswith("no batch") else str(error)
            ) from None
        return found


# -- as lines -----------------------------------------------------------------------------------------


def line_of(watched: Watched) -> str:
    """``key=value`` for programs that read logs."""
    each = watched.batch
    done = each["total"] - each["pending"] - each["running"]
    values: list[tuple[str, object]] = [
        ("batch", each["id"]), ("name", each["name"]), ("status", "gone" if watched.gone else each["status"]),
        ("percent", each["progress_percent"]), ("done", done), ("total", each["total"]),
        *((name, each[name]) for name in ("running", "completed", "failed", "crashed", "cancelled")),
    ]  # fmt: skip
    if each["rate"] is not None:
        values.append(("rate", f"{each['rate']:.3g}"))
    if not each["finished_at"]:
        values += [("eta", f"{each['eta']:.0f}")] if each["eta"] is not None and not each["paused_at"] else []
        values += [("paused", each["pause_reason"])] if each["paused_at"] else []
    elif watched.callbacks:
        values += [("callbacks_open", watched.open_callbacks), ("callbacks_failed", watched.failed_callbacks)]
    return pairs(values)


def crash_line(one: Object) -> str:
    return pairs([
        ("crash", how_it_died(one)), ("batch", one["batch_id"]), ("position", one["position"]), ("task", one["task"]),
        ("item", short(item_in_hand(one))), ("frame", one["python_frame"]), ("host", one["hostname"]),
        ("pid", one["pid"]), ("became", one["outcome"]),
    ])  # fmt: skip


def pairs(values: Iterable[tuple[str, object]]) -> str:
    """``key=value`` for what there is; in quotes, as JSON does it, where a value is not one plain word."""
    return " ".join(f"{key}={_value(value)}" for key, value in values if value not in (None, ""))


def _value(value: object) -> str:
    text = clean(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


# -- as a bar -----------------------------------------------------------------------------------------


def stacked(counts: Sequence[int], cells: int) -> list[int]:
    """How many of the cells each count gets: its share, but at least one if it is not 0."""
    total = sum(counts)
    if not total:
        return [0] * len(counts)
    exact = [count * cells / total for count in counts]
    given = [max(1, int(share)) if count else 0 for share, count in zip(exact, counts, strict=True)]
    while sum(given) > cells:  # what was rounded up comes from the largest
        given[max(range(len(given)), key=lambda at: given[at] - exact[at] + (given[at] > 1) * cells)] -= 1
    while sum(given) < cells:
        given[max(range(len(given)), key=lambda at: exact[at] - given[at])] += 1
    return given


def bar_of(each: Object, cells: int) -> Iterator[tuple[str, int]]:
    """(class, cells) of a batch's bar, in the order in which they stand."""
    names = ("completed", "failed", "crashed", "cancelled", "running", "pending")
    return zip(names, stacked([each[name] for name in names], cells), strict=True)
