"""Flower as people start it: a process of each version that is supported, by its command or a flowerconfig.py."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError

from tests.flower.kit import Served
from tests.helpers import GuardedProcess, eventually, free_port
from tests.integration.cli_kit import Shell, shell_in
from tests.servers import ServiceMissing

NEWEST = "newest"
#: Of each: how it is started, its options, and whether it asks for a password.
VERSIONS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "2.0.1": ("command", (), False),
    "2.1.0": ("config", ("--url-prefix=ops", "--basic-auth=ann:pass"), True),
    NEWEST: ("command", (), False),
}
SHOP = '''
import os
import signal

from celery import Celery

from celery_batchtrack import BatchTrack, each_item, note, tracked

app = Celery("cli_shop", broker=os.environ["SHOP_BROKER"])
app.conf.update(
    batchtrack_database_url=os.environ["CLI_DATABASE_URL"], worker_send_task_events=True, task_ignore_result=True
)
BatchTrack(app)


@app.task(name="shop.parse", bind=True)
@tracked(items="docs", on_crash="record")
def parse(self, docs, language="en"):
    if docs == ["DOC-9"] and not self.request.retries:
        raise self.retry(countdown=0)
    for doc in each_item(docs):
        note(f"parsing {doc}")
        if doc == "DOC-13":
            os.kill(os.getpid(), signal.SIGSEGV)
        if doc == "DOC-7":
            raise ValueError("no text in DOC-7")
'''


def installed(version: str) -> Path | None:
    """A folder with that Flower for PYTHONPATH, kept beside the environment; None for the environment's own."""
    if version == NEWEST:
        return None
    folder = Path(sys.prefix) / f"flower-{version}"
    if not (folder / "flower" / "app.py").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, f"--target={folder}", f"flower=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ServiceMissing(f"Flower {version} cannot be installed: {done.stderr.strip()[-300:]}")
    return folder


def version_of(folder: Path | None) -> str:
    path = {} if folder is None else {"PYTHONPATH": str(folder)}
    code = "import flower; print(flower.__version__)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **path}, capture_output=True, text=True)
    return done.stdout.strip()


@dataclass
class Running:
    """A process, and how to ask it."""

    process: GuardedProcess
    site: Served
    database: str
    broker: Path
    shell: Shell
    port: int
    prefix: str = ""
    password: bool = False
    workers: list[GuardedProcess] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def answers(self) -> bool:
        if not self.process.alive:
            raise RuntimeError(f"Flower ended:\n{self.process.output()[-3000:]}")
        try:
            with urllib.request.urlopen(f"{self.url}/healthcheck", timeout=5) as answer:
                return bool(answer.status == 200)
        except HTTPError:
            raise
        except (URLError, OSError):
            return False

    def start_worker(self) -> None:
        log = self.process.log.with_name("worker.log")
        command = [sys.executable, "-m", "celery", "-A", "cli_shop", "worker", "-c", "1", "-E", "-l", "INFO"]
        worker = GuardedProcess(command, log=log, cwd=self.shell.folder, env=self.shell.env)
        worker.spawn()
        self.workers.append(worker)
        eventually(lambda: " ready." in worker.output(), 30, what=f"a worker: {worker.output()}")

    def close(self) -> None:
        for each in (*self.workers, self.process):
            each.end_group()


def start(version: str, folder: Path, database: str) -> Running:
    """Does not wait until it answers."""
    how, options, password = VERSIONS[version]
    shell = shell_in(folder, database, SHOP)
    shell.env.update(SHOP_BROKER=f"batchtrack+filesystem://{folder}/broker", FLOWER_UNAUTHENTICATED_API="true")
    own = installed(version)
    if own is not None:
        shell.env["PYTHONPATH"] = os.pathsep.join([str(own), shell.env["PYTHONPATH"]])
    port = free_port()
    more = [f"--port={port}", "--address=127.0.0.1", *options]
    if how == "config":
        (folder / "flowerconfig.py").write_text("import celery_batchtrack.flower_plugin\n")
        command = [sys.executable, "-m", "celery", "-A", "cli_shop", "flower", *more]
    else:
        command = [sys.executable, "-m", "celery", "-A", "cli_shop", "batchtrack", "flower", *more]
    process = GuardedProcess(command, log=folder / "flower.log", cwd=folder, env=shell.env)
    process.spawn()
    prefix = next((f"/{each.partition('=')[2]}" for each in options if each.startswith("--url-prefix")), "")
    site = Served(port, None, None, prefix)
    return Running(process, site, database, folder / "broker", shell, port, prefix, password)


__all__ = ["NEWEST", "VERSIONS", "Running", "installed", "start", "version_of"]
