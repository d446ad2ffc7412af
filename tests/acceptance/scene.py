"""One application, seen from both sides: workers as processes, and this process as its client."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from celery_batchtrack import Batch
from celery_batchtrack.glue.extension import BatchTrack
from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.records import Violation, WorkerRow
from tests.helpers import eventually, unique
from tests.nodes import ProcessWorker

APP = "tests.acceptance.apps.crashes"

#: Everything that takes seconds in production, in tenths.
QUICK = {
    "batchtrack_wait_poll": 0.05,
    "batchtrack_retry_backoff": 0.05,
    "batchtrack_heartbeat": 0.5,
    "batchtrack_lease": 30,
    "batchtrack_detect_every": 1.0,
}


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def load(module: str, values: Mapping[str, str]) -> ModuleType:
    """A copy of its own of a module that reads its environment when it is imported."""
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(unique("scene"), found.origin)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with environment(values):
        spec.loader.exec_module(made)
    return made


class Scene:
    """Workers and a client of one application (`module`) on one broker and one database.

    `here` is the client's copy of that module: `scene.here.tasks.early.s(…)`. `conf` goes to both sides.
    """

    def __init__(self, folder: Path, broker: str, database: str, module: str = APP, **conf: Any) -> None:
        self.folder, self.broker, self.module = folder, broker, module
        self.conf = {
            "batchtrack_database_url": database,
            "batchtrack_auto_migrate": True,
            "batchtrack_blackbox_dir": str(folder / "boxes"),
            **QUICK,
            **conf,
        }
        self.here = load(module, self.environment())
        self.app = self.here.app
        self.batchtrack: BatchTrack = self.app.batchtrack
        self.batchtrack.migrate()

    @property
    def tasks(self) -> Any:
        return self.here.tasks

    def environment(self, **conf: Any) -> dict[str, str]:
        return {
            "BATCHTRACK_TEST_BROKER_URL": self.broker,
            "BATCHTRACK_TEST_CONF": json.dumps({**self.conf, **conf}),
        }

    def worker(
        self, *args: str, name: str | None = None, env: Mapping[str, str] | None = None, **conf: Any
    ) -> ProcessWorker:
        """A worker of this application, not started. `conf` differs from the client's."""
        folder = self.folder / unique("node")
        folder.mkdir()
        # Nobody but us to hear of: a second less at each start.
        quiet = () if name else ("--without-mingle", "--without-gossip")
        return ProcessWorker(
            self.module, *quiet, *args, folder=folder, env={**self.environment(**conf), **(env or {})}, name=name
        )

    def place(self, name: str) -> str:
        """Where a task notes its runs."""
        (self.folder / "places").mkdir(exist_ok=True)
        return str(self.folder / "places" / name)

    def lines(self, name: str) -> list[str]:
        path = Path(self.place(name))
        return path.read_text().splitlines() if path.exists() else []

    def go(self, *names: str) -> None:
        """Let tasks that wait at these places go on."""
        for name in names:
            Path(f"{self.place(name)}.go").touch()

    def wait_met(self, *names: str, timeout: float = 20.0) -> None:
        """Until a task is at each of these places."""
        for name in names:
            eventually(lambda name=name: self.lines(name), timeout, what=f"a task at {name}")

    def start(self, *children: Any, name: str = "batch", **options: Any) -> Batch:
        options.setdefault("tolerance", "100%")
        return Batch.create(name, children, app=self.app, **options)

    def run(self, *children: Any, timeout: float = 60.0, **options: Any) -> Batch:
        """A batch that has ended, and so have its callbacks."""
        batch = self.start(*children, **options)
        batch.wait(timeout, callbacks=True)
        return batch

    def statuses(self, batch: Batch) -> list[str]:
        return [child.status for child in batch.children()]

    def eventually_statuses(self, batch: Batch, *wanted: str, timeout: float = 20.0) -> None:
        eventually(lambda: self.statuses(batch) == list(wanted) or None, timeout, what=f"children {wanted}")

    def incidents(self, batch: Batch, position: int) -> list[IncidentRow]:
        return [each for each in batch.incidents() if each.position == position]

    def starts(self, batch: Batch) -> dict[str, int]:
        """How often each callback was claimed."""
        return {row.kind: row.attempt for row in batch._callback_rows()}

    def workers(self, kind: str = "worker") -> list[WorkerRow]:
        return [row for row in self.batchtrack.store.workers(all=True) if row.kind == kind]

    def violations(self) -> list[Violation]:
        return [each for each in self.batchtrack.store.verify(5.0) if each.violations]

    def close(self) -> None:
        self.batchtrack.reset()


def embedded(folder: Path, **conf: Any) -> Scene:
    return Scene(
        folder, f"batchtrack+filesystem://{folder / 'broker'}", f"sqlite:///{folder / 'batchtrack.db'}", **conf
    )


def beats(scene: Scene, count: int, of: Callable[[WorkerRow], bool] = lambda row: True) -> None:
    """Wait until each of these workers has beaten so often again."""
    goal = {row.id: row.beat + count for row in scene.workers() if of(row)}
    eventually(
        lambda: all(row.beat >= goal[row.id] for row in scene.workers() if row.id in goal),
        30,
        what=f"{count} beats of {len(goal)} workers",
    )
