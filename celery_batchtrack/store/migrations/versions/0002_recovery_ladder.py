"""The recovery ladder: dossiers, split children, suspects that run alone, breaker, quarantine.

Revision: 0002, after: 0001
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from celery_batchtrack.store.clock import Identifier, Moment
from celery_batchtrack.store.schema import Json

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _where(text: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(text), "sqlite_where": sa.text(text)}


def _added() -> dict[str, list[sa.Column[Any]]]:
    return {
        "batchtrack_batch": [
            sa.Column("pause_reason", sa.String(255)),
            sa.Column("watch_crashes", sa.Boolean(), nullable=False, server_default=sa.false()),
            sa.Column("deaths", sa.BigInteger(), nullable=False, server_default="0"),
            sa.Column("crash_samples", Json),
        ],
        "batchtrack_child": [
            sa.Column("origin", sa.BigInteger()),
            sa.Column("isolated", sa.Boolean(), nullable=False, server_default=sa.false()),
            sa.Column("rerouted", sa.Boolean(), nullable=False, server_default=sa.false()),
        ],
        "batchtrack_incident": [
            sa.Column("exception", sa.String(255)),
            sa.Column("stack", sa.Text()),
            sa.Column("python_frame", sa.String(255)),
            sa.Column("fingerprint", sa.String(16)),
            sa.Column("item", sa.String(255)),
            sa.Column("item_index", sa.BigInteger()),
            sa.Column("items_done", sa.BigInteger()),
            sa.Column("note", sa.Text()),
            sa.Column("peak_memory", sa.BigInteger()),
            sa.Column("boot_id", sa.String(64)),
            sa.Column("worker_id", Identifier()),
            sa.Column("queue", sa.String(255)),
            sa.Column("versions", Json),
        ],
    }


def upgrade() -> None:
    for table, columns in _added().items():
        for column in columns:
            op.add_column(table, column)
    op.create_index(
        "batchtrack_child_origin", "batchtrack_child", ["batch_id", "origin"], **_where("origin IS NOT NULL")
    )
    op.create_index(
        "batchtrack_child_isolated", "batchtrack_child", ["queue"], **_where("isolated AND status = 'pending'")
    )
    op.create_index(
        "batchtrack_incident_worker",
        "batchtrack_incident",
        ["worker_id"],
        **_where("cause = 'worker_lost' OR detected_by IN ('host', 'lease')"),
    )
    op.create_table(
        "batchtrack_quarantine",
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("item_hash", sa.String(32), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("item", sa.String(255), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("quarantine_after", sa.Integer(), nullable=False),
        sa.Column("cause", sa.String(32), nullable=False),
        sa.Column("signal", sa.String(16)),
        sa.Column("python_frame", sa.String(255)),
        sa.Column("batch_id", Identifier()),
        sa.Column("position", sa.BigInteger()),
        sa.Column("first_at", Moment(), nullable=False),
        sa.Column("last_at", Moment(), nullable=False),
        sa.Column("quarantined_at", Moment()),
        sa.Column("released_at", Moment()),
        sa.CheckConstraint("deaths >= 0 AND quarantine_after >= 1", name=op.f("ck_batchtrack_quarantine_counts")),
        sa.CheckConstraint(
            "quarantined_at IS NULL OR released_at IS NULL", name=op.f("ck_batchtrack_quarantine_state")
        ),
        sa.PrimaryKeyConstraint("task", "item_hash", "version", name=op.f("pk_batchtrack_quarantine")),
    )
    op.create_index(
        "batchtrack_quarantine_active", "batchtrack_quarantine", ["task"], **_where("quarantined_at IS NOT NULL")
    )


def downgrade() -> None:
    op.drop_table("batchtrack_quarantine")
    op.drop_index("batchtrack_incident_worker", "batchtrack_incident")
    op.drop_index("batchtrack_child_isolated", "batchtrack_child")
    op.drop_index("batchtrack_child_origin", "batchtrack_child")
    for table, columns in _added().items():
        for column in columns:
            op.drop_column(table, column.name)
