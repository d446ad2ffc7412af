"""The views' columns and their types, as docs/sql.md shows them; `test_docs_sql` asks the databases if it is so."""

from __future__ import annotations

from celery_batchtrack.store.views import VIEWS, View

_WORDS = {
    "uuid": "incident_id batch_id worker_id parent_batch last_batch_id waits_on_batch",
    "json": "tags metadata",
    "time": "time since not_before",
    "boolean": "is_crash isolated",
    "number": "detection_seconds crash_percent items_per_second lease",
    "integer": "round total done pending running completed failed crashed cancelled done_percent parent_position"
    " priority position exit_code attempt pid peak_memory occurrences crashes batches hosts last_position children rank"
    " crashes_24h open violations process_pid ordinal retries dispatches link split_from origin item_count weight",
}
_TYPES = {name: kind for kind, names in _WORDS.items() for name in names.split()}
#: Where `items` is how many, and not which.
_COUNTED = ("failure_signature", "outcome_per_minute", "outcome_per_hour")


def type_of(view: View, column: str) -> str:
    """uuid, text, integer, number, time, json or boolean."""
    if column == "items":
        return "integer" if view.name in _COUNTED else "json"
    if column in _TYPES:
        return _TYPES[column]
    if column.startswith("items_"):
        return "integer"
    if column.endswith("_at"):
        return "time"
    return "number" if "seconds" in column.split("_") else "text"


def views() -> str:
    """A section for each view: what it answers, and its columns with their types."""
    sections = []
    for view in VIEWS.values():
        by_type: dict[str, list[str]] = {}
        for column in view.columns:
            by_type.setdefault(type_of(view, column), []).append(f"`{column}`")
        rows = "\n".join(f"| {kind} | {', '.join(names)} |" for kind, names in by_type.items())
        sections.append(f"### {view.relation}\n\n{_sentence(view.summary)}\n\n| type | columns |\n|---|---|\n{rows}")
    return "\n\n".join(sections)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


_POSTGRESQL = {
    "uuid": "uuid", "text": "text", "character varying": "text", "smallint": "integer", "integer": "integer",
    "bigint": "integer", "double precision": "number", "numeric": "number", "timestamp with time zone": "time",
    "jsonb": "json", "boolean": "boolean",
}  # fmt: skip


def kind_on_postgresql(declared: str) -> str:
    """Of a type as `format_type` writes it."""
    return _POSTGRESQL[declared.partition("(")[0]]
