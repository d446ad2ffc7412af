"""Fixtures of the tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from celery_batchtrack import BatchTrack
from tests.integration.cli_kit import Run, Seeds, Shell, invoke, make_app, shell_in


@pytest.fixture
def app(tables: None, database_url: str) -> Iterator[Celery]:
    app = make_app(database_url)
    yield app
    BatchTrack.of(app).reset()


@pytest.fixture
def seeds(app: Celery) -> Seeds:
    return Seeds(BatchTrack.of(app).store)


@pytest.fixture
def text(app: Celery) -> Run:
    return lambda *args, code=0: invoke(app, *args, code=code).stdout


@pytest.fixture
def data(app: Celery) -> Run:
    return lambda *args, code=0: json.loads(invoke(app, *args, "--json", code=code).stdout)


@pytest.fixture
def shell(app: Celery, database_url: str, tmp_path: Path) -> Shell:
    """On the same database as `app`."""
    return shell_in(tmp_path, BatchTrack.of(app).store.url.render_as_string(hide_password=False))
