"""From a dead process to the item in its hand; and a child's items, found in its arguments and handed on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from celery_batchtrack.behaviour import dossier, fatal, handover, hosts
from celery_batchtrack.behaviour.blackbox import DECLARED, PROMISED, InHand, Page, Phase, slot_name
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.glue import codec
from celery_batchtrack.vocabulary.crash_policy import Action, RowPolicy
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import new_token, uuid7
from celery_batchtrack.vocabulary.records import ChildRow
from celery_batchtrack.vocabulary.states import Cause, Status
from tests.store.behaviour_kit import killed

DOCS = ["PMC:0", "PMC:1", "PMC:2", "PMC:3"]
TOKEN = new_token()
SEGFAULT = Evidence(Cause.SIGNAL, signal="SIGSEGV", message="signal 11 (SIGSEGV)")


def child(**changed: Any) -> ChildRow:
    """A running child with four documents."""
    documents = [{"id": name} for name in DOCS]
    values: dict[str, Any] = {
        "batch_id": uuid7(), "position": 3, "kind": "child", "ordinal": 0, "round": 1, "shard": 3,
        "task": "shop.annotate", "task_id": str(uuid.uuid4()), "status": "running", "cause": None,
        "verdict": None, "attempt": 1, "run_token": TOKEN, "crashes": 0,
        "retries": 0, "dispatches": 1, "link": 0, "waits_on_batch": None, "weight": 4, "result_id": None,
        "split_from": None, "origin": None, "isolated": False, "rerouted": False,
        "policy": None, "items": list(DOCS), "item_count": 4,
        "signature": json.dumps({"task": "shop.annotate", "args": [documents, "fast"], "kwargs": {"trace": True}}),
        "result": None, "worker_id": uuid.uuid4(), "slot": slot_name(), "queue": None, "dispatched_at": None,
        "not_before": None, "expires_at": None, "created_at": datetime.now(UTC), "started_at": datetime.now(UTC),
        "finished_at": None,
    }  # fmt: skip
    values.update(changed)
    return ChildRow(**values)


@pytest.fixture
def boxes(tmp_path: Path) -> Iterator[Boxes]:
    boxes = Boxes(tmp_path, uuid.uuid4())
    boxes.create()
    yield boxes
    boxes.close_own_pages()
    boxes.remove()


def page_of(boxes: Boxes, row: ChildRow, item: tuple[int, str] | None = None, flags: int = DECLARED) -> Page:
    """What a run left in its slot's page."""
    assert row.slot is not None and row.run_token is not None
    page = boxes.page(row.slot)
    page.enter(row.key, row.run_token, Phase.RUNNING)
    if item is not None:
        write = page.item_writer(flags)
        assert write is not None
        write(item[0], item[1].encode())
    return page


def stack_of(boxes: Boxes, row: ChildRow, signal_name: str = "Segmentation fault", thread: int = 0xABC) -> None:
    pid, start, *_ = (row.slot or "").split(":")
    path = boxes.stack_path(int(pid), int(start))
    assert path is not None
    header = f"Fatal Python error: {signal_name}\n\n" if signal_name else ""
    frame = '  File "/srv/shop.py", line 88 in annotate_one\n'
    path.write_text(f"{header}Current thread 0x{thread:x} (most recent call first):\n{frame}")


# -- which item ------------------------------------------------------------------------------------


def hand(index: int | None, name: str | None, *, declared: bool = True, promised: bool = False) -> InHand:
    return InHand(index, index or 0, name, declared, promised)


