"""What the tests of celery-once and of celery-singleton have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import redis

from celery_batchtrack import Batch
from tests.acceptance.scene import Scene, environment

#: A message that is lost is sent again soon.
IMPATIENT = {"batchtrack_redispatch_after": 1.0, "batchtrack_detect_every": 0.5}


class Locked(Scene):
    """This process is a client of the application, too: neither package changes Celery for others."""

    def __init__(self, folder: Path, locks: str, broker: str | None = None, **conf: object) -> None:
        self.locks = locks
        super().__init__(
            folder, broker or f"batchtrack+filesystem://{folder / 'broker'}",
            f"sqlite:///{folder / 'batchtrack.db'}", "tests.neighbours.apps.once", **{**IMPATIENT, **conf},
        )  # fmt: skip

    def environment(self, **conf: object) -> dict[str, str]:
        return {**super().environment(**conf), "LOCKS_URL": self.locks}

    def held(self) -> list[str]:
        """Locks that are held."""
        with redis.Redis.from_url(self.locks) as client:
            return sorted(key.decode() for key in client.scan_iter("*"))

    def why(self, batch: Batch, position: int) -> str:
        """Why a child was not sent."""
        (incident,) = self.incidents(batch, position)
        assert incident.cause == "not_sent"
        return str(incident.message)


@contextlib.contextmanager
def locked(folder: Path, locks: str) -> Iterator[Locked]:
    scene = Locked(folder, locks)
    with environment({"LOCKS_URL": locks}), scene.worker():
        yield scene
    scene.close()
