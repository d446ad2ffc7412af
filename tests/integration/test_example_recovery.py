"""The annotations example with killing documents at unknown places: who is crashed, who is stored, and how many died.

The documents are the demo's, the paragraphs of Python's own manual; with real ones where ``ANNOTATIONS_SAMPLE`` names
a JSONL file of annotated documents.
"""

from __future__ import annotations

import json
import math
import os
import random
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.annotations import demo
from tests.helpers import ROOT

DEPTH = 100_000


@dataclass
class Upload:
    """A run of the command."""

    report: dict[str, Any]
    incidents: list[tuple[str, str, str, str]]  # outcome, signal, item, stack
    stored: int
    killers: list[str]

    @property
    def crashed(self) -> list[str]:
        return sorted(name(document) for document in self.report["crashed"])


def name(document: dict[str, Any]) -> str:
    parts = (document["sourcedb"], document["sourceid"], document.get("divid"))
    return ":".join(str(part) for part in parts if part is not None)


def sample(folder: Path) -> list[str]:
    given = os.environ.get("ANNOTATIONS_SAMPLE")
    if given:
        return Path(given).read_text().splitlines()
    demo.write_sample(folder / "sample.jsonl")
    lines = (folder / "sample.jsonl").read_text().splitlines()
    return [line for at, line in enumerate(lines) if at not in (*demo.KILLERS, demo.OUT_OF_TEXT)]


def deadly(line: str) -> str:
    document = json.loads(line)
    document.pop("attributes", None)
    deep = "[" * DEPTH + "]" * DEPTH
    return f'{{"attributes": [{{"id": "A1", "subj": "T1", "pred": "deep", "obj": {deep}}}], {json.dumps(document)[1:]}'


def upload(folder: Path, *, seed: int, killers: int, batch_size: int, on_crash: str) -> Upload:
    lines = sample(folder)
    places = random.Random(seed).sample(range(len(lines)), killers)
    names = sorted(name(json.loads(lines[at])) for at in places)
    for at in places:
        lines[at] = deadly(lines[at])
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    command = [
        sys.executable, "-m", "examples.annotations", str(folder / "in.jsonl"), "--output", str(folder / "out.db"),
        "--batch-size", str(batch_size), "--on-crash", on_crash, "--json", str(folder / "report.json"),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    with sqlite3.connect(folder / "batchtrack.db") as tracking, sqlite3.connect(folder / "out.db") as output:
        incidents = tracking.execute("SELECT outcome, signal, item, stack FROM batchtrack_incident").fetchall()
        stored = output.execute("SELECT count(*) FROM annotations_document WHERE status = 'stored'").fetchone()[0]
    return Upload(json.loads((folder / "report.json").read_text()), incidents, stored, names)


@pytest.mark.parametrize(("seed", "killers", "batch_size"), [(1, 5, 10), (2, 3, 60), (3, 2, 237)])
@pytest.mark.parametrize("on_crash", ["skip", "bisect", "resume"])
def test_exactly_the_killing_documents_are_crashed_and_all_others_stored(
    tmp_path: Path, on_crash: str, seed: int, killers: int, batch_size: int
) -> None:
    found = upload(tmp_path, seed=seed, killers=killers, batch_size=batch_size, on_crash=on_crash)
    documents = found.report["documents"]
    assert found.crashed == found.killers
    assert documents["crashed"] == killers
    assert documents["stored"] == documents["total"] - killers - documents["invalid"] == found.stored
    bound = killers * (math.ceil(math.log2(batch_size)) + 1) if on_crash == "bisect" else killers
    assert len(found.incidents) <= bound
    assert len(found.incidents) == killers or on_crash == "bisect", "one death for each killer"
    assert {item for _, _, item, _ in found.incidents} == set(found.killers)
    for _, signal, _, stack in found.incidents:
        assert signal == "SIGSEGV"
        assert " in store_documents\n" in stack, "the stack names the application's function"