@pytest.mark.parametrize(
    ("item", "items", "found"),
    [
        (hand(2, "PMC:2"), DOCS, 2),
        (hand(0, "PMC:0"), DOCS, 0),
        (hand(None, None), DOCS, None),
        # No name of its own: by its place in the declared list, or not at all.
        (hand(2, None), DOCS, 2),
        (hand(2, "[2]"), ["[0]", "[1]", "[2]"], 2),
        (hand(0, "[0]"), ["[3]", "[4]"], 0),  # in a successor, items keep their names
        (hand(4, None), DOCS, None),
        (hand(4, "[4]"), DOCS, None),
        (hand(2, None, declared=False), DOCS, None),
        (hand(2, "[2]", declared=False), DOCS, None),
        (hand(2, "[2]", declared=False), ["[0]", "[1]", "[2]"], None),
        # Another order than the declared one: by name, if it says which.
        (hand(0, "PMC:3", declared=False), DOCS, 3),
        (hand(7, "PMC:3", declared=False), DOCS, 3),
        (hand(0, "PMC:3"), DOCS, 3),  # sorted in place
        (hand(9, "PMC:3"), DOCS, 3),
        (hand(0, "other"), DOCS, None),
        (hand(1, "a"), ["a", "a", "b"], 1),  # doubled, but in place
        (hand(2, "a"), ["a", "a", "b"], None),
        (hand(0, "a", declared=False), ["a", "a", "b"], None),
        (hand(0, "a", declared=False), ["a"], 0),
        (hand(0, "a"), [], None),
    ],
)
def test_the_item_in_hand_is_found_among_the_childs(item: InHand, items: list[str], found: int | None) -> None:
    assert dossier.index_of(item, items) == found


# -- a claimed run ---------------------------------------------------------------------------------


def test_a_run_tells_its_item_how_many_were_done_and_its_note(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row, (2, "PMC:2")).note("tokenise")
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index, found.items_done, found.note) == ("PMC:2", 2, 2, "tokenise")
    assert found.peak_memory is not None and found.peak_memory > 1_000_000
    assert (found.cause, found.signal, found.message) == (Cause.SIGNAL, "SIGSEGV", SEGFAULT.message)


def test_what_the_main_process_sampled_counts_if_it_is_more(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row)
    assert dossier.of_run(replace(SEGFAULT, peak_memory=2**50), boxes, row).peak_memory == 2**50


def test_a_run_before_its_first_item_has_none_in_hand(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row)
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index, found.items_done) == (None, None, 0)


def test_a_run_after_its_last_item_has_none_in_hand(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row, (3, "PMC:3")).no_item(4, DECLARED)
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index, found.items_done) == (None, None, 4)


def test_a_run_that_had_left_its_loop_blames_no_item(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row, (1, "PMC:1")).item_left()
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index, found.items_done) == (None, None, 1)


def test_a_run_that_is_ended_with_its_process_keeps_its_item(boxes: Boxes) -> None:
    row = child()
    page = page_of(boxes, row, (1, "PMC:1"))
    page.item_left()
    page.leave()
    page.close()
    assert dossier.of_run(SEGFAULT, boxes, row).item_index == 1


def test_a_promise_counts_only_in_the_declared_order(boxes: Boxes) -> None:
    """Resumed after another order, items that never ran would be taken for done."""
    row = child()
    cases = [
        ((2, "PMC:2"), DECLARED | PROMISED, True), ((2, "PMC:2"), DECLARED, False), ((2, "PMC:2"), PROMISED, False),
        ((0, "PMC:3"), DECLARED | PROMISED, False), ((2, "other"), DECLARED | PROMISED, False),
    ]  # fmt: skip
    for item, flags, promised in cases:
        page_of(boxes, row, item, flags)
        assert dossier.of_run(SEGFAULT, boxes, row).promised is promised, (item, flags)


def test_the_page_of_another_run_says_nothing_of_this_one(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, replace(row, run_token=new_token()), (2, "PMC:2")).note("another's")
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index, found.items_done, found.note) == (None, None, None, None)


@pytest.mark.parametrize("torn", ["page", "item", "nothing"])
def test_a_child_with_one_item_had_that_in_hand(boxes: Boxes, torn: str) -> None:
    """Whether or not its task uses `each_item`, and whatever became of its page."""
    row = child(items=["PMC:9"], item_count=1)
    if torn != "page":
        path = page_of(boxes, row).path
        assert path is not None
        if torn == "item":
            data = bytearray(path.read_bytes())
            data[128] |= 1
            path.write_bytes(data)
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index) == ("PMC:9", 0)


