"""Pausing a batch: by hand, or by its breaker when too many of its runs die."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from celery_batchtrack.vocabulary.policies import CrashRate, Sample
from celery_batchtrack.vocabulary.states import BATCH_ALIVE, BatchStatus, Kind, Status

from .clock import now
from .engine import Connected
from .schema import batch, child, tally
from .transitions import lock_in_order

_ALIVE = batch.c.status.in_([each.value for each in BATCH_ALIVE])


@dataclass(frozen=True, slots=True)
class Watched:
    """A locked batch whose deaths are counted."""

    batch_id: uuid.UUID
    rate: CrashRate
    deaths: int
    samples: list[Sample]
    paused: bool


def lock(connection: sa.Connection, batch_id: uuid.UUID) -> Watched | None:
    """Lock the batch if it has a breaker and lives; None otherwise. Comes before its child is touched."""
    found = connection.execute(
        sa.select(batch.c.options, batch.c.deaths, batch.c.crash_samples, batch.c.paused_at)
        .where(batch.c.id == batch_id, batch.c.watch_crashes, _ALIVE)
        .with_for_update(key_share=True)
    ).one_or_none()
    rate = CrashRate.from_option(found.options.get("crash_rate")) if found is not None else None
    if found is None or rate is None:
        return None
    samples = [Sample(*each) for each in found.crash_samples or ()]
    return Watched(batch_id, rate, found.deaths, samples, found.paused_at is not None)


def count_death(connection: sa.Connection, watched: Watched | None) -> str | None:
    """One death more. If that is too many, the batch is paused, and the answer says why."""
    if watched is None:
        return None
    present = _present(connection, watched.batch_id, watched.deaths + 1)
    reason = None if watched.paused else watched.rate.exceeded(watched.samples, present)
    values: dict[str, Any] = {
        "deaths": present.deaths, "crash_samples": watched.rate.with_sample(_begun(watched, present), present)
    }  # fmt: skip
    if reason is not None:
        values.update(paused_at=now(), pause_reason=f"breaker: {reason}"[:255])
    connection.execute(sa.update(batch).where(batch.c.id == watched.batch_id).values(**values))
    return reason


def _begun(watched: Watched, present: Sample) -> list[Sample]:
    """Before the first sample there was nothing: all that ended so far is in the window."""
    return watched.samples or [Sample(present.at, 0, 0)]


def _present(connection: sa.Connection, batch_id: uuid.UUID, deaths: int) -> Sample:
    # Parts that were done in a run that died are no runs; they were never sent.
    done = sa.select(sa.func.count()).where(
        child.c.batch_id == batch_id, child.c.origin.is_not(None), child.c.status == Status.COMPLETED.value,
        child.c.dispatches == 0,
    )  # fmt: skip
    row = connection.execute(
        sa.select(now(), sa.func.sum(tally.c.completed + tally.c.failed), done.scalar_subquery())
        .where(tally.c.batch_id == batch_id)
    ).one()  # fmt: skip
    return Sample(row[0].timestamp(), int(row[1] or 0) - int(row[2]), deaths)


class Pausing(Connected):
    """A paused batch dispatches and claims no children; what runs goes on, and may end it."""

    def pause(self, batch_id: uuid.UUID, reason: str) -> bool:
        """False if it was paused already, or has ended."""
        with self.single() as connection:
            done = connection.execute(
                sa.update(batch)
                .where(batch.c.id == batch_id, _ALIVE, batch.c.paused_at.is_(None))
                .values(paused_at=now(), pause_reason=reason[:255])
            )
        return done.rowcount == 1

    def resume(self, batch_id: uuid.UUID) -> bool:
        """False if it was not paused, or has ended. Messages that were refused meanwhile are gone, so all that
        is pending is due again."""
        with self.write() as connection:
            found = connection.execute(
                sa.select(batch.c.deaths)
                .where(batch.c.id == batch_id, _ALIVE, batch.c.paused_at.is_not(None))
                .with_for_update(key_share=True)
            ).one_or_none()
            if found is None:
                return False
            fresh = [_present(connection, batch_id, found.deaths)]  # what was before the pause is forgiven
            connection.execute(
                sa.update(batch).where(batch.c.id == batch_id)
                .values(paused_at=None, pause_reason=None, crash_samples=fresh)
            )  # fmt: skip
            sent = sa.and_(
                child.c.batch_id == batch_id, child.c.kind == Kind.CHILD.value,
                child.c.status == Status.PENDING.value, child.c.dispatched_at.is_not(None),
            )  # fmt: skip
            lock_in_order(connection, sent)
            connection.execute(sa.update(child).where(sent).values(dispatched_at=None))
            return True

    def sample_crash_rates(self) -> None:
        """Counters of the batches with a breaker, so that its window knows what ended well without a death."""
        running = sa.select(batch.c.id).where(batch.c.status == BatchStatus.RUNNING.value, batch.c.watch_crashes)
        with self.read() as connection:
            ids = list(connection.execute(running).scalars())
        for batch_id in ids:
            with self.write() as connection:
                watched = lock(connection, batch_id)
                if watched is None:
                    continue
                present = _present(connection, batch_id, watched.deaths)
                samples = watched.rate.with_sample(_begun(watched, present), present)
                if samples != watched.samples:
                    connection.execute(sa.update(batch).where(batch.c.id == batch_id).values(crash_samples=samples))


__all__ = ["Pausing", "Watched", "count_death", "lock"]
