"""Every command of ours that the documentation names is run as it is written, on a copy of the scene of `docs_scene`.

``ID``, and the beginnings of ids that stand for one, are the batch `articles`; the child that a dossier is asked of is
#0.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_batchtrack.store import Store
from tests.integration.cli_kit import invoke, make_app
from tests.unit.docs_scene import DocsScene
from tests.unit.test_docs import everything

#: What is not run here, and where it is.
ELSEWHERE = {
    "flower": "tests/flower",
    "metrics": "tests/integration/test_metrics.py",
    "doctor": "a console block",
    "watch": "tests/integration/test_cli_watch.py: the scene's batches never end",
    "drain": "tests/integration/test_cli_life.py: the scene's batches never end",
    "detect --every": "tests/integration/test_cli.py: it does not end",
    "retry": "tests/integration/test_cli_life.py: it needs the tasks, and an ended batch",
    "repro": "tests/integration/test_cli_repro.py: its script imports the application",
    "quarantine release": "tests/integration/test_cli_crashes.py: nothing is in quarantine here",
}
#: 1: there is something stuck.
CODES = {"stuck": 1}


def commands() -> list[str]:
    text = re.sub(r"^```console\n.*?^```$", "", everything(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"celery -A [\w.]+ batchtrack ([a-z][^`\n#&|<]*)", text)
    return sorted({each.strip().rstrip(",.;:)") for each in found})


def is_elsewhere(command: str) -> bool:
    words = command.split()
    for each in ELSEWHERE:
        name, *more = each.split()
        if words[0] == name and all(word in words for word in more):
            return True
    return False


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    path = tmp_path_factory.mktemp("commands") / "batchtrack.db"
    scene = DocsScene(Store(f"sqlite:///{path}"))
    scene.store.dispose()
    yield path, str(scene.articles)


def test_every_command_that_is_named_runs(
    scene: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, batch_id = scene
    ran = 0
    for number, command in enumerate(each for each in commands() if not is_elsewhere(each)):
        copy = tmp_path / f"{number}.db"
        shutil.copy(path, copy)
        text = re.sub(r"\bID\b|\b019a3f\w*", batch_id, command)
        text = re.sub(r"^(stack \S+) 4\b", r"\1 0", text)
        try:
            invoke(make_app(f"sqlite:///{copy}"), *shlex.split(text), code=CODES.get(text.split()[0], 0))
        except AssertionError as error:
            raise AssertionError(f"batchtrack {command}: {error}") from error
        ran += 1
    assert ran > 15


def test_what_is_run_elsewhere_is_named_somewhere() -> None:
    named = commands()
    for each in ELSEWHERE:
        assert any(command.startswith(each.split()[0]) for command in named), each
