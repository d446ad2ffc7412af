"""What is bound to the logs, by django-structlog."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.neighbours.kit import Made, Neighbour


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbour]:
    scene = Neighbour(tmp_path_factory.mktemp("logged"), "structlog")
    with scene.worker("--concurrency=1"):
        yield scene
    scene.close()


@pytest.fixture(scope="module")
def scripts(logged: Neighbour) -> Made:
    return logged.scripts(create=[], silent=[], ordinary=[])


def bound(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: each[key] for key in each if key != "task_id"} for name, each in seen.items()}


def test_children_log_with_their_creators_context_whoever_publishes_them(logged: Neighbour, scripts: Made) -> None:
    seen = bound(logged.seen(scripts["create"]["batch"]))
    one = {"user": "one", "only_one": "odd", "parent_task_id": "the parent"}
    assert seen["one"] == one
    assert seen["callback"] == one, "although a run of the other context published it"
    assert seen["second"] == seen["nested"] == {**one, "user": "two", "only_two": "odd"}


def test_nothing_of_a_sweep_is_in_the_logs_of_whom_it_publishes(logged: Neighbour, scripts: Made) -> None:
    seen = bound(logged.seen(scripts["silent"]["batch"]))
    assert seen["one"] == seen["callback"] == {}
    assert seen["second"]["user"] == "two"


def test_what_the_creator_sends_itself_is_as_ever(logged: Neighbour, scripts: Made) -> None:
    batch = logged.batch(scripts["ordinary"]["batch"])
    assert batch.wait(20) == "completed"
    (result,) = batch.results()
    assert result["user"] == "one"
