"""What pages, REST and commands show, as plain mappings: ids are UUIDs, times datetimes, durations seconds."""

from __future__ import annotations

import platform
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from celery_batchtrack import errors
from celery_batchtrack.surfaces import views
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import storable
from celery_batchtrack.vocabulary.states import Status

if TYPE_CHECKING:
    from celery_batchtrack.store import Store
    from celery_batchtrack.vocabulary.records import ChildRow
    from celery_batchtrack.vocabulary.settings import Settings

Object = dict[str, Any]

CHIPS = ("attention", "running", "crashed", "failed", "completed", "all")
#: Windows of the crash explorer.
WINDOWS: Mapping[str, float] = {"1h": 3600.0, "3h": 10_800.0, "24h": 86_400.0, "7d": 604_800.0}
#: Characters of a description in a list.
DESCRIBED = 1000
#: Bins of a plot, at most.
_BINS = 120
_NESTED = 50
#: Items that killed are looked for among so many newest deaths.
_DEATHS = 10_000
_WEEK = WINDOWS["7d"]
_OF_INCIDENT = (
    "cause", "signal", "exit_code", "exception", "python_frame", "message", "fingerprint", "item", "hostname",
)  # fmt: skip
_PACKAGES = ("celery-batchtrack", "celery", "kombu", "sqlalchemy", "psycopg", "flower")


# -- batches ----------------------------------------------------------------------------------------


def batch_list(
    store: Store, *, chip: str = "attention", search: str = "", after: str | None = None, limit: int = 25
) -> Object:
    """{chip, search, batches, next (cursor for `after`), searched (how far an item was looked for, in words)}.

    Raises InvalidOption for an unknown chip or a cursor that is none.
    """
    if chip not in CHIPS:
        raise errors.InvalidOption(f"no batches {chip!r}: there are {', '.join(CHIPS)}")
    search = _asked(search.strip(), 255) or ""
    found = store.browse_batches(chip=chip, search=search, after=_moment_and_id(after), limit=limit)
    listed = _batches(store, found.ids)
    last = listed[-1] if listed else None
    return {
        "chip": chip, "search": search, "batches": listed,
        "next": f"{last['created_at']}~{last['batch_id']}" if last is not None and found.more else None,
        "searched": (
            "Not all was looked through: children that have not ended, or have several items, only in the newest"
            " batches, and of those with it the newest are shown"
            if found.beyond else None
        ),
    }  # fmt: skip


def _moment_and_id(cursor: str | None) -> tuple[datetime, uuid.UUID] | None:
    if not cursor:
        return None
    moment, _, batch_id = cursor.partition("~")
    try:
        return datetime.fromisoformat(moment).astimezone(UTC), uuid.UUID(batch_id)
    except (ValueError, OverflowError):
        raise errors.InvalidOption(f"{cursor[:100]!r} is no page of this list: begin with the first") from None


def _asked(text: str | None, limit: int = 1000) -> str | None:
    """Text from outside as a database takes it."""
    return None if text is None else storable(text)[:limit]


def _batches(
    store: Store, ids: Sequence[uuid.UUID], *, whole: bool = False, stuck_rows: Sequence[Object] | None = None
) -> list[Object]:
    """`whole`: also long descriptions. `stuck_rows`: those of the view, if they were read before."""
    stuck = {each["batch_id"]: each["reason"] for each in (_stuck(store, ids) if stuck_rows is None else stuck_rows)}
    found = list(views.batches(store, ids))
    for each in found:
        each["short_id"] = str(each["batch_id"])[: views.SHORT_ID]
        each["stuck"] = stuck.get(uuid.UUID(str(each["batch_id"])))
        if not whole and len(each["description"] or "") > DESCRIBED:
            each["description"] = each["description"][: DESCRIBED - 1] + "…"
    return found


def _stuck(store: Store, ids: Sequence[uuid.UUID]) -> list[Object]:
    return store.view("stuck_batch", {"batch_id": list(ids)}) if ids else []


def batch_page(store: Store, batch_id: uuid.UUID) -> Object:
    """All of one batch's page but its children. Raises BatchNotFound."""
    stuck = _stuck(store, [batch_id])
    batch = _one(store, batch_id, stuck)
    settled = batch["completed"] + batch["failed"] + batch["crashed"] + batch["cancelled"]
    nested = store.list_batches(parent=batch_id, limit=_NESTED + 1)
    parent = [batch["parent_batch"]] if batch["parent_batch"] is not None else []
    return {
        "batch": batch,
        "stuck": next(iter(stuck), None),
        "callbacks": [views.callback(each) for each in store.callback_rows(batch_id)],
        "throughput": throughput(store, batch_id, batch),
        "crash_times": sorted(store.deaths_of(batch_id)) if batch["crashed"] or batch["status"] != "completed" else [],
        "durations": asdict(store.durations(batch_id, settled)),
        "slowest": store.view("slowest", {"batch_id": batch_id}, order_by=["rank"], limit=10),
        "signatures": _with_stacks(store, store.signatures(batch_id)),
        "parent": next(iter(_batches(store, parent)), None),
        "nested": _batches(store, nested[:_NESTED]),
        "nested_complete": len(nested) <= _NESTED,
    }


