"""What the tracking database says of itself, for `doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .records import WorkerRow


@dataclass(frozen=True, slots=True)
class Connections:
    """What a PostgreSQL server allows, and what is between it and us."""

    allowed: int  # for roles that are no superusers
    by_others: int  # in use now by whom we do not know
    #: None: straight to the server; "transaction": a pooler gives each transaction another connection of its own;
    #: "pooler": one of which that could not be seen.
    pooler: str | None
    prepares: bool  # the driver prepares statements on the server


@dataclass(frozen=True, slots=True)
class Tables:
    """From our tables, where they fit."""

    store_id: str
    workers: Sequence[WorkerRow]  # those that are alive
    swept_by: str | None
    swept_seconds: float | None  # ago
    open_batches: int
    kept_too_long: int  # batches whose retention is over, and was an hour ago
    oldest_seconds: float | None  # since the oldest of them ended
    longest_wait: float  # seconds until the last countdown of a child that waits for one
    #: Children and callbacks that were sent and have not begun, by queue.
    sent: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """One look at the tracking database."""

    product: str  # "PostgreSQL 15.18"
    url: str  # without password
    schema: str  # name of a `migrate.State`
    schema_says: str
    revision: str | None
    wanted_revision: str
    sqlite: bool
    makes_tables: bool  # at first use, where there are none
    ahead: float  # seconds that this host's clock is ahead of the database's, as far as it is certain
    connections: Connections | None = None
    tables: Tables | None = None
