"""Publishing rows: the first time, and again when a message seems lost.

A message is only a hint to try to claim a row, so a doubled one is harmless; a flood is not.
"""

from __future__ import annotations

import random
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

from celery_batchtrack import errors
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, Ticket
from celery_batchtrack.vocabulary.pacing import narrowest, refill_one_in
from celery_batchtrack.vocabulary.records import BatchRow, ChildRow, Outgoing
from celery_batchtrack.vocabulary.states import Cause, Kind, Status

from . import ending, failpoints, quarantine, report, results
from .tracker import Message, NotSent, Tracker, declared_callback

#: No redispatch wait grows beyond this, in seconds.
LONGEST_WAIT = 3600.0
#: A batch whose queue is full is not looked at again for so many seconds.
QUEUE_PAUSE = 0.25


def begin(tracker: Tracker, batch: BatchRow) -> None:
    """Publish a batch that was sealed just now: here if it is small or goes through a window, else by workers."""
    if not (_may_be_large(tracker, batch) and _hand_out(tracker, batch)):
        pump(tracker, batch.id)


def _may_be_large(tracker: Tracker, batch: BatchRow) -> bool:
    return batch.next_position > tracker.settings.fan_out and _window(tracker, batch) is None and batch.rate is None


def _hand_out(tracker: Tracker, batch: BatchRow) -> bool:
    """To workers of the queue where its first child is to go: they are there, whoever else is."""
    settings = tracker.settings
    left, first = tracker.store.count_undispatched(batch.id), tracker.store.first_undispatched(batch.id)
    if first is None or left <= settings.fan_out:  # another round, say, of a few of its children
        return False
    rows = max(settings.dispatch_chunk, settings.fan_out // 2)
    return tracker.publisher.hand_out(batch.id, -(-left // rows), rows, *first)


def pump(tracker: Tracker, batch_id: uuid.UUID | None = None, limit: int | None = None) -> int:
    """Publish what was never published for its attempt, of one batch or of all, as far as windows, rates and full
    queues let it. Returns how many.

    Each chunk is stamped, committed, and only then sent: dying in between leaves stamped rows without
    a message, which `redispatch` finds. A broker that is down ends the loop; the rows stay due.

    Arguments:
        limit: of each batch, about so many at most.
    """
    batches = tracker.store.undispatched() if batch_id is None else [batch_id]
    sent = 0
    for each in batches:
        count, down = _pump(tracker, each, limit=limit)
        sent += count
        if down:
            break
    return sent


def refill(tracker: Tracker, batch_id: uuid.UUID, one_in: int) -> None:
    """A child of a batch with a window is over. One in so many fills the window up."""
    if one_in and random.randrange(one_in) == 0:
        _pump(tracker, batch_id, limit=max(tracker.settings.dispatch_chunk, 2 * one_in), callbacks=False)


def fill_shared(tracker: Tracker, batch_id: uuid.UUID) -> None:
    """Children of a batch left the window that it shares with others, all at once: these get the places."""
    if tracker.settings.max_in_flight is not None:
        refill(tracker, batch_id, 1)


def go_on(tracker: Tracker) -> bool:
    """Publish what was held back until now, by its rate or by a full queue; of each batch not more than a sweep does.
    Whether more is to be sent soon."""
    limit = tracker.settings.fan_out
    full = [pump(tracker, batch_id, limit) >= limit for batch_id in tracker.store.held_back()]
    return any(full) or tracker.store.any_held_back()


def _pump(
    tracker: Tracker, batch_id: uuid.UUID, *, limit: int | None = None, callbacks: bool = True
) -> tuple[int, bool]:
    """One batch, and those that its children become on the way. Not by recursion: through a shared window each of these
    may bring up the next one."""
    sent, down, due = _pump_one(tracker, batch_id, limit=limit, callbacks=callbacks)
    while due and not down:
        more, down, others = _pump_one(tracker, due.popleft())
        sent += more
        due += others
    return sent, down


def _pump_one(
    tracker: Tracker, batch_id: uuid.UUID, *, limit: int | None = None, callbacks: bool = True
) -> tuple[int, bool, deque[uuid.UUID]]:
    """How many were sent, whether the broker is down, and batches that have something to publish now."""
    due: deque[uuid.UUID] = deque()
    settings, paced = tracker.settings, tracker.publisher.paced
    chunk = min(settings.dispatch_chunk, settings.max_queue_depth or settings.dispatch_chunk)
    sent, unsent = 0, []
    try:
        while True:
            taken = tracker.store.take_undispatched(
                batch_id, chunk, shared=settings.max_in_flight, paced=paced, callbacks=callbacks
            )
            if paced and settings.max_queue_depth is not None:
                taken = _that_queues_have_room_for(tracker, taken, settings.max_queue_depth)
            failpoints.reach("dispatch.stamped")
            failures, count, withheld = _send(tracker, taken, due)
            sent += count
            unsent += [each.given_back for each in failures if not each.final]
            down = any(each.down for each in failures)
            # What can never be sent was settled or split, and callbacks or parts may be due for that: look once more.
            more = withheld or any(each.final for each in failures)
            callbacks = callbacks or more
            if down or (len(taken) < chunk and not more) or (limit is not None and sent >= limit):
                return sent, down, due
    finally:
        if unsent:  # only now, or the next chunk would be the same rows again
            tracker.store.give_back(unsent)


def _that_queues_have_room_for(tracker: Tracker, taken: list[Outgoing], depth: int) -> list[Outgoing]:
    """The rest is given back, and its batches are held for a moment."""
    where: dict[tuple[str | None, str], list[Outgoing]] = defaultdict(list)
    kept, surplus = [], []
    for out in taken:
        row = out.child
        if row.kind != Kind.CHILD or row.task in CANVAS:
            kept.append(out)
        else:
            where[row.queue, "" if row.queue else row.task].append(out)
    for place, rows in where.items():
        length = tracker.publisher.queue_length(*place)
        room = len(rows) if length is None else max(0, depth - length)
        kept += rows[:room]
        surplus += rows[room:]
    if surplus:
        tracker.store.hold_back([each.child for each in surplus], QUEUE_PAUSE)
    return kept


#: A worker was just lost: messages that it had prefetched are gone, or held back by the broker for long.
AFTER_A_LOSS = 2.0


def redispatch(tracker: Tracker, *, worker_lost: bool = False) -> int:
    """Publish again what has been pending for long after its last publish. Returns how many.

    Long is `redispatch_after` where the queue is empty (so the message is gone, or prefetched), else
    `redispatch_wait`; both double with every publish. When a worker was just lost, an empty queue alone
    says enough.
    """
    after = min(AFTER_A_LOSS, tracker.settings.redispatch_after) if worker_lost else tracker.settings.redispatch_after
    keys: list[ChildKey] = []
    lost: set[ChildKey] = set()
    for where in tracker.store.overdue_queues(after):
        canvas = where[1] in CANVAS  # never a message: who took it died before it was a batch
        empty = canvas or tracker.publisher.queue_length(*where) == 0
        due_after = after if empty else tracker.settings.redispatch_wait
        for waited, dispatches, key in tracker.store.overdue(where, due_after):
            if (worker_lost and empty) or waited >= _patience(tracker, dispatches, empty=empty):
                keys.append(key)
                if empty and not canvas:
                    lost.add(key)
    taken = tracker.store.take_again(keys, after, lost)
    due: deque[uuid.UUID] = deque()
    failures, count, withheld = _send(tracker, taken, due)
    tracker.store.give_back([each.given_back for each in failures if not each.final])
    for batch_id, again in Counter(each.child.batch_id for each in taken).items():
        tracker.emit(events.Redispatched(batch_id, again))
    for batch_id in due:
        pump(tracker, batch_id)
    if withheld or any(each.final for each in failures):
        pump(tracker)
    return count


def _patience(tracker: Tracker, dispatches: int, *, empty: bool) -> float:
    settings = tracker.settings
    base = settings.redispatch_after if empty else settings.redispatch_wait
    return min(LONGEST_WAIT, base * 2.0 ** min(20, max(0, dispatches - 1)))


#: Tasks that no worker runs: a child at such a step becomes a batch of its own.
CANVAS = ("celery.chord", "celery.group")


def _send(
    tracker: Tracker, taken: Sequence[Outgoing], due: deque[uuid.UUID]
) -> tuple[list[NotSent], int, bool]:
    """Publish taken rows. Returns what failed (what can never be sent is settled), how many were sent, and whether
    items in quarantine were withheld; adds to `due` the batches that have something to publish now."""
    if not taken:
        return [], 0, False
    single = [each for each in taken if each.child.task not in CANVAS]
    nested = [each for each in taken if each.child.task in CANVAS]
    try:
        free, withheld = quarantine.sendable(tracker, single)
        messages, failures = _messages(tracker, free)
        failures += tracker.publisher.publish(messages)
        failures += _start_nested(tracker, nested, due)
    except BaseException:
        tracker.store.give_back([each.child for each in taken])
        raise
    _report_failures(tracker, failures)
    for failure in failures:
        if failure.final:
            _settle_unsent(tracker, failure)
    return failures, len(free) + len(nested) - len(failures), withheld


def _start_nested(tracker: Tracker, taken: Sequence[Outgoing], due: deque[uuid.UUID]) -> list[NotSent]:
    """Children whose present step is a group or chord: that becomes a batch of its own, for which they wait."""
    failures = []
    for out in taken:
        try:
            new, children = tracker.canvas.expand(out.child, out.batch, _prefix(tracker, out))
            made = tracker.store.nest(out.child, new, children)
        except (errors.BatchTrackError, *ending.UNREADABLE) as error:
            if isinstance(error, errors.DatabaseUnavailable):
                raise
            failures.append(NotSent(_unmade(tracker, out), f"{type(error).__name__}: {error}", final=True))
            continue
        if made:
            failpoints.reach("nest.committed")
            tracker.emit(events.BatchStarted(new.id, new.name, 1, out.child.batch_id))
            ended = ending.conclude(tracker, new.id)  # it may have no children
            due.extend((new.id,) if ended is None else ended.due)
    return failures


def _messages(tracker: Tracker, taken: Sequence[Outgoing]) -> tuple[list[Message], list[NotSent]]:
    """One row that cannot be made into a message must not hold up the others."""
    messages, failures = [], []
    for out in taken:
        try:
            messages.append(message_of(tracker, out))
        except ending.UNREADABLE as error:
            failures.append(NotSent(_unmade(tracker, out), f"{type(error).__name__}: {error}", final=True))
    return messages, failures


def _unmade(tracker: Tracker, out: Outgoing) -> Message:
    return Message(out.child, out.batch, Ticket(tracker.store_id, out.child.key, out.child.attempt, out.child.kind))


def _report_failures(tracker: Tracker, failures: Sequence[NotSent]) -> None:
    """Once per reason: a broker that is down concerns every child of a chunk."""
    counts = Counter(each.error for each in failures)
    for failure in failures:
        if failure.error in counts:
            tracker.emit(events.PublishFailed(failure.message.row.key, failure.error, counts.pop(failure.error)))


def _settle_unsent(tracker: Tracker, failure: NotSent) -> None:
    row = failure.message.row
    evidence = Evidence(Cause.NOT_SENT, phase="before_claim", message=failure.error)
    settled = tracker.store.settle_unstarted(row.key, row.attempt, Status.FAILED, evidence)
    if settled.written:
        tracker.emit(events.ChildSettled(row.key, row.task, Status.FAILED, row.attempt))
    due: list[uuid.UUID] = []
    if settled.look:
        ended = ending.conclude(tracker, row.batch_id)
        due += ended.due if ended is not None else ()
    if settled.body:
        due += ending.body_settled(tracker, row.key)
    for batch_id in due:
        if batch_id != row.batch_id:  # of that one the caller takes more anyway
            pump(tracker, batch_id)


def message_of(tracker: Tracker, out: Outgoing) -> Message:
    row, batch = out.child, out.batch
    ticket = Ticket(
        tracker.store_id, row.key, row.attempt, row.kind, more=_has_more(tracker, row),
        keep_result=batch.options.get("results") != "none" or row.kind != Kind.CHILD,
    )
    if row.kind == Kind.CHILD:
        ticket = replace(
            ticket, on_crash=batch.options.get("on_crash"), isolated=row.isolated, milestones=batch.watch_progress,
            refill=_refill_one_in(tracker, batch),
        )  # fmt: skip
        return Message(row, batch, ticket)
    if row.link:
        return Message(row, batch, ticket)  # what it was called with is bound already
    declared = declared_callback(batch, row)
    body_id = declared.get("errback")
    if body_id is not None and not declared.get("immutable"):
        ticket = replace(ticket, errback=(body_id, _dependency(tracker, row)))
    # As with Celery's chord, a body comes from one of the header's tasks: there, the one that happened to be last.
    parent_id = tracker.store.header_task_id(row.batch_id) if row.kind == Kind.ON_SUCCESS else None
    return Message(row, batch, ticket, _prefix(tracker, out), parent_id)


def _window(tracker: Tracker, batch: BatchRow) -> int | None:
    """The narrowest of the windows through which the batch's children go."""
    settings = tracker.settings
    return narrowest(batch.max_in_flight, settings.max_in_flight, settings.max_queue_depth)


def _refill_one_in(tracker: Tracker, batch: BatchRow) -> int:
    rate = batch.rate
    return refill_one_in(narrowest(_window(tracker, batch), None if rate is None else rate.burst))


def _has_more(tracker: Tracker, row: ChildRow) -> bool:
    """Whether other tasks follow this one within its child."""
    if row.result_id is None or row.signature is None:
        return False
    return bool(tracker.codec.loads(row.signature).get("chain"))


def _prefix(tracker: Tracker, out: Outgoing) -> tuple[object, ...]:
    """Arguments that a callback's first task gets before its own."""
    if out.child.kind == Kind.CHILD or out.child.link:
        return ()
    declared = declared_callback(out.batch, out.child)
    if declared.get("immutable"):
        return ()
    body_id = declared.get("errback")
    return _callback_arguments(tracker, out) if body_id is None else (body_id,)


def _dependency(tracker: Tracker, row: ChildRow) -> str:
    """The text of Celery's ChordError for the child that kept the body from running."""
    first = tracker.store.first_failure(row.batch_id)
    if first is None:
        return f"Dependency {row.batch_id} raised an unknown error"
    return f"Dependency {first.task_id} raised {first.message or 'an unknown error'}"


def _callback_arguments(tracker: Tracker, out: Outgoing) -> tuple[object, ...]:
    wanted = out.batch.options.get("callback_arg", "results")
    if out.child.kind != Kind.ON_SUCCESS:
        wanted = "report"
    if wanted == "nothing":
        return ()
    if wanted == "report":
        return (report.build(tracker, out.child.batch_id).as_dict(),)
    return (list(results.of_batch(tracker, out.child.batch_id)),)
