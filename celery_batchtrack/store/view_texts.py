"""The views, as SQL text that people read. What the two databases say differently is in `Words`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from celery_batchtrack.vocabulary.durations import BOUNDS

from .incidents import BESIDE
from .schema import NOBODY


@dataclass(frozen=True, slots=True)
class Words:
    """One database's words."""

    sqlite: bool

    @property
    def now(self) -> str:
        return "strftime('%Y-%m-%d %H:%M:%f000', 'now')" if self.sqlite else "statement_timestamp()"

    def age(self, since: str, until: str | None = None) -> str:
        """Seconds between two moments."""
        if self.sqlite:
            end = "julianday('now')" if until is None else f"julianday({until})"
            return f"(({end} - julianday({since})) * 86400.0)"
        return f"CAST(extract(epoch FROM {until or self.now} - {since}) AS double precision)"

    def ago(self, seconds: int) -> str:
        """The moment so many seconds ago."""
        if self.sqlite:
            return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '-{seconds} seconds')"
        return f"statement_timestamp() - interval '{seconds} seconds'"

    def hour(self, moment: str) -> str:
        if self.sqlite:
            return f"strftime('%Y-%m-%d %H:00:00.000000', {moment})"
        return f"date_trunc('hour', {moment} AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"

    def item(self, items: str) -> str:
        return f"json_extract({items}, '$[0]')" if self.sqlite else f"({items} ->> 0)"

    def bare(self, column: str) -> str:
        """See `clock.bare`."""
        return f"+{column}" if self.sqlite else column

    def first_number(self, text: str) -> str:
        """The number before the first colon."""
        if self.sqlite:
            return f"CAST(substr({text}, 1, instr({text}, ':') - 1) AS integer)"
        return f"CAST(substring({text} FROM '^([0-9]{{1,18}}):') AS bigint)"

    def among(self, column: str, query: str) -> str:
        """What the query finds. As an array PostgreSQL looks each up, where it would read the whole table for an OR."""
        return f"{column} IN ({query})" if self.sqlite else f"{column} = ANY (ARRAY ({query}))"

    def least(self, first: str, second: str) -> str:
        return f"min({first}, {second})" if self.sqlite else f"least({first}, {second})"

    def latest(self, *moments: str) -> str:
        return f"{'max' if self.sqlite else 'greatest'}({', '.join(moments)})"

    def id(self, text: str) -> str:
        return f"'{text}'" if self.sqlite else f"uuid '{text}'"

    def floor(self, number: str) -> str:
        return f"CAST({number} AS integer)" if self.sqlite else f"CAST(floor({number}) AS integer)"


_COUNTS = ("total", "completed", "failed", "crashed", "cancelled")


_OPEN_IN = "(CASE WHEN (c.status IN ('pending', 'running')) THEN c.batch_id END)"


def _open_children(words: Words, batch_id: str, status: str) -> str:
    """In the words of the index `batchtrack_child_open`. The state comes first: SQLite takes the first that fits."""
    return f"c.status = '{status}' AND {_OPEN_IN} = {words.bare(batch_id)} AND c.status IN ('pending', 'running')"


