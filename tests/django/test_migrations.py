"""Django's migrations and ours keep step."""

from __future__ import annotations

import re
from pathlib import Path

from alembic.script import ScriptDirectory

import celery_batchtrack
from celery_batchtrack.store import migrate
from celery_batchtrack.store.schema import metadata

MIGRATIONS = Path(celery_batchtrack.__file__).parent / "django" / "migrations"


def test_the_newest_migration_of_django_brings_our_newest_step() -> None:
    """Else a test database would be older than the code. A new step of ours needs a new migration there: copy the
    newest, and let it name the step."""
    found = {path.name: re.search(r'^REVISION = "(\w+)"$', path.read_text(), re.MULTILINE) for path in _migrations()}
    assert None not in found.values(), "each names the step that it brings"
    brought = [match[1] for match in found.values() if match is not None]
    assert brought[-1] == ScriptDirectory.from_config(migrate.config()).get_current_head()
    assert brought == sorted(brought)


def test_every_table_that_refers_to_another_is_known_to_django() -> None:
    """PostgreSQL truncates no table while one that refers to it is left, and `flush` knows tables by their models."""
    referring = {name for name, table in metadata.tables.items() if table.foreign_keys}
    known = set(re.findall(r'db_table = "(\w+)"', (MIGRATIONS.parent / "models.py").read_text()))
    assert referring - known == set(), "each needs a model, as `Tally` is one, and a migration with its state"


def _migrations() -> list[Path]:
    return sorted(MIGRATIONS.glob("[0-9]*.py"))
