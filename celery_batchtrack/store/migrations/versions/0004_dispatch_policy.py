"""Dispatch policy: windows, turns, rates.

Revision: 0004, after: 0003
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from celery_batchtrack.store.clock import Moment

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_OPEN = "status IN ('pending', 'running')"
_UNDISPATCHED = "status = 'pending' AND dispatched_at IS NULL"
_ON_ITS_WAY = "status = 'pending' AND (dispatched_at IS NOT NULL OR waits_on_batch IS NOT NULL)"
_CHECK = "CONSTRAINT ck_batchtrack_batch_max_in_flight CHECK (max_in_flight > 0)"


def _added() -> list[sa.Column[Any]]:
    return [
        sa.Column("priority", sa.SmallInteger(), nullable=False, server_default="0"),
        sa.Column("dispatch_at", Moment()),
        sa.Column("paid_until", Moment()),
    ]


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":  # which cannot add a constraint later, but with its column
        op.execute(f"ALTER TABLE batchtrack_batch ADD COLUMN max_in_flight INTEGER {_CHECK}")
    else:
        op.add_column("batchtrack_batch", sa.Column("max_in_flight", sa.Integer()))
        op.create_check_constraint(op.f("ck_batchtrack_batch_max_in_flight"), "batchtrack_batch", "max_in_flight > 0")
    for column in _added():
        op.add_column("batchtrack_batch", column)
    _index("batchtrack_batch_held", "batchtrack_batch", ["dispatch_at"], "dispatch_at IS NOT NULL")
    for name in ("batchtrack_child_open", "batchtrack_child_undispatched"):
        op.drop_index(name, "batchtrack_child")
    _index("batchtrack_child_open", "batchtrack_child", [_of_batch(_OPEN), "status"], _OPEN)
    _index(
        "batchtrack_child_undispatched", "batchtrack_child", [_of_batch(_UNDISPATCHED), "kind", "position"],
        _UNDISPATCHED,
    )  # fmt: skip
    _index("batchtrack_child_on_its_way", "batchtrack_child", [_of_batch(_ON_ITS_WAY)], _ON_ITS_WAY)


def _of_batch(states: str) -> Any:
    """The batch of a child that is in such a state."""
    return sa.text(f"(CASE WHEN ({states}) THEN batch_id END)")


def _index(name: str, table: str, columns: list[Any], where: str) -> None:
    op.create_index(name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


def downgrade() -> None:
    for name in ("batchtrack_child_on_its_way", "batchtrack_child_undispatched", "batchtrack_child_open"):
        op.drop_index(name, "batchtrack_child")
    _index("batchtrack_child_open", "batchtrack_child", ["batch_id", "status"], _OPEN)
    _index("batchtrack_child_undispatched", "batchtrack_child", ["kind", "batch_id", "position"], _UNDISPATCHED)
    op.drop_index("batchtrack_batch_held", "batchtrack_batch")
    for column in _added():
        op.drop_column("batchtrack_batch", column.name)
    if op.get_bind().dialect.name != "sqlite":
        op.drop_constraint("ck_batchtrack_batch_max_in_flight", "batchtrack_batch")
    op.drop_column("batchtrack_batch", "max_in_flight")
