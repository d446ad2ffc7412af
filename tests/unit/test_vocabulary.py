"""States and transitions, tolerance, the breaker, ids: decisions without I/O."""

from __future__ import annotations

import json
import random
import uuid
from datetime import timedelta

import pytest

from celery_batchtrack import errors
from celery_batchtrack.vocabulary import states
from celery_batchtrack.vocabulary.ids import ChildKey, Ticket, uuid7
from celery_batchtrack.vocabulary.policies import CrashRate, Sample, Tolerance, outcome
from celery_batchtrack.vocabulary.states import BatchStatus, Status

# -- states ----------------------------------------------------------------------------------------


def test_every_status_is_open_settled_or_split() -> None:
    assert {*states.OPEN, *states.SETTLED, Status.SPLIT} == set(Status)
    assert {*states.BATCH_ALIVE, *states.BATCH_ENDED} == set(BatchStatus)


def test_settled_stays_settled_but_for_the_overturn_of_a_suspicion_and_another_round() -> None:
    for transition in states.TRANSITIONS:
        settled = set(transition.sources) & set(states.SETTLED)
        allowed = {Status.CRASHED} if transition.name.startswith("overturn") else set()
        if transition is states.RETRY:
            allowed = {Status.FAILED, Status.CRASHED, Status.CANCELLED}
        assert settled == allowed, transition


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


# -- the breaker -----------------------------------------------------------------------------------


def test_a_crash_rate_is_a_percentage_in_words() -> None:
    assert CrashRate.parse("20%") == CrashRate(20.0, 300.0)
    assert CrashRate.parse(" 0.5 % ", "10m") == CrashRate(0.5, 600.0)
    assert CrashRate.parse("0%", timedelta(seconds=30)) == CrashRate(0.0, 30.0)
    assert CrashRate.parse(None) is None
    rate = CrashRate(12.5, 60.0)
    assert CrashRate.from_option(json.loads(json.dumps(rate.as_option()))) == rate
    assert CrashRate.from_option(None) is None


@pytest.mark.parametrize("wrong", ["100%", "120%", "20", 20, 0.2, "-1%", "", "%", "many", True, [], "nan%"])
def test_what_is_no_crash_rate_is_refused(wrong: object) -> None:
    with pytest.raises(errors.InvalidOption, match="max_crash_rate"):
        CrashRate.parse(wrong)


@pytest.mark.parametrize("wrong", [0, -5, "0s", "soon", True, [], float("nan"), float("inf"), timedelta(-1)])
def test_a_window_without_a_length_is_refused(wrong: object) -> None:
    with pytest.raises(errors.InvalidOption, match="crash_window"):
        CrashRate.parse("20%", wrong)


def test_a_window_alone_says_what_is_missing() -> None:
    with pytest.raises(errors.InvalidOption, match="crash_window needs max_crash_rate"):
        CrashRate.parse(None, "5m")


@pytest.mark.parametrize(
    ("percent", "deaths", "ended_well", "paused"),
    [
        (20, 3, 12, False), (20, 3, 11, True), (20, 1, 0, False), (20, 2, 0, False), (20, 3, 0, True),
        (50, 4, 4, False), (50, 5, 4, True), (0, 2, 1000, False), (0, 3, 1_000_000, True),
        (33.3333, 333_333, 666_667, False), (33.3333, 333_334, 666_666, True), (0.1, 3, 2_997, False),
    ],
)  # fmt: skip
def test_more_than_the_rate_pauses_and_less_than_three_deaths_prove_nothing(
    percent: float, deaths: int, ended_well: int, paused: bool
) -> None:
    rate = CrashRate(percent)
    reason = rate.exceeded([Sample(0.0, 0, 0)], Sample(10.0, ended_well, deaths))
    assert (reason is not None) is paused
    assert rate.exceeded([], Sample(10.0, ended_well, deaths)) == reason, "before the first sample there was nothing"
    if reason:
        assert f"{deaths} of {deaths + ended_well} runs" in reason


def test_what_is_older_than_the_window_is_forgiven() -> None:
    rate, samples = CrashRate(20.0, window=100.0), [Sample(0.0, 0, 0)]
    assert rate.exceeded(samples, Sample(50.0, 0, 3)) is not None
    samples = rate.with_sample(samples, Sample(50.0, 0, 3))
    assert rate.exceeded(samples, Sample(149.0, 0, 4)) is not None, "the three are still in the window"
    assert rate.exceeded(samples, Sample(150.0, 0, 4)) is None
    assert rate.exceeded(samples, Sample(150.0, 0, 6)) is not None


def test_no_death_within_the_window_is_ever_forgiven_and_none_of_long_ago_counts() -> None:
    """Against the deaths themselves, on random lives: sampled at each death, and by a sweep every 15 seconds."""
    dice = random.Random(3)
    for _ in range(200):
        rate, samples, deaths = CrashRate(50.0, window=100.0), [], []
        moments = [*((dice.uniform(0, 1000), True) for _ in range(dice.randrange(40))), *(
            (float(each), False) for each in range(0, 1000, 15)
        )]  # fmt: skip
        for at, died in sorted(moments):
            deaths += [at] if died else []
            present = Sample(at, 0, len(deaths))
            samples = samples or [Sample(at, 0, 0)]
            within = [sum(each > at - length for each in deaths) for length in (100.0, 100.0 + 10.0 + 15.0)]
            if within[0] >= rate.MINIMUM:
                assert rate.exceeded(samples, present) is not None
            if within[1] < rate.MINIMUM:
                assert rate.exceeded(samples, present) is None
            samples = rate.with_sample(samples, present)
            assert len(samples) <= rate.SAMPLES + 2, "it does not grow"
            assert samples == sorted(samples)


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
        Ticket(_TICKET.store_id, _TICKET.key, 1, keep_result=False, on_crash={"on_crash": "skip"}, isolated=True),
    ],
)
def test_a_ticket_survives_its_header(ticket: Ticket) -> None:
    assert Ticket.from_header(json.loads(json.dumps(ticket.as_header()))) == ticket


@pytest.mark.parametrize(
    "change",
    [
        {"store": "x"}, {"store": None}, {"store": 5}, {"batch": ""}, {"position": "first"}, {"position": None},
        {"attempt": []}, {"position": float("inf")}, {"errback": "x"}, {"errback": [1]}, {"errback": 7},
        {"on_crash": 5}, {"on_crash": "skip"},
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
