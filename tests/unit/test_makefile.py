"""`make test` runs every test there is, once, in several processes that share them out."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import __main__ as suite
from tests.helpers import ROOT


def test_every_process_of_the_suite_knows_every_folder_of_tests() -> None:
    there = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert all(sorted(order) == sorted(there) for order in suite.ORDERS)
    assert "python -m tests\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("bad", ["", "first", "second", "third"])
def test_a_failure_in_any_process_fails_the_suite_and_no_signal_is_ignored(
    bad: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "ORDERS", (("first",), ("second",), ("third",)))

    def stand_in(order: tuple[str, ...], share: Path, *more: str) -> list[str]:
        return ["sh", "-c", f"grep SigIgn /proc/self/status; test -d '{share}' && test {order[0]} != '{bad}'"]

    monkeypatch.setattr(suite, "command", stand_in)
    assert bool(suite.main()) is bool(bad)
    ignored = [int(line.split()[1], 16) for line in capfd.readouterr().out.splitlines() if "SigIgn" in line]
    ours = int(subprocess.check_output(["grep", "SigIgn", "/proc/self/status"], text=True).split()[1], 16)
    quits = 1 << (signal.SIGQUIT - 1)
    assert [each & quits for each in ignored] == [ours & quits] * 3


MODULE = """
import pytest
from pathlib import Path

def told(line):
    with (Path(__file__).parents[1] / "told").open("a") as file:
        file.write(line + "\\n")

@pytest.fixture(scope="module")
def made():
    told(f"{__name__} makes")
    yield
    told(f"{__name__} clears away")

@pytest.mark.parametrize("at", range(3))
def test_it(made, at):
    told(f"{__name__} {at}")
"""


def files_of_tests(folder: Path) -> list[str]:
    names = {f"test_{group}_{at}": folder / "tests" / group for group in ("one", "two") for at in range(6)}
    for name, place in names.items():
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.py").write_text(MODULE)
    (folder / "share").mkdir()
    return list(names)


def start(folder: Path, *order: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        suite.command(order, folder / "share", "-p", "no:cacheprovider"),
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ran(folder: Path, name: str) -> list[str]:
    told = (folder / "tests" / "told").read_text().splitlines()
    return [line.removeprefix(f"{name} ") for line in told if line.split()[0] == name]


ONCE = ["makes", "0", "1", "2", "clears away"]


def test_processes_that_share_tests_run_each_file_once_between_them(tmp_path: Path) -> None:
    names = files_of_tests(tmp_path)
    runs = [start(tmp_path, "one", "two"), start(tmp_path, "two", "one")]
    said = [each.communicate()[0] for each in runs]
    assert [each.returncode for each in runs] == [0, 0], said
    assert {name: ran(tmp_path, name) for name in names} == dict.fromkeys(names, ONCE)


def test_a_file_that_another_process_took_is_left_to_it_and_nothing_around_it_is_disturbed(tmp_path: Path) -> None:
    """The last file of a folder: what its tests share is over before those of the next folder begin."""
    names = files_of_tests(tmp_path)
    (tmp_path / "share" / "tests.one.test_one_5.py").touch()
    run = start(tmp_path, "one", "two")
    said = run.communicate()[0]
    assert run.returncode == 0, said
    assert {name: ran(tmp_path, name) for name in names} == {**dict.fromkeys(names, ONCE), "test_one_5": []}
