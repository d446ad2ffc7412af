"""The recovery ladder: what a policy may say, and what it makes of a death. Decisions without I/O."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import pytest

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.crash_policy import (
    FROM_OUTSIDE,
    ISOLATED,
    ON_CRASH,
    SPLITTING,
    Action,
    CrashPolicy,
    Death,
    Judgement,
    RowPolicy,
    backoff,
    base_queue,
    judge,
)
from celery_batchtrack.vocabulary.states import Cause, Verdict

OWN = (Cause.SIGNAL, Cause.EXIT, Cause.OOM, Cause.STALLED, Cause.TIME_LIMIT)
NOT_OWN = (Cause.WORKER_LOST, Cause.SETTLE_LOST)
DEADLY = (*OWN, *NOT_OWN)
#: Its item in hand may be blamed for it.
BLAMED = (Cause.SIGNAL, Cause.EXIT, Cause.OOM, Cause.STALLED)


def policy(on_crash: str, **more: Any) -> RowPolicy:
    return RowPolicy(on_crash, True, True, True, items=("args", 0), **more)


def death(cause: Cause = Cause.SIGNAL, **more: Any) -> Death:
    """Of a child with ten items, the fifth in hand."""
    signal = {"signal": "SIGSEGV"} if cause is Cause.SIGNAL else {}
    return Death(cause, **{"items": 10, "item": 4, **signal, **more})


# -- as_acks, record, retry ------------------------------------------------------------------------

_PROCESS = (Cause.SIGNAL, Cause.EXIT, Cause.OOM, Cause.STALLED, Cause.SETTLE_LOST)


@pytest.mark.parametrize("cause", [*_PROCESS, Cause.WORKER_LOST, Cause.TIME_LIMIT])
@pytest.mark.parametrize(("process", "worker", "limit"), list(itertools.product((True, False), repeat=3)))
def test_each_kind_of_death_asks_its_own_flag(cause: Cause, process: bool, worker: bool, limit: bool) -> None:
    as_acks = RowPolicy("as_acks", process, worker, limit)
    flag = {Cause.WORKER_LOST: worker, Cause.TIME_LIMIT: limit}.get(cause, process)
    assert judge(as_acks, Death(cause)).action is (Action.RUN_AGAIN if flag else Action.CRASHED)
    assert judge(as_acks, death(cause)) == judge(as_acks, Death(cause)), "its items change nothing"


def test_the_third_death_settles_by_default_whatever_the_policy() -> None:
    retry = RowPolicy("retry", True, True, True)
    judged = [judge(retry, Death(Cause.SIGNAL, crashes)).action for crashes in range(4)]
    assert judged == [Action.RUN_AGAIN, Action.RUN_AGAIN, Action.CRASHED, Action.CRASHED]
    only_one = RowPolicy("retry", True, True, True, max_crashes=1)
    assert judge(only_one, Death(Cause.SIGNAL)).action is Action.CRASHED


def test_a_usual_rerun_is_counted_and_goes_where_its_task_goes() -> None:
    assert judge(RowPolicy("retry", True, True, True), death()) == Judgement(
        Action.RUN_AGAIN, strike=True, isolated=False, queue=None
    )


@pytest.mark.parametrize(
    ("late", "reject", "retry", "on_timeout", "process", "worker", "limit"),
    [
        (False, False, False, True, False, False, False),
        (False, True, False, True, False, False, False),  # reject_on_worker_lost counts only with acks_late
        (True, False, False, True, False, True, False),
        (True, True, False, True, True, True, False),
        (True, True, False, False, True, True, True),
        (False, False, True, True, True, True, False),
        (False, False, False, False, False, False, False),
    ],
)
def test_as_acks_is_what_the_task_told_celery(
    late: bool, reject: bool, retry: bool, on_timeout: bool, process: bool, worker: bool, limit: bool
) -> None:
    resolved = RowPolicy.resolve(
        CrashPolicy(), 3, acks_late=late, reject_on_worker_lost=reject, retry_on_worker_lost=retry,
        acks_on_timeout=on_timeout,
    )  # fmt: skip
    assert (resolved.process, resolved.worker, resolved.time_limit) == (process, worker, limit)


TOLD_NOTHING = dict.fromkeys(
    ("acks_late", "reject_on_worker_lost", "retry_on_worker_lost", "acks_on_timeout"), False
)  # fmt: skip


def test_record_never_and_retry_always_runs_again() -> None:
    how = {"acks_late": True, "reject_on_worker_lost": True, "retry_on_worker_lost": True, "acks_on_timeout": False}
    assert not RowPolicy.resolve(CrashPolicy("record"), 3, **how).runs_again
    retry = RowPolicy.resolve(CrashPolicy("retry"), 5, **TOLD_NOTHING)
    assert (retry.process, retry.worker, retry.time_limit, retry.max_crashes) == (True, True, True, 5)


@pytest.mark.parametrize("on_crash", SPLITTING)
def test_what_splits_runs_again_whatever_the_task_told_celery(on_crash: str) -> None:
    resolved = RowPolicy.resolve(CrashPolicy(on_crash), 3, **TOLD_NOTHING, items=("args", 0), merge="sum")
    assert (resolved.process, resolved.worker, resolved.time_limit) == (True, True, True)
    assert (resolved.on_crash, resolved.items, resolved.merge) == (on_crash, ("args", 0), "sum")


def test_what_is_declared_comes_before_the_default_and_all_of_it_reaches_the_row() -> None:
    declared = CrashPolicy("skip", 7, 2.5, True, "big", 4, 16)
    row = RowPolicy.resolve(declared, 3, **TOLD_NOTHING)
    shared = [each.name for each in fields(CrashPolicy)]
    assert {name: getattr(row, name) for name in shared} == declared.as_option()
    assert RowPolicy.resolve(CrashPolicy(), 9, **TOLD_NOTHING).max_crashes == 9


# -- bisect, skip, resume: the run's own doing -----------------------------------------------------


@pytest.mark.parametrize("cause", OWN)
def test_bisect_halves_at_the_first_death_of_its_own(cause: Cause) -> None:
    assert judge(policy("bisect"), death(cause)).action is Action.BISECT
    assert judge(policy("bisect"), death(cause, promised=True)).action is Action.BISECT


@pytest.mark.parametrize("cause", BLAMED)
@pytest.mark.parametrize("crashes", [0, 1, 2, 50])
def test_skip_blames_the_item_in_hand(cause: Cause, crashes: int) -> None:
    assert judge(policy("skip"), death(cause, crashes=crashes)).action is Action.SKIP


@pytest.mark.parametrize("cause", BLAMED)
def test_resume_counts_on_what_was_promised_to_be_done(cause: Cause) -> None:
    assert judge(policy("resume"), death(cause, promised=True)).action is Action.RESUME
    assert judge(policy("resume"), death(cause, promised=True, item=0)).action is Action.RESUME


@pytest.mark.parametrize("cause", OWN)
def test_resume_without_the_promise_is_skip(cause: Cause) -> None:
    assert judge(policy("resume"), death(cause)) == judge(policy("skip"), death(cause))


@pytest.mark.parametrize("on_crash", SPLITTING)
@pytest.mark.parametrize("cause", OWN)
@pytest.mark.parametrize("promised", [True, False])
def test_an_unknown_item_falls_back_to_bisection(on_crash: str, cause: Cause, promised: bool) -> None:
    assert judge(policy(on_crash), death(cause, item=None, promised=promised)).action is Action.BISECT


def test_a_time_limit_convicts_no_item() -> None:
    """The time of all items together is over, whoever was in hand then."""
    assert judge(policy("skip"), death(Cause.TIME_LIMIT)).action is Action.BISECT
    assert judge(policy("resume"), death(Cause.TIME_LIMIT)).action is Action.BISECT, "nothing was promised"


def test_a_time_limit_under_resume_goes_on_at_the_item_in_hand() -> None:
    assert judge(policy("resume"), death(Cause.TIME_LIMIT, promised=True)).action is Action.GO_ON
    at_first = death(Cause.TIME_LIMIT, promised=True, item=0)
    assert judge(policy("resume"), at_first).action is Action.BISECT, "nothing was done: it would come again"


@pytest.mark.parametrize("on_crash", SPLITTING)
@pytest.mark.parametrize("cause", OWN)
def test_a_single_item_that_died_of_its_own_is_crashed_at_once(on_crash: str, cause: Cause) -> None:
    assert judge(policy(on_crash), death(cause, items=1, item=0)).action is Action.CRASHED
    assert judge(policy(on_crash), death(cause, items=1, item=0, promised=True)).action is Action.CRASHED


@pytest.mark.parametrize("on_crash", SPLITTING)
def test_items_that_stand_nowhere_in_the_arguments_cannot_be_split(on_crash: str) -> None:
    nowhere = RowPolicy(on_crash, True, True, True)
    assert judge(nowhere, death()).action is Action.CRASHED


def test_a_budget_bounds_the_deaths_that_bisection_costs() -> None:
    tight = policy("bisect", max_splits=3)
    assert [judge(tight, death(splits=splits)).action for splits in (0, 2, 3, 4)] == [
        Action.BISECT, Action.BISECT, Action.CRASHED, Action.CRASHED,
    ]  # fmt: skip
    assert judge(policy("skip", max_splits=3), death(item=None, splits=3)).action is Action.CRASHED
    assert policy("bisect").max_splits == 64


def test_the_budget_of_bisection_does_not_bound_what_each_death_brings_nearer_to_the_end() -> None:
    assert judge(policy("skip", max_splits=3), death(splits=500)).action is Action.SKIP
    assert judge(policy("resume", max_splits=3), death(splits=500, promised=True)).action is Action.RESUME
    late = death(Cause.TIME_LIMIT, splits=500, promised=True)
    assert judge(policy("resume", max_splits=3), late).action is Action.GO_ON


# -- bisect, skip, resume: not the run's own doing -------------------------------------------------


@pytest.mark.parametrize("on_crash", SPLITTING)
@pytest.mark.parametrize(
    "suspect",
    [*(death(signal=name) for name in FROM_OUTSIDE), *(death(cause) for cause in NOT_OWN)],
    ids=lambda each: each.signal or each.cause,
)
def test_what_may_come_from_outside_runs_again_as_it_is_until_its_last_chance(on_crash: str, suspect: Death) -> None:
    for crashes in (0, 1):
        assert judge(policy(on_crash), replace(suspect, crashes=crashes)) == Judgement(Action.RUN_AGAIN)
    assert judge(policy(on_crash), replace(suspect, crashes=2)).action is not Action.RUN_AGAIN
    lone = replace(suspect, items=1, item=0)
    assert judge(policy(on_crash), lone).action is Action.RUN_AGAIN
    assert judge(policy(on_crash), replace(lone, crashes=2)).action is Action.CRASHED


@pytest.mark.parametrize("signal", ["SIGSEGV", "SIGKILL", "SIGABRT", "SIGBUS", None])
def test_other_signals_are_the_runs_own(signal: str | None) -> None:
    assert judge(policy("skip"), death(signal=signal)).action is Action.SKIP


def test_at_its_last_chance_a_child_is_split_rather_than_lost_as_a_whole() -> None:
    for suspect in (death(signal="SIGTERM", crashes=2), death(Cause.WORKER_LOST, crashes=2)):
        assert judge(policy("bisect"), suspect).action is Action.BISECT
        assert judge(policy("skip"), suspect).action is Action.SKIP
        assert judge(policy("resume"), replace(suspect, promised=True)).action is Action.RESUME


@pytest.mark.parametrize("on_crash", SPLITTING)
def test_a_lost_report_never_splits(on_crash: str) -> None:
    """Its run may have completed every item."""
    for crashes, promised in itertools.product((0, 2, 9), (True, False)):
        judged = judge(policy(on_crash), death(Cause.SETTLE_LOST, crashes=crashes, promised=promised))
        assert judged.action is (Action.CRASHED if crashes else Action.RUN_AGAIN)


@pytest.mark.parametrize("on_crash", SPLITTING)
@pytest.mark.parametrize("cause", DEADLY)
def test_nothing_is_split_on_a_lease_verdict_alone(on_crash: str, cause: Cause) -> None:
    for crashes, item, promised, isolate in itertools.product((0, 1, 2, 9), (None, 0, 4), (True, False), (True, False)):
        silent = death(cause, verdict=Verdict.LEASE, crashes=crashes, item=item, promised=promised)
        judged = judge(policy(on_crash, isolate=isolate), silent)
        assert judged.action in (Action.RUN_AGAIN, Action.CRASHED), (silent, judged)


# -- isolate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_crash", ON_CRASH)
@pytest.mark.parametrize("crashes", [0, 2, 9])
@pytest.mark.parametrize("verdict", list(Verdict))
def test_those_that_went_down_together_are_nobodys_culprit(on_crash: str, crashes: int, verdict: Verdict) -> None:
    suspect = death(Cause.WORKER_LOST, crashes=crashes, verdict=verdict, others=3)
    isolating = replace(policy(on_crash), isolate=True)
    assert judge(isolating, suspect) == Judgement(Action.RUN_AGAIN, strike=False, isolated=True)


def test_who_was_alone_gets_its_strike_and_runs_alone_again() -> None:
    for on_crash in ("retry", *SPLITTING):
        isolating = policy(on_crash, isolate=True)
        alone = death(Cause.WORKER_LOST, others=0)
        assert judge(isolating, alone) == Judgement(Action.RUN_AGAIN, strike=True, isolated=True), on_crash
    assert judge(policy("retry", isolate=True), replace(alone, crashes=2)).action is Action.CRASHED
    last = judge(policy("skip", isolate=True), replace(alone, crashes=2))
    assert last == Judgement(Action.SKIP, isolated=True), "its successors are suspects too"


def test_a_process_that_died_by_itself_is_the_culprit_however_many_were_near() -> None:
    """It took nobody along: so neither it nor its successors need a worker of their own."""
    assert judge(policy("skip", isolate=True), death(others=3)) == Judgement(Action.SKIP, isolated=False)
    assert judge(policy("retry", isolate=True), death(others=3)) == Judgement(Action.RUN_AGAIN, isolated=False)


def test_a_suspect_stays_one_until_it_is_cleared() -> None:
    suspect = death(isolated=True)
    assert judge(policy("skip", isolate=True), suspect) == Judgement(Action.SKIP, isolated=True)
    assert judge(policy("retry", isolate=True), suspect) == Judgement(Action.RUN_AGAIN, isolated=True)
    assert judge(policy("retry"), suspect) == Judgement(Action.RUN_AGAIN, isolated=False), "unless nobody asks for it"


def test_without_isolate_every_death_is_a_strike() -> None:
    shared = death(Cause.WORKER_LOST, others=3)
    assert judge(policy("retry"), shared) == Judgement(Action.RUN_AGAIN, strike=True, isolated=False)
    assert judge(policy("record"), replace(shared, crashes=2)).action is Action.CRASHED


# -- oom_queue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_crash", ON_CRASH)
@pytest.mark.parametrize("queue", [None, "small", f"small{ISOLATED}"])
def test_what_died_of_memory_goes_on_once_where_there_is_more(on_crash: str, queue: str | None) -> None:
    roomy = policy(on_crash, oom_queue="big")
    assert judge(roomy, death(Cause.OOM, queue=queue)) == Judgement(Action.RUN_AGAIN, queue="big")
    for there in ("big", f"big{ISOLATED}"):
        here = death(Cause.OOM, queue=there)
        assert judge(roomy, here) == judge(policy(on_crash), here), "it had its chance"


def test_what_died_of_anything_else_stays_where_it_is() -> None:
    for cause in set(DEADLY) - {Cause.OOM}:
        assert judge(policy("retry", oom_queue="big"), death(cause, queue="small")) == Judgement(Action.RUN_AGAIN)


def test_more_memory_is_a_chance_even_for_the_last_time_since_it_comes_only_once() -> None:
    last = death(Cause.OOM, crashes=9, queue="small")
    assert judge(policy("record", oom_queue="big"), last).action is Action.RUN_AGAIN


def test_a_suspect_comes_from_the_queue_without_the_ending() -> None:
    assert [base_queue(each) for each in ("a", "a.isolated", "isolated", "", None)] == ["a", "a", "isolated", "", None]


# -- CrashPolicy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"on_crash": "skipp"}, "did you mean 'skip'"), ({"on_crash": None}, "on_crash"), ({"on_crash": 3}, "on_crash"),
        ({"on_crash": ["skip"]}, "on_crash"), ({"on_crash": ""}, "on_crash"),
        *(({name: value}, name) for name in ("max_crashes", "quarantine_after", "max_splits")
          for value in (0, -1, True, 1.0, "3")),
        ({"max_splits": None}, "max_splits"),
        ({"isolate": 1}, "isolate"), ({"isolate": None}, "isolate"), ({"isolate": "yes"}, "isolate"),
        ({"oom_queue": ""}, "oom_queue"), ({"oom_queue": 5}, "oom_queue"), ({"oom_queue": "q" * 201}, "oom_queue"),
        ({"oom_queue": f"big{ISOLATED}"}, "oom_queue"),
        ({"backoff": "soon"}, "backoff"), ({"backoff": True}, "backoff"), ({"backoff": []}, "backoff"),
        ({"backoff": -1}, "backoff"), ({"backoff": timedelta(seconds=-1)}, "backoff"),
        ({"backoff": float("nan")}, "backoff"), ({"backoff": float("inf")}, "backoff"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_crash_policy_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.InvalidOption, match=named):
        CrashPolicy(**wrong)


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, None), (0, 0.0), (2, 2.0), ("1m", 60.0), (timedelta(minutes=2), 120.0)]
)
def test_a_backoff_is_a_duration(given: Any, seconds: float | None) -> None:
    assert CrashPolicy(backoff=given).backoff == seconds


def test_a_policy_is_declared_by_a_name_or_as_a_whole() -> None:
    whole = CrashPolicy("skip", isolate=True)
    assert CrashPolicy.parse("skip") == CrashPolicy("skip")
    assert CrashPolicy.parse("skip", 5) == CrashPolicy("skip", max_crashes=5)
    assert CrashPolicy.parse(whole) is whole
    assert CrashPolicy.parse(whole, 5) == CrashPolicy("skip", max_crashes=5, isolate=True)
    for wrong in (None, 3, {"on_crash": "skip"}, "ignore"):
        with pytest.raises(errors.InvalidOption, match="on_crash"):
            CrashPolicy.parse(wrong)
    with pytest.raises(errors.InvalidOption, match="max_crashes"):
        CrashPolicy.parse("skip", 0)
    with pytest.raises(errors.InvalidOption, match="twice"):
        CrashPolicy.parse(CrashPolicy(max_crashes=2), 2)


def test_a_batch_overrides_by_a_name_that_alone_and_by_a_policy_all() -> None:
    task = CrashPolicy("skip", 7, 2.5, True, "big", 4, 16)
    assert task.overridden(None) is task and task.overridden({}) is task
    assert task.overridden({"on_crash": "record"}) == replace(task, on_crash="record")
    batch = CrashPolicy("retry", max_crashes=2)
    assert task.overridden(json.loads(json.dumps(batch.as_option()))) == batch
    assert task.overridden({"of a later version": 1}) is task
    with pytest.raises(errors.InvalidOption):
        task.overridden({"on_crash": "nonsense"})


def test_a_crash_policy_says_whether_it_takes_children_apart() -> None:
    assert [each for each in ON_CRASH if CrashPolicy(each).splits] == list(SPLITTING)
    assert [each for each in ON_CRASH if RowPolicy(each).splits] == list(SPLITTING)


# -- RowPolicy -------------------------------------------------------------------------------------

_EACH: dict[str, Any] = {
    "on_crash": "bisect", "process": True, "worker": True, "time_limit": True, "max_crashes": 7, "backoff": 0.0,
    "isolate": True, "oom_queue": "big", "quarantine_after": 2, "max_splits": 8, "items": ("kwargs", "docs", 0),
    "merge": "concat", "stall_timeout": 30.0,
}  # fmt: skip


@pytest.mark.parametrize("name", _EACH)
def test_each_part_of_a_policy_survives_its_row(name: str) -> None:
    kept = RowPolicy("retry", process=True) if name != "process" else RowPolicy("retry")
    kept = replace(kept, **{name: _EACH[name]})
    assert RowPolicy.from_option(json.loads(json.dumps(kept.as_option()))) == kept


def test_a_policy_survives_its_row_and_the_usual_one_costs_nothing() -> None:
    assert set(_EACH) == {each.name for each in fields(RowPolicy)}
    everything = RowPolicy(**_EACH)
    assert RowPolicy.from_option(json.loads(json.dumps(everything.as_option()))) == everything
    assert RowPolicy("record").as_option() is None and RowPolicy("record", max_crashes=5).as_option() is None
    assert RowPolicy.from_option(None) == RowPolicy() == RowPolicy.from_option({})
    late = RowPolicy("as_acks", worker=True, max_crashes=7)
    assert RowPolicy.from_option(late.as_option()) == late
    assert RowPolicy.from_option({"worker": True, "of a later version": 1}).worker


def test_a_policy_that_is_not_kept_judges_like_the_one_that_is_read_back() -> None:
    for told in (RowPolicy("as_acks"), RowPolicy("record", max_crashes=9)):
        assert told.as_option() is None
        for cause, crashes in itertools.product(DEADLY, (0, 5)):
            assert judge(told, death(cause, crashes=crashes)) == judge(RowPolicy(), death(cause, crashes=crashes))


def test_backoff_doubles_to_a_ceiling() -> None:
    assert [backoff(1.0, crashes) for crashes in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert backoff(1.0, 50) == 300 and backoff(0.0, 3) == 0
