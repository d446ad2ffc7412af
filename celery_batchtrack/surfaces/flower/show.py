"""How values look on a page: short, aligned, and harmless whatever a user named them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from celery_batchtrack.surfaces import render
from celery_batchtrack.surfaces.crash_pages import why_no_stack
from celery_batchtrack.surfaces.flower import svg
from celery_batchtrack.surfaces.pages import how_it_died, seconds_between
from celery_batchtrack.surfaces.render import NOTHING, clean, harmless, size
from celery_batchtrack.surfaces.views import SHORT_ID
from celery_batchtrack.vocabulary.records import isoformat

#: Characters of one value in a table, and of a text before "show all".
CELL, TEXT = 120, 600
#: Narrow and unbreakable: a number stays in one piece.
_THIN = "\u202f"


bar, plot, died, iso, no_stack = svg.bar, svg.plot, how_it_died, isoformat, why_no_stack


def line(value: object, limit: int = CELL) -> str:
    """One clean line; nothing at all is a dash."""
    if value is None or value == "":
        return NOTHING
    text = clean(str(value)[: 4 * limit])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def block(value: object) -> str:
    """Several lines, without escape sequences, control and invisible characters."""
    return harmless(str(value)).replace("\t", "    ")


def beginning(text: str, limit: int = TEXT) -> str:
    """Whole lines of it, if they are short."""
    if len(text) <= limit:
        return text
    cut = text.rfind("\n", limit // 2, limit)
    return text[: cut if cut > 0 else limit]


def number(value: Any) -> str:
    """Thousands apart."""
    if value is None:
        return NOTHING
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.1f}".replace(",", _THIN)
    return f"{int(value):,}".replace(",", _THIN)


def duration(seconds: float | None) -> str:
    """Two units at most: ``0.42 s``, ``53 s``, ``3 m 12 s``, ``2 h 5 m``, ``5 d 3 h``."""
    if seconds is None:
        return NOTHING
    seconds = max(0.0, float(seconds))
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms".replace(" ", _THIN)
    if seconds < 10 and not float(seconds).is_integer():
        return f"{seconds:.1f}{_THIN}s"
    whole = round(seconds)
    for unit, big, small_unit, small in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= big:
            rest = whole % big // small
            return f"{whole // big}{_THIN}{unit}" + (f" {rest}{_THIN}{small_unit}" if rest else "")
    return f"{whole}{_THIN}s"


def rate(per_second: float | None) -> str:
    if per_second is not None and per_second >= 10:
        return f"{number(round(per_second))}/s"
    return render.rate(per_second)


def moment(value: datetime | None) -> str:
    return NOTHING if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def clock(value: datetime) -> str:
    return f"{value:%H:%M:%S}"


def between(since: datetime | None, until: datetime | None) -> str:
    return duration(seconds_between(since, until))


def memory(count: int | None) -> str:
    return NOTHING if count is None else size(count).replace(" ", _THIN)


def short(id: uuid.UUID | str) -> str:
    return str(id)[:SHORT_ID]


#: States that look like another one's.
_LOOKS = {
    "alive": "completed", "suspected": "stuck", "lost": "crashed", "stopped": "cancelled", "retried": "partial",
    "redispatched": "partial", "late_write": "partial", "quarantined": "crashed", "released": "completed",
    "counted": "pending", "another version": "pending", "ok": "completed", "needs a look": "stuck",
}  # fmt: skip
_KNOWN = (
    "completed", "partial", "failed", "crashed", "cancelled", "running", "open", "pending", "paused", "stuck", "split",
)  # fmt: skip


def look(status: str) -> str:
    """Which colour and sign a state has."""
    found = _LOOKS.get(status, status)
    return found if found in _KNOWN else "pending"


def phase(batch: Mapping[str, Any]) -> str:
    """What its badge says: its status, or that it is paused or stuck."""
    if batch["finished_at"] is None:
        if batch["paused_at"] is not None:
            return "paused"
        if batch.get("stuck"):
            return "stuck"
    return str(batch["status"])


def done(batch: Mapping[str, Any]) -> int:
    return int(batch["total"]) - int(batch["pending"]) - int(batch["running"])


def taken(batch: Mapping[str, Any], now: datetime) -> str:
    """How long it has run, or ran."""
    return between(batch["started_at"] or batch["created_at"], batch["finished_at"] or now)


def told(value: Any) -> str:
    """A label's value on one line."""
    if isinstance(value, str):
        return line(value)
    return line(json.dumps(value, default=str, ensure_ascii=False))


