"""Windows, turns and rates, decided without a database."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from celery_batchtrack.errors import InvalidOption
from celery_batchtrack.vocabulary.pacing import Contender, Pace, Rate, narrowest, refill_one_in, turns


@pytest.mark.parametrize(
    ("text", "per_second"), [("10/s", 10), ("90/m", 1.5), ("36/h", 0.01), (" 2.5 / s ", 2.5), (7, 7), (0.5, 0.5)]
)
def test_a_rate_is_read_as_celery_writes_it(text: Any, per_second: float) -> None:
    assert Rate.parse(text) == Rate(pytest.approx(per_second))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [0, -1, "0/s", "10", "10/d", "ten/s", "", "/s", True, 1e-300, "1e-9/s", float("nan"), float("inf"), [1], "1e3/s"],
)
def test_what_is_no_rate_says_how_one_is_written(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="100/m"):
        Rate.parse(wrong)


@pytest.mark.parametrize("every", [0.1, 1.01])
@pytest.mark.parametrize("per_second", [10.0, 2.9, 5 / 3, 1.0, 0.3, 1 / 60])
def test_a_rate_is_kept_in_the_long_run_and_reached_however_seldom_somebody_looks(
    per_second: float, every: float
) -> None:
    rate, sent, clock, paid = Rate(per_second), 0, 0.0, None
    for step in range(int(600 / every)):  # ten minutes
        clock = step * every
        allowed = rate.allowance(None if paid is None else clock - paid)
        sent += int(allowed)
        paid = clock - rate.paid_since(allowed, int(allowed))
        assert sent <= rate.burst + per_second * clock + 1e-6
    assert sent >= 0.99 * per_second * clock - 1


def test_a_slow_rate_sends_one_and_tells_when_the_next_may_go() -> None:
    rate = Rate.parse("30/m")
    assert rate is not None and rate.burst == 1
    assert (rate.allowance(None), rate.wait(1.0, 1)) == (1.0, 2.0)
    assert rate.allowance(0.5) == 0.25 and rate.wait(0.25, 0) == pytest.approx(1.5)
    assert int(rate.allowance(3600.0)) == 1, "nothing is saved up"


def test_places_go_to_who_has_the_fewest_in_flight() -> None:
    large, small = Contender("large", 0, 90), Contender("small", 0, 0)
    assert turns(10, [large, small]) == {"small": 10}
    assert turns(100, [large, small]) == {"small": 95, "large": 5}
    assert turns(3, [Contender("a", 0, 0), Contender("b", 0, 0)]) == {"a": 2, "b": 1}


def test_a_higher_priority_is_served_first_and_equal_ones_take_turns() -> None:
    high = [Contender("x", 5, 40), Contender("y", 5, 40)]
    assert turns(6, [Contender("low", 0, 0), *high]) == {"x": 3, "y": 3}


def test_no_batch_gets_more_than_its_own_limits_let_it_send() -> None:
    narrow, shut, wide = Contender("narrow", 0, 0, 2), Contender("shut", 9, 0, 0), Contender("wide", 0, 0, None)
    assert turns(10, [narrow, shut, wide]) == {"narrow": 2, "wide": 8}
    assert turns(10, [narrow, shut]) == {"narrow": 2}
    assert turns(0, [wide]) == turns(5, []) == {}


def test_turns_share_out_what_there_is_as_evenly_as_they_can() -> None:
    for free in range(1, 60):
        contenders = [Contender(name, 0, have) for name, have in (("a", 0), ("b", 3), ("c", 17))]
        given = Counter(turns(free, contenders))
        after = {each.key: each.in_flight + given[each.key] for each in contenders}
        assert given.total() == free
        served = [after[name] for name in given]
        assert max(served) <= min(after.values()) + 1, after


def test_a_window_is_filled_up_many_times_while_it_empties() -> None:
    assert refill_one_in(None) == 0, "there is none"
    for window in (1, 2, 31, 32, 33, 100, 1000, 100_000):
        one_in = refill_one_in(window)
        assert (1 - 1 / one_in) ** window < math.exp(-22), "or the chance is too high that nobody does it"
        assert window / one_in <= 32, "or it costs too much"


@pytest.mark.parametrize("name", ["max_in_flight", "max_running"])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, "10", True])
def test_a_window_that_lets_nothing_through_is_refused(name: str, wrong: Any) -> None:
    with pytest.raises(InvalidOption, match=f"{name} must be a whole number of at least 1"):
        Pace.parse({name: wrong})


@pytest.mark.parametrize("wrong", ["high", 1.5, True, None, 10_000])
def test_a_priority_is_a_whole_number(wrong: Any) -> None:
    with pytest.raises(InvalidOption, match="priority"):
        Pace.parse({"priority": wrong})


def test_the_narrower_of_two_windows_counts() -> None:
    assert Pace.parse({"max_in_flight": 100, "max_running": 4}).window == 4
    assert Pace.parse({"max_in_flight": 3, "max_running": 4}).window == 3
    assert Pace.parse({}).window is None
    assert narrowest(None, 5, None, 3) == 3 and narrowest(None) is None
    kept = Pace.parse({"max_in_flight": 3, "rate": "6/m", "priority": 2}).as_options()
    assert Pace.parse(kept) == Pace.parse({"max_in_flight": 3, "rate": "6/m", "priority": 2})
    assert Pace.parse({}).as_options() == {}, "what is not asked for takes no room"
