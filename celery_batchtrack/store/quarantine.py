"""Items that killed: counted in the transaction of the death, and looked up before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from celery_batchtrack.vocabulary.aftermath import Killer, QuarantinedItem
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey

from .clock import now
from .engine import Connected
from .incidents import short
from .schema import quarantine

_COLUMNS = tuple(quarantine.c[name] for name in QuarantinedItem.__slots__)


def count_kill(connection: sa.Connection, task: str, killer: Killer | None, key: ChildKey, evidence: Evidence) -> bool:
    """One death more of this item. True if it is in quarantine from now on, and was not before.

    What is in quarantine stays there, also if a batch with a policy of more patience counts on.
    """
    if killer is None:
        return False
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(quarantine)
    told = {
        "item": short(killer.item), "quarantine_after": killer.quarantine_after, "cause": evidence.cause.value,
        "signal": evidence.signal, "python_frame": short(evidence.python_frame), "batch_id": key.batch_id,
        "position": key.position, "last_at": now(),
    }  # fmt: skip
    counted = insert.values(
        task=task, item_hash=killer.item_hash, version=killer.version, deaths=1, first_at=now(), **told
    ).on_conflict_do_update(
        index_elements=list(quarantine.primary_key), set_={**told, "deaths": quarantine.c.deaths + 1}
    )  # fmt: skip
    deaths: int = connection.execute(counted.returning(quarantine.c.deaths)).scalar_one()
    if deaths < killer.quarantine_after:
        return False
    set_aside = (
        sa.update(quarantine)
        .where(
            quarantine.c.task == task, quarantine.c.item_hash == killer.item_hash,
            quarantine.c.version == killer.version, quarantine.c.quarantined_at.is_(None),
        )
        .values(quarantined_at=now(), released_at=None)
    )  # fmt: skip
    return connection.execute(set_aside).rowcount == 1


class Quarantining(Connected):
    """The register of items that killed, over all batches."""

    def quarantined(self, tasks: Sequence[str], version: str) -> dict[tuple[str, str], QuarantinedItem]:
        """Items of these tasks that are not to be sent, by task and item hash."""
        if not tasks:
            return {}
        query = sa.select(*_COLUMNS).where(
            quarantine.c.task.in_(list(tasks)), quarantine.c.version == version,
            quarantine.c.quarantined_at.is_not(None),
        )  # fmt: skip
        with self.read() as connection:
            found = [QuarantinedItem(*row) for row in connection.execute(query)]
        return {(each.task, each.item_hash): each for each in found}

    def quarantine_list(self, *, all: bool = False, task: str | None = None) -> list[QuarantinedItem]:
        """Items in quarantine, newest first; with `all`, also those released or merely counted."""
        query = sa.select(*_COLUMNS).order_by(quarantine.c.last_at.desc(), quarantine.c.item)
        if not all:
            query = query.where(quarantine.c.quarantined_at.is_not(None))
        if task is not None:
            query = query.where(quarantine.c.task == task)
        with self.read() as connection:
            return [QuarantinedItem(*row) for row in connection.execute(query)]

    def release_from_quarantine(self, *, items: Sequence[str] = (), task: str | None = None) -> list[QuarantinedItem]:
        """Release items by identifier (or hash), of one task or of all; without any, all of them. Their count of
        deaths begins anew."""
        wanted: list[Any] = [quarantine.c.quarantined_at.is_not(None)]
        if items:
            wanted.append(sa.or_(quarantine.c.item.in_(list(items)), quarantine.c.item_hash.in_(list(items))))
        if task is not None:
            wanted.append(quarantine.c.task == task)
        statement = (
            sa.update(quarantine).where(*wanted)
            .values(quarantined_at=None, released_at=now(), deaths=0)
            .returning(*_COLUMNS)
        )  # fmt: skip
        with self.write() as connection:
            return [QuarantinedItem(*row) for row in connection.execute(statement)]


__all__ = ["Quarantining", "count_kill"]