def test_a_task_that_declares_no_items_tells_what_it_went_through_all_the_same(boxes: Boxes) -> None:
    row = child(items=[], item_count=1)
    page_of(boxes, row, (17, "page-17"), flags=0)
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index, found.items_done) == ("page-17", 17, 17)


def test_an_item_that_is_none_of_the_childs_is_told_without_an_index(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row, (1, "part-1"), flags=0)
    found = dossier.of_run(SEGFAULT, boxes, row)
    assert (found.item, found.item_index) == ("part-1", None)


def test_without_a_folder_or_a_slot_nothing_more_is_known(boxes: Boxes) -> None:
    assert dossier.of_run(SEGFAULT, Boxes(None, uuid.uuid4()), child()) == SEGFAULT
    assert dossier.of_run(SEGFAULT, boxes, child(slot=None)) == SEGFAULT


def test_a_failure_is_told_with_its_item_by_the_process_itself(boxes: Boxes) -> None:
    row = child()
    page = page_of(boxes, row, (2, "PMC:2"))
    page.note("store")
    error = Evidence(Cause.EXCEPTION, message="ValueError")
    for left, in_loop in ((False, False), (False, True), (True, True)):
        if left:
            page.item_left()
        found = dossier.of_failure(error, page, in_loop=in_loop)
        assert (found.item, found.item_index, found.items_done, found.note) == ("PMC:2", 2, 2, "store")
    found = dossier.of_failure(error, page, in_loop=False)
    assert (found.item, found.item_index, found.items_done, found.note) == (None, None, 2, "store")
    assert dossier.of_failure(error, Page(None), in_loop=True) == error


# -- with its stack --------------------------------------------------------------------------------


def test_a_stack_belongs_to_a_death_by_its_signal(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row)
    stack_of(boxes, row)
    assert dossier.of_run(SEGFAULT, boxes, row).python_frame == "shop.py:88 in annotate_one"
    killed_by_hand = Evidence(Cause.SIGNAL, signal="SIGKILL")
    assert dossier.of_run(killed_by_hand, boxes, row).stack is None
    assert dossier.of_run(Evidence(Cause.TIME_LIMIT), boxes, row).stack is None
    assert dossier.of_run(Evidence(Cause.SETTLE_LOST), boxes, row).stack is None


def test_a_dump_on_demand_belongs_to_a_stall(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row)
    stack_of(boxes, row, signal_name="")
    assert dossier.of_run(Evidence(Cause.STALLED), boxes, row).python_frame == "shop.py:88 in annotate_one"
    assert dossier.of_run(Evidence(Cause.WORKER_LOST), boxes, row).stack is None
    assert dossier.of_run(SEGFAULT, boxes, row).stack is None


@pytest.mark.parametrize("cause", [Cause.WORKER_LOST, Cause.EXIT])
def test_a_death_that_nobody_saw_is_explained_by_the_stack_it_left(boxes: Boxes, cause: Cause) -> None:
    row = child()
    page_of(boxes, row, (1, "PMC:1"))
    stack_of(boxes, row)
    found = dossier.of_run(Evidence(cause, message="its worker is gone"), boxes, row)
    assert (found.cause, found.signal, found.item_index) == (Cause.SIGNAL, "SIGSEGV", 1)
    assert found.message == "its worker is gone; it had died of SIGSEGV"
    assert found.python_frame == "shop.py:88 in annotate_one"


def test_a_death_with_an_exit_code_needs_no_other_explanation(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row)
    stack_of(boxes, row)
    assert dossier.of_run(Evidence(Cause.EXIT, exit_code=3), boxes, row).cause is Cause.EXIT


