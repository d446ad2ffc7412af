"""Random lives of batches whose items kill: whatever dies, every item ends once, and only the poisons are crashed.

First the decisions alone, by the hundred (`judge` and `cut`), then the same over a real store with everything that
may come between: deaths before the claim, deaths told twice, ends reported too late, lost workers, silent leases.
"""

from __future__ import annotations

import json
import math
import random
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from celery_batchtrack.behaviour import dispatch, finish, recovery, results
from celery_batchtrack.behaviour.handover import cut
from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary.crash_policy import Action, Death, RowPolicy, judge
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token
from celery_batchtrack.vocabulary.records import ChildRow, Claimed, Ending
from celery_batchtrack.vocabulary.states import Cause, Detector, Status, Verdict
from tests.store.behaviour_kit import Json, Told, tracker_on
from tests.store.kit import HERE, Scene, documents, items_by_status

ROUNDS = 400


def most_deaths_of_bisection(poisons: int, items: int) -> int:
    """For each poison: once for every halving until it is alone, and once more then."""
    return poisons * (math.ceil(math.log2(items)) + 1) if items else 0


# -- the decisions alone ---------------------------------------------------------------------------

_BLANK = dict.fromkeys(each.name for each in fields(ChildRow))


def child_of(names: tuple[str, ...]) -> ChildRow:
    values = {
        **_BLANK, "batch_id": uuid.uuid4(), "position": 0, "items": list(names), "item_count": len(names),
        "signature": documents(*names).signature,
    }  # fmt: skip
    return ChildRow(**values)


