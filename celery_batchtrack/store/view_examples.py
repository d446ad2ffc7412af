"""Queries to begin with, over the views; text for people, and all of it runs on both databases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .view_texts import Words

_Examples = tuple[tuple[str, Callable[[Words], str]], ...]
_HOUR, _DAY, _WEEK = 3600, 86_400, 604_800


def _always(text: str) -> Callable[[Words], str]:
    return lambda words: text


_ALL: Mapping[str, _Examples] = {
    "batch_progress": (
        ("what runs, and when it will be done", _always(
            "SELECT name, done, total, crashed, round(eta_seconds) AS eta FROM batchtrack_batch_progress\n"
            "WHERE status = 'running' ORDER BY created_at"
        )),
        ("which batches of the last day lost something", lambda words: (
            "SELECT batch_id, name, status, failed, crashed FROM batchtrack_batch_progress\n"
            f"WHERE failed + crashed > 0 AND created_at > {words.ago(_DAY)} ORDER BY created_at DESC"
        )),
    ),
    "crash": (
        ("which items crashed in the last day, and why", lambda words: (
            "SELECT item, task, signal, python_frame, hostname, died_at FROM batchtrack_crash\n"
            f"WHERE detected_at > {words.ago(_DAY)} ORDER BY detected_at DESC"
        )),
        ("items that crashed more than once, across batches", _always(
            "SELECT item, task, count(*) AS deaths, count(DISTINCT batch_id) AS batches FROM batchtrack_crash\n"
            "WHERE item IS NOT NULL GROUP BY item, task HAVING count(*) > 1 ORDER BY deaths DESC"
        )),
    ),
    "failure": (
        ("the newest failures, with their exceptions", _always(
            "SELECT batch_name, position, task, exception, message, python_frame FROM batchtrack_failure\n"
            "ORDER BY detected_at DESC LIMIT 20"
        )),
    ),
    "failure_signature": (
        ("the commonest causes of the last week", lambda words: (
            "SELECT occurrences, items, task, signal, exception, python_frame, last_at\n"
            f"FROM batchtrack_failure_signature WHERE last_at > {words.ago(_WEEK)}\n"
            "ORDER BY occurrences DESC LIMIT 20"
        )),
    ),
    "batch_child": (
        ("how children of each batch ended, and how long they ran", _always(
            "SELECT batch_name, status, count(*) AS children, avg(seconds) AS seconds FROM batchtrack_batch_child\n"
            "WHERE kind = 'child' GROUP BY batch_name, status ORDER BY batch_name, status"
        )),
    ),
    "outcome_per_minute": (
        ("throughput of the last hour", lambda words: (
            "SELECT time, sum(completed) AS completed, sum(failed) AS failed, sum(crashed) AS crashed\n"
            f"FROM batchtrack_outcome_per_minute WHERE time > {words.ago(_HOUR)} GROUP BY time ORDER BY time"
        )),
    ),
    "outcome_per_hour": (
        ("the hours with the highest share of crashes", _always(
            "SELECT time, task, crashed, crash_percent FROM batchtrack_outcome_per_hour\n"
            "WHERE crashed > 0 ORDER BY crash_percent DESC LIMIT 20"
        )),
    ),
    "task_duration": (
        ("how long each task takes", _always(
            "SELECT task, status, children, seconds_avg, p95_seconds, seconds_max FROM batchtrack_task_duration\n"
            "ORDER BY seconds_total DESC"
        )),
    ),
    "slowest": (
        ("the slowest children of the newest batches", _always(
            "SELECT batch_name, position, task, items, seconds, worker FROM batchtrack_slowest\n"
            "WHERE rank <= 5 ORDER BY batch_id DESC, rank LIMIT 50"
        )),
    ),
    "running": (
        ("what has run for longest", _always(
            "SELECT batch_name, position, task, running_seconds, worker, pid, worker_state FROM batchtrack_running\n"
            "ORDER BY started_at LIMIT 20"
        )),
    ),
    "worker_liveness": (
        ("who was lost, and by whom it was noticed", _always(
            "SELECT name, hostname, state, beat_age_seconds, lost_by, crashes_24h FROM batchtrack_worker_liveness\n"
            "WHERE state IN ('suspected', 'lost') ORDER BY beat_at DESC"
        )),
    ),
    "stuck_batch": (
        ("what does not go on", _always(
            "SELECT name, reason, detail, stuck_seconds, open, running FROM batchtrack_stuck_batch\n"
            "ORDER BY stuck_seconds DESC"
        )),
    ),
    "invariant": (
        ("what is broken; nothing should be", _always(
            "SELECT check_name, kind, violations FROM batchtrack_invariant WHERE violations > 0"
        )),
    ),
}  # fmt: skip
EXAMPLES: Mapping[str, _Examples] = MappingProxyType(_ALL)


def examples_of(name: str, *, sqlite: bool) -> list[tuple[str, str]]:
    """(what it answers, SQL) of a view, named without prefix."""
    return [(what, text(Words(sqlite))) for what, text in EXAMPLES[name]]
