"""The queries under the tables: what a page shows, in the words of the views, with its filters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from celery_batchtrack.store.view_texts import Words
from celery_batchtrack.surfaces.flower.show import quoted
from celery_batchtrack.surfaces.reading import WINDOWS
from celery_batchtrack.vocabulary.ids import SHORTEST_ID, digits_of

_WEEK, _DAY = int(WINDOWS["7d"]), int(WINDOWS["24h"])
#: In the words of `batchtrack_batch_progress`.
_CHIPS = {
    "attention": (
        "(status IN ('open', 'running', 'partial', 'failed')"
        " OR status = 'cancelled' AND reason IN ('abandoned', 'deadline'))"
    ),
    "running": "status IN ('open', 'running')",
    "crashed": "crashed > 0",
    "failed": "(failed > 0 OR status = 'failed')",
    "completed": "status = 'completed'",
}


@dataclass(frozen=True, slots=True)
class Query:
    """`note`: in which way it is not what the table shows."""

    text: str
    view: str
    note: str = ""


def select(view: str, where: Sequence[str] = (), order_by: str = "", *, columns: str = "*") -> str:
    conditions = f" WHERE {' AND '.join(where)}" if where else ""
    return f"SELECT {columns} FROM batchtrack_{view}{conditions}" + (f" ORDER BY {order_by}" if order_by else "")


def equal(where: Mapping[str, object]) -> list[str]:
    return [f"{name} = {quoted(value)}" for name, value in where.items()]


@dataclass(frozen=True, slots=True)
class Queries:
    """For one database."""

    words: Words

    def batches(self, chip: str, search: str) -> Query:
        where = [_CHIPS[chip]] if chip in _CHIPS else []
        if search:
            where.append(_known_by(search))
        note = "by name and id alone" if search else ""
        return Query(select("batch_progress", where, "created_at DESC, batch_id DESC"), "batch_progress", note)

    def children(self, batch_id: object, chosen: Mapping[str, str]) -> Query:
        where = equal({"batch_id": batch_id, "kind": "child"})
        if "status" in chosen:
            where += equal({"status": chosen["status"]})
        if "item" in chosen:
            where.append(self._has_item(chosen["item"]))
        if "worker" in chosen:
            name = quoted(chosen["worker"])
            where.append(f"(worker = {name} OR hostname = {name})")
        if "fingerprint" in chosen:
            alike = equal({"batch_id": batch_id, "fingerprint": chosen["fingerprint"]})
            where.append(f"position IN ({select('failure', alike, columns='position')})")
        return Query(select("batch_child", where, "position"), "batch_child")

    def _has_item(self, item: str) -> str:
        if self.words.sqlite:
            return f"instr(items, {quoted(json.dumps(item))}) > 0"
        return f"items @> {quoted(json.dumps([item], ensure_ascii=False))}"

    def signatures(self, where: Sequence[str]) -> Query:
        columns = (
            "fingerprint, task, max(coalesce(signal, exception, cause)) AS how, max(exit_code) AS exit_code,"
            " max(python_frame) AS python_frame, count(*) AS occurrences, count(DISTINCT item) AS items,"
            " count(DISTINCT batch_id) AS batches, count(DISTINCT hostname) AS hosts, max(detected_at) AS last_at"
        )
        text = select("failure", ["fingerprint IS NOT NULL", *where], columns=columns)
        return Query(f"{text} GROUP BY fingerprint, task ORDER BY last_at DESC", "failure")

    def failures(self, chosen: Mapping[str, str | None]) -> Query:
        """Signatures of the crash explorer."""
        return self.signatures(self._explored(chosen))

    def of_batch(self, batch_id: object) -> Query:
        """Signatures of one batch."""
        return self.signatures(equal({"batch_id": batch_id}))

    def repeated(self, chosen: Mapping[str, str | None]) -> Query:
        """Items of the crash explorer. What is in quarantine is in no view."""
        columns = "item, task, count(*) AS deaths, count(DISTINCT batch_id) AS batches, max(detected_at) AS last_at"
        text = select("crash", ["item IS NOT NULL", *self._explored(chosen)], columns=columns)
        grouped = f"{text} GROUP BY item, task HAVING count(*) > 1 ORDER BY deaths DESC, last_at DESC"
        return Query(grouped, "crash", "those with more than one death")

    def _explored(self, chosen: Mapping[str, str | None]) -> list[str]:
        columns = {"task": "task", "signal": "coalesce(signal, cause)", "host": "hostname"}
        asked = {columns[name]: value for name, value in chosen.items() if value}
        return [f"detected_at >= {self.words.ago(_WEEK)}", *equal(asked)]

    def workers(self, *, everyone: bool) -> Query:
        if everyone:
            ended = "coalesce(stopped_at, lost_at)"
            where = f"({ended} IS NULL OR {ended} >= {self.words.ago(_DAY)})"
        else:
            where = "state IN ('alive', 'suspected')"
        return Query(select("worker_liveness", [where], "started_at DESC"), "worker_liveness")


def _known_by(search: str) -> str:
    plain = search.replace("!", "!!").replace("%", "!%").replace("_", "!_")
    escape = " ESCAPE '!'" if plain != search else ""
    by_name = f"lower(name) LIKE lower({quoted(f'%{plain}%')}){escape}"
    digits = digits_of(search)
    if len(digits) < SHORTEST_ID:
        return by_name
    return f"({by_name} OR replace(CAST(batch_id AS text), '-', '') LIKE {quoted(digits + '%')})"


__all__ = ["Queries", "Query", "equal", "select"]
