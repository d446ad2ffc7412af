"""What the commands about crashes print for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from celery_batchtrack.surfaces.pages import (
    Object,
    ago,
    coloured,
    count,
    how_it_died,
    item_in_hand,
    moment,
    seconds_between,
    short,
    short_ids,
)
from celery_batchtrack.surfaces.render import Column, Screen, Table, clean, duration, number, size

#: A note has at most 512 bytes, a message may be a whole page.
_LONG = 600


def _how(title: str) -> Column:
    return Column(title, colour=lambda text: "red")


def crash_list(screen: Screen, crashes: Sequence[Object]) -> Iterator[str]:
    table = Table(screen, [
        Column("DIED"), Column("BATCH"), count("#"), Column("TASK", elastic=True), count("TRY"),
        Column("ITEM", elastic=True), _how("HOW"), Column("FRAME", elastic=True),
        Column("HOST", elastic=True), count("PID"), Column("SEEN BY"), Column("BECAME", colour=coloured),
    ])  # fmt: skip
    ids = short_ids([str(each["batch_id"]) for each in crashes])
    return table.lines(
        (
            moment(each["died_at"] or each["detected_at"]), id, each["position"], each["task"], each["attempt"],
            short(item_in_hand(each)), how_it_died(each), each["python_frame"] or "", each["hostname"] or "",
            each["pid"] or "", each["detected_by"], each["outcome"],
        )
        for id, each in zip(ids, crashes, strict=True)
    )  # fmt: skip


# -- groups ---------------------------------------------------------------------------------------


def _frame(title: str = "FRAME") -> Column:
    return Column(title, elastic=True)


def crash_groups(screen: Screen, by: str, groups: Sequence[Object], now: datetime) -> Iterator[str]:
    columns = _group_columns(by)
    return Table(screen, [column for column, _ in columns]).lines(
        [_group_cell(name, each, now) for _, name in columns] for each in groups
    )


def _group_columns(by: str) -> list[tuple[Column, str]]:
    """Deaths by signal or host are of any task, and what else is shown of them is that of the last one."""
    task, last = (Column("TASK", elastic=True), "task"), (count("LAST"), "last")
    counts = [(count("DEATHS"), "deaths"), (count("BATCHES"), "batches")]
    items = (count("ITEMS"), "items")
    if by == "item":
        head, tail = (Column("ITEM", elastic=True), "key"), (Column("STATE", colour=coloured), "state")
        return [head, task, *counts, (_how("SIGNAL"), "how"), (_frame(), "python_frame"), last, tail]
    if by == "fingerprint":
        head = (Column("FINGERPRINT"), "key")
        return [head, task, *counts, items, (_how("SIGNAL"), "how"), (_frame(), "python_frame"), last]
    how = [] if by == "signal" else [(_how("LAST SIGNAL"), "how")]
    return [
        (Column(by.upper(), elastic=True), "key"),
        *counts,
        items,
        *how,
        (_frame("LAST FRAME"), "python_frame"),
        last,
    ]


def _group_cell(name: str, each: Object, now: datetime) -> object:
    if name == "how":
        return how_it_died(each)
    if name == "last":
        return ago(each["last_at"], now)
    value = each[name]
    return "" if value is None else short(value) if isinstance(value, str) else value


# -- one incident -----------------------------------------------------------------------------------


def dossier(screen: Screen, one: Object, batch: str, others: Sequence[int] = ()) -> Iterator[str]:
    """All that is known of one incident, without its stack. `others`: attempts that have incidents too."""
    for label, parts in (
        ("", [f"#{one['position']} {one['task']}", f"attempt {one['attempt']}", one["outcome"], batch]),
        ("cause", _cause(one)),
        ("item", _item(one)),
        ("note", [one["note"]]),
        ("message", [one["message"]]),
        ("frame", [one["python_frame"]]),
        ("memory", [one["peak_memory"] and f"peak {size(one['peak_memory'])}"]),
        ("where", _where(one)),
        ("versions", [f"{name} {version}" for name, version in sorted((one["versions"] or {}).items())]),
        ("died" if one["detected_by"] else "when", _when(one)),
        ("group", [one["fingerprint"] and f"fingerprint {one['fingerprint']}"]),
        ("also", [f"attempt {', '.join(map(str, others))}: see --attempt"] if others else []),
    ):
        text = "   ".join(short(part, _LONG) for part in parts if part)
        if text:
            yield screen.printable(f"{label:<9}  {text}" if label else text)


def _cause(one: Object) -> list[Any]:
    cause = str(one["cause"]).replace("_", " ")
    how = how_it_died(one)
    shown = how if how.startswith(cause) else f"{cause} {how}"
    phase = "before it was claimed" if one["phase"] == "before_claim" else ""
    return [shown, one["exception"], phase, one["overturned_at"] and f"overturned {moment(one['overturned_at'])}"]


def _item(one: Object) -> list[Any]:
    of = number(len(one["items"]))
    if one["item"] is None and one["item_index"] is None:
        return [f"not known, one of {of}: {item_in_hand(one)}"] if len(one["items"]) > 1 else [item_in_hand(one)]
    index, done = one["item_index"], one["items_done"]
    parts = [one["item"]]
    if index is not None and (index < len(one["items"]) or not one["items"]):
        parts.append(f"number {number(index + 1)}{f' of {of}' if one['items'] else ''} (index {index})")
    if done is not None:
        parts.append(f"{number(done)} done before it")
    return parts


def _where(one: Object) -> list[Any]:
    host = f"{one['hostname'] or ''}" + (f" pid {one['pid']}" if one["pid"] else "")
    named = (("worker", one["worker"]), ("queue", one["queue"]), ("boot", one["boot_id"]))
    return [host.strip(), *(f"{label} {value}" for label, value in named if value)]


def _when(one: Object) -> list[Any]:
    seen = f"seen {moment(one['detected_at'])}" + (f" by {one['detected_by']}" if one["detected_by"] else "")
    late = seconds_between(one["died_at"], one["detected_at"])
    return [
        one["died_at"] and moment(one["died_at"]), seen, None if late is None else f"after {duration(late)}",
        one["verdict"],
    ]  # fmt: skip


def stack(screen: Screen, text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield screen.printable(clean(line))


#: Nobody can write a stack after these.
_SILENT = ("SIGKILL", "oom", "worker_lost", "settle_lost", "lost_message", "quarantined", "late_write")


def why_no_stack(one: Object) -> str:
    if one["signal"] in _SILENT or one["cause"] in _SILENT:
        return f"no stack: {clean(how_it_died(one))} leaves none"
    if one["signal"]:
        return (
            "no stack: its process had not switched on faulthandler for us (see batchtrack_faulthandler), or had "
            "nowhere to write (see batchtrack_blackbox_dir)"
        )
    return "no stack and no traceback is known of it"


# -- quarantine -------------------------------------------------------------------------------------


def quarantine_list(screen: Screen, items: Sequence[Object], now: datetime) -> Iterator[str]:
    table = Table(screen, [
        Column("ITEM", elastic=True), Column("TASK", elastic=True), Column("VERSION", elastic=True), count("DEATHS"),
        count("LIMIT"), _how("SIGNAL"), _frame(), Column("LAST IN", elastic=True), count("LAST"),
        Column("STATE", colour=coloured),
    ])  # fmt: skip
    ids = short_ids([str(each["batch_id"] or "") for each in items])
    return table.lines(
        (
            short(each["item"]), each["task"], each["version"], each["deaths"], each["quarantine_after"],
            each["signal"] or each["cause"], each["python_frame"] or "",
            f"{id} {each['position']}" if each["batch_id"] else "", ago(each["last_at"], now), each["state"],
        )
        for id, each in zip(ids, items, strict=True)
    )  # fmt: skip


# -- repro ------------------------------------------------------------------------------------------


def repro_page(screen: Screen, made: Object) -> Iterator[str]:
    for label, text in (
        ("arguments", f"{made['arguments']}   {made['what']}"),
        ("script", f"{made['script']}   runs {made['task']} outside Celery, under faulthandler"),
        ("mind", made["caution"]),
        ("run", made["command"]),
    ):
        if text:
            yield screen.printable(f"{label:<9}  {clean(text)}")
