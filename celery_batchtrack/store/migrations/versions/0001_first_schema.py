"""The first schema: batches, children, tallies, workers, incidents.

Revision: 0001, after: none
"""
# ruff: noqa: E501

import uuid

import sqlalchemy as sa
from alembic import op

from celery_batchtrack.store.clock import Identifier, Moment, now
from celery_batchtrack.store.schema import Json

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('batchtrack_batch',
    sa.Column('id', Identifier(), nullable=False),
    sa.Column('name', sa.String(length=255), nullable=False),
    sa.Column('status', sa.String(length=16), nullable=False),
    sa.Column('reason', sa.String(length=16), nullable=True),
    sa.Column('round', sa.SmallInteger(), server_default='1', nullable=False),
    sa.Column('parent_task_id', sa.String(length=255), nullable=True),
    sa.Column('parent_task', sa.String(length=255), nullable=True),
    sa.Column('root_id', sa.String(length=255), nullable=True),
    sa.Column('options', Json, nullable=False),
    sa.Column('callbacks', sa.Text(), nullable=False),
    sa.Column('headers', sa.Text(), nullable=True),
    sa.Column('start_now', sa.Boolean(), nullable=False),
    sa.Column('watch_failure', sa.Boolean(), nullable=False),
    sa.Column('shards', sa.SmallInteger(), nullable=False),
    sa.Column('opened_by', Identifier(), nullable=True),
    sa.Column('next_position', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('created_at', Moment(), nullable=False),
    sa.Column('sealed_at', Moment(), nullable=True),
    sa.Column('paused_at', Moment(), nullable=True),
    sa.Column('started_at', Moment(), nullable=True),
    sa.Column('finished_at', Moment(), nullable=True),
    sa.CheckConstraint("(status = 'cancelled') = (reason IS NOT NULL)", name=op.f('ck_batchtrack_batch_reason')),
    sa.CheckConstraint("(status IN ('open', 'running')) = (finished_at IS NULL)", name=op.f('ck_batchtrack_batch_finished')),
    sa.CheckConstraint("status <> 'open' OR sealed_at IS NULL", name=op.f('ck_batchtrack_batch_unsealed')),
    sa.CheckConstraint("status <> 'running' OR sealed_at IS NOT NULL", name=op.f('ck_batchtrack_batch_sealed')),
    sa.CheckConstraint("status IN ('open', 'running', 'completed', 'partial', 'failed', 'cancelled')", name=op.f('ck_batchtrack_batch_status')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_batchtrack_batch'))
    )
    op.create_index('batchtrack_batch_alive', 'batchtrack_batch', ['status'], unique=False, postgresql_where=sa.text("status IN ('open', 'running')"), sqlite_where=sa.text("status IN ('open', 'running')"))
    op.create_index('batchtrack_batch_created', 'batchtrack_batch', ['created_at'], unique=False)
    op.create_table('batchtrack_meta',
    sa.Column('id', sa.SmallInteger(), autoincrement=False, nullable=False),
    sa.Column('store_id', Identifier(), nullable=False),
    sa.Column('created_at', Moment(), nullable=False),
    sa.Column('swept_at', Moment(), nullable=True),
    sa.Column('swept_by', sa.String(length=255), nullable=True),
    sa.Column('server_started_at', Moment(), nullable=True),
    sa.CheckConstraint('id = 1', name=op.f('ck_batchtrack_meta_one_row')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_batchtrack_meta'))
    )
    op.create_table('batchtrack_worker',
    sa.Column('id', Identifier(), nullable=False),
    sa.Column('kind', sa.String(length=8), nullable=False),
    sa.Column('name', sa.String(length=255), nullable=False),
    sa.Column('hostname', sa.String(length=255), nullable=False),
    sa.Column('boot_id', sa.String(length=64), nullable=True),
    sa.Column('pid_namespace', sa.String(length=64), nullable=True),
    sa.Column('pid', sa.BigInteger(), nullable=False),
    sa.Column('pid_started', sa.BigInteger(), nullable=True),
    sa.Column('pool', sa.String(length=32), nullable=False),
    sa.Column('lease', sa.Float(), nullable=False),
    sa.Column('version', sa.String(length=32), nullable=False),
    sa.Column('beat', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('beat_at', Moment(), nullable=False),
    sa.Column('suspected_beat', sa.BigInteger(), nullable=True),
    sa.Column('suspected_at', Moment(), nullable=True),
    sa.Column('started_at', Moment(), nullable=False),
    sa.Column('stopped_at', Moment(), nullable=True),
    sa.Column('lost_at', Moment(), nullable=True),
    sa.Column('lost_by', sa.String(length=16), nullable=True),
    sa.CheckConstraint("kind IN ('worker', 'client')", name=op.f('ck_batchtrack_worker_kind')),
    sa.CheckConstraint('(lost_by IS NULL) = (lost_at IS NULL)', name=op.f('ck_batchtrack_worker_loss')),
    sa.CheckConstraint('(suspected_beat IS NULL) = (suspected_at IS NULL)', name=op.f('ck_batchtrack_worker_suspicion')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_batchtrack_worker'))
    )
    op.create_index('batchtrack_worker_alive', 'batchtrack_worker', ['hostname'], unique=False, postgresql_where=sa.text('stopped_at IS NULL AND lost_at IS NULL'), sqlite_where=sa.text('stopped_at IS NULL AND lost_at IS NULL'))
    op.create_table('batchtrack_child',
    sa.Column('batch_id', Identifier(), nullable=False),
    sa.Column('position', sa.BigInteger(), nullable=False),
    sa.Column('kind', sa.String(length=16), nullable=False),
    sa.Column('ordinal', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('round', sa.SmallInteger(), server_default='1', nullable=False),
    sa.Column('shard', sa.SmallInteger(), nullable=False),
    sa.Column('task', sa.String(length=255), nullable=False),
    sa.Column('task_id', sa.String(length=255), nullable=False),
    sa.Column('status', sa.String(length=16), nullable=False),
    sa.Column('cause', sa.String(length=32), nullable=True),
    sa.Column('verdict', sa.String(length=16), nullable=True),
    sa.Column('attempt', sa.Integer(), server_default='0', nullable=False),
    sa.Column('run_token', Identifier(), nullable=True),
    sa.Column('crashes', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('retries', sa.Integer(), server_default='0', nullable=False),
    sa.Column('dispatches', sa.Integer(), server_default='0', nullable=False),
    sa.Column('link', sa.SmallInteger(), server_default='0', nullable=False),
    sa.Column('waits_on_batch', Identifier(), nullable=True),
    sa.Column('split_from', sa.BigInteger(), nullable=True),
    sa.Column('policy', Json, nullable=True),
    sa.Column('items', Json, nullable=True),
    sa.Column('item_count', sa.Integer(), server_default='1', nullable=False),
    sa.Column('signature', sa.Text(), nullable=True),
    sa.Column('result', sa.Text(), nullable=True),
    sa.Column('worker_id', Identifier(), nullable=True),
    sa.Column('slot', sa.String(length=96), nullable=True),
    sa.Column('queue', sa.String(length=255), nullable=True),
    sa.Column('dispatched_at', Moment(), nullable=True),
    sa.Column('not_before', Moment(), nullable=True),
    sa.Column('expires_at', Moment(), nullable=True),
    sa.Column('created_at', Moment(), nullable=False),
    sa.Column('started_at', Moment(), nullable=True),
    sa.Column('finished_at', Moment(), nullable=True),
    sa.CheckConstraint("(status IN ('pending', 'running')) = (finished_at IS NULL)", name=op.f('ck_batchtrack_child_finished')),
    sa.CheckConstraint("kind IN ('child', 'on_success', 'on_failure', 'on_first_failure', 'on_finish')", name=op.f('ck_batchtrack_child_kind')),
    sa.CheckConstraint("status <> 'completed' OR cause IS NULL", name=op.f('ck_batchtrack_child_cause')),
    sa.CheckConstraint("status <> 'pending' OR (worker_id IS NULL AND slot IS NULL)", name=op.f('ck_batchtrack_child_pending')),
    sa.CheckConstraint("status <> 'running' OR (worker_id IS NOT NULL AND slot IS NOT NULL AND run_token IS NOT NULL AND started_at IS NOT NULL)", name=op.f('ck_batchtrack_child_running')),
    sa.CheckConstraint("status IN ('pending', 'running', 'completed', 'failed', 'crashed', 'cancelled', 'split')", name=op.f('ck_batchtrack_child_status')),
    sa.CheckConstraint("verdict IS NULL OR verdict IN ('observed', 'lease')", name=op.f('ck_batchtrack_child_verdict')),
    sa.CheckConstraint('item_count >= 0 AND attempt >= 0', name=op.f('ck_batchtrack_child_counts')),
    sa.ForeignKeyConstraint(['batch_id'], ['batchtrack_batch.id'], name=op.f('fk_batchtrack_child_batch_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('batch_id', 'position', name=op.f('pk_batchtrack_child'))
    )
    op.create_index('batchtrack_child_callback', 'batchtrack_child', ['batch_id', 'round', 'kind', 'ordinal'], unique=True, postgresql_where=sa.text("kind <> 'child'"), sqlite_where=sa.text("kind <> 'child'"))
    op.create_index('batchtrack_child_undispatched', 'batchtrack_child', ['kind', 'batch_id', 'position'], unique=False, postgresql_where=sa.text("status = 'pending' AND dispatched_at IS NULL"), sqlite_where=sa.text("status = 'pending' AND dispatched_at IS NULL"))
    op.create_index('batchtrack_child_dispatched', 'batchtrack_child', ['dispatched_at'], unique=False, postgresql_where=sa.text("status = 'pending' AND dispatched_at IS NOT NULL"), sqlite_where=sa.text("status = 'pending' AND dispatched_at IS NOT NULL"))
    op.create_index('batchtrack_child_open', 'batchtrack_child', ['batch_id', 'status'], unique=False, postgresql_where=sa.text("status IN ('pending', 'running')"), sqlite_where=sa.text("status IN ('pending', 'running')"))
    op.create_index('batchtrack_child_slot', 'batchtrack_child', ['worker_id', 'slot'], unique=True, postgresql_where=sa.text("status = 'running'"), sqlite_where=sa.text("status = 'running'"))
    op.create_table('batchtrack_tally',
    sa.Column('batch_id', Identifier(), nullable=False),
    sa.Column('shard', sa.SmallInteger(), nullable=False),
    sa.Column('total', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('completed', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('failed', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('crashed', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('cancelled', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('items_total', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('items_completed', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('items_failed', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('items_crashed', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('items_cancelled', sa.BigInteger(), server_default='0', nullable=False),
    sa.ForeignKeyConstraint(['batch_id'], ['batchtrack_batch.id'], name=op.f('fk_batchtrack_tally_batch_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('batch_id', 'shard', name=op.f('pk_batchtrack_tally'))
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE batchtrack_tally SET (fillfactor = 50)")
    op.create_table('batchtrack_incident',
    sa.Column('id', Identifier(), nullable=False),
    sa.Column('batch_id', Identifier(), nullable=False),
    sa.Column('position', sa.BigInteger(), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=False),
    sa.Column('run_token', Identifier(), nullable=True),
    sa.Column('outcome', sa.String(length=16), nullable=False),
    sa.Column('cause', sa.String(length=32), nullable=False),
    sa.Column('phase', sa.String(length=16), nullable=False),
    sa.Column('signal', sa.String(length=16), nullable=True),
    sa.Column('exit_code', sa.Integer(), nullable=True),
    sa.Column('message', sa.Text(), nullable=True),
    sa.Column('traceback', sa.Text(), nullable=True),
    sa.Column('hostname', sa.String(length=255), nullable=True),
    sa.Column('worker', sa.String(length=255), nullable=True),
    sa.Column('pid', sa.BigInteger(), nullable=True),
    sa.Column('detected_by', sa.String(length=16), nullable=True),
    sa.Column('verdict', sa.String(length=16), nullable=True),
    sa.Column('died_at', Moment(), nullable=True),
    sa.Column('detected_at', Moment(), nullable=False),
    sa.Column('overturned_at', Moment(), nullable=True),
    sa.ForeignKeyConstraint(['batch_id', 'position'], ['batchtrack_child.batch_id', 'batchtrack_child.position'], name='fk_batchtrack_incident_child', ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_batchtrack_incident'))
    )
    op.create_index('batchtrack_incident_child', 'batchtrack_incident', ['batch_id', 'position'], unique=False)
    op.create_index('batchtrack_incident_detected', 'batchtrack_incident', ['detected_at'], unique=False)
    meta = sa.table(
        "batchtrack_meta", sa.column("id"), sa.column("store_id", Identifier), sa.column("created_at", Moment)
    )
    op.execute(sa.insert(meta).values(id=1, store_id=uuid.uuid4(), created_at=now()))


def downgrade() -> None:
    for name in ("incident", "child", "tally", "batch", "worker", "meta"):
        op.drop_table(f"batchtrack_{name}")
