"""States and transitions, tolerance, ids: decisions without I/O."""

from __future__ import annotations

import uuid

import pytest

from celery_batchtrack import errors
from celery_batchtrack.vocabulary import states
from celery_batchtrack.vocabulary.ids import ChildKey, Ticket, uuid7
from celery_batchtrack.vocabulary.policies import Tolerance, outcome
from celery_batchtrack.vocabulary.states import BatchStatus, Status

# -- states ----------------------------------------------------------------------------------------


def test_every_status_is_open_settled_or_split() -> None:
    assert {*states.OPEN, *states.SETTLED, Status.SPLIT} == set(Status)
    assert {*states.BATCH_ALIVE, *states.BATCH_ENDED} == set(BatchStatus)


def test_settled_stays_settled_but_for_the_overturn_of_a_suspicion() -> None:
    for transition in states.TRANSITIONS:
        settled = set(transition.sources) & set(states.SETTLED)
        assert settled == ({Status.CRASHED} if transition.name.startswith("overturn") else set()), transition


def test_every_open_status_has_a_way_to_every_end() -> None:
    reached = {Status.PENDING}
    while more := {t.target for t in states.TRANSITIONS if set(t.sources) & reached} - reached:
        reached |= more
    assert reached == set(Status)
    assert {t.target for t in states.TRANSITIONS if Status.PENDING in t.sources} >= {
        Status.CRASHED, Status.FAILED, Status.CANCELLED,
    }, "a pending row may settle without ever running"  # fmt: skip


def test_actions_have_names_of_their_own_and_every_one_is_listed() -> None:
    names = [each.name for each in states.TRANSITIONS]
    assert len(names) == len(set(names))
    declared = [each for each in vars(states).values() if isinstance(each, states.Transition)]
    assert set(declared) == set(states.TRANSITIONS)


# -- tolerance and outcome -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerance", "total", "allowed"),
    [
        (0, 10, 0), (3, 10, 3), (20, 10, 10), ("0%", 10, 0), ("100%", 10, 10),
        ("2%", 50, 1), ("2%", 49, 0), ("2%", 99, 1), ("2%", 100, 2),
        ("29%", 100, 29), ("57%", 100, 57), ("0.1%", 1000, 1), ("0.1%", 999, 0),
        ("33.3333%", 3_000_000, 999_999), ("33.3334%", 3_000_000, 1_000_002), ("0.0001%", 1_000_000, 1),
        (" 2.5 % ", 40, 1), ("2.5%", 39, 0), ("7%", 100, 7), ("1.1%", 1000, 11),
    ],
)  # fmt: skip
def test_a_tolerance_is_inclusive_and_a_percentage_rounds_down(tolerance: int | str, total: int, allowed: int) -> None:
    parsed = Tolerance.parse(tolerance)
    assert parsed.allows(allowed, total)
    assert allowed >= total or not parsed.allows(allowed + 1, total)


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "2", "101%", "-1%", "%", "two", [], "1e3%", "nan%"])
def test_what_is_no_tolerance_is_refused(value: object) -> None:
    with pytest.raises(errors.InvalidOption, match="tolerance"):
        Tolerance.parse(value)


@pytest.mark.parametrize("value", [0, 7, "2%", "0.5%", "33.333333%", "100%"])
def test_a_tolerance_survives_its_option(value: int | str) -> None:
    parsed = Tolerance.parse(value)
    assert parsed.as_option() == value
    assert Tolerance.parse(parsed.as_option()) == parsed == Tolerance.parse(parsed)


@pytest.mark.parametrize(
    ("tolerance", "completed", "total", "ends"),
    [
        (0, 0, 0, "completed"), (0, 5, 5, "completed"), (0, 4, 5, "failed"), (1, 4, 5, "partial"), (1, 3, 5, "failed"),
        ("100%", 0, 5, "partial"), ("100%", 5, 5, "completed"), ("50%", 1, 2, "partial"), ("49%", 1, 2, "failed"),
    ],
)  # fmt: skip
def test_the_outcome_of_a_batch(tolerance: int | str, completed: int, total: int, ends: str) -> None:
    assert outcome(Tolerance.parse(tolerance), completed, total) == ends


# -- ids -------------------------------------------------------------------------------------------


def test_batch_ids_are_version_7_and_in_order_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for millisecond in range(1_900_000_000_000, 1_900_000_000_200):
        monkeypatch.setattr("time.time_ns", lambda now=millisecond: now * 1_000_000)
        found.append(uuid7())
    assert found == sorted(found) and sorted(map(str, found)) == list(map(str, found))
    assert {each.version for each in found} == {7} and {each.variant for each in found} == {uuid.RFC_4122}
    assert found[0].int >> 80 == 1_900_000_000_000


def test_ids_of_one_millisecond_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_900_000_000_000_000_000)
    assert len({uuid7() for _ in range(1000)}) == 1000


_TICKET = Ticket(uuid.uuid4(), ChildKey(uuid7(), 12), 3)


@pytest.mark.parametrize(
    "ticket",
    [
        _TICKET,
        Ticket(_TICKET.store_id, _TICKET.key, 0, "on_finish"),
        Ticket(_TICKET.store_id, _TICKET.key, 0, "on_failure", ("body-id", "Dependency x raised ValueError('é')")),
    ],
)
def test_a_ticket_survives_its_header(ticket: Ticket) -> None:
    import json

    assert Ticket.from_header(json.loads(json.dumps(ticket.as_header()))) == ticket


@pytest.mark.parametrize(
    "change",
    [
        {"store": "x"}, {"store": None}, {"store": 5}, {"batch": ""}, {"position": "first"}, {"position": None},
        {"attempt": []}, {"position": float("inf")}, {"errback": "x"}, {"errback": [1]}, {"errback": 7},
    ],
)  # fmt: skip
def test_a_header_that_is_not_ours_is_no_ticket(change: dict[str, object]) -> None:
    assert Ticket.from_header({**_TICKET.as_header(), **change}) is None


@pytest.mark.parametrize("header", [None, "x", 5, [], {}, {"store": str(uuid.uuid4())}, b"x"])
def test_garbage_is_no_ticket(header: object) -> None:
    assert Ticket.from_header(header) is None


def test_keys_sort_by_batch_and_position() -> None:
    first, second = sorted((uuid7(), uuid7()))
    keys = [ChildKey(second, 0), ChildKey(first, 10), ChildKey(first, 9)]
    assert sorted(keys) == [keys[2], keys[1], keys[0]]
    assert str(ChildKey(first, 3)) == f"{first}#3"
