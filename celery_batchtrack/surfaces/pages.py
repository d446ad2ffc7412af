"""What each command prints for people, from the same mappings that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from celery_batchtrack.surfaces.render import NOTHING, Column, Screen, Table, bar, clean, duration, number, rate

Object = Mapping[str, Any]

_COLOURS = {
    "completed": "green", "running": "blue", "partial": "yellow", "failed": "red", "crashed": "red",
    "cancelled": "yellow", "alive": "green", "suspected": "yellow", "lost": "red", "ok": "green",
}  # fmt: skip
#: The time stamp of a time-ordered id: shorter, and batches of the same minute look alike.
_SHORT_ID = 13
_NAMED = 10


def _coloured(text: str) -> str | None:
    return _COLOURS.get(text)


def _status(title: str = "STATUS") -> Column:
    return Column(title, colour=_coloured)


def _count(title: str) -> Column:
    return Column(title, right=True)


def _bad_count(title: str) -> Column:
    return Column(title, right=True, colour=lambda text: None if text == "0" else "red")


def short_ids(ids: Sequence[str]) -> list[str]:
    """Beginnings of the ids that tell them apart."""
    length = _SHORT_ID
    while length < 36 and len({each[:length] for each in ids}) < len(set(ids)):
        length += 1
    return [each[:length].rstrip("-") for each in ids]


def _seconds(since: datetime | None, until: datetime | None) -> float | None:
    return None if since is None or until is None else (until - since).total_seconds()


def moment(value: datetime | None) -> str:
    return NOTHING if value is None else f"{value:%Y-%m-%d %H:%M:%S}Z"


def some(items: Sequence[str], count: int = 3) -> str:
    """The first few identifiers, and how many more there are."""
    more = len(items) - count
    return ", ".join(items[:count]) + (f" (+{more})" if more > 0 else "")


def how_it_died(incident: Object) -> str:
    if incident["signal"]:
        return str(incident["signal"])
    if incident["exit_code"] is not None:
        return f"exit code {incident['exit_code']}"
    return str(incident["cause"]).replace("_", " ")


# -- list, show -----------------------------------------------------------------------------------


def batch_list(screen: Screen, batches: Sequence[Object], now: datetime) -> Iterator[str]:
    table = Table(screen, [
        Column("ID"), Column("NAME", elastic=True), _status(), Column("PROGRESS"), _count("DONE/TOTAL"),
        _bad_count("FAIL"), _bad_count("CRASH"), _count("RATE"), _count("ETA"), _count("AGE"),
    ])  # fmt: skip
    ids = short_ids([each["id"] for each in batches])
    return table.lines(_batch_line(short, each, now) for short, each in zip(ids, batches, strict=True))


def _batch_line(short: str, each: Object, now: datetime) -> Sequence[object]:
    running = each["finished_at"] is None
    done = each["total"] - each["pending"] - each["running"]
    percent = each["progress_percent"]
    return (
        short, each["name"], each["status"], f"{bar(percent)} {percent:3d}%", f"{number(done)}/{number(each['total'])}",
        each["failed"], each["crashed"], rate(each["rate"]) if running else NOTHING,
        duration(each["eta"]) if running else NOTHING, duration(_seconds(each["created_at"], now)),
    )  # fmt: skip


def batch_page(screen: Screen, each: Object) -> Iterator[str]:
    """Everything about one batch, on about a screen."""
    for label, text in (
        ("", _headline(screen, each)),
        ("progress", _progress(each)),
        ("items", _sum(each, "items_")),
        ("children", _sum(each, "") + f", {number(each['pending'] + each['running'])} open"),
        ("times", _times(each)),
        *(("callbacks", _callback(callback)) for callback in each["callbacks"]),
        *_incident_lines(each),
    ):
        yield screen.printable(f"{label:<9}  {text}" if label else text)


def _headline(screen: Screen, each: Object) -> str:
    status = screen.style(each["status"], _coloured(each["status"]))
    parts = [f"{clean(each['name'])} {each['id']}", status, f"round {each['round']}"]
    if each["reason"]:
        parts.append(f"cancelled by {clean(each['reason'])}")
    if each["parent_task"]:
        parts.append(f"by {clean(each['parent_task'])} (task {clean(each['parent_task_id'])})")
    return "   ".join(parts)


def _progress(each: Object) -> str:
    percent = each["progress_percent"]
    text = f"{bar(percent)} {percent}%"
    if each["rate"] is not None:
        text += f"   {rate(each['rate'])}"
    if each["finished_at"] is None and each["eta"] is not None:
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


def _times(each: Object) -> str:
    took = _seconds(each["started_at"], each["finished_at"])
    parts = [f"{name} {moment(each[name + '_at'])}" for name in ("created", "started", "finished")]
    return "   ".join(parts) + ("" if took is None else f"   took {duration(took)}")


def _callback(each: Object) -> str:
    took = _seconds(each["started_at"], each["finished_at"])
    after = "" if took is None else f" in {duration(took)}"
    starts = "1 start" if each["attempt"] == 1 else f"{each['attempt']} starts"
    cause = f" ({clean(each['cause'])})" if each["cause"] else ""
    return f"{each['kind']} {clean(each['task'])} → {each['status']}{cause}{after} ({starts})"


def _incident_lines(each: Object) -> Iterator[tuple[str, str]]:
    named = [one for one in each["incidents"] if one["outcome"] in ("crashed", "failed") and not one["overturned_at"]]
    for one in named[:_NAMED]:
        yield one["outcome"], _incident(one)
    left = each["failed"] + each["crashed"] - min(len(named), _NAMED)
    if left > 0:
        how = f"batchtrack children {each['id']} --status failed --status crashed"
        yield "", f"{'':9}  … and {number(left)} more: {how}"


def _incident(one: Object) -> str:
    parts = [f"#{one['position']} {clean(some(one['items']) or one['task'])}"]
    if one["outcome"] == "failed":
        parts.append(clean(one["message"] or how_it_died(one))[:200])
    else:
        parts.append(clean(how_it_died(one)))
    if one["hostname"]:
        parts.append(clean(one["hostname"]) + (f" pid {one['pid']}" if one["pid"] else ""))
    late = _seconds(one["died_at"], one["detected_at"])
    if one["detected_by"] and late is not None:
        parts.append(f"seen after {duration(late)} ({one['detected_by']})")
    return "   ".join(parts)


# -- children, crashes, workers, verify -----------------------------------------------------------


def child_list(screen: Screen, children: Iterable[Object]) -> Iterator[str]:
    table = Table(screen, [
        _count("#"), Column("KIND"), _status(), Column("TASK", elastic=True), Column("ITEMS", elastic=True),
        _count("TRY"), _bad_count("CRASHES"), Column("CAUSE"), _count("TOOK"),
    ])  # fmt: skip
    return table.lines(
        (
            each["position"], each["kind"], each["status"], each["task"], some(each["items"]), each["attempt"],
            each["crashes"], each["cause"] or "", duration(_seconds(each["started_at"], each["finished_at"])),
        )
        for each in children
    )  # fmt: skip


def crash_list(screen: Screen, crashes: Sequence[Object]) -> Iterator[str]:
    table = Table(screen, [
        Column("DIED"), Column("BATCH"), _count("#"), Column("TASK", elastic=True), _count("TRY"),
        Column("ITEMS", elastic=True), Column("HOW", colour=lambda text: "red"), Column("HOST", elastic=True),
        _count("PID"), Column("SEEN BY"), Column("BECAME", colour=_coloured),
    ])  # fmt: skip
    ids = short_ids([str(each["batch_id"]) for each in crashes])
    return table.lines(
        (
            moment(each["died_at"] or each["detected_at"]), short, each["position"], each["task"], each["attempt"],
            some(each["items"]), how_it_died(each), each["hostname"] or "", each["pid"] or "", each["detected_by"],
            each["outcome"],
        )
        for short, each in zip(ids, crashes, strict=True)
    )  # fmt: skip


def worker_list(screen: Screen, workers: Sequence[Object], now: datetime) -> Iterator[str]:
    table = Table(screen, [
        Column("NAME", elastic=True), _status("STATE"), Column("KIND"), Column("POOL"), Column("HOST", elastic=True),
        _count("PID"), _count("LAST BEAT"), _count("UP"), Column("VERSION"),
    ])  # fmt: skip
    return table.lines(
        (
            each["name"], each["state"], each["kind"], each["pool"], each["hostname"], each["pid"],
            duration(_seconds(each["beat_at"], now)) + " ago",
            duration(_seconds(each["started_at"], each["stopped_at"] or each["lost_at"] or now)), each["version"],
        )
        for each in workers
    )  # fmt: skip


def check_list(screen: Screen, violations: Sequence[Object]) -> Iterator[str]:
    table = Table(screen, [Column("CHECK"), Column("RESULT", colour=lambda text: _coloured(text) or "red"), Column("")])
    return table.lines(
        (each["check"], f"{each['violations']} violations" if each["violations"] else "ok", some(each["examples"], 5))
        for each in violations
    )


def sweep_line(done: Mapping[str, int]) -> str:
    did = [f"{name.replace('_', ' ')} {count}" for name, count in done.items() if count]
    return ", ".join(did) or "nothing to do"
