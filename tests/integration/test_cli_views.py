"""The views from the command line: their queries and rows, what runs, what is stuck, who has what item."""

from __future__ import annotations

import json

import sqlalchemy as sa
from celery import Celery

from celery_batchtrack.store.view_examples import EXAMPLES, examples_of
from celery_batchtrack.store.views import VIEWS
from celery_batchtrack.vocabulary.ids import ChildKey, new_token
from tests.helpers import free_port
from tests.integration.cli_kit import ESCAPES, HOSTILE, Run, Seeds, invoke, make_app


def test_every_view_is_listed_and_its_query_and_examples_run(seeds: Seeds, text: Run, data: Run) -> None:
    batch_id = str(seeds.ended())
    lines = text("sql").splitlines()
    assert [line.split()[0] for line in lines[1:]] == [view.relation for view in VIEWS.values()]
    assert set(EXAMPLES) == set(VIEWS)
    listed = data("sql")
    for name, view in VIEWS.items():
        [whole] = data("sql", name)
        assert whole["columns"] == list(view.columns) and view.relation in [each["name"] for each in listed]
        assert [each["query"] for each in whole["examples"]] == [
            each for _, each in examples_of(name, sqlite=seeds.store.sqlite)
        ]
        said = text("sql", view.relation)
        assert said.startswith(f"-- {view.relation}: {view.summary}\n")
        with seeds.store.read() as connection:
            for query in (whole["query"], *(each["query"] for each in whole["examples"])):
                assert query.strip() in said
                connection.execute(sa.text(query.replace(":", "\\:"))).all()
        rows = data("sql", name, "--run", "-n", 5)
        assert all(set(row) == set(view.columns) for row in rows)
    assert [row["signal"] for row in data("sql", "crash", "--run", "--batch", batch_id)] == ["SIGSEGV"]
    assert "SIGSEGV" in text("sql", "crash", "--run", "--batch", batch_id)


def test_sql_needs_no_database_and_says_what_there_is() -> None:
    app = make_app(f"postgresql://127.0.0.1:{free_port()}/x")
    assert "FROM batchtrack_incident" in invoke(app, "sql", "crash").stdout
    assert "there are batch_progress, crash" in invoke(app, "sql", "crashs", code=2).stderr
    assert "is not by batch" in invoke(app, "sql", "invariant", "--run", "--batch", "7", code=2).stderr
    for wrong in (["--run"], ["crash", "--batch", "7"]):
        invoke(app, "sql", *wrong, code=2)
    invoke(app, "sql", "crash", "--run", code=69)


def test_running_shows_who_has_what_in_hand(seeds: Seeds, text: Run, data: Run) -> None:
    assert text("running") == "nothing runs\n"
    worker, first, second = seeds.worker(), seeds.batch(HOSTILE.replace("\0", "")), seeds.batch("second")
    seeds.run(first, 0, worker)
    seeds.run(second, 1, worker)
    assert [(each["batch_id"], each["position"]) for each in data("running")] == [(str(first), 0), (str(second), 1)]
    [row] = data("running", "--batch", second)
    assert (row["items"], row["worker"], row["worker_state"]) == (["PMC:1", "DOI:1"], "w1@here", "alive")
    assert data("running", "--longer-than", "1h") == []
    said = text("running")
    assert "PMC:1, DOI:1" in said and "w1@here" in said and not set(ESCAPES) & set(said)
    [told] = data("workers")
    pool_process = seeds.batch("in a pool process")
    seeds.store.claim(ChildKey(pool_process, 0), 0, new_token(), worker, "977:1:0:0")
    said = text("running", "--batch", pool_process).splitlines()[1]
    assert " 977 " in said and " 4242 " not in said
    assert (told["running"], told["crashes_24h"]) == (2, 0) and "RUNNING" in text("workers")


def test_stuck_batches_are_told_with_exit_code_1(seeds: Seeds, text: Run, data: Run, app: Celery) -> None:
    assert text("stuck") == "nothing is stuck\n"
    batch_id = seeds.batch("invoices")
    seeds.store.pause(batch_id, "by hand")
    [row] = data("stuck", code=1)
    assert (row["batch_id"], row["name"]) == (str(batch_id), "invoices")
    assert "invoices" in text("stuck", code=1)
    assert json.loads(invoke(app, "list", "--since", "1h", "--json").stdout)
    assert data("list", "--since", "0s") == []


def test_children_are_found_by_their_item(seeds: Seeds, data: Run, app: Celery) -> None:
    batch_id = seeds.batch(children=700)
    assert [each["position"] for each in data("children", batch_id, "--item", "DOI:699")] == [699]
    assert data("children", batch_id, "--item", "DOI:699", "--status", "completed") == []
    assert data("children", batch_id, "--item", "DOI") == []
    invoke(app, "children", batch_id, "--item", "DOI:1", "--callbacks", code=2)
