"""One project on each database, for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.django.project import Project
from tests.servers import PostgresServer


@pytest.fixture(scope="package", params=["sqlite", "postgresql"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Made by the README, and migrated."""
    pytest.importorskip("django")
    folder = tmp_path_factory.mktemp("django")
    if request.param == "sqlite":
        made = Project(folder)
        _migrated(made)
        yield made
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.create_database()
    made = Project(folder, url)
    _migrated(made)
    yield made
    server.drop_database(url)


def _migrated(project: Project) -> None:
    commands = ('"makemigrations", "uploads"', '"migrate"')
    calls = "\n".join(f"call_command({command}, verbosity=0)" for command in commands)
    project.run(f"from django.core.management import call_command\n{calls}")


@pytest.fixture
def on_sqlite(project: Project, request: pytest.FixtureRequest) -> Project:
    """For what does not depend on the database."""
    if "postgresql" in request.node.name:
        pytest.skip("once is enough")
    return project
