"""The tables. The database enforces what the code promises; `migrations` holds the same, in steps.

Totals of a batch live in its tally shards only; `running` is counted over a partial index, and
`pending` is the rest. Partial indexes cover only what is still open: what is settled costs nothing.
"""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.elements import Grouping

from celery_batchtrack.vocabulary.states import CALLBACK_KINDS, NOT_COMPLETED, OPEN, BatchStatus, Kind, Status, Verdict

from .clock import Identifier, Moment, age, bare, first_item, now

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

#: JSON that people query; parsed by SQLAlchemy on both databases.
Json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def _one_of(column: str, values: Any) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


def _when(column: str, values: Any) -> Any:
    """Condition of a partial index, for both databases."""
    text = sa.text(_one_of(column, values))
    return {"postgresql_where": text, "sqlite_where": text}


def _where(text: str) -> Any:
    return {"postgresql_where": sa.text(text), "sqlite_where": sa.text(text)}


_OPEN = _one_of("status", OPEN)
#: Batches that a deadline may end. A query says it in these very words, or the index is not found.
DUE = "status IN ('open', 'running') AND deadline_at IS NOT NULL"
#: Incidents of runs that went down with their worker. A query says it in these very words, or the index is not found.
WITH_ITS_WORKER = "cause = 'worker_lost' OR detected_by IN ('host', 'lease')"

