"""What each command prints for people, from the same mappings that ``--json`` prints."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from celery_batchtrack.surfaces.render import NOTHING, Column, Screen, Table, bar, clean, cut, duration, number, rate
from celery_batchtrack.surfaces.views import SHORT_ID

Object = Mapping[str, Any]

_COLOURS = {
    "completed": "green", "running": "blue", "partial": "yellow", "failed": "red", "crashed": "red",
    "cancelled": "yellow", "alive": "green", "suspected": "yellow", "lost": "red", "ok": "green", "split": "yellow",
    "paused": "yellow", "quarantined": "red",
}  # fmt: skip
_NAMED, _LABELS = 10, 20
#: Identifiers, notes and messages are as long as a user made them.
_SHOWN = 80


def coloured(text: str) -> str | None:
    return _COLOURS.get(text)


def _status(title: str = "STATUS") -> Column:
    return Column(title, colour=coloured)


def count(title: str) -> Column:
    return Column(title, right=True)


def _bad_count(title: str) -> Column:
    return Column(title, right=True, colour=lambda text: None if text == "0" else "red")


def short_ids(ids: Sequence[str]) -> list[str]:
    """Beginnings of the ids that tell them apart."""
    length = SHORT_ID
    while length < 36 and len({each[:length] for each in ids}) < len(set(ids)):
        length += 1
    return [each[:length].rstrip("-") for each in ids]


def seconds_between(since: datetime | None, until: datetime | None) -> float | None:
    return None if since is None or until is None else (until - since).total_seconds()


def moment(value: datetime | None) -> str:
    return NOTHING if value is None else f"{value:%Y-%m-%d %H:%M:%S}Z"


def ago(then: datetime | None, now: datetime) -> str:
    return duration(seconds_between(then, now)) + " ago"


def some(items: Sequence[str], first: int = 3) -> str:
    """The first few identifiers, and how many more there are."""
    more = len(items) - first
    return ", ".join(items[:first]) + (f" (+{more})" if more > 0 else "")


def short(text: object, limit: int = _SHOWN) -> str:
    """One clean line of bounded length."""
    return cut(clean(text), limit)


def item_in_hand(incident: Object) -> str:
    """The item, or where it is not known, those it is one of."""
    return str(incident["item"] or some(incident["items"]))


def how_it_died(incident: Object) -> str:
    if incident["signal"]:
        return str(incident["signal"])
    if incident["exit_code"] is not None:
        return f"exit code {incident['exit_code']}"
    return str(incident["cause"]).replace("_", " ")


# -- list, show -----------------------------------------------------------------------------------


def batch_list(screen: Screen, batches: Sequence[Object], now: datetime) -> Iterator[str]:
    table = Table(screen, [
        Column("ID"), Column("NAME", elastic=True), _status(), Column("PROGRESS"), count("DONE/TOTAL"),
        _bad_count("FAIL"), _bad_count("CRASH"), count("RATE"), count("ETA"), count("AGE"),
    ])  # fmt: skip
    ids = short_ids([each["id"] for each in batches])
    return table.lines(_batch_line(id, each, now) for id, each in zip(ids, batches, strict=True))


def _batch_line(id: str, each: Object, now: datetime) -> Sequence[object]:
    running = each["finished_at"] is None
    moving = running and not each["paused_at"]
    done = each["total"] - each["pending"] - each["running"]
    percent = each["progress_percent"]
    return (
        id, each["name"], _status_of(each), f"{bar(percent)} {percent:3d}%", f"{number(done)}/{number(each['total'])}",
        each["failed"], each["crashed"], rate(each["rate"]) if running else NOTHING,
        duration(each["eta"]) if moving else NOTHING, duration(seconds_between(each["created_at"], now)),
    )  # fmt: skip


def _status_of(each: Object) -> str:
    return "paused" if each["paused_at"] and not each["finished_at"] else str(each["status"])


def batch_page(screen: Screen, each: Object, id: str, app: str) -> Iterator[str]:
    """Everything about one batch, on about a screen. `id` and `app` are for the commands that it proposes."""
    command = f"celery -A {shlex.quote(app)} batchtrack" if app != "<app>" else "celery -A <app> batchtrack"
    for label, text in (
        ("", _headline(screen, each)),
        ("progress", _progress(each)),
        ("items", _sum(each, "items_")),
        ("children", _children(each)),
        *_labels(each),
        ("times", _times(each)),
        *_sending(each),
        *_paused(each, f"{command} resume {id}"),
        *(("callbacks", _callback(callback)) for callback in each["callbacks"]),
        *_incident_lines(each),
        *_next(each, f"{command} repro {id}"),
    ):
        yield screen.printable(f"{label:<9}  {text}" if label else text)


def _headline(screen: Screen, each: Object) -> str:
    status = screen.style(_status_of(each), coloured(_status_of(each)))
    parts = [f"{clean(each['name'])} {each['id']}", status, f"round {each['round']}"]
    if each["reason"]:
        parts.append(f"cancelled by {clean(each['reason'])}")
    if each["parent_task"]:
        parts.append(f"by {clean(each['parent_task'])} (task {clean(each['parent_task_id'])})")
    return "   ".join(parts)


def _labels(each: Object) -> Iterator[tuple[str, str]]:
    if each["description"]:
        yield "about", short(each["description"], 200)
    told = [short(tag) for tag in each["tags"] or ()]
    told += [f"{short(key)}={short(value)}" for key, value in (each["metadata"] or {}).items()]
    if told:
        yield "labels", some(told, _LABELS)
    if each["parent_batch"]:
        yield "nested", f"in {each['parent_batch']} #{each['parent_position']}"
    if each["nested"]:
        yield "nested", f"{number(each['nested'])} batches in it: `batchtrack list --parent {each['id']}`"


def _progress(each: Object) -> str:
    percent = each["progress_percent"]
    text = f"{bar(percent)} {percent}%"
    if each["rate"] is not None:
        text += f"   {rate(each['rate'])}"
    if each["finished_at"] is None and not each["paused_at"] and each["eta"] is not None:
        text += f"   {duration(each['eta'])} left"
    return text


def _sum(each: Object, prefix: str) -> str:
    ended = [
        f"{number(each[prefix + name])} {name}"
        for name in ("completed", "failed", "crashed", "cancelled") if each[prefix + name]
    ]  # fmt: skip
    if not prefix:
        ended += [f"{number(each[name])} {name}" for name in ("running", "pending") if each[name]]
    elif left := each["items_total"] - sum(
        each["items_" + name] for name in ("completed", "failed", "crashed", "cancelled")
    ):
        ended.append(f"{number(left)} open")
    return f"{number(each[prefix + 'total'])} = {' + '.join(ended) or '0'}"


def _children(each: Object) -> str:
    left = each["pending"] + each["running"]
    split = f" ({number(each['split'])} split)" if each["split"] else ""
    return f"{_sum(each, '')}, {number(left)} open{split}"


def _sending(each: Object) -> Iterator[tuple[str, str]]:
    """What may be why nothing moves."""
    limits = each["limits"]
    told = [f"{name} {number(limits[name])}" for name in ("max_in_flight", "max_running") if name in limits]
    if "rate" in limits:
        told.append(f"rate {_as_declared(limits['rate'])}")
    if "queue" in limits:
        told.append(f"queue {clean(limits['queue'])}")
    if each["priority"]:
        told.append(f"priority {each['priority']}")
    if each["dispatch_at"] is not None and each["finished_at"] is None:
        told.append(f"held back until {moment(each['dispatch_at'])}")
    if told:
        yield "sending", ", ".join(told)


def _as_declared(per_second: float) -> str:
    for unit, seconds in (("s", 1), ("m", 60)):
        if per_second * seconds >= 1:
            return f"{per_second * seconds:g}/{unit}"
    return f"{per_second * 3600:g}/h"


def _paused(each: Object, resume: str) -> Iterator[tuple[str, str]]:
    if _status_of(each) == "paused":
        yield "paused", f"{short(each['pause_reason'], 255)}   since {moment(each['paused_at'])}   {resume}"


def _times(each: Object) -> str:
    took = seconds_between(each["started_at"], each["finished_at"])
    parts = [f"{name} {moment(each[name + '_at'])}" for name in ("created", "started", "finished")]
    return "   ".join(parts) + ("" if took is None else f"   took {duration(took)}")


def _callback(each: Object) -> str:
    took = seconds_between(each["started_at"], each["finished_at"])
    after = "" if took is None else f" in {duration(took)}"
    starts = "1 start" if each["attempt"] == 1 else f"{each['attempt']} starts"
    cause = f" ({clean(each['cause'])})" if each["cause"] else ""
    return f"{each['kind']} {clean(each['task'])} → {each['status']}{cause}{after} ({starts})"


def _named(each: Object) -> list[Object]:
    return [one for one in each["incidents"] if one["outcome"] in ("crashed", "failed") and not one["overturned_at"]]


def _incident_lines(each: Object) -> Iterator[tuple[str, str]]:
    named = _named(each)
    for one in named[:_NAMED]:
        yield one["outcome"], _incident(one)
    left = each["failed"] + each["crashed"] - min(len(named), _NAMED)
    if left > 0:
        how = f"batchtrack children {each['id']} --status failed --status crashed"
        yield "", f"{'':9}  … and {number(left)} more: {how}"


def _incident(one: Object) -> str:
    parts = [f"#{one['position']} {short(item_in_hand(one) or one['task'])}"]
    if one["outcome"] == "failed":
        parts.append(short(one["message"] or how_it_died(one), 200))
    else:
        parts += [clean(how_it_died(one)), *([short(one["python_frame"])] if one["python_frame"] else [])]
    if one["hostname"]:
        parts.append(short(one["hostname"]) + (f" pid {one['pid']}" if one["pid"] else ""))
    late = seconds_between(one["died_at"], one["detected_at"])
    if one["detected_by"] and late is not None:
        parts.append(f"seen after {duration(late)} ({one['detected_by']})")
    return "   ".join(parts)


def _next(each: Object, repro: str) -> Iterator[tuple[str, str]]:
    """What to do about the first crash that is shown; rather one that happened here than one of a withheld item."""
    crashed = [one for one in _named(each) if one["outcome"] == "crashed"]
    here = [one for one in crashed if one["cause"] != "quarantined"]
    for one in (here or crashed)[:1]:
        yield "next", f"{repro} {one['position']}"


# -- children, workers, verify --------------------------------------------------------------------


def child_list(screen: Screen, children: Iterable[Object]) -> Iterator[str]:
    table = Table(screen, [
        count("#"), Column("KIND"), _status(), Column("TASK", elastic=True), Column("ITEMS", elastic=True),
        count("TRY"), _bad_count("CRASHES"), Column("CAUSE"), count("TOOK"),
    ])  # fmt: skip
    return table.lines(
        (
            each["position"], _kind(each), each["status"], each["task"], some(each["items"]), each["attempt"],
            each["crashes"], each["cause"] or "", duration(seconds_between(each["started_at"], each["finished_at"])),
        )
        for each in children
    )  # fmt: skip


def _kind(each: Object) -> str:
    return str(each["kind"]) if each["split_from"] is None else f"part of {each['split_from']}"


def worker_list(screen: Screen, workers: Sequence[Object], now: datetime) -> Iterator[str]:
    table = Table(screen, [
        Column("NAME", elastic=True), _status("STATE"), Column("KIND"), Column("POOL"), Column("HOST", elastic=True),
        count("PID"), count("RUNNING"), _bad_count("CRASHES 24H"), count("LAST BEAT"), count("UP"), Column("VERSION"),
    ])  # fmt: skip
    return table.lines(
        (
            each["name"], each["state"], each["kind"], each["pool"], each["hostname"], each["pid"],
            each["running"], each["crashes_24h"], ago(each["beat_at"], now),
            duration(seconds_between(each["started_at"], each["stopped_at"] or each["lost_at"] or now)),
            each["version"],
        )
        for each in workers
    )  # fmt: skip


def check_list(screen: Screen, violations: Sequence[Object]) -> Iterator[str]:
    table = Table(screen, [Column("CHECK"), Column("RESULT", colour=lambda text: coloured(text) or "red"), Column("")])
    return table.lines(
        (each["check"], f"{each['violations']} violations" if each["violations"] else "ok", some(each["examples"], 5))
        for each in violations
    )


def sweep_line(done: Mapping[str, int]) -> str:
    did = [f"{name.replace('_', ' ')} {count}" for name, count in done.items() if count]
    return ", ".join(did) or "nothing to do"


def pause_line(each: Object, what: str, done: bool) -> str:
    """What `pause` (`what` is "paused") or `resume` ("resumed") did."""
    name = f"{each['name']} {each['id']}"
    counts = f"{each['running']} running, {each['pending']} pending"
    if done:
        return f"{what} {name}: {counts}"
    if each["finished_at"]:
        return f"{name} had ended already: {each['status']}"
    reason = f"is paused already: {each['pause_reason']}" if what == "paused" else "is not paused"
    return f"{name} {reason} ({counts})"