def in_a_thread(act: Callable[[], None]) -> int:
    """Do it in a thread that is not over before the test is. Its identity."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (act(), done.set(), over.wait(30)), daemon=True)
    thread.start()
    assert done.wait(20)
    assert thread.ident is not None
    return thread.ident


over = threading.Event()


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    over.clear()
    yield
    over.set()


@pytest.fixture
def pool(boxes: Boxes) -> list[tuple[ChildRow, int]]:
    """Two runs in the threads of one process: (row, the thread's identity)."""
    made = []
    for _ in range(2):
        row: list[ChildRow] = []

        def claim(row: list[ChildRow] = row) -> None:
            row.append(child(slot=slot_name(), run_token=new_token(), items=["PMC:1"], item_count=1))
            page_of(boxes, row[0], (0, "PMC:1"))

        thread = in_a_thread(claim)
        made.append((row[0], thread))
    return made


LOST = Evidence(Cause.WORKER_LOST, message="its worker is gone")


def test_in_a_pool_of_threads_only_the_one_that_died_is_convicted(
    boxes: Boxes, pool: list[tuple[ChildRow, int]]
) -> None:
    (guilty, thread), (innocent, _) = pool
    stack_of(boxes, guilty, thread=thread)
    assert dossier.of_run(LOST, boxes, guilty).cause is Cause.SIGNAL
    assert dossier.of_run(LOST, boxes, innocent) == replace(
        LOST, item="PMC:1", item_index=0, items_done=0, peak_memory=dossier.of_run(LOST, boxes, innocent).peak_memory
    )


def test_a_thread_of_nobodys_convicts_none_of_several(boxes: Boxes, pool: list[tuple[ChildRow, int]]) -> None:
    """A thread that one of the tasks had started: nobody knows which."""
    stack_of(boxes, pool[0][0], thread=0xDEAD)
    assert [dossier.of_run(LOST, boxes, row).cause for row, _ in pool] == [Cause.WORKER_LOST] * 2


def test_a_thread_of_nobodys_convicts_the_only_run_of_its_process(
    boxes: Boxes, pool: list[tuple[ChildRow, int]]
) -> None:
    (alone, _), (idle, _) = pool
    boxes.page(idle.slot or "").clear()
    stack_of(boxes, alone, thread=0xDEAD)
    assert dossier.of_run(LOST, boxes, alone).cause is Cause.SIGNAL


def test_an_eager_child_inside_another_died_with_it(boxes: Boxes) -> None:
    outer, inner = child(slot=slot_name(0)), child(slot=slot_name(1), run_token=new_token())
    for row in (outer, inner):
        page_of(boxes, row)
    stack_of(boxes, outer, thread=0xDEAD)
    assert [dossier.of_run(LOST, boxes, row).cause for row in (outer, inner)] == [Cause.SIGNAL] * 2


def test_runs_of_other_processes_and_odd_files_do_not_keep_one_from_being_alone(boxes: Boxes) -> None:
    row = child()
    page_of(boxes, row)
    page_of(boxes, child(slot=f"{os.getpid() + 1}:5:7:0", run_token=new_token()))
    assert boxes.folder is not None
    (boxes.folder / "x.box").write_text("")
    stack_of(boxes, row, thread=0xDEAD)
    assert dossier.of_run(LOST, boxes, row).cause is Cause.SIGNAL


def test_a_torn_page_beside_it_may_be_anybodys(boxes: Boxes, pool: list[tuple[ChildRow, int]]) -> None:
    (row, _), (other, _) = pool
    path = boxes.path(other.slot or "")
    assert path is not None
    data = bytearray(path.read_bytes())
    data[8] |= 1
    path.write_bytes(data)
    stack_of(boxes, row, thread=0xDEAD)
    assert dossier.of_run(LOST, boxes, row).cause is Cause.WORKER_LOST


# -- before the claim ------------------------------------------------------------------------------


def test_a_process_that_died_before_its_claim_is_told_by_its_stack(boxes: Boxes) -> None:
    row = child()
    stack_of(boxes, row)
    pid, start = os.getpid(), hosts.started(os.getpid())
    evidence = replace(SEGFAULT, phase="before_claim")
    assert dossier.of_process(evidence, boxes, pid, start).python_frame == "shop.py:88 in annotate_one"
    assert dossier.of_process(evidence, boxes, pid, None).python_frame == "shop.py:88 in annotate_one", (
        "it was gone before its start could be asked for"
    )
    assert dossier.of_process(evidence, boxes, pid + 1, None) == evidence
    other = replace(evidence, signal="SIGKILL")
    assert dossier.of_process(other, boxes, pid, start) == other


def test_a_real_death_is_told_from_what_it_really_left(boxes: Boxes) -> None:
    row = child(slot=None)
    slots: list[str] = []
    reader, told = os.pipe()

    def run() -> None:
        slot = slot_name()
        os.write(told, slot.encode())
        path = boxes.stack_path(os.getpid(), hosts.started(os.getpid()))
        assert path is not None and fatal.install(path, True)
        page_of(boxes, replace(row, slot=slot), (3, "PMC:3"), DECLARED | PROMISED).note("last")
        os.kill(os.getpid(), signal.SIGSEGV)

    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
    slots.append(os.read(reader, 100).decode())
    os.close(reader)
    os.close(told)
    found = dossier.of_run(SEGFAULT, boxes, replace(row, slot=slots[0]))
    assert (found.item, found.item_index, found.note, found.promised) == ("PMC:3", 3, "last", True)
    assert found.python_frame is not None and found.python_frame.startswith("test_dossier.py")
    assert found.stack is not None and "in run" in found.stack


def test_a_process_that_was_killed_leaves_its_item(boxes: Boxes) -> None:
    row = child()
    killed(lambda: page_of(boxes, row, (1, "PMC:1")))
    assert dossier.of_run(Evidence(Cause.SIGNAL, signal="SIGKILL"), boxes, row).item == "PMC:1"


# -- a child's items in its arguments --------------------------------------------------------------


def of(args: list[Any] | None = None, kwargs: dict[str, Any] | None = None, **more: Any) -> ChildRow:
    called = {"task": "t", "args": args if args is not None else [], "kwargs": kwargs or {}, "options": {"queue": "q"}}
    return child(signature=codec.dumps(called), **more)


WHERE: list[tuple[ChildRow, tuple[str | int, ...]]] = [
    (of([DOCS, "x"]), ("args", 0)),
    (of(["x", DOCS]), ("args", 1)),
    (of([], {"docs": DOCS, "how": "fast"}), ("kwargs", "docs")),
    (of([{"docs": DOCS, "how": "fast"}]), ("args", 0, "docs")),
    (of([], {"work": {"docs": DOCS}}), ("kwargs", "work", "docs")),
]


@pytest.mark.parametrize(("row", "path"), WHERE)
def test_items_are_found_and_chosen_wherever_they_stand(row: ChildRow, path: tuple[str | int, ...]) -> None:
    items = handover.items_of(row, path, codec)
    assert items is not None and items.values == DOCS
    names, signature = items.chosen([0, 2], codec)
    assert names == ("PMC:0", "PMC:2")
    expected, holder = json.loads(row.signature or ""), None
    holder = expected
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = ["PMC:0", "PMC:2"]
    assert json.loads(signature) == expected, "all else is as it was"
    assert items.chosen([0, 1, 2, 3], codec)[1] == json.dumps(json.loads(row.signature or "")), "and the row's own too"


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (of([DOCS]), None),
        (child(signature=None), ("args", 0)),
        (child(signature="{"), ("args", 0)),
        (child(signature="[]"), ("args", 0)),
        (child(signature="[" * 100_000 + "]" * 100_000), ("args", 0)),
        (of([]), ("args", 0)),
        (of([], {}), ("kwargs", "docs")),
        (of([["PMC:0"]]), ("args", 0)),
        (of([[*DOCS, "PMC:4"]]), ("args", 0)),
        (of(["PMC:"]), ("args", 0)),
        (of([{"docs": 5}]), ("args", 0, "docs")),
        (of([dict.fromkeys(DOCS, 1)]), ("args", 0)),
        (of([DOCS], item_count=5), ("args", 0)),
        (of([DOCS], items=[]), ("args", 0)),
        (of([None]), ("args", 0, "docs")),
    ],
)
def test_what_is_not_as_many_items_as_the_row_has_is_left_whole(
    row: ChildRow, path: tuple[str | int, ...] | None
) -> None:
    assert handover.items_of(row, path, codec) is None
    policy = RowPolicy("skip", True, True, True, items=path)
    for action in (Action.BISECT, Action.SKIP, Action.RESUME, Action.GO_ON):
        assert handover.cut(row, policy, action, replace(SEGFAULT, item_index=1), codec) is None


