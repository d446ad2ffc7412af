"""Schema versions: what the database has, what the code needs, and the way there (Alembic)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from celery_batchtrack import errors

VERSION_TABLE = "batchtrack_alembic_version"
_SCRIPTS = Path(__file__).parent / "migrations"
_MIGRATE = "run `celery -A <app> batchtrack migrate` (in a Django project, `manage.py migrate`)"
#: Key of the advisory lock that lets one of several `migrate` work at a time (PostgreSQL).
_LOCK = 0x62746D67


class State(Enum):
    EMPTY = "has no batchtrack tables"
    OLDER = "is older than this version of celery-batchtrack"
    CURRENT = "fits"
    NEWER = "is newer than this version of celery-batchtrack"


def config() -> Config:
    settings = Config()
    settings.set_main_option("script_location", str(_SCRIPTS))
    settings.set_main_option("path_separator", "os")
    return settings


def _revisions() -> tuple[str, set[str]]:
    scripts = ScriptDirectory.from_config(config())
    head = scripts.get_current_head()
    assert head is not None
    return head, {each.revision for each in scripts.walk_revisions()}


def state(connection: sa.Connection) -> State:
    """Compare the database's version with the code's. Two cheap queries, once per process."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return State.EMPTY
    stored = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars().all()
    head, known = _revisions()
    if not stored:
        return State.EMPTY
    if stored == [head]:
        return State.CURRENT
    return State.OLDER if set(stored) <= known else State.NEWER


def newest() -> str:
    """The step that this code needs."""
    return _revisions()[0]


def revision(connection: sa.Connection) -> str | None:
    """The step that the database is at."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()


def reaches(connection: sa.Connection, revision: str = "head") -> bool:
    """Whether the database has this step, or is beyond it."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return False
    stored = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars().all()
    newest_first = [each.revision for each in ScriptDirectory.from_config(config()).walk_revisions()]
    wanted = 0 if revision == "head" else newest_first.index(revision)
    return bool(stored) and all(each not in newest_first[wanted + 1 :] for each in stored)


def refusal(found: State, url: str) -> errors.SchemaError:
    """The error for a database that does not fit, with what to do."""
    if found is State.EMPTY:
        return errors.SchemaMissing(f"tracking database {url} has no batchtrack tables: {_MIGRATE}")
    if found is State.OLDER:
        return errors.SchemaOutdated(
            f"tracking database {url} has an older schema than this version of celery-batchtrack: {_MIGRATE}"
        )
    return errors.SchemaTooNew(
        f"tracking database {url} has a newer schema than this version of celery-batchtrack: "
        "upgrade the package on this machine"
    )


Around = Callable[[sa.Connection], None]


def upgrade(engine: sa.Engine, before: Around, after: Around) -> None:
    """Run every missing step in one transaction: `before` only if there is one, `after` always."""
    with engine.begin() as connection:
        upgrade_on(connection, before, engine.url.render_as_string(hide_password=True))
        after(connection)


def upgrade_on(connection: sa.Connection, before: Around, url: str, to: str = "head") -> None:
    """The steps to the revision `to` that are missing, within a transaction that has begun."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    if state(connection) is State.NEWER:
        raise refusal(State.NEWER, url)
    if reaches(connection, to):
        return
    before(connection)
    settings = config()
    settings.attributes["connection"] = connection
    command.upgrade(settings, to)
