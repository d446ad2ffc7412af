"""Alembic's entry: runs on the connection that `store.migrate` hands over."""

from alembic import context

from celery_batchtrack.store.migrate import VERSION_TABLE
from celery_batchtrack.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