def batch_progress(words: Words) -> str:
    sums = [*_COUNTS, *(f"items_{name}" for name in _COUNTS), "weight_total", "weight_done"]
    if words.sqlite:
        parts = [
            f"(SELECT sum(t.{name}) FROM batchtrack_tally t WHERE t.batch_id = b.id) AS {name}" for name in sums
        ]  # fmt: skip
        source = "batchtrack_batch b"
    else:
        parts = [f"t.{name}" for name in sums]
        inner = ", ".join(f"CAST(sum({name}) AS bigint) AS {name}" for name in sums)
        source = (
            f"batchtrack_batch b\n    CROSS JOIN LATERAL (SELECT {inner}\n"
            "      FROM batchtrack_tally WHERE batch_id = b.id) t"
        )
    counted = ",\n      ".join(parts)
    return f"""\
SELECT batch_id, name, status, reason, round, tags,
  total, done, total - done - running AS pending, running, completed, failed, crashed, cancelled,
  CASE WHEN finished_at IS NOT NULL THEN 100
       WHEN weight_total > 0 THEN {words.least("99", words.floor("100.0 * weight_done / weight_total"))}
       ELSE 0 END AS done_percent,
  items_total, items_done, items_completed, items_failed, items_crashed, items_cancelled,
  CASE WHEN seconds > 0 AND items_done > 0 THEN items_done / seconds END AS items_per_second,
  CASE WHEN finished_at IS NOT NULL THEN 0.0
       WHEN weight_done > 0 THEN (weight_total - weight_done) * seconds / weight_done END AS eta_seconds,
  seconds, created_at, sealed_at, started_at, finished_at, deadline_at, paused_at, pause_reason,
  parent_batch, parent_position, parent_task, parent_task_id, description, metadata, priority
FROM (
  SELECT p.*, completed + failed + crashed + cancelled AS done,
    items_completed + items_failed + items_crashed + items_cancelled AS items_done
  FROM (
    SELECT b.id AS batch_id, b.name, b.status, b.reason, b.round, b.tags,
      {counted},
      (SELECT count(*) FROM batchtrack_child c
        WHERE {_open_children(words, "b.id", "running")}
          AND c.kind = 'child') AS running,
      {words.age("b.started_at", f"coalesce(b.finished_at, {words.now})")} AS seconds,
      b.created_at, b.sealed_at, b.started_at, b.finished_at, b.deadline_at, b.paused_at, b.pause_reason,
      b.parent_batch, b.parent_position, b.parent_task, b.parent_task_id, b.description, b.metadata, b.priority
    FROM {source}
  ) p
) q"""


def _child_of_incident(words: Words) -> str:
    """PostgreSQL is told to look it up by its whole key: since a batch has few children on the average, it would go
    through all of a large one's for each incident."""
    here = "c.batch_id = i.batch_id AND c.position = i.position"
    if words.sqlite:
        return f"JOIN batchtrack_child c ON {here}"
    return f"CROSS JOIN LATERAL (SELECT * FROM batchtrack_child c WHERE {here} OFFSET 0) c"


def _incidents(words: Words, *, deaths: bool) -> str:
    more = (
        "" if deaths
        else ",\n  i.exception, i.traceback, (i.detected_by IS NOT NULL) AS is_crash"
    )  # fmt: skip
    where = (
        f"i.outcome NOT IN {BESIDE} AND i.overturned_at IS NULL"
        + (" AND i.detected_by IS NOT NULL" if deaths else "")
    )
    return f"""\
SELECT i.id AS incident_id, i.batch_id, b.name AS batch_name, i.position, c.task, c.task_id,
  coalesce(i.item, CASE WHEN c.item_count = 1 THEN {words.item("c.items")} END) AS item, c.items,
  i.signal, i.exit_code, i.cause, i.python_frame, i.stack, i.message, i.note, i.attempt, i.outcome,
  i.worker, i.worker_id, i.hostname, i.pid, i.queue, i.died_at, i.detected_at, i.detected_by,
  {words.age("i.died_at", "i.detected_at")} AS detection_seconds,
  i.verdict, i.fingerprint, i.peak_memory{more}
FROM batchtrack_incident i
{_child_of_incident(words)}
JOIN batchtrack_batch b ON b.id = i.batch_id
WHERE {where}"""


def crash(words: Words) -> str:
    return _incidents(words, deaths=True)


def failure(words: Words) -> str:
    return _incidents(words, deaths=False)


def failure_signature(words: Words) -> str:
    def newest(name: str) -> str:
        # No max() of a UUID on PostgreSQL before 18.
        if name == "batch_id" and not words.sqlite:
            return "CAST(max(CASE WHEN nth = 1 THEN CAST(batch_id AS text) END) AS uuid)"
        return f"max(CASE WHEN nth = 1 THEN {name} END)"

    told = ("cause", "signal", "exception", "python_frame", "message")
    return f"""\
SELECT fingerprint, task, {", ".join(f"{newest(name)} AS {name}" for name in told)},
  count(*) AS occurrences, sum(CASE WHEN is_crash THEN 1 ELSE 0 END) AS crashes,
  count(DISTINCT item) AS items, count(DISTINCT batch_id) AS batches, count(DISTINCT hostname) AS hosts,
  min(detected_at) AS first_at, max(detected_at) AS last_at,
  {newest("batch_id")} AS last_batch_id, {newest("position")} AS last_position, {newest("item")} AS last_item,
  {newest("exit_code")} AS exit_code
FROM (
  SELECT f.*, row_number() OVER (PARTITION BY fingerprint, task ORDER BY detected_at DESC, incident_id DESC) AS nth
  FROM batchtrack_failure f WHERE fingerprint IS NOT NULL
) n
GROUP BY fingerprint, task"""