def test_documents_that_are_nested_deeper_than_python_recurses_are_handed_on_or_left_whole() -> None:
    """A parse tree: readable as JSON, but not by a walk in Python."""
    for depth in (300, 450, 600, 900, 940, 960, 980):
        tree: Any = "leaf"
        for _ in range(depth):
            tree = [tree]
        try:
            text = json.dumps({"args": [[tree, tree]]})
        except RecursionError:
            continue
        row = child(items=["[0]", "[1]"], item_count=2, signature=text)
        policy = RowPolicy("bisect", True, True, True, items=("args", 0), quarantine_after=1)
        cut = handover.cut(row, policy, Action.BISECT, SEGFAULT, codec)
        handover.killer_of(row, policy, replace(SEGFAULT, item_index=0), None, codec)
        if depth <= 600:
            assert cut is not None and json.loads(cut.parts[0].signature or "") == {"args": [[tree]]}
    assert sys.getrecursionlimit() == 1000


# -- parts -----------------------------------------------------------------------------------------

AT = RowPolicy("skip", True, True, True, items=("args", 0))


def parts(action: Action, index: int | None, count: int = 4, **how: Any) -> list[tuple[tuple[str, ...], str, bool]]:
    """(identifiers, status, whether it has evidence) of each part."""
    names = [f"d{at}" for at in range(count)]
    row = of([[{"id": name} for name in names]], items=names, item_count=count)
    cut = handover.cut(row, AT, action, replace(SEGFAULT, item_index=index), codec, **how)
    assert cut is not None
    assert sorted(name for part in cut.parts for name in part.items) == names, "items are conserved"
    assert all(part.item_count == len(part.items) for part in cut.parts)
    for part in cut.parts:
        if part.status is not Status.COMPLETED:
            assert part.signature is not None
            assert json.loads(part.signature)["args"] == [[{"id": name} for name in part.items]]
    assert len({part.task_id for part in cut.parts}) == len(cut.parts)
    carried = [part.evidence for part in cut.parts if part.evidence is not None] + ([cut.own] if cut.own else [])
    assert len(carried) == 1, "a death is told once"
    return [(part.items, part.status.value, part.evidence is not None) for part in cut.parts]


