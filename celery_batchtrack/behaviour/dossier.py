"""From a dead process to the item in its hand: what its black box and its last stack say of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import is_name_of_index
from celery_batchtrack.vocabulary.records import ChildRow
from celery_batchtrack.vocabulary.states import Cause

from . import blackbox, fatal
from .blackbox import InHand, Page, PageState, slot_process
from .folders import Boxes


def of_run(evidence: Evidence, boxes: Boxes, row: ChildRow) -> Evidence:
    """The evidence of a claimed run that died, with everything that its slot left behind."""
    path = boxes.path(row.slot) if row.slot else None
    page = None if path is None else blackbox.read(path)
    if page is not None and page.token != row.run_token:
        page = None  # it says nothing of this run
    if page is not None:
        evidence = replace(evidence, **_in_hand(page, row))
        evidence = replace(evidence, peak_memory=max(evidence.peak_memory or 0, page.peak_memory) or None)
    return _with_stack(of_only_item(evidence, row), boxes, row, page)


def of_only_item(evidence: Evidence, row: ChildRow) -> Evidence:
    """Where nothing says which item it was, and the child has but one: that one."""
    if evidence.item is None and row.item_count == 1 and row.items:
        return replace(evidence, item=row.items[0], item_index=0)
    return evidence


def of_failure(evidence: Evidence, page: Page, *, in_loop: bool) -> Evidence:
    """The evidence of a run that failed in this very process, with what its page says. `in_loop`: where its loop over
    the items was left, it was by the error."""
    state = page.state()
    if state is None or state.item is None:
        return evidence
    item = state.item
    evidence = replace(evidence, items_done=item.done, note=state.note)
    if item.left and not in_loop:
        return evidence
    return replace(evidence, item=item.identifier, item_index=item.index if item.declared else None)


def of_process(evidence: Evidence, boxes: Boxes, pid: int, started: int | None) -> Evidence:
    """The evidence of a process that died before it could claim: its stack is all there is."""
    if started is None:  # it was gone before anybody asked
        started = next((start for known, start, _ in boxes.stacks() if known == pid), None)
    stack = fatal.read(boxes.stack_path(pid, started))
    return _stacked(evidence, stack) if stack is not None and stack.signal == evidence.signal else evidence


def _in_hand(page: PageState, row: ChildRow) -> dict[str, Any]:
    found: dict[str, Any] = {"note": page.note}
    if page.item is not None and page.item.left:  # it died of something else, later
        found["items_done"] = page.item.done
    elif page.item is not None:
        index = index_of(page.item, row.items)
        shown = row.items[index] if index is not None and row.items else page.item.identifier
        # Of a loop in another order nobody knows which items came before.
        promised = page.item.promised and page.item.declared and index == page.item.index
        found.update(item=shown, item_index=index, items_done=page.item.done, promised=promised)
        if index is None and page.item.index is not None and not row.items:
            found["item_index"] = page.item.index  # of a task that declares no items: an index all the same
    return found


def index_of(item: InHand, items: list[str]) -> int | None:
    """Which of the child's items is meant: by its index where the loop went over the items as declared, else by its
    identifier, if that is unique. None where it cannot be told."""
    if item.index is None:
        return None
    named = item.identifier
    if named is None or is_name_of_index(named):
        return item.index if item.declared and item.index < len(items) else None
    if item.declared and items[item.index : item.index + 1] == [named]:
        return item.index
    return items.index(named) if items.count(named) == 1 else None  # the list may have been sorted in place


def _with_stack(evidence: Evidence, boxes: Boxes, row: ChildRow, page: PageState | None) -> Evidence:
    if row.slot is None:
        return evidence
    pid, started = slot_process(row.slot)
    stack = fatal.read(boxes.stack_path(pid, started))
    if stack is None:
        return evidence
    if evidence.cause in (Cause.SIGNAL, Cause.OOM) and evidence.signal in (stack.signal, None):
        return _stacked(evidence, stack)
    if evidence.cause is Cause.STALLED and stack.signal is None:
        return _stacked(evidence, stack)
    if evidence.cause in (Cause.WORKER_LOST, Cause.EXIT) and stack.signal is not None and evidence.exit_code is None:
        return _explained(evidence, stack, page, alone=_is_alone(boxes, row.slot))
    return evidence


def _explained(evidence: Evidence, stack: fatal.FatalStack, page: PageState | None, *, alone: bool) -> Evidence:
    """Nobody saw how it died, but it said so itself: it was this run, if the thread that died is its own, or if the
    process had no other."""
    if not alone and (page is None or page.thread != stack.thread):
        return evidence
    message = f"{evidence.message}; it had died of {stack.signal}" if evidence.message else None
    return _stacked(replace(evidence, cause=Cause.SIGNAL, signal=stack.signal, message=message), stack)


def _is_alone(boxes: Boxes, slot: str) -> bool:
    """Whether no other thread of its process had a page in use."""
    process, _, rest = slot.partition(":")
    start, thread, _ = rest.split(":")
    for other, path in boxes.pages():
        pid, began, native, _ = other.split(":")
        if (pid, began) == (process, start) and native != thread:
            page = blackbox.read(path)
            if page is None or page.key is not None:
                return False
    return True


def _stacked(evidence: Evidence, stack: fatal.FatalStack | None) -> Evidence:
    if stack is None:
        return evidence
    return replace(evidence, stack=stack.text, python_frame=stack.frame)
