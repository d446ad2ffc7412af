"""Who is asking: one boot of a worker's main process, or a client process."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.records import HostIdentity, NewWorker
from celery_batchtrack.vocabulary.states import Cause, Detector

from . import hosts
from .blackbox import slot_process


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Stays the same for all processes of one worker boot."""

    name: str
    kind: str = "worker"
    pool: str = "prefork"
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    host: HostIdentity = field(default_factory=hosts.identity)
    pid: int = field(default_factory=os.getpid)
    pid_started: int | None = field(default_factory=lambda: hosts.started(os.getpid()))
    #: Of what runs here, for evidence.
    versions: Mapping[str, str] = field(default_factory=dict)

    def as_new_worker(self, lease: float, version: str) -> NewWorker:
        return NewWorker(
            self.id, self.kind, self.name[:255], self.host, self.pid, self.pid_started, self.pool[:32], lease, version
        )

    def evidence(self, cause: Cause, slot: str | None, detector: Detector | None, **known: object) -> Evidence:
        """Evidence of a run in one of this worker's slots."""
        pid = slot_process(slot)[0] if slot else self.pid
        return Evidence(
            cause,
            hostname=self.host.hostname,
            boot_id=self.host.boot_id,
            worker=self.name,
            worker_id=self.id,
            versions=self.versions or None,
            pid=pid,
            detected_by=detector,
            **known,  # type: ignore[arg-type]
        )