def test_bisect_makes_two_halves_the_first_not_smaller() -> None:
    assert parts(Action.BISECT, None) == [(("d0", "d1"), "pending", False), (("d2", "d3"), "pending", False)]
    assert parts(Action.BISECT, 1, 5)[0][0] == ("d0", "d1", "d2")
    assert parts(Action.BISECT, None, 2) == [(("d0",), "pending", False), (("d1",), "pending", False)]


@pytest.mark.parametrize("index", [0, 1, 3])
def test_skip_takes_one_item_out_and_runs_all_others_again(index: int) -> None:
    others = tuple(f"d{at}" for at in range(4) if at != index)
    assert parts(Action.SKIP, index) == [((f"d{index}",), "crashed", True), (others, "pending", False)]


def test_resume_takes_what_came_before_for_done() -> None:
    assert parts(Action.RESUME, 2) == [
        (("d0", "d1"), "completed", False), (("d2",), "crashed", True), (("d3",), "pending", False)
    ]  # fmt: skip
    assert parts(Action.RESUME, 0) == [(("d0",), "crashed", True), (("d1", "d2", "d3"), "pending", False)]
    assert parts(Action.RESUME, 3) == [(("d0", "d1", "d2"), "completed", False), (("d3",), "crashed", True)]


def test_going_on_convicts_none() -> None:
    assert parts(Action.GO_ON, 2) == [(("d0", "d1"), "completed", False), (("d2", "d3"), "pending", False)]
    assert parts(Action.GO_ON, 0) == [(("d0", "d1", "d2", "d3"), "pending", False)]


