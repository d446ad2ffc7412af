"""The project that the README's section on Django describes, word for word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import urlsplit

from tests.helpers import ROOT, unique
from tests.nodes import ProcessWorker
from tests.unit.test_docs import blocks

#: What a test's machine needs beside the README's settings.
OURS = """
import logging
logging.getLogger("django.request").setLevel("CRITICAL")
ALLOWED_HOSTS = ["*"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
CELERY_BATCHTRACK_WAIT_POLL = 0.05
CELERY_BATCHTRACK_BLACKBOX_DIR = str(BASE_DIR / "boxes")
CELERY_BROKER_URL = f"batchtrack+filesystem://{BASE_DIR / 'broker'}"
"""


def readme_files() -> dict[str, str]:
    """By path, as the first line of each block says."""
    found = [each for each in blocks("python") if each.path.name == "README.md" and "tests/django" in each.remark]
    named = {re.match(r"# (\S+\.py)\n", each.code): each.code for each in found}
    assert None not in named, "each block of the section begins with the path of its file"
    return {match[1]: code for match, code in named.items() if match is not None}


class Project:
    """In a folder of its own; `url` is a PostgreSQL, or None for SQLite, as `startproject` has it."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder / "shop"
        self._python("-m", "django", "startproject", "shop", cwd=folder)
        self.manage("startapp", "uploads")
        for path, code in readme_files().items():
            self.write(path, code, append=path == "shop/settings.py")
        self.write("shop/settings.py", OURS + _database(url), append=True)

    def write(self, path: str, code: str, *, append: bool = False) -> None:
        file = self.folder / path
        file.write_text((file.read_text() if append else "") + textwrap.dedent(code))

    def settings(self, code: str) -> str:
        """A settings module of its own, which differs from the project's; its name."""
        name = unique("variant")
        self.write(f"shop/{name}.py", f"from shop.settings import *\n{textwrap.dedent(code)}")
        return f"shop.{name}"

    def manage(self, *args: str, code: int = 0, settings: str | None = None) -> str:
        """Output of ``manage.py …``, errors included."""
        return self._python("manage.py", *args, cwd=self.folder, code=code, settings=settings)

    def run(self, script: str, *, code: int = 0, settings: str | None = None) -> str:
        """Output of a script of the project."""
        name = f"{unique('script')}.py"
        self.write(name, f"import django\ndjango.setup()\nimport shop.celery\n{textwrap.dedent(script)}")
        return self._python(name, cwd=self.folder, code=code, settings=settings or "shop.settings")

    def worker(self) -> ProcessWorker:
        """``celery -A shop worker``, not started."""
        return ProcessWorker(
            "shop", "--without-mingle", "--without-gossip", folder=self.folder, cwd=self.folder,
            env={"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def _python(self, *args: str, cwd: Path, code: int = 0, settings: str | None = None) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("BATCHTRACK_")}
        environment.update(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
        environment.pop("DJANGO_SETTINGS_MODULE", None)
        if settings is not None:
            environment["DJANGO_SETTINGS_MODULE"] = settings
        done = subprocess.run(
            [sys.executable, *args], cwd=cwd, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{args[:2]}\n{done.stdout}"
        return done.stdout


def _database(url: str | None) -> str:
    if url is None:
        return ""
    parts = urlsplit(url)
    return f"""
DATABASES["default"].update(
    ENGINE="django.db.backends.postgresql", NAME={parts.path.lstrip("/")!r}, USER={parts.username!r},
    HOST={parts.hostname!r}, PORT={parts.port!r},
)
"""