def some(items: Sequence[str] | None, first: int = 2) -> str:
    """The first identifiers, and how many more there are."""
    if not items:
        return NOTHING
    more = len(items) - first
    return ", ".join(line(each, 60) for each in items[:first]) + (f" +{number(more)}" if more > 0 else "")


def item_of(row: Mapping[str, Any]) -> str:
    """The item in hand, or those it is one of."""
    return line(row["item"], 80) if row.get("item") else some(row.get("items"))


def how(row: Mapping[str, Any]) -> str:
    """Signal, exit code, exception or cause of an attempt, child or signature."""
    if row.get("signal"):
        return str(row["signal"])
    if row.get("exception"):
        return line(row["exception"], 60)
    if row.get("exit_code") is not None:
        return f"exit code {row['exit_code']}"
    return line(str(row.get("cause") or NOTHING).replace("_", " "), 60)


def is_crash(row: Mapping[str, Any]) -> bool:
    """Of an incident: somebody noticed a death; a failure tells of itself."""
    return bool(row["is_crash"] if "is_crash" in row else row["detected_by"])


def stack_of(incident: Mapping[str, Any]) -> str:
    return block(incident.get("stack") or incident.get("traceback") or "")


def may_call_again(batch: Mapping[str, Any], callbacks: Sequence[Mapping[str, Any]]) -> bool:
    now = [each for each in callbacks if each["round"] == batch["round"]]
    return not open_batch(batch) and any(each["status"] in ("failed", "crashed", "cancelled") for each in now)


def quoted(value: object) -> str:
    """A value in SQL that people copy."""
    if isinstance(value, int):
        return str(value)
    return "'" + str(value).replace("'", "''") + "'"


def pairs(mapping: Mapping[str, Any] | None) -> Iterable[tuple[str, Any]]:
    return sorted((mapping or {}).items())


def open_batch(batch: Mapping[str, Any]) -> bool:
    return batch["finished_at"] is None


def may_retry(batch: Mapping[str, Any]) -> bool:
    return not open_batch(batch) and bool(batch["failed"] or batch["crashed"] or batch["cancelled"])


def dossier(each: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All else that is known of an attempt, by label; what is not known is left out."""
    noticed_by = each.get("detected_by")
    late = seconds_between(each["died_at"], each["detected_at"]) if noticed_by else None
    seen = (f"by {noticed_by}" + (f", {duration(late)} after" if late is not None else "")) if noticed_by else ""
    index, items_done = each.get("item_index"), each.get("items_done")
    found = (
        ("item in hand", line(each["item"], 200) if each.get("item") else ""),
        ("its place", f"number {number(index + 1)}" + (f" of {number(len(each['items']))}" if each.get("items") else "")
         if index is not None else ""),
        ("done before it", number(items_done) if items_done is not None else ""),
        ("note", line(each["note"], 500) if each.get("note") else ""),
        ("cause", str(each["cause"]).replace("_", " ")),
        ("exception", line(each["exception"], 200) if each.get("exception") else ""),
        ("signal", line(each["signal"]) if each.get("signal") else ""),
        ("exit code", str(each["exit_code"]) if each.get("exit_code") is not None else ""),
        ("phase", "before it was claimed" if each.get("phase") == "before_claim" else ""),
        ("memory", f"peak {memory(each['peak_memory'])}" if each.get("peak_memory") else ""),
        ("host", line(each["hostname"]) if each.get("hostname") else ""),
        ("worker", line(each["worker"]) if each.get("worker") else ""),
        ("pid", str(each["pid"]) if each.get("pid") else ""),
        ("queue", line(each["queue"]) if each.get("queue") else ""),
        ("died", moment(each["died_at"]) if each.get("died_at") and noticed_by else ""),
        ("noticed", seen),
        ("verdict", str(each["verdict"]) if each.get("verdict") else ""),
        ("boot", line(each["boot_id"]) if each.get("boot_id") else ""),
        ("versions", ", ".join(f"{line(name)} {line(value)}" for name, value in pairs(each.get("versions")))),
        ("fingerprint", str(each["fingerprint"] or "")),
    )  # fmt: skip
    return [(label, value) for label, value in found if value]
