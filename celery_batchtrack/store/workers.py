"""Workers: their pulse, suspicion and loss; and the sweep's own book-keeping."""

from __future__ import annotations

import uuid
from datetime import datetime

import sqlalchemy as sa

from celery_batchtrack.vocabulary.records import ChildRow, NewWorker, WorkerRow
from celery_batchtrack.vocabulary.states import Detector, Status

from .clock import age, later, now
from .engine import Connected
from .rows import CHILD_COLUMNS, WORKER_COLUMNS, child_row, worker_row
from .schema import child, meta, worker

_ALIVE = sa.and_(worker.c.stopped_at.is_(None), worker.c.lost_at.is_(None))
_SECOND_OF_JITTER = 1.0


class WorkerWrites(Connected):
    """One row per boot of a worker's main process, or of a client process while it needs one."""

    def register(self, new: NewWorker) -> None:
        """Insert the worker's row; a second call with the same id changes nothing."""
        values = {name: getattr(new, name) for name in NewWorker.__slots__ if name != "host"}
        values.update(hostname=new.host.hostname, boot_id=new.host.boot_id, pid_namespace=new.host.pid_namespace)
        with self.write() as connection:
            known = connection.execute(sa.select(worker.c.id).where(worker.c.id == new.id)).one_or_none()
            if known is None:
                connection.execute(sa.insert(worker).values(**values, beat=0, beat_at=now(), started_at=now()))

    def beat(self, worker_id: uuid.UUID) -> bool:
        """One pulse: clears every suspicion and revives a worker lost by its lease. False if unknown."""
        with self.single() as connection:
            done = connection.execute(
                sa.update(worker)
                .where(worker.c.id == worker_id, worker.c.stopped_at.is_(None))
                .values(
                    beat=worker.c.beat + 1, beat_at=now(), suspected_beat=None, suspected_at=None,
                    lost_at=None, lost_by=None,
                )
            )  # fmt: skip
        return done.rowcount == 1

    def stop(self, worker_id: uuid.UUID) -> None:
        """The worker ends in order: its pool has joined."""
        with self.single() as connection:
            connection.execute(
                sa.update(worker)
                .where(worker.c.id == worker_id, worker.c.stopped_at.is_(None))
                .values(stopped_at=now())
            )

    def live_workers(self) -> list[WorkerRow]:
        """Workers that neither stopped nor were found lost."""
        with self.read() as connection:
            return [worker_row(row) for row in connection.execute(sa.select(*WORKER_COLUMNS).where(_ALIVE))]

    def workers(self, *, all: bool = False, limit: int = 1000) -> list[WorkerRow]:
        query = sa.select(*WORKER_COLUMNS).order_by(worker.c.started_at.desc()).limit(limit)
        if not all:
            query = query.where(_ALIVE)
        with self.read() as connection:
            return [worker_row(row) for row in connection.execute(query)]

    def knows_worker(self, worker_id: uuid.UUID) -> bool:
        """Whether the worker is this database's."""
        with self.read() as connection:
            found = connection.execute(sa.select(worker.c.id).where(worker.c.id == worker_id)).one_or_none()
        return found is not None

    def lose(self, worker_id: uuid.UUID, by: Detector, beat: int | None = None) -> bool:
        """Mark a worker as lost; with `beat`, only if it has not beaten since."""
        guard = [worker.c.id == worker_id, worker.c.lost_at.is_(None), worker.c.stopped_at.is_(None)]
        if beat is not None:
            guard.append(worker.c.beat == beat)
        with self.single() as connection:
            done = connection.execute(sa.update(worker).where(*guard).values(lost_at=now(), lost_by=by.value))
        return done.rowcount == 1

    # -- suspicion by lease ----------------------------------------------------------------------

    def suspect(self, *, anew: bool) -> None:
        """Stamp workers whose pulse is older than their lease. `anew` restarts every suspicion's clock."""
        stale = sa.and_(_ALIVE, worker.c.beat_at < later(-1.0 * worker.c.lease))
        unstamped = sa.or_(worker.c.suspected_beat.is_(None), worker.c.suspected_beat != worker.c.beat)
        stamped = sa.and_(_ALIVE, worker.c.suspected_at.is_not(None))
        condition = sa.or_(stale, stamped) if anew else sa.and_(stale, unstamped)
        with self.single() as connection:
            connection.execute(
                sa.update(worker).where(condition).values(suspected_beat=worker.c.beat, suspected_at=now())
            )

    def suspect_now(self, worker_id: uuid.UUID) -> None:
        """Stamp one worker at once: another was started under its node name."""
        with self.single() as connection:
            connection.execute(
                sa.update(worker)
                .where(worker.c.id == worker_id, _ALIVE, worker.c.suspected_beat.is_(None))
                .values(suspected_beat=worker.c.beat, suspected_at=now())
            )

    def confirmed_stale(self) -> list[WorkerRow]:
        """Workers suspected at least a lease ago that have not beaten since."""
        query = sa.select(*WORKER_COLUMNS).where(
            _ALIVE,
            worker.c.suspected_beat == worker.c.beat,
            age(worker.c.suspected_at) >= worker.c.lease - _SECOND_OF_JITTER,
            age(worker.c.beat_at) >= worker.c.lease,
        )
        with self.read() as connection:
            return [worker_row(row) for row in connection.execute(query)]

    def orphans(self) -> list[tuple[ChildRow, WorkerRow]]:
        """Running rows whose worker is stopped or lost, with that worker."""
        query = (
            sa.select(*CHILD_COLUMNS, *WORKER_COLUMNS)
            .join(worker, worker.c.id == child.c.worker_id)
            .where(
                child.c.status == Status.RUNNING.value,
                sa.or_(worker.c.stopped_at.is_not(None), worker.c.lost_at.is_not(None)),
            )
        )
        split = len(CHILD_COLUMNS)
        with self.read() as connection:
            return [(child_row(row[:split]), worker_row(row[split:])) for row in connection.execute(query)]

    # -- the sweep's own row ---------------------------------------------------------------------

    def sweep_overdue(self, interval: float) -> bool:
        """Whether nobody has swept for an interval."""
        query = sa.select(sa.or_(meta.c.swept_at.is_(None), age(meta.c.swept_at) >= interval))
        with self.read() as connection:
            return bool(connection.execute(query).scalar_one())

    def begin_sweep(self, by: str, interval: float) -> bool:
        """Note this sweep. True if lease verdicts may be passed in it: the last sweep was recent, and the
        database has not restarted since (after an outage, every pulse is stale)."""
        with self.write() as connection:
            started = self._server_started(connection)
            row = connection.execute(
                sa.select(meta.c.swept_at, meta.c.server_started_at, age(meta.c.swept_at).label("ago"))
                .with_for_update()
            ).one()  # fmt: skip
            connection.execute(sa.update(meta).values(swept_at=now(), swept_by=by[:255], server_started_at=started))
        recent = row.swept_at is not None and row.ago <= 2 * interval + _SECOND_OF_JITTER
        return recent and row.server_started_at == started

    def _server_started(self, connection: sa.Connection) -> datetime | None:
        if self.sqlite:
            return None
        return connection.execute(  # type: ignore[no-any-return, unused-ignore]
            sa.select(sa.func.pg_postmaster_start_time())
        ).scalar_one()
