"""Applications with other people's packages, each in processes of its own: some can be set up only once in a process,
and most change Celery for the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from celery_batchtrack import Batch
from tests.acceptance.scene import Scene
from tests.helpers import ROOT

#: What scripts gave, by step.
Made = dict[str, Any]


class Neighbour(Scene):
    """This process is a client of `plain`, on the same broker and database as the application `module`.

    Nobody sweeps but who is told to.
    """

    def __init__(self, folder: Path, module: str, broker: str = "", database: str = "", **conf: Any) -> None:
        super().__init__(
            folder, broker or f"batchtrack+filesystem://{folder / 'broker'}",
            database or f"sqlite:///{folder / 'batchtrack.db'}", "tests.neighbours.apps.plain",
            **{"batchtrack_detect_every": 60.0, **conf},
        )  # fmt: skip
        self.module = f"tests.neighbours.apps.{module}"
        self.more: dict[str, str] = {}

    def environment(self, **conf: Any) -> dict[str, str]:
        return {**super().environment(**conf), **getattr(self, "more", {})}

    def scripts(self, env: Mapping[str, str] | None = None, **steps: Sequence[Any]) -> Made:
        """What steps of the application give, run one after another as a script; each with its arguments."""
        done = subprocess.run(
            [sys.executable, "-m", self.module, json.dumps(steps)], cwd=ROOT, timeout=60, capture_output=True,
            text=True, env=self._plain_environment(env or {}),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        made: Made = json.loads(done.stdout.splitlines()[-1])
        return made

    def _plain_environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), **self.environment(), **more}

    def batch(self, batch_id: str) -> Batch:
        return Batch.get(batch_id, app=self.app)

    def seen(self, batch_id: str, timeout: float = 30.0) -> dict[str, Any]:
        """What each task of `filled` saw of its context, by what it was called with."""
        batch = self.batch(batch_id)
        assert batch.wait(timeout, callbacks=True) == "completed", batch.report().as_dict()
        one, second, (nested, _) = batch.results()
        (callback,) = batch.children(kind="callbacks")
        return {"one": one, "second": second, "nested": nested, "callback": callback.result}