def _pivot(column: str) -> str:
    return ", ".join(
        f"CAST(sum(CASE WHEN status = '{name}' THEN {column} ELSE 0 END) AS bigint) AS {name}" for name in _COUNTS[1:]
    )


def outcome_per_minute(words: Words) -> str:
    return f"""\
SELECT time, batch_id, task, {_pivot("children")},
  CAST(sum(items) AS bigint) AS items, sum(seconds) AS seconds_total
FROM batchtrack_outcome
WHERE status <> 'died' AND batch_id <> {words.id(str(NOBODY))}
GROUP BY time, batch_id, task"""


def outcome_per_hour(words: Words) -> str:
    return f"""\
SELECT time, task, completed, failed, crashed, cancelled,
  CAST(100.0 * crashed / nullif(completed + failed + crashed + cancelled, 0) AS double precision) AS crash_percent,
  items,
  seconds_total / nullif(ran, 0) AS seconds_avg
FROM (
  SELECT {words.hour("time")} AS time, task, {_pivot("children")},
    CAST(sum(items) AS bigint) AS items, sum(seconds) AS seconds_total,
    sum(CASE WHEN bucket >= 0 THEN children ELSE 0 END) AS ran
  FROM batchtrack_outcome
  WHERE status <> 'died'
  GROUP BY {words.hour("time")}, task
) h"""


def task_duration(words: Words) -> str:
    bounds = " ".join(f"WHEN {index} THEN {bound}" for index, bound in enumerate(BOUNDS))

    def percentile(share: float) -> str:
        bound = words.least(f"CASE bucket {bounds} ELSE longest END", "longest")
        return f"min(CASE WHEN upto >= {share} * of_all THEN {bound} END)"

    return f"""\
SELECT task, status, CAST(max(of_all) AS bigint) AS children, sum(seconds) AS seconds_total,
  sum(seconds) / max(of_all) AS seconds_avg, max(longest) AS seconds_max,
  {percentile(0.5)} AS p50_seconds,
  {percentile(0.95)} AS p95_seconds,
  {percentile(0.99)} AS p99_seconds
FROM (
  SELECT task, status, bucket, seconds,
    sum(children) OVER (PARTITION BY task, status ORDER BY bucket) AS upto,
    sum(children) OVER (PARTITION BY task, status) AS of_all,
    max(seconds_max) OVER (PARTITION BY task, status) AS longest
  FROM (
    SELECT task, status, bucket, sum(children) AS children, sum(seconds) AS seconds, max(seconds_max) AS seconds_max
    FROM batchtrack_outcome WHERE status <> 'died' AND bucket >= 0
    GROUP BY task, status, bucket
  ) s
) w
GROUP BY task, status"""


#: So many of each batch.
SLOWEST = 100


def slowest(words: Words) -> str:
    ran = words.age("c.started_at", "c.finished_at")
    settled = "c.kind = 'child' AND c.started_at IS NOT NULL AND c.finished_at IS NOT NULL"
    if words.sqlite:
        source = (
            "batchtrack_batch b\n  JOIN batchtrack_child s ON s.rowid IN (\n"
            f"    SELECT c.rowid FROM batchtrack_child c WHERE c.batch_id = b.id AND {settled}\n"
            f"    ORDER BY {ran} DESC LIMIT {SLOWEST})"
        )
    else:
        source = (
            "batchtrack_batch b\n  CROSS JOIN LATERAL (\n"
            f"    SELECT c.* FROM batchtrack_child c WHERE c.batch_id = b.id AND {settled}\n"
            f"    ORDER BY {ran} DESC LIMIT {SLOWEST}) s"
        )
    return f"""\
SELECT batch_id, batch_name, row_number() OVER (PARTITION BY batch_id ORDER BY seconds DESC, position) AS rank,
  position, task, task_id, status, items, seconds, started_at, finished_at, worker_id, worker, hostname
FROM (
  SELECT b.id AS batch_id, b.name AS batch_name, s.position, s.task, s.task_id, s.status, s.items,
    {words.age("s.started_at", "s.finished_at")} AS seconds, s.started_at, s.finished_at, s.worker_id,
    w.name AS worker, w.hostname
  FROM {source}
  LEFT JOIN batchtrack_worker w ON w.id = s.worker_id
) t"""