def _one(store: Store, batch_id: uuid.UUID, stuck_rows: Sequence[Object] | None = None) -> Object:
    found = _batches(store, [batch_id], whole=True, stuck_rows=stuck_rows)
    if not found:
        raise errors.BatchNotFound(f"no batch {batch_id} in {store.shown_url}")
    return found[0]


def throughput(store: Store, batch_id: uuid.UUID, batch: Object) -> Object:
    """{bin_seconds, bins: [{time, completed, failed, crashed, cancelled}]}, from the batch's start, or the first end of
    a child before it, until now or its end; no bins before anything began."""
    row = store.batches([batch_id]).get(batch_id)
    if row is None or (row.started_at is None and not row.start_now):
        return {"bin_seconds": 60, "bins": []}
    start, first = row.started_at or row.created_at, store.first_end(batch_id)
    if first is not None and first + timedelta(minutes=1) <= start:
        start = first  # it was sealed, or sealed again, later
    seconds = ((row.finished_at or store.current_time()) - start).total_seconds()
    by_minute = batch["total"] > 5_000 or seconds > 3600.0
    width = _width(seconds, 60 if by_minute else 1)
    if by_minute:
        start = start.replace(second=0, microsecond=0)
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for each in store.throughput(batch_id, start, width, by_minute=by_minute):
        counts[each.index][each.status] += each.children
    last = max([int(seconds // width), *counts])
    names = ("completed", "failed", "crashed", "cancelled")
    bins = [
        {"time": start + timedelta(seconds=index * width), **{name: counts[index][name] for name in names}}
        for index in range(min(last, 4 * _BINS) + 1)
    ]
    return {"bin_seconds": width, "bins": bins}


def _width(seconds: float, least: int) -> int:
    """A round number of seconds, in which so long a time has at most `_BINS` bins."""
    for width in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21_600, 43_200):
        if width >= least and seconds / width <= _BINS:
            return width
    return 86_400 * (1 + int(seconds / 86_400 / _BINS))


def _with_stacks(store: Store, signatures: Iterable[Any]) -> list[Object]:
    found = [asdict(each) for each in signatures]
    stacks = store.stacks([each["last_incident"] for each in found])
    for each in found:
        each["stack"] = stacks.get(each.pop("last_incident"))
        each.pop("counts")
    return found


# -- children ---------------------------------------------------------------------------------------


def child_list(
    store: Store, batch_id: uuid.UUID, *, status: str | None = None, item: str | None = None,
    worker: str | None = None, fingerprint: str | None = None, after: int | None = None, limit: int = 50,
) -> Object:  # fmt: skip
    """{children, next (position for `after`), searched (how far was looked, in words)}. Raises InvalidOption for an
    unknown status."""
    if status is not None and status not in {each.value for each in Status}:
        raise errors.InvalidOption(f"no status {status!r}: there are {', '.join(Status)}")
    page = store.browse_children(
        batch_id, status=status, item=_asked(item), worker_name=_asked(worker), fingerprint=_asked(fingerprint),
        after=-1 if after is None else max(-1, min(after, 2**62)), limit=limit,
    )  # fmt: skip
    searched = None if page.searched_to is None else f"looked up to #{page.searched_to}: go on for more"
    return {"children": _children(store, batch_id, page.rows), "next": page.next, "searched": searched}


def _children(store: Store, batch_id: uuid.UUID, rows: Sequence[ChildRow]) -> list[Object]:
    unhappy = [row.position for row in rows if row.status != Status.COMPLETED or row.crashes or row.retries]
    told = store.newest_incidents(batch_id, unhappy) if unhappy else {}
    names = store.worker_names([row.worker_id for row in rows if row.worker_id is not None])
    found = []
    for row in rows:
        incident = told.get(row.position)
        name, host = names.get(row.worker_id, (None, None)) if row.worker_id is not None else (None, None)
        more = {key: getattr(incident, key, None) for key in _OF_INCIDENT if key not in ("cause", "hostname")}
        found.append({
            **views.child(row), "seconds": _ran(row), **more,
            "worker": name or getattr(incident, "worker", None),
            "hostname": host or getattr(incident, "hostname", None),
        })  # fmt: skip
    return found


def _ran(row: ChildRow) -> float | None:
    if row.started_at is None or row.finished_at is None:
        return None
    return (row.finished_at - row.started_at).total_seconds()


def child_page(store: Store, batch_id: uuid.UUID, position: int) -> Object:
    """{batch, child, attempts (newest first), same_signature, parts, repro (a command)}. Raises BatchNotFound and
    ChildNotFound."""
    batch = _one(store, batch_id)
    row = store.child(ChildKey(batch_id, position)) if 0 <= position < 2**63 else None
    if row is None:
        raise errors.ChildNotFound(f"batch {batch_id} has no child #{position}")
    incidents = store.incidents(batch_id, position=position)[::-1]
    newest = next((each.fingerprint for each in incidents if each.fingerprint and each.overturned_at is None), None)
    alike = store.view("failure", {"fingerprint": newest}, order_by=["-detected_at"], limit=21) if newest else []
    for each in alike:
        del each["stack"], each["traceback"]
    parts = store.parts_of(row) if row.status == Status.SPLIT else []
    return {
        "batch": batch,
        "child": _children(store, batch_id, [row])[0],
        "attempts": [views.incident(each) for each in incidents],
        "same_signature": [each for each in alike if (each["batch_id"], each["position"]) != (batch_id, position)][:20],
        "parts": _children(store, batch_id, parts),
        "repro": f"celery -A <app> batchtrack repro {batch['short_id']} {position}",
    }


# -- failures, workers, health ----------------------------------------------------------------------


def crashes(store: Store, *, task: str | None = None, signal: str | None = None, host: str | None = None) -> Object:
    """Failures of the last seven days by root cause, items that died more than once, and what to narrow them by."""
    task, signal, host = _asked(task), _asked(signal), _asked(host)
    found = store.signatures(task=task, signal=signal, host=host, within=list(WINDOWS.values()), since=_WEEK)
    rows = _with_stacks(store, found)
    for row, signature in zip(rows, found, strict=True):
        row["counts"] = dict(zip(WINDOWS, signature.counts, strict=True))
    version_now = {(each.task, each.item): each.state for each in store.quarantine_list()}
    groups = store.crash_groups(
        "item", since=_WEEK, limit=50, newest=_DEATHS, task=task, signal=signal, host=host
    )  # fmt: skip
    repeated = [each for each in groups if each.deaths > 1 or (each.task, each.key) in version_now]
    last = store.last_deaths(
        [each.key for each in repeated], since=_WEEK, task=task, signal=signal, host=host
    )  # fmt: skip
    return {
        "signatures": rows,
        "repeat_items": [
            {
                "item": each.key, "task": each.task, "deaths": each.deaths, "batches": each.batches,
                "signal": each.signal, "cause": each.cause, "exit_code": each.exit_code,
                "python_frame": each.python_frame, "last_at": each.last_at,
                "last_batch_id": last.get((each.task, each.key), (None, None))[0],
                "last_position": last.get((each.task, each.key), (None, None))[1],
                "state": version_now.get((each.task, each.key)),
            }
            for each in repeated
        ],
        "tasks": list(store.failing("task", _WEEK)),
        "signals": list(store.failing("signal", _WEEK)),
        "hosts": list(store.failing("hostname", _WEEK)),
    }  # fmt: skip


def workers(store: Store, *, hours: float = 24.0) -> Object:
    """{workers: [row of worker_liveness + children (rows of running)]}: those that live, and those that ended within
    so many hours, newest first."""
    found = store.view("worker_liveness", order_by=["-started_at"], limit=500)
    now = store.current_time()
    recent = [each for each in found if _is_recent(each, now, hours)]
    running: dict[Any, list[Object]] = {}
    for each in store.view("running", order_by=["started_at"], limit=2000):
        running.setdefault(each["worker_id"], []).append(each)
    return {"workers": [{**each, "children": running.get(each["worker_id"], [])} for each in recent]}


def _is_recent(row: Object, now: datetime, hours: float) -> bool:
    ended = row["stopped_at"] or row["lost_at"]
    return ended is None or (now - ended).total_seconds() <= hours * 3600


def health(store: Store, settings: Settings) -> Object:
    """Database, schema, sweeps, what is stuck. `ok`: nothing is stuck, and a sweep was made lately, or nothing is
    open."""
    facts = store.facts()
    stuck = store.view("stuck_batch", order_by=["-stuck_seconds"], limit=100)
    states = [each["state"] for each in store.view("worker_liveness", {"kind": "worker"}, limit=2000)]
    late = facts["sweep_age_seconds"] is None or facts["sweep_age_seconds"] > 4 * settings.detect_every
    idle = not facts["open_batches"]
    return {
        "ok": not stuck and (idle or not late),
        "database": store.shown_url,
        "schema": store.schema_state().name.lower(),
        **facts,
        "detect_every": settings.detect_every,
        "stuck": stuck,
        "workers": {name: states.count(name) for name in ("alive", "suspected", "lost", "stopped")},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def invariants(store: Store) -> list[Object]:
    """Every check and how many rows break it. Reads everything: on demand, or rarely."""
    return store.view("invariant")


__all__ = [
    "CHIPS", "WINDOWS", "batch_list", "batch_page", "child_list", "child_page", "crashes", "health", "invariants",
    "throughput", "workers",
]  # fmt: skip
