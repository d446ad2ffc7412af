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
    # The last one is for the test to send; a sweep of the others would do it.
    return traced.scripts(create=[], untraced=[], ordinary=[], told=[], silent=[], unswept=[])


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


def test_the_span_of_a_run_says_of_what_batch_it_is_and_links_to_its_creator(traced: Neighbour, scripts: Made) -> None:
    made = scripts["create"]
    seen = traced.seen(made["batch"])
    assert seen["one"]["batchtrack"] == {
        "batchtrack.batch_id": made["batch"], "batchtrack.position": 0, "batchtrack.attempt": 1,
        "batchtrack.kind": "child",
    }  # fmt: skip
    assert seen["callback"]["batchtrack"]["batchtrack.kind"] == "on_success"
    creator = made["traces"]["one span"]
    assert {name: each["links"] for name, each in seen.items() if name != "nested"} == {
        "one": [creator], "second": [creator], "callback": [creator]
    }, "also a child that was added in another trace"  # fmt: skip
    assert seen["nested"]["links"] == [made["traces"]["two span"]], "its batch is that child's"
    untraced = traced.seen(scripts["untraced"]["batch"])
    assert [each["links"] for each in untraced.values()] == [[]] * 4


def test_a_death_and_the_end_of_a_batch_are_spans_in_its_creators_trace_whoever_notices(scripts: Made) -> None:
    made = scripts["told"]
    crash, batch = made["spans"]
    where = {"trace": made["traces"]["one"], "parent": made["traces"]["one span"], "forwards": True}
    assert crash.items() >= {**where, "name": "crash/traced.see", "status": "ERROR"}.items()
    assert crash["attributes"].items() >= {
        "batchtrack.batch_id": made["batch"], "batchtrack.position": 0, "batchtrack.attempt": 1,
        "batchtrack.cause": "worker_lost", "batchtrack.detected_by": "host", "batchtrack.runs_again": False,
        "error.type": "worker_lost", "celery.task_name": "traced.see", "process.pid": 2**22 + 1,
    }.items()  # fmt: skip
    assert crash["events"]["exception"]["exception.type"] == "worker_lost"
    assert batch.items() >= {**where, "name": "batch/told", "status": "UNSET"}.items()
    assert batch["attributes"].items() >= {
        "batchtrack.status": "cancelled", "batchtrack.reason": "user", "batchtrack.children.total": 2,
        "batchtrack.children.crashed": 1, "batchtrack.children.cancelled": 1, "batchtrack.round": 1,
    }.items()  # fmt: skip
    assert scripts["silent"]["spans"] == [], "batchtrack_otel = False"