def _state(words: Words) -> str:
    return (
        "CASE WHEN w.stopped_at IS NOT NULL THEN 'stopped' WHEN w.lost_at IS NOT NULL THEN 'lost' "
        f"WHEN w.suspected_beat = w.beat OR {words.age('w.beat_at')} > w.lease THEN 'suspected' ELSE 'alive' END"
    )


def batch_child(words: Words) -> str:
    return f"""\
SELECT c.batch_id, b.name AS batch_name, c.position, c.kind, c.ordinal, c.round, c.task, c.task_id, c.status, c.cause,
  c.verdict, c.attempt, c.crashes, c.retries, c.dispatches, c.link, c.waits_on_batch, c.split_from, c.origin,
  c.isolated, c.items, c.item_count, c.weight, c.queue, c.worker_id, w.name AS worker, w.hostname, c.created_at,
  c.dispatched_at, c.not_before, c.expires_at, c.started_at, c.finished_at,
  {words.age("c.started_at", "c.finished_at")} AS seconds
FROM batchtrack_child c
JOIN batchtrack_batch b ON b.id = c.batch_id
LEFT JOIN batchtrack_worker w ON w.id = c.worker_id"""


def running(words: Words) -> str:
    return f"""\
SELECT {_OPEN_IN} AS batch_id,
  b.name AS batch_name, c.position, c.kind, c.task, c.task_id, c.items, c.attempt, c.started_at,
  {words.age("c.started_at")} AS running_seconds, c.worker_id, w.name AS worker, w.hostname, w.pid, c.slot,
  w.beat_at, {words.age("w.beat_at")} AS beat_age_seconds,
  {_state(words)} AS worker_state, {words.first_number("c.slot")} AS process_pid
FROM batchtrack_child c
JOIN batchtrack_batch b ON b.id = c.batch_id
LEFT JOIN batchtrack_worker w ON w.id = c.worker_id
WHERE c.status = 'running' AND c.status IN ('pending', 'running')"""


def worker_liveness(words: Words) -> str:
    return f"""\
SELECT w.id AS worker_id, w.kind, w.name, w.hostname, w.pid, w.pool, w.version,
  {_state(words)} AS state,
  w.beat_at, {words.age("w.beat_at")} AS beat_age_seconds, w.lease, w.started_at,
  {words.age("w.started_at", f"coalesce(w.stopped_at, w.lost_at, {words.now})")} AS uptime_seconds,
  (SELECT count(*) FROM batchtrack_child c WHERE c.worker_id = w.id AND c.status = 'running') AS running,
  coalesce(d.crashes, 0) AS crashes_24h, w.stopped_at, w.lost_at, w.lost_by
FROM batchtrack_worker w
LEFT JOIN (
  SELECT worker_id, count(*) AS crashes FROM batchtrack_incident
  WHERE detected_at > {words.ago(86_400)} AND detected_by IS NOT NULL AND overturned_at IS NULL
  GROUP BY worker_id
) d ON d.worker_id = w.id"""


#: Seconds without any child starting or ending, and none running, after which a batch counts as stuck.
QUIET = 300


