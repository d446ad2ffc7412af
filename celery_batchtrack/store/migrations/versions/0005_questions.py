"""What people ask: counts of what ended, and indexes for what they look for. The views are made after every step.

Revision: 0005, after: 0004
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from celery_batchtrack.store.clock import Identifier, Moment

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_OPEN = "status IN ('pending', 'running')"
_SETTLED = "kind = 'child' AND started_at IS NOT NULL AND finished_at IS NOT NULL"
_ONE_ITEM = "item_count = 1 AND finished_at IS NOT NULL"
_KEY = ("batch_id", "shard", "time", "task", "status", "detail", "bucket")


def _is_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def upgrade() -> None:
    op.create_table(
        "batchtrack_outcome",
        sa.Column("batch_id", Identifier(), nullable=False),
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("time", Moment(), nullable=False),
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("detail", sa.String(32), nullable=False),
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("children", sa.BigInteger(), nullable=False),
        sa.Column("items", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("seconds_max", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint(*_KEY, name=op.f("pk_batchtrack_outcome")),
    )
    op.create_index("batchtrack_outcome_time", "batchtrack_outcome", ["time"])
    _index("batchtrack_outcome_unmerged", "batchtrack_outcome", ["batch_id"], "shard >= 0")
    op.drop_index("batchtrack_child_open", "batchtrack_child")
    _index("batchtrack_child_open", "batchtrack_child", [_of_batch(_OPEN), "status", "position"], _OPEN)
    _index("batchtrack_child_slowest", "batchtrack_child", ["batch_id", sa.text(f"({_ran()})")], _SETTLED)
    _index(
        "batchtrack_child_unhappy", "batchtrack_child", ["batch_id", "status", "position"],
        "status IN ('failed', 'crashed', 'cancelled')",
    )  # fmt: skip
    _index("batchtrack_child_item", "batchtrack_child", [sa.text(f"({_first_item()})")], _ONE_ITEM, "hash")
    _index("batchtrack_child_task_id", "batchtrack_child", ["task_id"], "finished_at IS NOT NULL", "hash")
    _index(
        "batchtrack_child_callback_waiting", "batchtrack_child", ["batch_id"], "kind <> 'child' AND status = 'pending'"
    )
    op.add_column("batchtrack_batch", sa.Column("round_at", Moment()))
    _index("batchtrack_tally_crashed", "batchtrack_tally", ["batch_id"], "crashed > 0")
    _index("batchtrack_tally_failed", "batchtrack_tally", ["batch_id"], "failed > 0")
    _index(
        "batchtrack_incident_fingerprint", "batchtrack_incident", ["fingerprint", "detected_at"],
        "fingerprint IS NOT NULL",
    )  # fmt: skip
    _index("batchtrack_incident_item", "batchtrack_incident", ["item"], "item IS NOT NULL")
    _index("batchtrack_batch_not_completed", "batchtrack_batch", ["created_at"], "status <> 'completed'")
    _count_what_ended()
    op.add_column("batchtrack_meta", sa.Column("counted_from", Moment()))
    # Workers of the version before go on for a while, and count nothing.
    later = "strftime('%Y-%m-%d %H:%M:%f000', 'now', '+1 day')" if _is_sqlite() else "now() + interval '1 day'"
    op.execute(f"UPDATE batchtrack_meta SET counted_from = {later} WHERE EXISTS (SELECT 1 FROM batchtrack_batch)")


#: Upper bounds of the classes of durations, as they were at this step.
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def _count_what_ended() -> None:
    """Counts of the children that are there, as if they had been counted when they ended."""
    classes = " ".join(f"WHEN ran <= {bound} THEN {index}" for index, bound in enumerate(_BOUNDS))
    op.execute(
        f"""
        INSERT INTO batchtrack_outcome
          (batch_id, shard, time, task, status, detail, bucket, children, items, seconds, seconds_max)
        SELECT batch_id, -1, {_minute("finished_at")}, task, status, '',
          CASE WHEN ran IS NULL THEN -1 {classes} ELSE {len(_BOUNDS)} END AS class,
          count(*), sum(item_count), coalesce(sum(ran), 0), coalesce(max(ran), 0)
        FROM (SELECT c.*, {_ran()} AS ran FROM batchtrack_child c) settled
        WHERE kind = 'child' AND finished_at IS NOT NULL AND status <> 'split'
        GROUP BY batch_id, {_minute("finished_at")}, task, status, class
        """
    )
    op.execute(
        f"""
        INSERT INTO batchtrack_outcome
          (batch_id, shard, time, task, status, detail, bucket, children, items, seconds, seconds_max)
        SELECT i.batch_id, -1, {_minute("i.detected_at")}, c.task, 'died', coalesce(i.signal, i.cause), -1,
          count(*), 0, 0, 0
        FROM batchtrack_incident i
        JOIN batchtrack_child c ON c.batch_id = i.batch_id AND c.position = i.position
        WHERE i.detected_by IS NOT NULL AND i.outcome NOT IN ('late_write', 'redispatched')
        GROUP BY i.batch_id, {_minute("i.detected_at")}, c.task, coalesce(i.signal, i.cause)
        """
    )


def _minute(column: str) -> str:
    if _is_sqlite():
        return f"strftime('%Y-%m-%d %H:%M:00.000000', {column})"
    return f"date_trunc('minute', {column})"


def _ran() -> str:
    if _is_sqlite():
        return "((julianday(finished_at) - julianday(started_at)) * 86400.0)"
    return "CAST(extract(epoch FROM finished_at - started_at) AS double precision)"


def _first_item() -> str:
    return "json_extract(items, '$[0]')" if _is_sqlite() else "(items ->> 0)"


def _of_batch(states: str) -> Any:
    """The batch of a child that is in such a state."""
    return sa.text(f"(CASE WHEN ({states}) THEN batch_id END)")


def _index(name: str, table: str, columns: list[Any], where: str, using: str | None = None) -> None:
    more: dict[str, Any] = {} if using is None else {"postgresql_using": using}
    op.create_index(name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where), **more)


def downgrade() -> None:
    op.drop_column("batchtrack_meta", "counted_from")
    op.drop_column("batchtrack_batch", "round_at")
    op.drop_index("batchtrack_child_callback_waiting", "batchtrack_child")
    for name, table in (
        ("batchtrack_incident_fingerprint", "batchtrack_incident"),
        ("batchtrack_batch_not_completed", "batchtrack_batch"),
        ("batchtrack_incident_item", "batchtrack_incident"), ("batchtrack_tally_failed", "batchtrack_tally"),
        ("batchtrack_tally_crashed", "batchtrack_tally"), ("batchtrack_child_task_id", "batchtrack_child"),
        ("batchtrack_child_item", "batchtrack_child"), ("batchtrack_child_unhappy", "batchtrack_child"),
        ("batchtrack_child_slowest", "batchtrack_child"), ("batchtrack_child_open", "batchtrack_child"),
    ):  # fmt: skip
        op.drop_index(name, table)
    _index("batchtrack_child_open", "batchtrack_child", [_of_batch(_OPEN), "status"], _OPEN)
    op.drop_table("batchtrack_outcome")
