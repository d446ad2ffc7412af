"""One short round of the benchmark, so that it does not rot. It prints figures; here only that it can."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.helpers import ROOT
from tests.servers import PostgresServer, RedisServer, require


def test_the_benchmark_runs_both_ways() -> None:
    for service in (PostgresServer, RedisServer):
        with require(service):
            pass
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--children", "60", "--rounds", "1", "--rows", "2000"],
        cwd=ROOT, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(re.findall(r"children/s", run.stdout)) == 2 + 4
    assert len(re.findall(r"  page ", run.stdout)) == 2 * 27
