"""A batch's whole life: nesting, weights, deadlines, labels, milestones, results by the id their caller knows.

Revision: 0003, after: 0002
"""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

from celery_batchtrack.store.clock import Identifier, Moment
from celery_batchtrack.store.schema import Json

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_KINDS = "'child', 'on_success', 'on_failure', 'on_first_failure', 'on_finish'"
_PARENT = (
    "CONSTRAINT fk_batchtrack_batch_parent_batch FOREIGN KEY(parent_batch) REFERENCES batchtrack_batch (id) "
    "ON DELETE CASCADE"
)
_OPEN_BATCH = "status IN ('open', 'running')"


def _where(text: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(text), "sqlite_where": sa.text(text)}


def _added() -> dict[str, list[sa.Column[Any]]]:
    no = sa.false()
    return {
        "batchtrack_batch": [
            sa.Column("parent_position", sa.BigInteger()),
            sa.Column("watch_progress", sa.Boolean(), nullable=False, server_default=no),
            sa.Column("untold", sa.Boolean(), nullable=False, server_default=no),
            sa.Column("result_id", sa.String(255)),
            sa.Column("description", sa.Text()),
            sa.Column("tags", Json),
            sa.Column("metadata", Json),
            sa.Column("deadline_at", Moment()),
        ],
        "batchtrack_child": [
            sa.Column("weight", sa.BigInteger(), nullable=False, server_default="1"),
            sa.Column("result_id", sa.String(255)),
        ],
        "batchtrack_tally": [
            sa.Column("weight_total", sa.BigInteger(), nullable=False, server_default="0"),
            sa.Column("weight_done", sa.BigInteger(), nullable=False, server_default="0"),
        ],
        "batchtrack_incident": [sa.Column("error", sa.Text())],
    }


def _indexes() -> dict[str, tuple[str, list[str], str | None]]:
    return {
        "batchtrack_batch_name": ("batchtrack_batch", ["name"], None),
        "batchtrack_batch_parent": ("batchtrack_batch", ["parent_batch"], "parent_batch IS NOT NULL"),
        "batchtrack_batch_deadline": (
            "batchtrack_batch", ["deadline_at"], f"{_OPEN_BATCH} AND deadline_at IS NOT NULL"
        ),
        "batchtrack_batch_result": ("batchtrack_batch", ["result_id"], "result_id IS NOT NULL"),
        "batchtrack_batch_untold": ("batchtrack_batch", ["id"], "untold"),
        "batchtrack_child_waiting": ("batchtrack_child", ["waits_on_batch"], "waits_on_batch IS NOT NULL"),
        "batchtrack_child_result": ("batchtrack_child", ["result_id"], "result_id IS NOT NULL"),
    }  # fmt: skip


def upgrade() -> None:
    for table, columns in _added().items():
        for column in columns:
            op.add_column(table, column)
    _add_parent_batch()
    for name, (table, names, where) in _indexes().items():
        op.create_index(name, table, names, **(_where(where) if where else {}))
    _allow_kinds(f"{_KINDS}, 'on_progress'", _KINDS)
    op.execute("UPDATE batchtrack_child SET weight = item_count")
    op.execute(
        "UPDATE batchtrack_tally SET weight_total = items_total, "
        "weight_done = items_completed + items_failed + items_crashed + items_cancelled"
    )
    op.execute("UPDATE batchtrack_child SET result_id = task_id WHERE kind <> 'child'")


def _add_parent_batch() -> None:
    op.add_column("batchtrack_batch", sa.Column("parent_batch", Identifier()))
    if op.get_bind().dialect.name == "sqlite":
        _edit("batchtrack_batch", lambda sql: f"{sql.rstrip().removesuffix(')').rstrip()}, {_PARENT})")
        return
    op.create_foreign_key(
        "fk_batchtrack_batch_parent_batch", "batchtrack_batch", "batchtrack_batch", ["parent_batch"], ["id"],
        ondelete="CASCADE",
    )  # fmt: skip


def _allow_kinds(kinds: str, before: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        _edit("batchtrack_child", lambda sql: sql.replace(f"kind IN ({before})", f"kind IN ({kinds})"))
        return
    op.drop_constraint("ck_batchtrack_child_kind", "batchtrack_child")
    op.create_check_constraint(op.f("ck_batchtrack_child_kind"), "batchtrack_child", f"kind IN ({kinds})")


def _edit(table: str, change: Callable[[str], str]) -> None:
    """SQLite cannot alter constraints. Its manual's way is to edit the schema's text: a rebuilt table would have to be
    dropped, and with it, by cascade, every row that refers to it."""
    connection = op.get_bind()
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    where = "type = 'table' AND name = ?"
    sql = connection.exec_driver_sql(f"SELECT sql FROM sqlite_master WHERE {where}", (table,)).scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    connection.exec_driver_sql(f"UPDATE sqlite_master SET sql = ? WHERE {where}", (change(sql), table))
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = OFF")


def downgrade() -> None:
    op.execute("DELETE FROM batchtrack_child WHERE kind = 'on_progress'")
    _allow_kinds(_KINDS, f"{_KINDS}, 'on_progress'")
    for name, (table, _, _) in _indexes().items():
        op.drop_index(name, table)
    if op.get_bind().dialect.name == "sqlite":
        _edit("batchtrack_batch", lambda sql: sql.replace(f", {_PARENT}", ""))
    else:
        op.drop_constraint("fk_batchtrack_batch_parent_batch", "batchtrack_batch")
    op.drop_column("batchtrack_batch", "parent_batch")
    for table, columns in _added().items():
        for column in columns:
            op.drop_column(table, column.name)
