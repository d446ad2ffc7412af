"""Claim, settle, release, crash, overturn: every write to a child and what it refuses, on every database."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest

from celery_batchtrack.store import SlotTaken, Store
from celery_batchtrack.store.clock import later
from celery_batchtrack.vocabulary.aftermath import Rerun
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import Claimed, Ending, Release
from celery_batchtrack.vocabulary.states import Cause, Status, Verdict
from tests.store.kit import ERROR, RETRY, SEGFAULT, Scene, add_up, counts, refused, some, statements

ALL = ("on_success", "on_failure", "on_first_failure", "on_finish")

# -- claim -----------------------------------------------------------------------------------------


def test_a_claim_makes_the_row_the_slots_own(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id, slot="41:1:1:0", policy=RETRY)
    row = scene.row(claimed.key)
    assert (row.status, row.attempt, row.run_token) == ("running", 1, claimed.token)
    assert (row.worker_id, row.slot, row.policy) == (scene.worker_id, "41:1:1:0", RETRY)
    assert row.started_at is not None
    assert claimed.attempt == 1 and claimed.kind == "child"


def test_a_second_message_for_the_same_attempt_is_refused(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    again = refused(scene.claim(claimed.key, attempt=0))
    assert "attempt 0" in again.reason and not again.wait
    assert scene.row(claimed.key).run_token == claimed.token


def test_a_message_of_a_later_attempt_does_not_fit_a_running_row(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    assert "running" in refused(scene.claim(claimed.key, attempt=1)).reason


def test_a_stale_message_does_not_fit_a_row_that_went_back_to_pending(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    scene.store.release(claimed.key, claimed.token, Release())
    refused(scene.claim(claimed.key, attempt=0))
    assert scene.run(claimed.key.batch_id).attempt == 2


def test_a_claim_whose_answer_was_lost_may_be_repeated_with_its_token(scene: Scene) -> None:
    key, token = ChildKey(scene.batch(1), 0), new_token()
    first = scene.claim(key, attempt=0, token=token, slot="1:1:1:0")
    again = scene.claim(key, attempt=0, token=token, slot="1:1:1:0")
    assert first == again == Claimed(key, 1, token, "child")
    assert scene.row(key).attempt == 1


def test_a_claim_in_a_slot_that_still_runs_another_says_so(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.run(batch_id, 0, slot="1:1:1:0")
    with pytest.raises(SlotTaken):
        scene.claim(ChildKey(batch_id, 1), slot="1:1:1:0")
    assert scene.statuses(batch_id) == ["running", "pending"]
    scene.run(batch_id, 1, slot="1:1:1:1")  # an eager call inside the first: one depth further


def test_the_same_slot_of_another_worker_is_another_slot(scene: Scene) -> None:
    batch_id = scene.batch(2)
    scene.run(batch_id, 0, slot="1:1:1:0")
    scene.run(batch_id, 1, slot="1:1:1:0", worker=scene.worker())


@pytest.mark.parametrize("ended", ["cancelled", "finished"])
def test_nothing_is_claimed_of_a_batch_that_ended(scene: Scene, ended: str) -> None:
    batch_id = scene.batch(1)
    if ended == "cancelled":
        scene.store.cancel(batch_id)
    else:
        scene.complete(scene.run(batch_id))
        scene.store.finish(batch_id)
    answer = refused(scene.claim(ChildKey(batch_id, 0)))
    assert not answer.wait and not answer.expired


def test_a_pending_row_of_an_ended_batch_is_still_refused(scene: Scene) -> None:
    batch_id = scene.batch(1)
    scene.set_batch(batch_id, status="failed", finished_at=later(0.0))
    assert "failed" in refused(scene.claim(ChildKey(batch_id, 0))).reason


def test_an_open_batchs_child_may_be_claimed(scene: Scene) -> None:
    scene.run(scene.batch(1, seal=False, start_now=True))


def test_nothing_is_claimed_of_a_paused_batch_and_nothing_is_lost_by_it(scene: Scene) -> None:
    batch_id = scene.batch(1)
    scene.set_batch(batch_id, paused_at=later(0.0))
    assert "paused" in refused(scene.claim(ChildKey(batch_id, 0))).reason
    scene.set_batch(batch_id, paused_at=None)
    scene.run(batch_id)


def test_a_callback_runs_in_spite_of_a_pause_but_not_of_another_round(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=("on_success", "on_finish"))
    scene.store.finish(batch_id)
    scene.set_batch(batch_id, paused_at=later(0.0))
    assert scene.run(batch_id, 0).kind == "on_success"
    scene.set_batch(batch_id, round=2, paused_at=None)
    assert "round 2" in refused(scene.claim(ChildKey(batch_id, 1))).reason


def test_an_expired_child_is_refused_and_may_be_withdrawn(scene: Scene) -> None:
    batch_id = scene.batch(some(1, expires_in=-1.0))
    answer = refused(scene.claim(ChildKey(batch_id, 0)))
    assert answer.expired and not answer.wait
    assert [row.key for row in scene.store.expired()] == [ChildKey(batch_id, 0)]


@pytest.mark.parametrize("who", ["unknown", "stopped"])
def test_a_worker_that_the_database_does_not_know_alive_waits(scene: Scene, who: str) -> None:
    batch_id = scene.batch(1)
    worker = uuid.uuid4() if who == "unknown" else scene.worker()
    scene.store.stop(worker)
    assert refused(scene.claim(ChildKey(batch_id, 0), worker=worker)).wait
    assert scene.statuses(batch_id) == ["pending"]


def test_a_claim_of_a_row_that_is_gone_says_so(scene: Scene) -> None:
    assert refused(scene.claim(ChildKey(uuid7(), 0), attempt=0)).reason == "its row is gone"


def test_a_new_claim_forgets_how_sure_the_last_death_was(scene: Scene) -> None:
    first = scene.run(scene.batch(1))
    scene.crash(first, Verdict.LEASE, again=0.0)
    second = scene.run(first.key.batch_id)
    assert scene.row(second.key).verdict is None
    scene.store.cancel(first.key.batch_id)
    assert scene.store.cancelled_runs([(second.key, second.token)]) != {}, "a zombie would live on"


# -- settle ----------------------------------------------------------------------------------------


def test_completing_writes_the_result_the_count_and_drops_the_arguments(scene: Scene) -> None:
    batch_id = scene.batch(some(1, items=5))
    claimed = scene.run(batch_id)
    settled = scene.complete(claimed, '{"ok": true}')
    row = scene.row(claimed.key)
    assert settled.written and settled.look
    assert (row.status, row.result, row.signature, row.cause) == ("completed", '{"ok": true}', None, None)
    assert row.finished_at is not None
    assert scene.store.progress(batch_id).items_completed == 5
    assert add_up(scene, batch_id)


def test_failing_writes_the_cause_and_an_incident(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    scene.fail(claimed)
    row = scene.row(claimed.key)
    (incident,) = scene.incidents(claimed.key.batch_id)
    assert (row.status, row.cause) == ("failed", "exception")
    assert (incident.outcome, incident.cause, incident.attempt) == ("failed", "exception", 1)
    assert (incident.message, incident.traceback) == (ERROR.message, ERROR.traceback)
    assert row.signature is not None, "a retry of the batch needs it"
    assert add_up(scene, claimed.key.batch_id)


def test_evidence_is_kept_whole_where_text_has_what_databases_refuse(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    scene.fail(claimed, Evidence(Cause.EXCEPTION, message="nul \0 and lone \udce9", traceback="x" * 50_000))
    (incident,) = scene.incidents(claimed.key.batch_id)
    assert incident.message == "nul \\0 and lone \\udce9"
    assert incident.traceback is not None and len(incident.traceback) < 21_000


def test_only_the_last_settle_of_a_shard_asks_for_a_look(scene: Scene) -> None:
    batch_id = scene.batch(4, shards=2)
    looks = [scene.complete(scene.run(batch_id, position)).look for position in (0, 2, 1, 3)]
    assert looks == [False, True, False, True]


def test_a_settle_whose_answer_was_lost_may_be_repeated_and_counts_once(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.complete(claimed)
    again = scene.complete(claimed)
    assert again.written and again.look and not again.late
    assert counts(scene, batch_id) == {"completed": 1}
    assert scene.incidents(batch_id) == []


def test_a_settle_under_another_token_is_late_and_recorded(scene: Scene) -> None:
    batch_id = scene.batch(1)
    first = scene.run(batch_id)
    scene.crash(first, again=0.0)
    second = scene.run(batch_id)
    late = scene.complete(first, '"from the dead"')
    assert late.late and not late.written
    assert scene.row(first.key).run_token == second.token and scene.row(first.key).result is None
    assert [each.outcome for each in scene.incidents(batch_id)] == ["retried", "late_write"]
    assert scene.complete(second).written
    assert add_up(scene, batch_id)


def test_a_settle_after_the_cancel_is_late_and_changes_nothing(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.store.cancel(batch_id)
    assert scene.complete(claimed).late
    assert counts(scene, batch_id) == {"cancelled": 1}
    assert [each.outcome for each in scene.incidents(batch_id)] == ["late_write"]


def test_a_settle_of_a_row_that_is_gone_is_swallowed(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.store.cancel(batch_id)
    scene.set_batch(batch_id, finished_at=later(-10.0))
    scene.store.prune(completed=1, other=1)
    settled = scene.complete(claimed)
    assert not settled.written and not settled.late


def test_a_callbacks_settle_counts_nowhere(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=("on_finish",))
    scene.store.finish(batch_id)
    settled = scene.fail(scene.run(batch_id, 0))
    assert settled.written and not settled.callbacks
    assert scene.store.progress(batch_id).total == 0
    assert scene.called(batch_id) == ["on_finish"]


def test_a_failing_callback_is_no_first_failure(scene: Scene) -> None:
    batch_id = scene.batch(2, tolerance=2, calls=ALL)
    scene.fail(scene.run(batch_id, 0))
    scene.fail(scene.run(batch_id, 2))
    assert scene.called(batch_id) == ["on_first_failure"]


# -- statements ------------------------------------------------------------------------------------


def _sent(store: Store, sent: list[str]) -> list[str]:
    return [statement.split()[0] for statement in sent]


def test_a_claim_and_a_settle_are_one_statement_each(scene: Scene) -> None:
    """PostgreSQL: 1 and 1, in autocommit. SQLite has no UPDATE within a CTE and needs its transaction opened:
    BEGIN + 1 for the claim, BEGIN + 2 for the settle (row, then tally)."""
    batch_id = scene.batch(2)
    scene.complete(scene.run(batch_id, 0))  # warm: the first use of a connection asks more
    key, token, slot = ChildKey(batch_id, 1), new_token(), scene.slot()
    with statements(scene.store.engine) as claim:
        assert isinstance(scene.store.claim(key, 0, token, scene.worker_id, slot), Claimed)
    with statements(scene.store.engine) as settle:
        assert scene.store.settle(key, token, Ending(Status.COMPLETED, "1")).look
    if scene.store.sqlite:
        assert _sent(scene.store, claim) == ["BEGIN", "UPDATE"]
        assert _sent(scene.store, settle) == ["BEGIN", "UPDATE", "UPDATE", "INSERT"]
    else:
        assert _sent(scene.store, claim) == ["UPDATE"]
        assert _sent(scene.store, settle) == ["WITH"]


# -- release ---------------------------------------------------------------------------------------


def test_a_release_gives_the_row_back_for_the_next_attempt(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.store.take_undispatched(batch_id, 10)
    assert scene.store.release(claimed.key, claimed.token, Release(retries=3, signature='{"args": [2]}'))
    row = scene.row(claimed.key)
    assert (row.status, row.attempt, row.retries, row.crashes) == ("pending", 1, 3, 0)
    assert (row.worker_id, row.slot, row.started_at, row.dispatched_at) == (None, None, None, None)
    assert row.signature == '{"args": [2]}'
    assert row.run_token == claimed.token, "the token stays until the next claim"
    assert counts(scene, batch_id) == {"pending": 1}


def test_a_retry_that_celery_sent_for_later_is_not_published_twice(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    scene.store.release(claimed.key, claimed.token, Release(countdown=60.0, sent=True))
    row = scene.row(claimed.key)
    assert row.dispatched_at is not None and row.not_before is not None
    assert scene.store.take_undispatched(None, 10) == []


def test_a_retry_that_celery_sent_for_now_is_published_again(scene: Scene) -> None:
    """Its message came before the release and was refused."""
    past = datetime(2020, 1, 1, tzinfo=UTC)
    for how in (Release(sent=True), Release(countdown=0.0, sent=True), Release(eta=past, sent=True)):
        claimed = scene.run(scene.batch(1))
        scene.store.release(claimed.key, claimed.token, how)
        assert [each.child.attempt for each in scene.store.take_undispatched(None, 10)] == [1], how


@pytest.mark.parametrize(
    ("names", "kept"), [(("b", "a"), ["b", "a"]), (("a",), []), ((), []), (None, ["doc-0-0", "doc-0-1"])]
)
def test_a_release_with_other_arguments_tells_their_items_if_they_are_as_many(
    scene: Scene, names: tuple[str, ...] | None, kept: list[str]
) -> None:
    """The counts stand; with other identifiers a crash would convict, and hand on, items under wrong names."""
    batch_id = scene.batch(some(1, items=2))
    run = scene.run(batch_id)
    assert scene.store.release(run.key, run.token, Release(signature='{"args": [["b", "a"]]}', items=names))
    row = scene.row(run.key)
    assert (row.items, row.item_count) == (kept, 2)
    assert scene.violations() == {}


def test_a_release_with_evidence_records_the_attempt_that_did_not_complete(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    scene.store.release(claimed.key, claimed.token, Release(evidence=Evidence(Cause.RETRY, message="later")))
    (incident,) = scene.incidents(claimed.key.batch_id)
    assert (incident.outcome, incident.cause, incident.attempt) == ("retried", "retry", 1)


def test_a_release_of_a_run_that_lost_its_row_changes_nothing(scene: Scene) -> None:
    first = scene.run(scene.batch(1))
    scene.crash(first, again=0.0)
    second = scene.run(first.key.batch_id)
    assert not scene.store.release(first.key, first.token, Release())
    assert scene.row(first.key).run_token == second.token
    assert scene.row(first.key).status == "running"


def test_a_claim_that_was_given_up_goes_back_without_a_strike(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    assert scene.store.release_claiming(scene.row(claimed.key))
    row = scene.row(claimed.key)
    assert (row.status, row.crashes, row.attempt, row.dispatched_at) == ("pending", 0, 1, None)
    assert not scene.store.release_claiming(row)


# -- crash -----------------------------------------------------------------------------------------


def test_a_crash_is_recorded_with_all_that_is_known(scene: Scene) -> None:
    batch_id = scene.batch(some(1, items=2))
    claimed = scene.run(batch_id)
    settled = scene.crash(claimed)
    row, (incident,) = scene.row(claimed.key), scene.incidents(batch_id)
    assert settled.written and settled.look
    assert (row.status, row.cause, row.verdict, row.crashes) == ("crashed", "signal", "observed", 1)
    assert (incident.outcome, incident.signal, incident.pid, incident.detected_by) == ("crashed", "SIGSEGV", 41, "main")
    assert incident.items == ["doc-0-0", "doc-0-1"] and incident.verdict == "observed"
    assert incident.died_at is not None and incident.died_at <= incident.detected_at
    assert counts(scene, batch_id) == {"crashed": 1}
    assert add_up(scene, batch_id)


def test_a_crash_may_lead_to_another_attempt(scene: Scene) -> None:
    batch_id = scene.batch(1)
    scene.store.take_undispatched(batch_id, 10)
    claimed = scene.run(batch_id)
    settled = scene.crash(claimed, again=5.0)
    row = scene.row(claimed.key)
    assert settled.written and not settled.look
    assert (row.status, row.crashes, row.attempt, row.cause) == ("pending", 1, 1, None)
    assert (row.worker_id, row.slot, row.dispatched_at) == (None, None, None)
    assert row.not_before is not None and row.not_before > scene.store.current_time()
    assert [each.outcome for each in scene.incidents(batch_id)] == ["retried"]
    assert add_up(scene, batch_id)


def test_a_crash_verdict_on_a_run_that_settled_changes_nothing(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    seen = scene.row(claimed.key)
    scene.complete(claimed)
    assert not scene.store.crash(seen, SEGFAULT, Verdict.OBSERVED, None).written
    assert counts(scene, batch_id) == {"completed": 1} and scene.incidents(batch_id) == []


def test_a_crash_verdict_on_an_older_run_does_not_touch_the_newer(scene: Scene) -> None:
    first = scene.run(scene.batch(1))
    seen = scene.row(first.key)
    scene.crash(first, again=0.0)
    second = scene.run(first.key.batch_id)
    assert not scene.store.crash(seen, SEGFAULT, Verdict.OBSERVED, None).written
    assert scene.row(second.key).status == "running"


def test_a_death_before_the_claim_uses_up_an_attempt(scene: Scene) -> None:
    batch_id = scene.batch(1)
    scene.store.take_undispatched(batch_id, 10)
    row = scene.row(ChildKey(batch_id, 0))
    evidence = Evidence(Cause.SIGNAL, phase="before_claim", signal="SIGSEGV")
    assert scene.store.crash_unclaimed(row, evidence, Rerun()).written
    struck = scene.row(row.key)
    assert (struck.status, struck.attempt, struck.crashes, struck.dispatched_at) == ("pending", 1, 1, None)
    refused(scene.claim(row.key, attempt=0))
    assert not scene.store.crash_unclaimed(row, evidence, Rerun()).written, "one death, told twice"
    assert scene.store.crash_unclaimed(struck, evidence, None).written
    assert scene.row(row.key).status == "crashed"
    assert [(each.phase, each.attempt) for each in scene.incidents(batch_id)] == [
        ("before_claim", 1), ("before_claim", 2),
    ]  # fmt: skip
    assert counts(scene, batch_id) == {"crashed": 1}
    assert add_up(scene, batch_id)


def test_a_death_before_the_claim_does_not_touch_a_row_that_was_claimed(scene: Scene) -> None:
    seen = scene.row(ChildKey(scene.batch(1), 0))
    claimed = scene.run(seen.batch_id)
    assert not scene.store.crash_unclaimed(seen, SEGFAULT, None).written
    assert scene.row(claimed.key).status == "running"


# -- messages that never reached their task --------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (Status.FAILED, Cause.NOT_REGISTERED), (Status.FAILED, Cause.CONTENT_REFUSED), (Status.FAILED, Cause.NOT_SENT),
        (Status.CANCELLED, Cause.REVOKED), (Status.CANCELLED, Cause.EXPIRED),
    ],
)  # fmt: skip
def test_a_message_that_never_reached_its_task_settles_the_row(scene: Scene, status: Status, cause: Cause) -> None:
    batch_id = scene.batch(1, calls=ALL)
    key = ChildKey(batch_id, 0)
    settled = scene.store.settle_unstarted(key, 0, status, Evidence(cause, phase="before_claim"))
    assert settled.written and settled.look
    assert settled.callbacks == (status is Status.FAILED)
    row, (incident,) = scene.row(key), scene.incidents(batch_id)
    assert (row.status, row.cause, incident.phase) == (status, cause, "before_claim")
    assert add_up(scene, batch_id)


def test_a_stale_message_that_never_reached_its_task_settles_nothing(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    evidence = Evidence(Cause.REVOKED)
    assert not scene.store.settle_unstarted(claimed.key, 0, Status.CANCELLED, evidence).written
    scene.store.release(claimed.key, claimed.token, Release())
    assert not scene.store.settle_unstarted(claimed.key, 0, Status.CANCELLED, evidence).written
    assert scene.row(claimed.key).status == "pending"


def test_a_terminated_run_is_cancelled(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    settled = scene.store.settle_terminated(scene.row(claimed.key), Evidence(Cause.TERMINATED))
    assert settled.written
    assert (scene.row(claimed.key).status, scene.row(claimed.key).cause) == ("cancelled", "terminated")
    assert not scene.crash(claimed).written, "the death that follows is no crash"
    assert add_up(scene, claimed.key.batch_id)


# -- overturn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [Status.COMPLETED, Status.FAILED])
@pytest.mark.parametrize("again", [None, 0.0], ids=["crashed", "put back"])
def test_a_run_taken_for_dead_by_its_lease_overturns_the_verdict(
    scene: Scene, ending: Status, again: float | None
) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.crash(claimed, Verdict.LEASE, again)
    settled = scene.complete(claimed) if ending is Status.COMPLETED else scene.fail(claimed)
    assert settled.written and settled.overturned and settled.look
    row = scene.row(claimed.key)
    assert (row.status, row.verdict) == (ending, None) and row.finished_at is not None
    assert scene.incidents(batch_id)[0].overturned_at is not None, "the incident is kept, and marked"
    assert counts(scene, batch_id) == {ending.value: 1}
    assert add_up(scene, batch_id)


def test_an_observed_verdict_is_never_overturned(scene: Scene) -> None:
    for again in (None, 0.0):
        claimed = scene.run(scene.batch(1))
        scene.crash(claimed, Verdict.OBSERVED, again)
        before = scene.row(claimed.key)
        settled = scene.complete(claimed)
        assert settled.late and not settled.overturned
        assert scene.row(claimed.key) == before
        assert add_up(scene, claimed.key.batch_id)


def test_a_late_completion_after_a_newer_claim_changes_nothing(scene: Scene) -> None:
    first = scene.run(scene.batch(1))
    scene.crash(first, Verdict.LEASE, again=0.0)
    second = scene.run(first.key.batch_id)
    assert scene.complete(first).late
    scene.crash(second, Verdict.LEASE)
    assert scene.complete(first).late, "the newer run's verdict is not the older's to overturn"
    assert scene.complete(second).overturned


def test_a_late_completion_of_a_convicted_attempt_after_the_end_changes_nothing(scene: Scene) -> None:
    batch_id = scene.batch(1)
    claimed = scene.run(batch_id)
    scene.crash(claimed, Verdict.LEASE)
    assert scene.store.finish(batch_id) is not None
    assert scene.complete(claimed).late
    assert counts(scene, batch_id) == {"crashed": 1} and scene.status(batch_id) == "failed"
    assert add_up(scene, batch_id)


def test_a_callbacks_lease_verdict_is_overturned_although_its_batch_ended(scene: Scene) -> None:
    batch_id = scene.batch(0, calls=("on_finish",))
    scene.store.finish(batch_id)
    claimed = scene.run(batch_id, 0)
    scene.crash(claimed, Verdict.LEASE)
    assert scene.complete(claimed).overturned
    assert add_up(scene, batch_id)


# -- zombies ---------------------------------------------------------------------------------------


def _zombie(scene: Scene, claimed: Claimed) -> bool:
    return claimed.key in scene.store.cancelled_runs([(claimed.key, claimed.token)])


def test_runs_that_live_or_may_be_overturned_are_no_zombies(scene: Scene) -> None:
    running = scene.run(scene.batch(1))
    assert not _zombie(scene, running)
    scene.crash(running, Verdict.LEASE)
    assert not _zombie(scene, running)
    put_back = scene.run(scene.batch(1))
    scene.crash(put_back, Verdict.LEASE, again=0.0)
    assert not _zombie(scene, put_back)


def test_runs_that_can_change_nothing_any_more_are_zombies(scene: Scene) -> None:
    cancelled, convicted, superseded, ended = (scene.run(scene.batch(1)) for _ in range(4))
    scene.store.cancel(cancelled.key.batch_id)
    assert _zombie(scene, cancelled)
    scene.crash(convicted)
    assert _zombie(scene, convicted)
    scene.crash(superseded, Verdict.LEASE, again=0.0)
    scene.run(superseded.key.batch_id)
    assert _zombie(scene, superseded)
    scene.crash(ended, Verdict.LEASE)
    scene.store.finish(ended.key.batch_id)
    assert _zombie(scene, ended), "its batch ended: nothing may be overturned"
    scene.set_batch(ended.key.batch_id, finished_at=later(-10.0))
    scene.store.prune(completed=1, other=1)
    assert _zombie(scene, ended), "its row is gone"


def test_a_run_put_back_by_its_lease_is_a_zombie_once_its_batch_was_cancelled(scene: Scene) -> None:
    claimed = scene.run(scene.batch(1))
    scene.crash(claimed, Verdict.LEASE, again=0.0)
    scene.store.cancel(claimed.key.batch_id)
    assert _zombie(scene, claimed)


# -- reading ---------------------------------------------------------------------------------------


def test_running_rows_are_found_by_worker_process_and_slot(scene: Scene) -> None:
    batch_id, other = scene.batch(4), scene.worker()
    for position, slot in enumerate(("12:1:1:0", "12:1:1:1", "123:1:1:0")):
        scene.run(batch_id, position, slot=slot)
    scene.run(batch_id, 3, slot="12:1:1:0", worker=other)
    found = scene.store.running_of
    assert sorted(row.position for row in found(scene.worker_id)) == [0, 1, 2]
    assert sorted(row.position for row in found(scene.worker_id, "12:")) == [0, 1]
    assert [row.position for row in found(scene.worker_id, "12:1:1:1")] == [1]
    assert [row.position for row in found(other)] == [3]


def test_incidents_are_filtered_by_kind_and_age(scene: Scene) -> None:
    batch_id = scene.batch(3, tolerance=3)
    scene.fail(scene.run(batch_id, 0))
    scene.crash(scene.run(batch_id, 1))
    overturned = scene.run(batch_id, 2)
    scene.crash(overturned, Verdict.LEASE)
    scene.complete(overturned)
    assert [each.position for each in scene.store.incidents(batch_id)] == [0, 1, 2]
    assert [each.position for each in scene.store.incidents(batch_id, crashes_only=True)] == [1]
    assert [each.position for each in scene.store.incidents(batch_id, outcomes=["failed"])] == [0]
    assert [each.position for each in scene.store.incidents(limit=2)] == [1, 2]
    assert len(scene.store.incidents(since=3600)) == 3 and scene.store.incidents(since=-60) == []
    assert scene.store.incidents(uuid7()) == []


def test_the_first_failure_of_a_batch_names_its_task_and_message(scene: Scene) -> None:
    batch_id = scene.batch(3)
    assert scene.store.first_failure(batch_id) is None
    retried = scene.run(batch_id, 0)
    scene.store.release(retried.key, retried.token, Release(evidence=Evidence(Cause.RETRY, message="not this")))
    scene.fail(scene.run(batch_id, 2))
    scene.crash(scene.run(batch_id, 1))
    first = scene.store.first_failure(batch_id)
    assert first is not None
    assert (first.task_id, first.message) == (scene.rows(batch_id)[2].task_id, "ValueError: no")
