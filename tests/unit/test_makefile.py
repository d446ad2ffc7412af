"""`make test` runs every test there is, in two halves."""

from __future__ import annotations

import re

from tests.helpers import ROOT


def test_every_folder_of_tests_is_in_one_half_of_the_suite() -> None:
    halves = re.findall(r"^(?:COMPUTING|WAITING) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [folder for half in halves for folder in half.split()]
    there = {f"tests/{path.relative_to(ROOT / 'tests').parts[0]}" for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(halves) == 2 and sorted(named) == sorted(there)
