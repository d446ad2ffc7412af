"""OpenTelemetry's instrumentation of Celery."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.neighbours.kit import Made, Neighbour


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbour]:
    scene = Neighbour(tmp_path_factory.mktemp("traced"), "opentelemetry")
    with scene.worker("--concurrency=1"):
        yield scene
    scene.close()


@pytest.fixture(scope="module")
def scripts(traced: Neighbour) -> Made:
    return traced.scripts(create=[], untraced=[], ordinary=[], unswept=[])  # a sweep of the others would send it


def test_children_belong_to_their_creators_trace_whoever_publishes_them(traced: Neighbour, scripts: Made) -> None:
    made = scripts["create"]
    traces = made["traces"]
    seen = traced.seen(made["batch"])
    assert {name: each["trace"] for name, each in seen.items()} == {
        "one": traces["one"], "second": traces["two"], "nested": traces["two"], "callback": traces["one"]
    }  # fmt: skip
    assert {name: each["customer"] for name, each in seen.items()} == {
        "one": "one", "second": "two", "nested": "two", "callback": "one"
    }  # fmt: skip
    assert made["published"][seen["one"]["parent"]] == traces["one"], "below a span of its sending, in that trace"
    assert made["published"][seen["nested"]["parent"]] == traces["two"]


def test_a_process_without_opentelemetry_sends_the_creators_trace(traced: Neighbour, scripts: Made) -> None:
    made = scripts["unswept"]
    assert made["published"] == {}
    traced.batchtrack.sweep()
    seen = traced.seen(made["batch"])
    assert seen["one"]["trace"] == seen["callback"]["trace"] == made["traces"]["one"]
    assert seen["second"]["trace"] == made["traces"]["two"]
    assert seen["one"]["customer"] == "one"
    assert seen["one"]["parent"] == made["traces"]["one span"], "no span of its sending is made there"


def test_children_of_no_trace_do_not_fall_into_the_trace_of_a_sweep(traced: Neighbour, scripts: Made) -> None:
    made = scripts["untraced"]
    seen = traced.seen(made["batch"])
    found = [each["trace"] for each in seen.values()]
    assert made["traces"]["other"] not in found
    assert len(set(found)) == len(found), "each has its own"
    assert {each["customer"] for each in seen.values()} == {None}


def test_what_the_creator_sends_itself_is_below_its_own_span(traced: Neighbour, scripts: Made) -> None:
    made = scripts["ordinary"]
    assert made["below"] == [True, True]
    batch = traced.batch(made["batch"])
    assert batch.wait(20) == "completed"
    assert [each["trace"] for each in batch.results()] == [made["traces"]["one"]]