meta = sa.Table(
    "batchtrack_meta",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("store_id", Identifier, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("swept_at", Moment),
    sa.Column("swept_by", sa.String(255)),
    sa.Column("server_started_at", Moment),
    sa.Column("counted_from", Moment),  # ends of children of older batches may have been counted by nobody
    sa.CheckConstraint("id = 1", name="one_row"),
)

worker = sa.Table(
    "batchtrack_worker",
    metadata,
    sa.Column("id", Identifier, primary_key=True),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("hostname", sa.String(255), nullable=False),
    sa.Column("boot_id", sa.String(64)),
    sa.Column("pid_namespace", sa.String(64)),
    sa.Column("pid", sa.BigInteger, nullable=False),
    sa.Column("pid_started", sa.BigInteger),
    sa.Column("pool", sa.String(32), nullable=False),
    sa.Column("lease", sa.Float, nullable=False),
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("beat", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("beat_at", Moment, nullable=False),
    sa.Column("suspected_beat", sa.BigInteger),
    sa.Column("suspected_at", Moment),
    sa.Column("started_at", Moment, nullable=False),
    sa.Column("stopped_at", Moment),
    sa.Column("lost_at", Moment),
    sa.Column("lost_by", sa.String(16)),
    sa.CheckConstraint("kind IN ('worker', 'client')", name="kind"),
    sa.CheckConstraint("(suspected_beat IS NULL) = (suspected_at IS NULL)", name="suspicion"),
    sa.CheckConstraint("(lost_by IS NULL) = (lost_at IS NULL)", name="loss"),
    sa.Index("batchtrack_worker_alive", "hostname", **_where("stopped_at IS NULL AND lost_at IS NULL")),
)

batch = sa.Table(
    "batchtrack_batch",
    metadata,
    sa.Column("id", Identifier, primary_key=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(16)),
    sa.Column("round", sa.SmallInteger, nullable=False, server_default="1"),
    sa.Column("parent_batch", Identifier),  # nested: the batch whose child waits for this one
    sa.Column("parent_position", sa.BigInteger),
    sa.Column("parent_task_id", sa.String(255)),
    sa.Column("parent_task", sa.String(255)),
    sa.Column("root_id", sa.String(255)),
    sa.Column("options", Json, nullable=False),
    sa.Column("callbacks", sa.Text, nullable=False),
    sa.Column("headers", sa.Text),
    sa.Column("start_now", sa.Boolean, nullable=False),
    sa.Column("watch_failure", sa.Boolean, nullable=False),  # has on_first_failure callbacks
    sa.Column("watch_progress", sa.Boolean, nullable=False, server_default=sa.false()),  # has on_progress callbacks
    sa.Column("untold", sa.Boolean, nullable=False, server_default=sa.false()),  # its end, to Celery's result backend
    sa.Column("result_id", sa.String(255)),  # by which its body's outcome is asked for
    sa.Column("description", sa.Text),
    sa.Column("tags", Json),
    sa.Column("metadata", Json),
    sa.Column("deadline_at", Moment),
    sa.Column("max_in_flight", sa.Integer),  # its window: the narrower of max_in_flight and max_running
    sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("dispatch_at", Moment),  # its children are held back until then
    sa.Column("paid_until", Moment),  # of its rate: see `pacing.Rate`
    sa.Column("shards", sa.SmallInteger, nullable=False),
    sa.Column("opened_by", Identifier),
    sa.Column("next_position", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("sealed_at", Moment),
    sa.Column("paused_at", Moment),
    sa.Column("pause_reason", sa.String(255)),
    sa.Column("watch_crashes", sa.Boolean, nullable=False, server_default=sa.false()),  # has a breaker
    sa.Column("deaths", sa.BigInteger, nullable=False, server_default="0"),  # counted only where there is a breaker
    sa.Column("crash_samples", Json),  # its sliding window: see `policies.CrashRate`
    sa.Column("started_at", Moment),
    sa.Column("round_at", Moment),  # when another round of it, or of its callbacks, began
    sa.Column("finished_at", Moment),
    sa.CheckConstraint(_one_of("status", BatchStatus), name="status"),
    sa.CheckConstraint("(status IN ('open', 'running')) = (finished_at IS NULL)", name="finished"),
    sa.CheckConstraint("status <> 'running' OR sealed_at IS NOT NULL", name="sealed"),
    sa.CheckConstraint("status <> 'open' OR sealed_at IS NULL", name="unsealed"),
    sa.CheckConstraint("(status = 'cancelled') = (reason IS NOT NULL)", name="reason"),
    sa.CheckConstraint("max_in_flight > 0", name="max_in_flight"),
    sa.ForeignKeyConstraint(
        ["parent_batch"], ["batchtrack_batch.id"], ondelete="CASCADE", name="fk_batchtrack_batch_parent_batch"
    ),
    sa.Index("batchtrack_batch_alive", "status", **_where("status IN ('open', 'running')")),
    sa.Index("batchtrack_batch_created", "created_at"),
    sa.Index("batchtrack_batch_name", "name"),
    sa.Index("batchtrack_batch_parent", "parent_batch", **_where("parent_batch IS NOT NULL")),
    sa.Index("batchtrack_batch_deadline", "deadline_at", **_where(DUE)),
    sa.Index("batchtrack_batch_result", "result_id", **_where("result_id IS NOT NULL")),
    sa.Index("batchtrack_batch_untold", "id", **_where("untold")),
    sa.Index("batchtrack_batch_held", "dispatch_at", **_where("dispatch_at IS NOT NULL")),
)

child = sa.Table(
    "batchtrack_child",
    metadata,
    sa.Column("batch_id", Identifier, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("ordinal", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("round", sa.SmallInteger, nullable=False, server_default="1"),
    sa.Column("shard", sa.SmallInteger, nullable=False),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("task_id", sa.String(255), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("cause", sa.String(32)),
    sa.Column("verdict", sa.String(16)),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("run_token", Identifier),
    sa.Column("crashes", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("retries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("dispatches", sa.Integer, nullable=False, server_default="0"),
    sa.Column("link", sa.SmallInteger, nullable=False, server_default="0"),
    sa.Column("waits_on_batch", Identifier),
    sa.Column("split_from", sa.BigInteger),
    sa.Column("origin", sa.BigInteger),  # the header position that this was split off
    sa.Column("isolated", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("rerouted", sa.Boolean, nullable=False, server_default=sa.false()),  # `queue` is not its task's
    sa.Column("policy", Json),
    sa.Column("items", Json),
    sa.Column("item_count", sa.Integer, nullable=False, server_default="1"),
    sa.Column("weight", sa.BigInteger, nullable=False, server_default="1"),  # share of the batch's progress
    sa.Column("result_id", sa.String(255)),  # by which its outcome is asked for, where `task_id` changes on the way
    sa.Column("signature", sa.Text),
    sa.Column("result", sa.Text),
    sa.Column("worker_id", Identifier),
    sa.Column("slot", sa.String(96)),
    sa.Column("queue", sa.String(255)),
    sa.Column("dispatched_at", Moment),
    sa.Column("not_before", Moment),
    sa.Column("expires_at", Moment),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("started_at", Moment),
    sa.Column("finished_at", Moment),
    sa.PrimaryKeyConstraint("batch_id", "position"),
    sa.ForeignKeyConstraint(["batch_id"], ["batchtrack_batch.id"], ondelete="CASCADE"),
    sa.CheckConstraint(_one_of("status", Status), name="status"),
    sa.CheckConstraint(_one_of("kind", (Kind.CHILD, *CALLBACK_KINDS)), name="kind"),
    sa.CheckConstraint(f"verdict IS NULL OR {_one_of('verdict', Verdict)}", name="verdict"),
    sa.CheckConstraint("status <> 'pending' OR (worker_id IS NULL AND slot IS NULL)", name="pending"),
    sa.CheckConstraint(
        "status <> 'running' OR (worker_id IS NOT NULL AND slot IS NOT NULL AND run_token IS NOT NULL"
        " AND started_at IS NOT NULL)",
        name="running",
    ),
    sa.CheckConstraint(f"({_OPEN}) = (finished_at IS NULL)", name="finished"),
    sa.CheckConstraint("status <> 'completed' OR cause IS NULL", name="cause"),
    sa.CheckConstraint("item_count >= 0 AND attempt >= 0", name="counts"),
    # Once per batch, round and kind.
    sa.Index(
        "batchtrack_child_callback", "batch_id", "round", "kind", "ordinal", unique=True,
        **_where("kind <> 'child'"),
    ),
    sa.Index("batchtrack_child_callback_waiting", "batch_id", **_where("kind <> 'child' AND status = 'pending'")),
    # One slot of one worker runs at most one child.
    sa.Index("batchtrack_child_slot", "worker_id", "slot", unique=True, **_where("status = 'running'")),
    # Who waits for a nested batch; callbacks and chains by the id that their caller knows.
    sa.Index("batchtrack_child_waiting", "waits_on_batch", **_where("waits_on_batch IS NOT NULL")),
    sa.Index("batchtrack_child_result", "result_id", **_where("result_id IS NOT NULL")),
    # The parts of a header position, and suspects that wait to run alone.
    sa.Index("batchtrack_child_origin", "batch_id", "origin", **_where("origin IS NOT NULL")),
    sa.Index("batchtrack_child_isolated", "queue", **_where("isolated AND status = 'pending'")),
    # What was published for its attempt and still waits.
    sa.Index(
        "batchtrack_child_dispatched", "dispatched_at", **_where("status = 'pending' AND dispatched_at IS NOT NULL")
    ),
)  # fmt: skip


#: In the words of the index.
BATCH_NOT_COMPLETED = batch.c.status != sa.literal_column("'completed'")
sa.Index("batchtrack_batch_not_completed", batch.c.created_at, **_where("status <> 'completed'"))

# -- children of a batch that are in some state ----------------------------------------------------


class _OfBatch:
    """An index over `batch_id` of children in some state, and the condition that is answered by it and by no other.

    A condition on ``batch_id`` itself could be answered by the primary key, too, and by every other index that begins
    with it; and a planner whose statistics are older than the batch takes them for equal, though one of them goes
    through all of the batch's children.
    """

    def __init__(self, name: str, *states: sa.ColumnElement[bool], then: tuple[sa.Column[Any], ...] = ()) -> None:
        self._states = states
        self._batch = Grouping(sa.case((sa.and_(*states), child.c.batch_id)))  # an index wants it in brackets
        where = sa.and_(*states)
        sa.Index(name, self._batch, *then, postgresql_where=where, sqlite_where=where)

    def __call__(self, batch_id: Any, *only: Status) -> sa.ColumnElement[bool]:
        """Of children of this batch (an id, or a column) in that state; `only` in these of its states. They come first:
        of two conditions on a column SQLite looks up the first."""
        value = bare(batch_id) if isinstance(batch_id, sa.Column) else batch_id
        return sa.and_(*((in_state(*only),) if only else ()), self._batch == value, *self._states)


def in_state(*states: Any) -> sa.ColumnElement[bool]:
    """Spelt out: SQLite looks for the very words of an index in a query."""
    names: list[sa.ColumnElement[str]] = [sa.literal_column(repr(str(each))) for each in states]
    return child.c.status == names[0] if len(names) == 1 else child.c.status.in_(names)


#: Pending or running.
open_in = _OfBatch("batchtrack_child_open", in_state(*OPEN), then=(child.c.status, child.c.position))
#: Never sent for its attempt; also one that waits for a batch.
undispatched_in = _OfBatch(
    "batchtrack_child_undispatched", in_state(Status.PENDING), child.c.dispatched_at.is_(None),
    then=(child.c.kind, child.c.position),
)  # fmt: skip
#: Takes a place in its batch's window before it runs: it was sent, or waits for the batch that it became.
on_its_way_in = _OfBatch(
    "batchtrack_child_on_its_way", in_state(Status.PENDING),
    sa.or_(child.c.dispatched_at.is_not(None), child.c.waits_on_batch.is_not(None)),
)  # fmt: skip

# -- children by what people look for --------------------------------------------------------------

#: Seconds that a child ran, from its last start.
RAN = age(child.c.started_at, child.c.finished_at)
_RAN: Any = Grouping(RAN)
_FIRST_ITEM: Any = Grouping(first_item(child.c["items"]))
#: Says it in the words of the indexes.
SETTLED_CHILD = sa.and_(
    child.c.kind == sa.literal_column("'child'"), child.c.started_at.is_not(None), child.c.finished_at.is_not(None)
)
#: Only what has ended stands in the indexes by item and task id: before that a row changes too often.
HAS_ENDED = child.c.finished_at.is_not(None)
ONE_ITEM = sa.and_(child.c.item_count == sa.literal_column("1"), HAS_ENDED)
sa.Index(
    "batchtrack_child_slowest", child.c.batch_id, _RAN, postgresql_where=SETTLED_CHILD, sqlite_where=SETTLED_CHILD
)
sa.Index(
    "batchtrack_child_unhappy", child.c.batch_id, child.c.status, child.c.position,
    **_when("status", NOT_COMPLETED),
)  # fmt: skip
sa.Index(
    "batchtrack_child_item", _FIRST_ITEM, postgresql_using="hash", postgresql_where=ONE_ITEM, sqlite_where=ONE_ITEM
)
sa.Index(
    "batchtrack_child_task_id", child.c.task_id, postgresql_using="hash", postgresql_where=HAS_ENDED,
    sqlite_where=HAS_ENDED,
)  # fmt: skip

tally = sa.Table(
    "batchtrack_tally",
    metadata,
    sa.Column("batch_id", Identifier, nullable=False),
    sa.Column("shard", sa.SmallInteger, nullable=False),
    *(
        sa.Column(prefix + name, sa.BigInteger, nullable=False, server_default="0")
        for prefix in ("", "items_")
        for name in ("total", "completed", "failed", "crashed", "cancelled")
    ),
    sa.Column("weight_total", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("weight_done", sa.BigInteger, nullable=False, server_default="0"),
    sa.PrimaryKeyConstraint("batch_id", "shard"),
    sa.ForeignKeyConstraint(["batch_id"], ["batchtrack_batch.id"], ondelete="CASCADE"),
    # Batches with crashes, however few among many.
    sa.Index("batchtrack_tally_crashed", "batch_id", **_where("crashed > 0")),
    sa.Index("batchtrack_tally_failed", "batch_id", **_where("failed > 0")),
)


@sa.event.listens_for(tally, "after_create")
def _leave_room(table: sa.Table, connection: sa.Connection, **_: Any) -> None:
    """A tally row is rewritten all the time: room for updates within its page."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("ALTER TABLE batchtrack_tally SET (fillfactor = 50)"))


incident = sa.Table(
    "batchtrack_incident",
    metadata,
    sa.Column("id", Identifier, primary_key=True),
    sa.Column("batch_id", Identifier, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("run_token", Identifier),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("cause", sa.String(32), nullable=False),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("signal", sa.String(16)),
    sa.Column("exit_code", sa.Integer),
    sa.Column("message", sa.Text),
    sa.Column("exception", sa.String(255)),
    sa.Column("error", sa.Text),  # JSON of the exception, as Celery's result backends keep it
    sa.Column("traceback", sa.Text),
    sa.Column("stack", sa.Text),
    sa.Column("python_frame", sa.String(255)),
    sa.Column("fingerprint", sa.String(16)),
    sa.Column("item", sa.String(255)),
    sa.Column("item_index", sa.BigInteger),
    sa.Column("items_done", sa.BigInteger),
    sa.Column("note", sa.Text),
    sa.Column("peak_memory", sa.BigInteger),
    sa.Column("hostname", sa.String(255)),
    sa.Column("boot_id", sa.String(64)),
    sa.Column("worker", sa.String(255)),
    sa.Column("worker_id", Identifier),
    sa.Column("pid", sa.BigInteger),
    sa.Column("queue", sa.String(255)),
    sa.Column("versions", Json),
    sa.Column("detected_by", sa.String(16)),
    sa.Column("verdict", sa.String(16)),
    sa.Column("died_at", Moment),
    sa.Column("detected_at", Moment, nullable=False),
    sa.Column("overturned_at", Moment),
    sa.ForeignKeyConstraint(
        ["batch_id", "position"], ["batchtrack_child.batch_id", "batchtrack_child.position"], ondelete="CASCADE",
        name="fk_batchtrack_incident_child",
    ),
    sa.Index("batchtrack_incident_child", "batch_id", "position"),
    sa.Index("batchtrack_incident_detected", "detected_at"),
    sa.Index("batchtrack_incident_fingerprint", "fingerprint", "detected_at", **_where("fingerprint IS NOT NULL")),
    sa.Index("batchtrack_incident_item", "item", **_where("item IS NOT NULL")),
    # Who went down with the same worker.
    sa.Index("batchtrack_incident_worker", "worker_id", **_where(WITH_ITS_WORKER)),
)  # fmt: skip

#: Whose outcomes are those of batches that are deleted.
NOBODY = uuid.UUID(int=0)

#: No foreign key: counts outlive their batch.
outcome = sa.Table(
    "batchtrack_outcome",
    metadata,
    sa.Column("batch_id", Identifier, nullable=False),
    sa.Column("shard", sa.SmallInteger, nullable=False),
    sa.Column("time", Moment, nullable=False),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("detail", sa.String(32), nullable=False),
    sa.Column("bucket", sa.SmallInteger, nullable=False),  # see vocabulary/durations.py
    sa.Column("children", sa.BigInteger, nullable=False),
    sa.Column("items", sa.BigInteger, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("seconds_max", sa.Float, nullable=False),
    sa.PrimaryKeyConstraint("batch_id", "shard", "time", "task", "status", "detail", "bucket"),
    sa.Index("batchtrack_outcome_time", "time"),
    sa.Index("batchtrack_outcome_unmerged", "batch_id", **_where("shard >= 0")),
)


def unmerged() -> sa.ColumnElement[bool]:
    """In the words of the index."""
    return outcome.c.shard >= sa.literal_column("0")


quarantine = sa.Table(
    "batchtrack_quarantine",
    metadata,
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("item_hash", sa.String(32), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("item", sa.String(255), nullable=False),
    sa.Column("deaths", sa.Integer, nullable=False),
    sa.Column("quarantine_after", sa.Integer, nullable=False),
    sa.Column("cause", sa.String(32), nullable=False),
    sa.Column("signal", sa.String(16)),
    sa.Column("python_frame", sa.String(255)),
    sa.Column("batch_id", Identifier),
    sa.Column("position", sa.BigInteger),
    sa.Column("first_at", Moment, nullable=False),
    sa.Column("last_at", Moment, nullable=False),
    sa.Column("quarantined_at", Moment),
    sa.Column("released_at", Moment),
    sa.PrimaryKeyConstraint("task", "item_hash", "version"),
    sa.CheckConstraint("deaths >= 0 AND quarantine_after >= 1", name="counts"),
    sa.CheckConstraint("quarantined_at IS NULL OR released_at IS NULL", name="state"),
    sa.Index("batchtrack_quarantine_active", "task", **_where("quarantined_at IS NOT NULL")),
)

__all__ = [
    "NOBODY", "Json", "batch", "child", "incident", "meta", "metadata", "now", "outcome", "quarantine", "tally",
    "worker",
]  # fmt: skip
