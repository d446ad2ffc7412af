"""`--chaos-rounds=N` for longer chaos, `--chaos-seed=S` to see one round again."""

from __future__ import annotations

import random

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption("--chaos-rounds", type=int, default=1, help="rounds of random faults (default 1)")
    group.addoption("--chaos-seed", type=int, default=None, help="seed of the first round, for a replay")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" not in metafunc.fixturenames:
        return
    # Where the whole suite is run, this file is read after the command line.
    options = metafunc.config.option
    first = getattr(options, "chaos_seed", None)
    rounds = getattr(options, "chaos_rounds", 1)
    if first is None:
        first = random.SystemRandom().randrange(1_000_000)
    metafunc.parametrize("seed", range(first, first + rounds))