@dataclass
class Tree:
    """A header position and what its deaths make of it, without a store."""

    policy: RowPolicy
    poisons: frozenset[str]
    dice: random.Random
    #: How likely it is that the black box does not know the item, or that the time is over before an item.
    unknown: float = 0.0
    slow: float = 0.0
    deaths: int = 0
    splits: int = 0
    ran: Counter[str] = field(default_factory=Counter)
    ended: dict[Status, list[str]] = field(default_factory=lambda: {status: [] for status in Status})

    def live(self, names: tuple[str, ...]) -> None:
        waiting = [names]
        while waiting:
            waiting += self._run(waiting.pop(self.dice.randrange(len(waiting))))

    def _run(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """One run over these items, to its end or to the first that kills; the successors that this leads to."""
        for index, name in enumerate(names):
            if index and self.dice.random() < self.slow:
                return self._die(names, index, Cause.TIME_LIMIT)
            if name in self.poisons:
                return self._die(names, index, Cause.SIGNAL)
            self.ran[name] += 1
        self.ended[Status.COMPLETED] += names
        return []

    def _die(self, names: tuple[str, ...], index: int, cause: Cause) -> list[tuple[str, ...]]:
        self.deaths += 1
        known = None if self.dice.random() < self.unknown else index
        promised = self.policy.on_crash == "resume"
        death = Death(cause, items=len(names), item=known, promised=promised, splits=self.splits)
        action = judge(self.policy, death).action
        evidence = Evidence(cause, item_index=known, promised=promised)
        if action is Action.CRASHED:
            self.ended[Status.CRASHED] += names
            return []
        divided = cut(child_of(names), self.policy, action, evidence, Json())
        assert divided is not None
        self.splits += action is Action.BISECT
        assert sorted(name for part in divided.parts for name in part.items) == sorted(names), "an item was lost"
        assert (divided.own is None) == any(part.evidence for part in divided.parts), "one death, one incident"
        for part in divided.parts:
            assert part.item_count == len(part.items) > 0
            if part.status is Status.PENDING:
                assert part.signature is not None and json.loads(part.signature)["args"][0] == list(part.items)
            else:
                self.ended[part.status] += part.items
        return [part.items for part in divided.parts if part.status is Status.PENDING]


def grown(on_crash: str, dice: random.Random, **more: Any) -> tuple[Tree, tuple[str, ...]]:
    count = dice.choice([1, 2, 3, 5, 8, 17, 64, 100, 238])
    names = tuple(f"doc-{number}" for number in range(count))
    poisons = frozenset(dice.sample(names, min(count, dice.choice([0, 1, 1, 2, 3, 7]))))
    policy = RowPolicy(on_crash, True, True, True, items=("args", 0), max_splits=more.pop("max_splits", 10_000))
    tree = Tree(policy, poisons, dice, **more)
    tree.live(names)
    ended = [name for each in tree.ended.values() for name in each]
    assert sorted(ended) == sorted(names), "every item ends, and once"
    return tree, names


@pytest.mark.parametrize("seed", range(4))
def test_bisection_finds_exactly_the_poisons_at_a_logarithm_of_deaths_each(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(ROUNDS // 4):
        tree, names = grown("bisect", dice)
        assert set(tree.ended[Status.CRASHED]) == tree.poisons
        assert tree.deaths <= most_deaths_of_bisection(len(tree.poisons), len(names))


@pytest.mark.parametrize("seed", range(4))
def test_skip_costs_one_death_a_poison(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(ROUNDS // 4):
        tree, _ = grown("skip", dice)
        assert set(tree.ended[Status.CRASHED]) == tree.poisons
        assert tree.deaths == len(tree.poisons)


@pytest.mark.parametrize("seed", range(4))
def test_resume_costs_one_death_a_poison_and_runs_no_item_twice(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(ROUNDS // 4):
        tree, names = grown("resume", dice)
        assert set(tree.ended[Status.CRASHED]) == tree.poisons
        assert tree.deaths == len(tree.poisons)
        assert tree.ran == Counter(name for name in names if name not in tree.poisons)


@pytest.mark.parametrize("on_crash", ["skip", "resume"])
def test_where_the_item_is_sometimes_unknown_it_costs_no_more_than_bisection(on_crash: str) -> None:
    dice = random.Random(on_crash)
    for _ in range(ROUNDS):
        tree, names = grown(on_crash, dice, unknown=dice.choice([0.1, 0.5, 1.0]))
        assert set(tree.ended[Status.CRASHED]) == tree.poisons
        assert tree.deaths <= most_deaths_of_bisection(len(tree.poisons), len(names))


@pytest.mark.parametrize("on_crash", ["bisect", "skip", "resume"])
def test_time_limits_convict_no_item_that_is_not_alone(on_crash: str) -> None:
    """A task that is slow at random: what is too long is divided until it is short enough."""
    dice = random.Random(on_crash)
    for _ in range(ROUNDS):
        tree, _ = grown(on_crash, dice, slow=dice.choice([0.01, 0.1]))
        assert set(tree.ended[Status.CRASHED]) == tree.poisons
        if on_crash == "resume":
            assert set(tree.ran.values()) <= {1}, "it goes on where it was"


def test_a_budget_of_bisection_bounds_deaths_and_loses_no_item() -> None:
    dice = random.Random(64)
    spent = 0
    for _ in range(ROUNDS):
        budget = dice.choice([1, 2, 5, 64])
        tree, _ = grown("bisect", dice, max_splits=budget)
        assert tree.splits <= budget
        assert tree.deaths <= 2 * budget + 1, "its splits, and the pieces that are left"
        assert set(tree.ended[Status.CRASHED]) >= tree.poisons
        spent += set(tree.ended[Status.CRASHED]) != tree.poisons
    assert spent > 10, "the budget was tight sometimes"


# -- over a real store -----------------------------------------------------------------------------

SEGFAULT = Evidence(Cause.SIGNAL, signal="SIGSEGV", detected_by=Detector.MAIN)


@dataclass
class Run:
    """A claimed child, as its process knows it."""

    claimed: Claimed
    names: tuple[str, ...]


@dataclass
class Life:
    """One batch, its worker, and everything that may go wrong between them."""

    tracker: Told
    scene: Scene
    policy: RowPolicy
    poisons: frozenset[str]
    dice: random.Random
    batch_id: uuid.UUID
    running: list[Run] = field(default_factory=list)
    ghosts: list[Run] = field(default_factory=list)  # runs that were given up, and may still report
    convictions: int = 0  # deaths of their own: by a poison
    done: Counter[str] = field(default_factory=Counter)

    def live(self) -> None:
        """Until nothing is left to do."""
        dispatch.pump(self.tracker, self.batch_id)
        outbox = self.tracker.outbox.sent
        while outbox or self.running:
            steps: list[Callable[[], None]] = []
            steps += [self._claim] * (bool(outbox) and len(self.running) < 3)
            steps += [self._go_on] * (3 * bool(self.running))
            steps += [self._report_late] * bool(self.ghosts)
            self.dice.choice(steps)()

    def _claim(self) -> None:
        outbox = self.tracker.outbox.sent
        message = outbox.pop(self.dice.randrange(len(outbox)))
        if message.row.kind != "child":
            return
        if self.dice.random() < 0.05:
            outbox.append(message)  # the broker delivers it twice
        row = self.scene.row(message.row.key)
        if self.dice.random() < 0.05 and row.status == Status.PENDING and row.attempt == message.ticket.attempt:
            told = replace(SEGFAULT, phase="before_claim", signal="SIGTERM")
            assert recovery.died_before_claim(self.tracker, row, told, self.policy)
            assert not recovery.died_before_claim(self.tracker, row, told, self.policy)
            return
        answer = self.scene.store.claim(
            row.key, message.ticket.attempt, new_token(), self.scene.worker_id, self.scene.slot(),
            self.policy.as_option(),
        )  # fmt: skip
        if isinstance(answer, Claimed):
            names = tuple(json.loads(message.row.signature or "")["args"][0])
            assert list(names) == self.scene.row(row.key).items
            self.running.append(Run(answer, names))

    def _go_on(self) -> None:
        run = self.running.pop(self.dice.randrange(len(self.running)))
        fate = self.dice.random()
        at = next((index for index, name in enumerate(run.names) if name in self.poisons), None)
        if fate < 0.04:
            self._lost(run, Verdict.OBSERVED)
        elif fate < 0.08:
            self._lost(run, Verdict.LEASE)
        elif at is None:
            self._complete(run)
        else:
            self._kill(run, at)

    def _complete(self, run: Run) -> None:
        ending = Ending(Status.COMPLETED, json.dumps(list(run.names)))
        settled = self.scene.store.settle(run.claimed.key, run.claimed.token, ending)
        if settled.written:
            self.done.update(run.names)
        finish.after(self.tracker, run.claimed.key, settled)

    def _kill(self, run: Run, at: int) -> None:
        row = self.scene.row(run.claimed.key)
        promised = self.policy.on_crash == "resume"
        evidence = replace(SEGFAULT, item_index=at, item=run.names[at], promised=promised)
        assert recovery.run_died(self.tracker, row, evidence, Verdict.OBSERVED)
        assert not recovery.run_died(self.tracker, row, evidence, Verdict.OBSERVED), "told twice, judged once"
        self.convictions += 1
        if promised and len(run.names) > 1:
            self.done.update(run.names[:at])
        self.ghosts.append(run)

    def _lost(self, run: Run, verdict: Verdict) -> None:
        by = Detector.LEASE if verdict is Verdict.LEASE else Detector.HOST
        evidence = Evidence(Cause.WORKER_LOST, detected_by=by, worker_id=self.scene.worker_id)
        assert recovery.run_died(self.tracker, self.scene.row(run.claimed.key), evidence, verdict)
        self.ghosts.append(run)

    def _report_late(self) -> None:
        """It may overturn a lease verdict; otherwise it changes nothing."""
        run = self.ghosts.pop()
        if not set(run.names) & self.poisons:
            self._complete(run)


def begun(tracker: Told, dice: random.Random, on_crash: str) -> tuple[Life, list[tuple[str, ...]]]:
    numbers = iter(range(1000))
    headers = [
        tuple(f"doc-{next(numbers)}" for _ in range(dice.choice([1, 2, 5, 12]))) for _ in range(dice.choice([1, 2, 4]))
    ]
    names = [name for header in headers for name in header]
    poisons = frozenset(dice.sample(names, min(len(names), dice.choice([0, 1, 2, 4]))))
    policy = RowPolicy(on_crash, True, True, True, max_crashes=100, items=("args", 0), merge="concat")
    scene = Scene(tracker.store)
    scene.worker(HERE, id=scene.worker_id)
    batch_id = scene.batch(
        [documents(*header) for header in headers], shards=dice.choice([1, 3, 16]), tolerance="100%",
        calls=("on_success", "on_finish", "on_first_failure"),
    )  # fmt: skip
    return Life(tracker, scene, policy, poisons, dice, batch_id), headers


@pytest.mark.parametrize("on_crash", ["bisect", "skip", "resume"])
@pytest.mark.parametrize("seed", range(4))
def test_every_life_ends_with_exactly_the_poisons_crashed(sqlite_url: str, on_crash: str, seed: int) -> None:
    dice = random.Random(f"{on_crash} {seed}")
    store = Store(sqlite_url)
    for _ in range(15):
        tracker = tracker_on(store)
        life, headers = begun(tracker, dice, on_crash)
        life.live()
        _check(life, headers)
    assert Scene(store).violations() == {}
    store.dispose()


def _check(life: Life, headers: list[tuple[str, ...]]) -> None:
    scene, names = life.scene, [name for header in headers for name in header]
    found, good = items_by_status(scene, life.batch_id), [name for name in names if name not in life.poisons]
    assert set(found) <= {"completed", "crashed"}
    assert found.get("crashed", []) == sorted(life.poisons)
    assert found.get("completed", []) == sorted(good)
    assert life.done == Counter(good), "each was done, and once as far as anybody was told"
    most = sum(
        most_deaths_of_bisection(len(life.poisons & set(header)), len(header)) for header in headers
    )  # fmt: skip
    assert life.convictions <= most if life.policy.on_crash == "bisect" else life.convictions == len(life.poisons)
    assert scene.status(life.batch_id) == ("partial" if life.poisons else "completed")
    assert scene.called(life.batch_id) == ["on_finish", *(["on_first_failure"] * bool(life.poisons)), "on_success"]
    assert all(scene.store.child(ChildKey(life.batch_id, row.position)) for row in scene.rows(life.batch_id))
    _check_results(life, headers)


def _check_results(life: Life, headers: list[tuple[str, ...]]) -> None:
    """Merged, each position's own, in the order of its items; what resume found done has no result."""
    merged = [value for value in results.of_batch(life.tracker, life.batch_id) if value]
    order = [name for header in headers for name in header if name not in life.poisons]
    told = [name for value in merged for name in value]
    if life.policy.on_crash == "resume":
        assert told == [name for name in order if name in set(told)]
    else:
        assert merged == [
            good for header in headers if (good := [name for name in header if name not in life.poisons])
        ]  # fmt: skip
