"""What a message says of its batch, for Flower's Tasks tab."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_batchtrack import Batch, BatchTrack
from celery_batchtrack.glue.labels import labelled
from celery_batchtrack.vocabulary.ids import HEADER, ChildKey, Ticket, new_token, uuid7
from tests.helpers import unique


def sent(tmp_path: Path, **conf: Any) -> tuple[Batch, list[dict[str, Any]]]:
    """A batch of three children, and the messages that it and another task made: (headers, kwargs)."""
    app = Celery("labels", broker="memory://", set_as_current=False)
    app.conf.update(batchtrack_database_url=f"sqlite:///{tmp_path}/b.db", task_default_queue=unique(), **conf)
    BatchTrack(app)

    @app.task(name=unique("labels"))
    def work(number: int, **kwargs: Any) -> None: ...

    work.delay(9, colour="plain")
    hidden = work.s(3, password="secret").set(kwargsrepr="<hidden>", argsrepr="<hidden>")
    batch = Batch.create("labelled", [work.s(1), work.s(2, colour="red"), hidden], app=app)
    with app.connection() as connection, connection.SimpleQueue(app.conf.task_default_queue) as queue:
        messages = [queue.get(timeout=5) for _ in range(4)]
    return batch, [{"headers": each.headers, "kwargs": each.payload[1]} for each in messages]


def test_messages_name_their_batch_where_flower_looks_and_tasks_see_nothing_of_it(tmp_path: Path) -> None:
    batch, (other, *children) = sent(tmp_path)
    assert other["headers"]["kwargsrepr"] == "{'colour': 'plain'}"
    assert [each["kwargs"] for each in children] == [{}, {"colour": "red"}, {"password": "secret"}]
    shown = [each["headers"]["kwargsrepr"] for each in children]
    assert ast.literal_eval(shown[0]) == {"bt_batch": str(batch.id), "bt_child": 0}, "as Flower's search reads it"
    assert ast.literal_eval(shown[1]) == {"bt_batch": str(batch.id), "bt_child": 1, "colour": "red"}
    assert shown[2].endswith("} <hidden>") and "secret" not in shown[2] and str(batch.id) in shown[2]
    assert all(HEADER in each["headers"] for each in children)


def test_labels_can_be_switched_off(tmp_path: Path) -> None:
    _, messages = sent(tmp_path, batchtrack_flower_labels=False)
    shown = [each["headers"]["kwargsrepr"] for each in messages]
    assert shown == ["{'colour': 'plain'}", "{}", "{'colour': 'red'}", "<hidden>"]


@pytest.mark.parametrize("shown", [None, "", "{}", "{'a': 1}", "{'a': '...", "{...}", "[]"])
def test_a_label_comes_before_whatever_is_shown(shown: str | None) -> None:
    ticket = Ticket(new_token(), ChildKey(uuid7(), 7), 0)
    text = labelled(ticket, shown)
    assert text.startswith(f"{{'bt_batch': '{ticket.key.batch_id}', 'bt_child': 7")
    assert (shown or "{}").strip("{}") in text