def stuck_batch(words: Words) -> str:
    runs, waits = (_open_children(words, "b.id", status) for status in ("running", "pending"))
    dead = (
        f"SELECT min(coalesce(w.stopped_at, w.lost_at, w.beat_at)) FROM batchtrack_child c\n"
        f"      LEFT JOIN batchtrack_worker w ON w.id = c.worker_id\n      WHERE {runs}\n"
        f"        AND (w.id IS NULL OR w.stopped_at IS NOT NULL OR w.lost_at IS NOT NULL\n"
        f"          OR {words.age('w.beat_at')} > 2 * w.lease)"
    )
    due = (
        f"SELECT 1 FROM batchtrack_child c WHERE {waits} AND c.waits_on_batch IS NULL\n"
        f"        AND (c.not_before IS NULL OR c.not_before < {words.ago(QUIET)})"
    )
    candidates = f"""
      SELECT o.id FROM batchtrack_batch o WHERE o.status IN ('open', 'running')
      UNION
      SELECT c.batch_id FROM batchtrack_child c
      JOIN batchtrack_batch o ON o.id = c.batch_id AND o.round = c.round
      WHERE c.kind <> 'child' AND c.status = 'pending' AND c.waits_on_batch IS NULL
        AND (c.not_before IS NULL OR c.not_before < {words.ago(QUIET)})
        AND c.created_at < {words.ago(QUIET)} AND coalesce(o.round_at, c.created_at) < {words.ago(QUIET)}"""
    return f"""\
SELECT batch_id, name, status, reason,
  CASE reason
    WHEN 'paused' THEN coalesce(pause_reason, 'paused by hand') || ': resume it, or cancel it'
    WHEN 'never_sealed' THEN 'the process that was filling it is gone: a sweep cancels it as abandoned'
    WHEN 'deadline_passed' THEN 'its deadline is over and it has not been ended: is the crash detector running?'
    WHEN 'worker_gone' THEN 'children run on a worker that is gone: is the crash detector running?'
    WHEN 'no_worker' THEN 'no worker is alive: start one for ' || coalesce('queue ' || queue, 'its queue')
    WHEN 'callback_waiting' THEN 'it has ended, and a callback of it has not started: is there a worker for its queue?'
    ELSE 'children wait' || coalesce(' in queue ' || queue, '')
      || ' and nothing runs: is there a worker for their queue, and does the broker answer?'
  END AS detail,
  since, {words.age("since")} AS stuck_seconds, open, running
FROM (
  SELECT p.*,
    CASE WHEN alive AND paused_at IS NOT NULL THEN 'paused'
         WHEN status = 'open' AND opener_gone THEN 'never_sealed'
         WHEN alive AND deadline_at < {words.ago(60)} THEN 'deadline_passed'
         WHEN dead_since IS NOT NULL THEN 'worker_gone'
         WHEN NOT alive THEN 'callback_waiting'
         WHEN running = 0 AND is_due AND last_at < {words.ago(QUIET)}
           THEN CASE WHEN EXISTS (SELECT 1 FROM batchtrack_worker w WHERE w.kind = 'worker'
                       AND w.stopped_at IS NULL AND w.lost_at IS NULL
                       AND {words.age("w.beat_at")} < 2 * w.lease)
                THEN 'no_progress' ELSE 'no_worker' END
    END AS reason,
    CASE WHEN alive AND paused_at IS NOT NULL THEN paused_at
         WHEN dead_since IS NOT NULL THEN dead_since ELSE last_at END AS since
  FROM (
    SELECT b.id AS batch_id, b.name, b.status, b.paused_at, b.pause_reason, b.deadline_at,
      b.status IN ('open', 'running') AS alive,
      EXISTS (SELECT 1 FROM batchtrack_worker w WHERE w.id = b.opened_by
        AND (w.stopped_at IS NOT NULL OR w.lost_at IS NOT NULL)) AS opener_gone,
      ({dead}) AS dead_since,
      (SELECT count(*) FROM batchtrack_child c WHERE {runs}) AS running,
      (SELECT CAST(coalesce(sum(total - completed - failed - crashed - cancelled), 0) AS bigint)
        FROM batchtrack_tally t WHERE t.batch_id = b.id) AS open,
      b.status = 'running' AND (b.dispatch_at IS NULL OR b.dispatch_at < {words.ago(QUIET)})
        AND EXISTS ({due}) AS is_due,
      ({due.replace("SELECT 1", "SELECT c.queue", 1)} LIMIT 1) AS queue,
      {words.latest("coalesce(b.finished_at, b.started_at, b.created_at)", "coalesce(b.round_at, b.created_at)",
                    "coalesce((SELECT max(o.time) FROM batchtrack_outcome o WHERE o.batch_id = b.id), b.created_at)")}
        AS last_at
    FROM batchtrack_batch b
    WHERE {words.among("b.id", candidates)}
  ) p
) r
WHERE reason IS NOT NULL"""


@dataclass(frozen=True, slots=True)
class View:
    """A view as it is declared: its name without the prefix, what it answers, its columns in order."""

    name: str
    summary: str
    columns: tuple[str, ...]
    text: Callable[[Words], str]

    @property
    def relation(self) -> str:
        return f"batchtrack_{self.name}"
