"""`make test` runs every test there is, in two halves."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests import __main__ as halves
from tests.helpers import ROOT


def test_every_folder_of_tests_is_in_one_half_of_the_suite() -> None:
    there = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert sorted(halves.COMPUTING + halves.WAITING) == sorted(there)
    assert "python -m tests\n" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("bad", ["", "computing", "waiting"])
def test_a_failure_in_either_half_fails_the_suite_and_no_signal_is_ignored(
    bad: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(halves, "COMPUTING", ("computing",))
    monkeypatch.setattr(halves, "WAITING", ("waiting",))

    def stand_in(folders: tuple[str, ...], *more: str) -> list[str]:
        return ["sh", "-c", f"grep SigIgn /proc/self/status; test {folders[0]} != '{bad}'"]

    monkeypatch.setattr(halves, "command", stand_in)
    assert bool(halves.main()) is bool(bad)
    ignored = [int(line.split()[1], 16) for line in capfd.readouterr().out.splitlines() if "SigIgn" in line]
    ours = int(subprocess.check_output(["grep", "SigIgn", "/proc/self/status"], text=True).split()[1], 16)
    quits = 1 << (signal.SIGQUIT - 1)
    assert [each & quits for each in ignored] == [ours & quits] * 2
