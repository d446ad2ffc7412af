"""`--chaos-rounds=N` for longer chaos, `--chaos-seed=S` to see one round again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.scene import APP, Scene
from tests.helpers import unique

CONF = {
    "batchtrack_redispatch_after": 1.0,
    "batchtrack_redispatch_wait": 5.0,
    "batchtrack_detect_every": 0.5,
    "batchtrack_claim_timeout": 5.0,
    "worker_prefetch_multiplier": 2,
}


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


@pytest.fixture
def module() -> str:
    """Of the application; a test module may have another."""
    return APP


@pytest.fixture
def scene(seed: int, module: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """Even seeds: the embedded broker and SQLite. Odd ones: Redis and PostgreSQL."""
    if seed % 2 == 0:
        broker, database = f"batchtrack+filesystem://{tmp_path / 'broker'}", f"sqlite:///{tmp_path / 'batchtrack.db'}"
        scene = Scene(tmp_path, broker, database, module, **CONF)
    else:
        redis, database = request.getfixturevalue("redis_server"), request.getfixturevalue("postgres_url")
        scene = Scene(tmp_path, redis.url, database, module, task_default_queue=unique("queue"), **CONF)
    yield scene
    scene.close()