def test_only_what_runs_again_is_isolated() -> None:
    row = of([DOCS])
    cut = handover.cut(row, AT, Action.SKIP, replace(SEGFAULT, item_index=0), codec, isolated=True, queue="q.isolated")
    assert cut is not None
    assert [part.isolated for part in cut.parts] == [False, True] and cut.parts[1].queue == "q.isolated"


def test_the_part_that_is_crashed_carries_the_evidence_with_its_item() -> None:
    cut = handover.cut(of([DOCS]), AT, Action.SKIP, replace(SEGFAULT, item_index=2), codec)
    assert cut is not None and cut.own is None
    told = cut.parts[0].evidence
    assert told is not None and (told.item, told.item_index, told.signal) == ("PMC:2", 2, "SIGSEGV")


@pytest.mark.parametrize("index", [None, -1, 4])
@pytest.mark.parametrize("action", [Action.SKIP, Action.RESUME, Action.GO_ON])
def test_without_a_known_item_nothing_is_taken_out(action: Action, index: int | None) -> None:
    assert handover.cut(of([DOCS]), AT, action, replace(SEGFAULT, item_index=index), codec) is None


# -- who is counted for quarantine -----------------------------------------------------------------


def test_the_item_in_hand_is_the_killer() -> None:
    policy = replace(AT, quarantine_after=2)
    killer = handover.killer_of(of([DOCS]), policy, replace(SEGFAULT, item_index=2), "1.4", codec)
    assert killer is not None
    assert (killer.item, killer.version, killer.quarantine_after) == ("PMC:2", "1.4", 2)
    assert killer.item_hash == handover.item_hash("PMC:2", "whatever it holds")


def test_the_only_item_of_a_child_is_the_killer_whatever_is_known() -> None:
    row = of([["PMC:7"]], items=["PMC:7"], item_count=1)
    killer = handover.killer_of(row, replace(AT, quarantine_after=1), SEGFAULT, None, codec)
    assert killer is not None and (killer.item, killer.version) == ("PMC:7", "")


@pytest.mark.parametrize(
    ("row", "policy", "index"),
    [
        (of([DOCS]), AT, 2),
        (of([DOCS]), replace(AT, quarantine_after=1), None),
        (of([DOCS]), replace(AT, quarantine_after=1), 4),
        (of([DOCS]), replace(AT, quarantine_after=1, items=None), 2),
        (of([["PMC:0"]]), replace(AT, quarantine_after=1), 0),
    ],
)
def test_nobody_is_blamed_where_it_is_not_known_or_not_asked_for(
    row: ChildRow, policy: RowPolicy, index: int | None
) -> None:
    assert handover.killer_of(row, policy, replace(SEGFAULT, item_index=index), None, codec) is None


def test_an_item_is_known_again_by_its_identifier_or_else_by_what_it_is() -> None:
    same = handover.item_hash("[3]", {"a": 1, "b": [2]})
    assert handover.item_hash("[0]", {"b": [2], "a": 1}) == same, "wherever it stands, in whatever order"
    assert handover.item_hash("[0]", {"a": 1, "b": [3]}) != same
    assert handover.item_hash("PMC:1", {"a": 1}) == handover.item_hash("PMC:1", {"a": 2})
    assert handover.item_hash("PMC:1", 1) != handover.item_hash("PMC:2", 1)
    assert handover.item_hash("[3]", datetime(2026, 1, 1)) != handover.item_hash("[3]", datetime(2026, 1, 2))
    assert handover.item_hash('="x"', 0) != handover.item_hash("[0]", "y")
    assert len(same) == 32 and int(same, 16)
