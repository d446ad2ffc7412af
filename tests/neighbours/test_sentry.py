"""Sentry's integration with Celery: traces, and errors told once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import eventually
from tests.neighbours.kit import Made, Neighbour


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbour]:
    folder = tmp_path_factory.mktemp("watched")
    scene = Neighbour(folder, "sentry")
    scene.more = {"SENTRY_EVENTS": str(folder / "events"), "SENTRY_RATE": "1"}
    with scene.worker("--concurrency=1"):
        yield scene
    scene.close()


@pytest.fixture(scope="module")
def scripts(watched: Neighbour) -> dict[str, Made]:
    """By the rate at which transactions are traced; "0" is without tracing."""
    return {
        "1": watched.scripts(create=[], uncaptured=[], ordinary=[]),
        "0": watched.scripts({"SENTRY_RATE": "0"}, create=[]),
    }


def events(watched: Neighbour) -> list[dict[str, Any]]:
    path = Path(watched.more["SENTRY_EVENTS"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("rate", ["1", "0"], ids=["tracing", "without tracing"])
def test_children_continue_their_creators_trace_whoever_publishes_them(
    watched: Neighbour, scripts: dict[str, Made], rate: str
) -> None:
    made = scripts[rate]["create"]
    traces = made["traces"]
    seen = watched.seen(made["batch"])
    assert {name: each["trace"] for name, each in seen.items()} == {
        "one": traces["one"], "second": traces["two"], "nested": traces["two"], "callback": traces["one"]
    }  # fmt: skip
    assert rate == "0" or seen["one"]["sampled"] is True
    assert made["users"] and set(made["users"]) == {None}, "a sweep's user has nothing to do with what it sends"


def test_children_of_no_trace_do_not_fall_into_the_trace_of_a_sweep(
    watched: Neighbour, scripts: dict[str, Made]
) -> None:
    made = scripts["1"]["uncaptured"]
    seen = watched.seen(made["batch"])
    assert made["traces"]["other"] not in [each["trace"] for each in seen.values()]


def test_errors_are_told_once_with_their_task_in_the_creators_trace(
    watched: Neighbour, scripts: dict[str, Made]
) -> None:
    made = scripts["1"]["ordinary"]
    batch = watched.batch(made["batch"])
    assert batch.wait(20) == "partial"
    trace = made["traces"]["one"]
    assert next(iter(batch.results()))["trace"] == trace
    child = list(batch.children())[1]

    def told() -> list[dict[str, Any]] | None:
        found = [each for each in events(watched) if each.get("exception")]
        return found if len(found) >= 2 else None

    found = eventually(told, what="both errors")
    assert [each["exception"]["values"][-1]["value"] for each in found] == ["on purpose"] * 2
    assert {each["contexts"]["trace"]["trace_id"] for each in found} == {trace}
    assert child.task_id in {each["tags"]["celery_task_id"] for each in found}
    sent = [each for each in events(watched) if each.get("type") == "transaction" and each["transaction"] == "one"]
    submits = [span for span in sent[-1]["spans"] if span["op"] == "queue.submit.celery"]
    assert {"watched.see", "watched.fail"} <= {span["description"] for span in submits}, "of the creator's own sending"
