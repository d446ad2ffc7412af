"""The same worker in a container, where there is a Docker engine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.helpers import ROOT
from tests.nodes import ProcessWorker

#: Built from this file's folder with the project's own checkout mounted; rebuilt from Docker's cache.
DOCKERFILE = """
FROM python:3.11-slim
RUN pip install --no-cache-dir "celery>=5.5" "sqlalchemy>=2.0.30" alembic "psycopg[binary,pool]" redis pydantic
"""
IMAGE = "celery-batchtrack-test-worker"


class DockerWorker(ProcessWorker):
    """Runs another worker's command in a container, on the host's network and at the same paths.

    `docker run` stays in the foreground: it passes on SIGTERM and SIGQUIT, and its end is the container's.
    SIGKILL would only end the client, so `stop` ends the container by its name.
    """

    def __init__(self, worker: ProcessWorker, folder: Path) -> None:
        subprocess.run(["docker", "build", "--tag", IMAGE, "-"], input=DOCKERFILE.encode(), check=True, timeout=600)
        process = worker._process
        given = {key: value for key, value in (process.env or {}).items() if os.environ.get(key) != value}
        environment = [part for key, value in given.items() for part in ("--env", f"{key}={value}")]
        mounts = [part for path in (ROOT, folder) for part in ("--volume", f"{path}:{path}")]
        process.command = [
            "docker", "run", "--rm", "--init", "--network", "host", "--name", worker.name,
            "--user", f"{os.getuid()}:{os.getgid()}", "--workdir", str(ROOT), *mounts, *environment,
            IMAGE, "python", *process.command[1:],
        ]  # fmt: skip
        self.name, self._process, self._log_start = worker.name, process, 0

    def kill(self) -> None:
        self.stop()

    def stop(self) -> None:
        subprocess.run(["docker", "rm", "--force", self.name], capture_output=True, timeout=60)
        super().stop()
